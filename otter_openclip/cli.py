"""The ``otter-openclip`` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns its exit code. User errors are printed and give 2."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["train"]:
        # All flags after it are open_clip_train's and the plugin's, parsed there.
        from otter_openclip.training.launcher import main as train

        return train(argv[1:])
    if argv[:1] == ["eval"]:
        # Likewise clip_benchmark's.
        from otter_openclip.evaluation.eval import main as evaluate

        return evaluate(argv[1:])

    from otter_openclip import data, demo, patching
    from otter_openclip.checkpoints import convert, export

    parser = argparse.ArgumentParser(
        prog="otter-openclip", description="OTTER as a plugin of open_clip."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("train", help="open_clip's training command with --loss otter")
    commands.add_parser("eval", help="clip_benchmark's eval with F@K, for any number of classes")
    for name, module, summary in (
        ("export", export, "turn a training checkpoint into a folder for open_clip.create_model"),
        ("convert", convert, "turn a checkpoint of facebookresearch/OTTER into such a folder"),
        ("data", data, "turn data sets as downloaded into webdataset shards"),
        ("patch", patching, "patch open_clip or clip_benchmark to know --loss otter, and back"),
        ("demo", demo, "train InfoNCE and OTTER on the glyphs of matplotlib's fonts"),
    ):
        command = commands.add_parser(name, help=summary, description=module.__doc__)
        module.add_arguments(command)
        command.set_defaults(run=module.main)
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"otter-openclip {args.command}: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
