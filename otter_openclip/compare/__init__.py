"""Does it help on my pairs, and by how much? Every loss tuned alike, repeated with seeds, and reported.

Settings are chosen by mean average precision on half of the test images; figures are of the other half.
The same command goes on where it was stopped, and with one --storage any number of them share the work.
"""

from __future__ import annotations

import argparse
import os

from otter_openclip.cli import needs, number, positive

LOSSES = ("infonce", "ls", "kd", "otter")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to ``parser``."""
    add = parser.add_argument
    add("out", metavar="OUT", help="folder to write, or of a comparison that goes on")
    text = "two towers of otter-openclip towers, which stay frozen under linear heads; "
    text += "any other model is trained as a whole"
    add("--model", required=True, metavar="NAME", help=text)
    text = "webdataset shards as for training: braces are expanded"
    add("--train-data", required=True, metavar="SHARDS", help=text)
    text = "labelled test images, a clip_benchmark webdataset"
    add("--eval", required=True, metavar="DIR", help=text)
    add("--losses", nargs="+", choices=LOSSES, default=LOSSES, help="default: all four")
    text = "fit: the closed form; fit+LOSS: what starts from it. Default with two towers: fit fit+otter"
    methods = ("fit", *(f"fit+{loss}" for loss in LOSSES))
    add("--methods", action="extend", nargs="+", choices=methods, help=text)
    add("--trials", type=positive, metavar="N", help="settings to try of each method; default: 30")
    add("--seeds", type=positive, metavar="N", help="repeats of the chosen setting; default: 5")
    text = "begin nothing that would end later than this; what there is then is reported"
    add("--hours", type=number(0, open_low=True), metavar="H", help=text)
    text = "Optuna's: a file, on a shared disk perhaps, or postgresql://...; default: OUT/study.journal"
    add("--storage", metavar="URL", help=text)
    add("--quick", action="store_true", help="5 short trials of each method, 2 seeds")


def main(args: argparse.Namespace) -> int:
    """Run the command; returns its exit code.

    Raises:
        RuntimeError: naming the extra to install, if Optuna is missing.
    """
    needs("optuna", "compare")
    # Torch reads it when it is imported: threads must not spin while another process needs the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from otter_openclip.compare.comparing import compare  # heavy imports

    compare(**vars(args))
    return 0
