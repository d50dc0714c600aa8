"""Unified diffs, file by file, applied by ``git apply`` or ``patch`` to bytes and never in place."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

_HUNK = re.compile(rb"@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@")
_UNSUPPORTED = (b"rename from ", b"copy from ", b"old mode ", b"GIT binary patch", b"Binary files ")
TOOLS = ("git", "patch")


class DoesNotFit(Exception):
    """A file is not what a diff expects; the message says where."""


@dataclass(frozen=True)
class FileDiff:
    """One file's part of a patch. ``hunks`` are the first line numbers (old, new) of each hunk."""

    path: str
    text: bytes
    added: int
    removed: int
    hunks: tuple[tuple[int, int], ...]
    creates: bool
    deletes: bool


def parse_patch(file: Path) -> list[FileDiff]:
    """The files of a patch as ``git diff`` or ``diff -u`` writes it (paths ``a/...``, ``b/...``).

    Raises:
        ValueError: it is no such patch, or renames files or changes modes or binary ones.
    """
    lines = io.BytesIO(file.read_bytes()).readlines()
    diffs, i = [], 0
    while i < len(lines):
        if lines[i].startswith(b"diff --git ") or (
            lines[i].startswith(b"--- ") and lines[i + 1 : i + 2] and lines[i + 1][:4] == b"+++ "
        ):
            diff, i = _parse_file(lines, i, file.name)
            diffs.append(diff)
        else:  # a message before the first file, a signature after the last
            i += 1
    if not diffs:
        raise ValueError(f"{file}: not a patch in unified format")
    return diffs


def _parse_file(lines: list[bytes], start: int, name: str) -> tuple[FileDiff, int]:
    """The diff that starts at a line, and the line after it."""
    old = new = None
    creates = deletes = False
    i = start
    while i < len(lines) and not lines[i].startswith(b"@@ "):
        line = lines[i].rstrip(b"\r\n")
        if line.startswith(_UNSUPPORTED):
            raise ValueError(
                f"{name}, line {i + 1}: {line.decode(errors='replace')!r} is unsupported"
            )
        if line.startswith(b"diff --git "):
            if i > start:
                break  # the next file: this one is created or deleted empty
            old, _, new = line.removeprefix(b"diff --git ").partition(b" b/")
            new = b"b/" + new
        elif line.startswith(b"--- "):
            old = line[4:].split(b"\t")[0]
        elif line.startswith(b"+++ "):
            new = line[4:].split(b"\t")[0]
        elif not line.startswith((b"index ", b"new file mode ", b"deleted file mode ", b"diff ")):
            break
        creates |= line.startswith(b"new file mode ") or line.startswith(b"--- /dev/null")
        deletes |= line.startswith(b"deleted file mode ") or line.startswith(b"+++ /dev/null")
        i += 1
    path = _path(old if deletes else new, name)

    added = removed = 0
    hunks = []
    while i < len(lines) and (match := _HUNK.match(lines[i])):
        hunks.append((int(match[1]), int(match[3])))
        old_left, new_left = (int(count) if count else 1 for count in (match[2], match[4]))
        i += 1
        while old_left > 0 or new_left > 0 or (lines[i : i + 1] and lines[i].startswith(b"\\")):
            kind = lines[i][:1] if i < len(lines) else b""
            if kind not in (b" ", b"+", b"-", b"\\", b"\n"):
                raise ValueError(f"{name}: the hunk {match[0].decode()!r} of {path} is cut short")
            old_left -= kind in (b" ", b"-", b"\n")
            new_left -= kind in (b" ", b"+", b"\n")
            added += kind == b"+"
            removed += kind == b"-"
            i += 1
    if not hunks and not creates and not deletes:
        raise ValueError(f"{name}: nothing changes in {path}")
    text = b"".join(lines[start:i])
    return FileDiff(path, text, added, removed, tuple(hunks), creates, deletes), i


def _path(name: bytes | None, patch: str) -> str:
    """The path without its ``a/`` or ``b/``."""
    text = (name or b"").decode()
    path = PurePosixPath(text).parts[1:]
    if text[:2] not in ("a/", "b/") or not path or ".." in path:
        raise ValueError(f"{patch}: {text!r} is not a path like a/package/module.py")
    return "/".join(path)


def find_tool() -> str:
    """``git`` if it runs here, else ``patch``.

    Raises:
        RuntimeError: there is neither.
    """
    for tool in TOOLS:
        if shutil.which(tool) is not None and _run([tool, "--version"], Path.cwd()).returncode == 0:
            return tool
    raise RuntimeError(
        "neither git nor patch can be run, and one of them must apply the patch. "
        "Fix: install git (or GNU patch) and see that it is on PATH"
    )


def transform(diff: FileDiff, content: bytes | None, tool: str, *, reverse: bool) -> bytes | None:
    """``content`` with ``diff`` applied, or taken back; None stands for no such file.

    Line offsets are allowed, as for both tools, fuzz is not: context must match exactly. The result is
    accepted only if the opposite direction gives ``content`` again, byte for byte.

    Raises:
        DoesNotFit: with the hunk.
        RuntimeError: the tool itself fails.
    """
    result = _transform(diff, content, tool, reverse)
    if _transform(diff, result, tool, not reverse) != content:
        raise DoesNotFit("the change could not be taken back exactly")
    return result


def _transform(diff: FileDiff, content: bytes | None, tool: str, reverse: bool) -> bytes | None:
    absent, leaves_none = diff.creates, diff.deletes
    if reverse:
        absent, leaves_none = leaves_none, absent
    if absent and content is not None:
        raise DoesNotFit("exists already")
    if not absent and content is None:
        raise DoesNotFit("is missing")
    if not diff.hunks:  # an empty file comes or goes
        if content:
            raise DoesNotFit("is not empty")
        return None if leaves_none else b""

    with tempfile.TemporaryDirectory(prefix="otter-patch-") as temporary:
        root = Path(temporary).resolve()
        tree = root / "tree"
        file = tree / diff.path
        file.parent.mkdir(parents=True)
        if content is not None:
            file.write_bytes(content)
        (root / "patch").write_bytes(diff.text)
        if tool == "git":
            command = ["git", "-c", "core.autocrlf=false", "apply", "--whitespace=nowarn"]
            command += ["--reverse"] if reverse else []
            command += ["-p1", str(root / "patch")]
        else:
            # force: no question, and never the other direction because it looks likelier
            command = ["patch", "--force", "--fuzz=0", "--binary"]
            command += ["--reverse"] if reverse else []
            command += ["-p1", "-i", str(root / "patch")]
        done = _run(command, tree, home=root)
        if done.returncode == 1:
            raise DoesNotFit(_where(diff, done.stdout, reverse))
        if done.returncode != 0:
            raise RuntimeError(
                f"{' '.join(command[:4])} failed on {diff.path}: {done.stdout.strip()}"
            )
        result = file.read_bytes() if file.exists() else b""
        return None if leaves_none else result


def _run(
    command: list[str], cwd: Path, home: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a tool in English and, with ``home``, blind to every repository and configuration."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("GIT_")
        and name not in ("POSIXLY_CORRECT", "VERSION_CONTROL", "PATCH_VERSION_CONTROL", "PATCH_GET")
    } | {"LC_ALL": "C", "LANGUAGE": "C"}
    if home is not None:
        environment |= {
            "HOME": str(home),
            "XDG_CONFIG_HOME": str(home),
            "GIT_CEILING_DIRECTORIES": str(home),
            "GIT_CONFIG_NOSYSTEM": "1",
            "GIT_ATTR_NOSYSTEM": "1",
        }
    return subprocess.run(
        command,
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )


def _where(diff: FileDiff, output: str, reverse: bool) -> str:
    """The hunks that a tool's output names as failed; the output itself if it names none."""
    starts = [hunk[reverse] for hunk in diff.hunks]
    failed = {int(number) for number in re.findall(r"Hunk #(\d+) FAILED", output)}  # patch
    failed |= {  # git
        starts.index(int(line)) + 1
        for line in re.findall(r"patch failed: .*:(\d+)$", output, re.MULTILINE)
        if int(line) in starts
    }
    if not failed:
        return " ".join(output.split())
    return "; ".join(
        f"hunk {number} of {len(starts)} (line {starts[number - 1]}) does not fit"
        for number in sorted(failed)
    )
