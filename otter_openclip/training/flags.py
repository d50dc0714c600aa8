"""The plugin's command-line flags, added to open_clip_train's own parser.

open_clip's own flags are left to open_clip, but for mixes with ours that would damage a run in silence.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import torch
from open_clip_train.data import expand_urls

from otter_openclip import __version__
from otter_openclip.cli import as_list, name_nearest, number, positive
from otter_openclip.evaluation.validator import check_webdataset
from otter_openclip.losses import (
    IMPLEMENTATIONS,
    INITIAL_LOG_SCALE,
    MAX_COEF,
    MAX_LOG_SCALE,
    MIN_LAMBDA,
    OT_SCOPES,
)
from otter_openclip.shards.sizes import listed_samples
from otter_openclip.training.recipes import add_config_flag, expand_config

LOSSES = ("clip", "infonce", "ls", "kd", "otter")
TRAINED_LOSSES = LOSSES[1:]
TEACHER_LOSSES = ("kd", "otter")


class _Flag:
    """A flag of some losses; what is not given has the default, or the one of the run's loss."""

    def __init__(self, losses: Sequence[str], default: Any, text: str, **keywords: Any) -> None:
        """``keywords`` are argparse's."""
        self.losses, self.default, self.text, self.keywords = losses, default, text, keywords


_OTTER = ("otter",)
_COEFS = {"kd": 0.0, "otter": 1.0}
_coefficient = number(0, MAX_COEF)
_share = number(0, 1)
_FLAGS = {
    "--alpha": _Flag(
        TEACHER_LOSSES, 0.5, "weight of the contrastive term (paper: alpha)", type=_share
    ),
    "--label-smoothing": _Flag(
        ("ls",), 0.1, "target mass spread over the other pairs (paper: epsilon)", type=_share
    ),
    "--ema-decay": _Flag(
        ("clip", *TEACHER_LOSSES),
        dict.fromkeys(TEACHER_LOSSES, 0.999),
        "upper bound of the EMA teacher's decay; 0 takes the student itself as the teacher; with "
        "--loss clip an EMA that nothing learns from",
        type=_share,
    ),
    "--sinkhorn-lambda": _Flag(
        _OTTER, 0.15, "entropic regularisation of the plan (paper: lambda)", type=number(MIN_LAMBDA)
    ),
    "--sinkhorn-iter": _Flag(_OTTER, 5, "Sinkhorn updates", type=positive),
    "--vv-coef": _Flag(
        TEACHER_LOSSES,
        _COEFS,
        "weight of image-image similarity (paper: gamma_v)",
        type=_coefficient,
    ),
    "--tt-coef": _Flag(
        TEACHER_LOSSES, _COEFS, "weight of text-text similarity (paper: gamma_t)", type=_coefficient
    ),
    "--keep-diag": _Flag(
        _OTTER, False, "let the plan put mass on the pair itself", action="store_true"
    ),
    "--ot-scope": _Flag(
        _OTTER, "global", "one transport problem over all ranks, or one per rank", choices=OT_SCOPES
    ),
    "--loss-impl": _Flag(
        TEACHER_LOSSES,
        "auto",
        "hold the loss's matrices (dense), or compute them anew by tiles (streaming); auto holds them "
        "while they take at most an eighth of the device's memory; plain is the formulas as the paper "
        "has them",
        choices=IMPLEMENTATIONS,
    ),
    "--distill-T-t": _Flag(
        ("kd",),
        100.0,
        "scale of the teacher's similarities (paper: T_t)",
        type=number(0, MAX_COEF, open_low=True),
    ),
    "--share-logit-scale": _Flag(
        TEACHER_LOSSES,
        False,
        "use the model's logit scale for the distillation term too, instead of its own",
        action="store_true",
    ),
    "--init-distill-logit-scale": _Flag(
        TEACHER_LOSSES,
        INITIAL_LOG_SCALE,
        "log of the distillation term's own scale at the start of training",
        type=number(0, MAX_LOG_SCALE),
        metavar="LOG",
    ),
    "--init-logit-scale": _Flag(
        TRAINED_LOSSES,
        None,
        "log of the model's own scale at the start of training, instead of what the model has",
        type=number(0, MAX_LOG_SCALE),
        metavar="LOG",
    ),
    "--feature-dropout": _Flag(
        TRAINED_LOSSES,
        0.0,
        "share of what frozen towers give that the student does not see; the teacher does",
        type=number(0, 0.99),
        metavar="P",
    ),
    "--pair-weights": _Flag(
        TRAINED_LOSSES,
        None,
        "a fit.json of otter-openclip fit: how likely a pair is right multiplies its contrastive term",
        metavar="FILE",
    ),
    "--init": _Flag(
        TRAINED_LOSSES,
        None,
        "fit: start from the closed form of otter-openclip fit, and with its weights of the pairs",
        choices=("fit",),
    ),
    "--teacher-mode": _Flag(
        TEACHER_LOSSES,
        "train",
        "mode the EMA teacher runs in: dropout and batch-norm as in the reference, or not",
        choices=("train", "eval"),
    ),
}

# What a resumed run may change without a warning: how a loss is computed, where a run starts.
_NOT_OF_THE_OBJECTIVE = (
    "--loss-impl",
    "--init",
    "--init-logit-scale",
    "--init-distill-logit-scale",
)
# What would let training see other features than those that ``--init fit`` fits heads to.
_OTHER_TOWERS = (
    "pretrained pretrained_image reference_crop force_image_size force_context_length "
    "force_quick_gelu image_mean image_std image_interpolation image_resize_mode"
).split()


def _shown(default: Any) -> str:
    if isinstance(default, dict):
        return ", ".join(f"{value} with {loss}" for loss, value in default.items())
    return "off" if default is False or default is None else str(default)


def _dest(flag: str) -> str:
    return flag.lstrip("-").replace("-", "_")


def _add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--version", action="version", version=f"otter-openclip {__version__}")
    group = parser.add_argument_group("OTTER", "flags of the plugin (otter-openclip)")
    if "--loss" not in parser._option_string_actions:  # a patched open_clip_train has it
        group.add_argument(
            "--loss",
            choices=LOSSES,
            help="training objective; 'clip', the default, leaves open_clip as it is",
        )
    add_config_flag(group)
    group.add_argument(
        "--reference-crop",
        action="store_true",
        help="the reference's transforms: shorter side to 256/224 of the image size, then a random crop "
        "in training and the centre in evaluation; any --loss",
    )
    group.add_argument(
        "--zeroshot-data",
        action="extend",
        nargs="+",
        metavar="DIR",
        help="clip_benchmark webdatasets, with one label or several a picture, whose F@K is evaluated "
        "every --zeroshot-frequency epochs; the best by F@1 of the first is kept as best.pt; any --loss",
    )
    group.add_argument(
        "--zeroshot-weights",
        choices=("student", "teacher"),
        default="student",
        help="what --zeroshot-data evaluates: the student (default) or its EMA, the teacher",
    )
    group.add_argument(
        "--feature-cache",
        metavar="DIR",
        help="compute what locked towers (--lock-image, --lock-text) give once a sample, keep it in "
        "DIR in a file for each shard, and train on that; any --loss",
    )
    for name, flag in _FLAGS.items():
        text = f"{flag.text}; default {_shown(flag.default)} (--loss {', '.join(flag.losses)})"
        group.add_argument(name, default=None, help=text, **flag.keywords)


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse ``argv`` with open_clip_train's ``parser`` and the plugin's flags, and check the whole.

    Bad input ends in ``parser.error``, which names the nearest flag to an unknown one.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser.error = functools.partial(_error, parser)
    _add_flags(parser)
    stock = {name: parser.get_default(name) for name in ("precision", "warmup")}
    parser.set_defaults(precision=None, warmup=None, loss="clip")
    # In place of ``parser.parse_args`` stands the plugin's hook, which calls this: so the class's own.
    args = argparse.ArgumentParser.parse_args(parser, expand_config(parser, argv))
    for fault in _faults(args):
        parser.error(fault)
    _settle_flags(parser, args)
    for fault in _teacher_faults(args):
        parser.error(fault)
    if args.precision is None:
        # open_clip's default, amp, is tens of times slower on a CPU.
        no_gpu = args.device.startswith("cuda") and not torch.cuda.is_available()
        on_cpu = args.device.startswith("cpu") or no_gpu
        args.precision = "fp32" if on_cpu and args.loss != "clip" else stock["precision"]
    if args.warmup is None and args.loss == "clip":
        args.warmup = stock["warmup"]
    if args.train_num_samples is None and in_shards(args):
        # Each shard by the file beside it; open_clip counts all by the first one's.
        try:
            args.train_num_samples = listed_samples(expand_urls(args.train_data)[0])
        except ValueError as error:
            parser.error(f"--train-data {args.train_data}: {error}; or pass --train-num-samples N")
    return args


def _error(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    message = name_nearest(message, parser._option_string_actions)
    # The usage line of 100 flags would bury the message.
    parser.exit(2, f"{parser.prog}: error: {message}\nSee {parser.prog} --help for all flags.\n")


def _faults(args: argparse.Namespace) -> Iterator[str]:
    """What is wrong with ``args`` as they are given; the first is said."""
    if args.loss not in LOSSES:  # a patched open_clip_train also lists other packages' losses
        yield f"--loss {args.loss} is not one of this plugin's: {', '.join(LOSSES)}"
    for name in ("config", "zeroshot_data", "feature_cache", "pair_weights"):
        if "" in as_list(getattr(args, name)):
            yield f"argument --{name.replace('_', '-')}: expected a value, got ''"
    if args.zeroshot_data is not None:
        try:
            for folder in args.zeroshot_data:  # text files only, which takes a moment
                check_webdataset(folder, flag="--zeroshot-data")
        except ValueError as error:
            yield str(error)
    resized = args.image_resize_mode not in (None, "shortest")
    if args.reference_crop and (args.aug_cfg or resized or args.image_interpolation == "random"):
        yield (
            "--reference-crop resizes the shorter side and has no augmentation but its crop; "
            "drop it, or --aug-cfg, --image-resize-mode and --image-interpolation random"
        )
    for name in ("feature_cache", "feature_dropout"):
        if getattr(args, name) and not (args.lock_image or args.lock_text):
            flag = f"--{name.replace('_', '-')}"
            yield f"{flag} is for locked towers, but none is: add --lock-image, --lock-text or both"
    distill = args.distill_model is not None, args.distill_pretrained is not None
    teacher = args.loss in TEACHER_LOSSES
    if any(distill) and args.loss != "clip" and not teacher:
        yield f"--loss {args.loss} has no teacher; drop --distill-model, or use --loss kd or otter"
    if any(distill) and not all(distill):
        yield "--distill-model and --distill-pretrained must be given together"
    if all(distill) and teacher and (args.ema_decay is not None or args.teacher_mode is not None):
        yield "--ema-decay and --teacher-mode are for the EMA, which --distill-model replaces; drop one"
    if any(distill) and args.feature_cache is not None:
        yield "--feature-cache does not go with --distill-model, which takes images; drop one of them"
    if args.feature_cache is not None and args.aug_cfg and args.lock_image:
        yield (
            "--aug-cfg: with --feature-cache a locked image tower sees its images without augmentation; "
            "drop one of them"
        )
    if args.init is not None and args.feature_cache is None:
        yield "--init fit needs what towers give for all pairs: add --feature-cache DIR, or drop it"
    for name in _OTHER_TOWERS if args.init is not None else ():
        if getattr(args, name):
            flag = f"--{name.replace('_', '-')}"
            yield f"--init fit takes the towers as --model has them; drop {flag}, or write such towers"
    if args.init is not None and args.precision not in (None, "fp32", "amp", "amp_bf16"):
        yield f"--init fit does not go with --precision {args.precision}; take fp32, amp or amp_bf16"
    if not in_shards(args):
        for flag in ("--feature-cache", "--pair-weights"):
            if getattr(args, _dest(flag)) is not None:
                yield (
                    f"{flag} takes --train-data in webdataset shards; otter-openclip data csv makes "
                    "them of a table"
                )


def _settle_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    for name, flag in _FLAGS.items():
        value = getattr(args, _dest(name))
        if value is None:
            per_loss = isinstance(flag.default, dict)
            default = flag.default.get(args.loss) if per_loss else flag.default
            setattr(args, _dest(name), default)
        elif args.loss not in flag.losses:
            wanted = " or ".join(f"--loss {loss}" for loss in flag.losses)
            parser.error(f"{name} has no meaning with --loss {args.loss}; it needs {wanted}")
    # The fixed teacher is created by the plugin, so that it also works with --accum-freq; open_clip
    # itself must not see it.
    args.teacher_model = args.teacher_pretrained = None
    if args.loss != "clip":
        args.teacher_model, args.distill_model = args.distill_model, None
        args.teacher_pretrained, args.distill_pretrained = args.distill_pretrained, None


def has_ema(args: argparse.Namespace) -> bool:
    """Whether a run with these settled flags keeps an EMA of its model."""
    return bool(args.ema_decay) and args.teacher_model is None


def _teacher_faults(args: argparse.Namespace) -> Iterator[str]:
    if "lookahead" in args.opt.lower() and (args.loss in TEACHER_LOSSES or has_ema(args)):
        yield (
            f"--loss {args.loss} does not go with --opt {args.opt}: teacher and second scale hang on "
            "torch's optimizer hooks, which timm's Lookahead has not; use the optimizer without it"
        )
    if args.zeroshot_weights == "student":
        return
    if args.zeroshot_data is None:
        yield "--zeroshot-weights belongs to --zeroshot-data DIR; give that too, or drop it"
    if not (has_ema(args) and args.train_data):
        yield (
            f"--zeroshot-weights teacher: this run (--loss {args.loss}) keeps no EMA; train with --loss "
            "kd or otter without --distill-model, or with --loss clip, and --ema-decay above 0"
        )


def in_shards(args: argparse.Namespace, name: str = "train_data") -> bool:
    """Whether open_clip takes ``--train-data``, or the flag of that name, for webdataset shards."""
    data = getattr(args, name)
    guessed = args.dataset_type == "auto" and str(data).endswith(".tar")
    return bool(data) and (guessed or args.dataset_type == "webdataset")


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """The flags that define the run's objective, as stored in a checkpoint."""
    used = {
        _dest(name): getattr(args, _dest(name))
        for name, flag in _FLAGS.items()
        if args.loss in flag.losses and name not in _NOT_OF_THE_OBJECTIVE
    }
    return {"loss": args.loss, **used}
