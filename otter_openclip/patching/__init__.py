"""Patch open_clip or clip_benchmark so that their own commands know ``--loss otter`` and our data sets.

Without a flag the command says what it would change. The patches are in the folder ``patches``, one for
each release that there is one for.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path

from otter_openclip.patching.diffs import DoesNotFit, FileDiff, find_tool, parse_patch, transform
from otter_openclip.patching.files import Change, replace_files
from otter_openclip.patching.targets import PROJECTS, Target, find_target

# In a wheel beside this package, in a checkout (installed with -e or not) at the top.
PATCHES = (Path(__file__).parents[1] / "patches", Path(__file__).parents[2] / "patches")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to ``parser``."""
    parser.add_argument("project", choices=list(PROJECTS), help="what to patch")
    action = parser.add_mutually_exclusive_group()
    for name, text in (
        (
            "check",
            "say what state the target is in and what would change; change nothing (default)",
        ),
        ("apply", "apply the patch"),
        ("revert", "take it back: the files get their original bytes"),
    ):
        action.add_argument(
            f"--{name}", dest="action", action="store_const", const=name, default="check", help=text
        )
    parser.add_argument(
        "--target",
        metavar="DIR",
        help="a site-packages folder, a copy of the packages, or a source checkout (default: the "
        "package installed here)",
    )


def main(args: argparse.Namespace) -> int:
    """Run the command; returns its exit code.

    Raises:
        ValueError: no target, a version without a patch, or files that the patch does not fit.
        OSError: the target cannot be written. RuntimeError: no tool that applies patches.
    """
    target = find_target(PROJECTS[args.project], args.target)
    patch = _find_patch(target)
    diffs = parse_patch(patch)
    tool = find_tool()
    parts = [_examine(diff, target, tool) for diff in diffs if target.locate(diff.path)]
    left_out = [diff.path for diff in diffs if not target.locate(diff.path)]
    if not parts:
        raise ValueError(f"{patch.name} has nothing for {target}")
    if any(part.problem for part in parts):
        raise ValueError(_unfit(parts, target, patch))

    print(f"{target}: {_state(parts)}")
    reverse = args.action == "revert" or (
        args.action == "check" and all(part.patched for part in parts)
    )
    todo = [part for part in parts if part.patched == reverse]
    for part in parts:
        print(f"  {part.describe(reverse) if part in todo else part.describe_done()}")
    for path in left_out:
        print(f"  left out  {path} ({target.why_left_out(path)})")

    opposite = "--revert" if reverse else "--apply"
    if args.action == "check":
        print(f"{opposite} would change {_count(todo)} as above. Nothing was changed.")
    elif not todo:
        print(f"Nothing to do: {'not patched' if reverse else 'patched already'}.")
    else:
        replace_files([Change(part.path, part.content, part.result) for part in todo])
        print(f"{'Reverted' if reverse else 'Applied'} {patch.name} with {tool}: {_count(todo)}.")
        new = [part.name for part in todo if part.diff.creates]
        if new and not reverse and target.dist_info:
            print(f"Revert before an upgrade: pip does not know of {', '.join(new)}.")
    return 0


@dataclass(frozen=True)
class _Part:
    """One file of the target: what it holds and, by its state, what the other direction gives."""

    diff: FileDiff
    path: Path
    name: str  # the path for people
    content: bytes | None
    result: bytes | None
    patched: bool
    problem: tuple[str, str] | None  # in no state or in both: why it cannot be applied, reverted

    def describe(self, reverse: bool) -> str:
        """What applying or reverting does to the file."""
        added, removed = self.diff.added, self.diff.removed
        if reverse:
            added, removed = removed, added
        comes = self.diff.deletes if reverse else self.diff.creates
        goes = self.diff.creates if reverse else self.diff.deletes
        verb = "add" if comes else "remove" if goes else "restore" if reverse else "change"
        return f"{verb:8}  {self.name}  +{added} -{removed}"

    def describe_done(self) -> str:
        """The file that needs nothing."""
        return f"{'as it is':8}  {self.name}"


def _examine(diff: FileDiff, target: Target, tool: str) -> _Part:
    """Find out whether a file is as before the patch, as after it, or neither."""
    path = target.locate(diff.path)
    assert path is not None
    content = path.read_bytes() if path.exists() else None
    results: dict[bool, bytes | None] = {}
    reasons = {}
    for reverse in (False, True):
        try:
            results[reverse] = transform(diff, content, tool, reverse=reverse)
            reasons[reverse] = "it can be applied and reverted as well"
        except DoesNotFit as error:
            reasons[reverse] = str(error)
    patched, result = next(iter(results.items()), (False, None))
    problem = None if len(results) == 1 else (reasons[False], reasons[True])
    return _Part(diff, path, target.shown(diff.path), content, result, patched, problem)


def _find_patch(target: Target) -> Path:
    """The patch for the target's version."""
    folder = next((folder for folder in PATCHES if folder.is_dir()), None)
    if folder is None:
        raise ValueError(f"the patches are missing: no folder {' or '.join(map(str, PATCHES))}")
    name = target.project.distribution
    patch = folder / f"{name}-{target.version}.patch"
    if patch.is_file():
        return patch
    versions = [
        match[1]
        for file in sorted(folder.iterdir())
        if (match := re.fullmatch(rf"{name}-(.+)\.patch", file.name))
    ]
    raise ValueError(
        f"no patch for {name} {target.version} (read from {target.stated_in}); there are patches for: "
        f"{', '.join(versions) or 'no version'}. Fix: install one of these versions, or make the patch "
        "as patches/README.md describes"
    )


def _state(parts: list[_Part]) -> str:
    patched = sum(part.patched for part in parts)
    if patched in (0, len(parts)):
        return "patched" if patched else "not patched"
    return f"patched in part ({patched} of {len(parts)} files)"


def _count(parts: list[_Part]) -> str:
    return f"{len(parts)} file{'s' * (len(parts) != 1)}"


def _unfit(parts: list[_Part], target: Target, patch: Path) -> str:
    """The error for files that are neither as before the patch nor as after it."""
    patched = any(part.patched for part in parts if not part.problem)
    lines = [
        f"  {part.path}: {part.problem[patched]}" for part in parts if part.problem is not None
    ]
    release = f"{target.project.distribution}=={target.version}"
    fix = f"reinstall it (pip install --force-reinstall --no-deps {release})"
    if target.checkout:
        fix = f"compare the checkout's files with release {target.version}"
    return "\n".join(
        [
            f"{target}: changed otherwise, {patch.name} can be neither applied nor reverted. "
            "Nothing was changed.",
            *lines,
            f"Fix: {fix}, or make a patch for these files as patches/README.md describes",
        ]
    )
