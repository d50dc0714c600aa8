"""Fit the heads of two pretrained towers to pairs, in closed form, and find the pairs that look wrong.

Writes a folder that stock open_clip loads, with fit.json (what was chosen, the pairs that look wrong)
and report.html. Nothing is tuned and no labels are needed: ridges, power and scale are chosen by
held-out pairs. Several processes of torchrun share the work.
"""

from __future__ import annotations

import argparse

from otter_openclip.cli import number, positive

PRECISIONS = ("fp32", "amp", "amp_bf16")  # the towers' weights stay in float32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to ``parser``."""
    add = parser.add_argument
    add("out", metavar="OUT", help="folder to write; new or empty")
    text = "two pretrained towers, as otter-openclip towers writes them: local-dir:FOLDER"
    add("--model", required=True, metavar="NAME", help=text)
    text = "webdataset shards as for training: braces are expanded"
    add("--train-data", required=True, metavar="SHARDS", help=text)
    text = "where the towers' features are kept, as in training; default: OUT.features"
    add("--feature-cache", metavar="DIR", help=text)
    text = "a labelled webdataset: ridges and power are those of its best mean average precision"
    add("--val", metavar="DIR", help=text)
    text = "images without captions, which transport matches with --unpaired-captions"
    add("--unpaired-images", metavar="SHARDS", help=text)
    text = "captions without images: a text file with one a line, or shards"
    add("--unpaired-captions", metavar="FILE_OR_SHARDS", help=text)
    add("--embed-dim", type=positive, metavar="D", help="default: as wide as the features allow")
    add("--no-weights", action="store_true", help="let all pairs count alike")
    text = "also match the pairs' own pictures and captions anew; may help where captions are wrong"
    add("--transport-pairs", action="store_true", help=text)
    text = "entropic regularisation of the transport; default: 0.03"
    add("--sinkhorn-lambda", type=number(1e-3), default=0.03, metavar="X", help=text)
    text = "leave the text features' mean, for towers that cannot take it off"
    add("--keep-text-mean", action="store_true", help=text)
    text = "of the towers' features; default: fp32 on a CPU, else amp"
    add("--precision", choices=PRECISIONS, help=text)
    text = "processes that read images; default: 1"
    add("--workers", type=number(0, kind=int), default=1, metavar="N", help=text)
    add("--device", metavar="NAME", help="default: cuda if there is one, else cpu")
    add("--overwrite", action="store_true", help="replace OUT if it is an earlier export")


def main(args: argparse.Namespace) -> int:
    """Run the command; returns its exit code."""
    from otter_openclip.closed_form.fitting_run import fit_folder  # heavy imports

    fit_folder(report=print, **vars(args))
    return 0
