"""The plugin's command-line flags, added to open_clip_train's own parser."""

from __future__ import annotations

import argparse
import difflib
import functools
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import open_clip
import torch
from open_clip.factory import LOCAL_DIR_PREFIX, parse_model_name

from otter_openclip.cli import as_list, check_repeated, name_nearest, number
from otter_openclip.losses import (
    IMPLEMENTATIONS,
    INITIAL_LOG_SCALE,
    MAX_COEF,
    MAX_LOG_SCALE,
    MIN_LAMBDA,
    OT_SCOPES,
)
from otter_openclip.model_folders.folder import CONFIG_FILE
from otter_openclip.training import stock_flags
from otter_openclip.training.recipes import add_config_flag, expand_config
from otter_openclip.training.zeroshot import check_folder

LOSSES = ("clip", "infonce", "ls", "kd", "otter")
TEACHER_LOSSES = ("kd", "otter")
PAIR_LOSSES = ("ls", *TEACHER_LOSSES)
TEACHER_MODES = ("train", "eval")
ZEROSHOT_WEIGHTS = ("student", "teacher")
FEATURE_PRECISIONS = ("fp32", "bf16")


# flag -> (losses it applies to, default or {loss: default}, argparse keywords)
_FLAGS: dict[str, tuple[tuple[str, ...], Any, dict[str, Any]]] = {
    "--alpha": (
        TEACHER_LOSSES,
        0.5,
        {"type": number(0, 1), "help": "weight of the contrastive term (paper: alpha)"},
    ),
    "--label-smoothing": (
        ("ls",),
        0.1,
        {"type": number(0, 1), "help": "target mass spread over the other pairs (paper: epsilon)"},
    ),
    "--ema-decay": (
        ("clip", *TEACHER_LOSSES),
        dict.fromkeys(TEACHER_LOSSES, 0.999),
        {
            "type": number(0, 1),
            "help": "upper bound of the EMA teacher's decay; with --loss clip keep an EMA of the model, "
            "which nothing learns from, and repeat the data order as the other losses do",
        },
    ),
    "--sinkhorn-lambda": (
        ("otter",),
        0.15,
        {
            "type": number(MIN_LAMBDA, math.inf),
            "help": "entropic regularisation of the transport plan (paper: lambda)",
        },
    ),
    "--sinkhorn-iter": (
        ("otter",),
        5,
        {"type": number(1, math.inf, int), "help": "Sinkhorn updates"},
    ),
    "--vv-coef": (
        TEACHER_LOSSES,
        {"kd": 0.0, "otter": 1.0},
        {"type": number(0, MAX_COEF), "help": "weight of image-image similarity (paper: gamma_v)"},
    ),
    "--tt-coef": (
        TEACHER_LOSSES,
        {"kd": 0.0, "otter": 1.0},
        {"type": number(0, MAX_COEF), "help": "weight of text-text similarity (paper: gamma_t)"},
    ),
    "--keep-diag": (
        ("otter",),
        False,
        {"action": "store_true", "help": "let the plan put mass on the pair itself"},
    ),
    "--ot-scope": (
        ("otter",),
        "global",
        {
            "choices": OT_SCOPES,
            "help": "one transport problem over all ranks, or one per rank",
        },
    ),
    "--loss-impl": (
        TEACHER_LOSSES,
        "auto",
        {
            "choices": IMPLEMENTATIONS,
            "help": "hold the loss's matrices (dense), or compute them anew by tiles (streaming); auto "
            "holds them while they take at most an eighth of the device's memory; plain is the formulas "
            "as the paper has them",
        },
    ),
    "--distill-T-t": (
        ("kd",),
        100.0,
        {
            "type": number(0, MAX_COEF, open_low=True),
            "help": "scale of the teacher's similarities (paper: T_t)",
        },
    ),
    "--share-logit-scale": (
        TEACHER_LOSSES,
        False,
        {
            "action": "store_true",
            "help": "use the model's logit scale for the distillation term too, instead of its own",
        },
    ),
    "--init-distill-logit-scale": (
        TEACHER_LOSSES,
        INITIAL_LOG_SCALE,
        {
            "type": number(0, MAX_LOG_SCALE),
            "metavar": "LOG",
            "help": "log of the distillation term's own scale at the start of training",
        },
    ),
    "--teacher-mode": (
        TEACHER_LOSSES,
        "train",
        {
            "choices": TEACHER_MODES,
            "help": "mode the EMA teacher runs in: dropout and batch-norm as in the reference, or not",
        },
    ),
}

# How it is computed; what a checkpoint itself has.
_NOT_OF_THE_OBJECTIVE = ("--loss-impl", "--init-distill-logit-scale")


def _shown(default: Any) -> str:
    if isinstance(default, dict):
        if len(set(default.values())) == 1:
            return f"{next(iter(default.values()))} with {' and '.join(default)}"
        return ", ".join(f"{value} with {loss}" for loss, value in default.items())
    return "off" if default is False else str(default)


def _dest(flag: str) -> str:
    return flag.lstrip("-").replace("-", "_")


def _add_flags(parser: argparse.ArgumentParser) -> list[argparse.Action]:
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
        metavar="DIR",
        help="multi-label clip_benchmark webdataset whose F@K is evaluated every --zeroshot-frequency "
        "epochs; the best by F@1 is kept as best.pt; any --loss",
    )
    group.add_argument(
        "--zeroshot-weights",
        choices=ZEROSHOT_WEIGHTS,
        help="what --zeroshot-data evaluates: the student (default) or its EMA, the teacher",
    )
    group.add_argument(
        "--feature-cache",
        metavar="DIR",
        help="compute what locked towers (--lock-image, --lock-text) give once a sample, keep it in "
        "DIR, and train on that; any --loss",
    )
    group.add_argument(
        "--feature-views",
        type=number(1, 1000, int),
        metavar="K",
        help="augmented views of each image to keep in --feature-cache; by default one without "
        "augmentation",
    )
    group.add_argument(
        "--feature-precision",
        choices=FEATURE_PRECISIONS,
        help="bf16: features for --feature-cache are computed in bfloat16 if the device has it and they "
        "stay within 1%%; default fp32, which is --precision",
    )
    for flag, (losses, default, keywords) in _FLAGS.items():
        keywords = dict(keywords)
        keywords["help"] += f"; default {_shown(default)} (--loss {', '.join(losses)})"
        group.add_argument(flag, default=None, **keywords)
    return [*group._group_actions, parser._option_string_actions["--loss"]]


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse ``argv`` with open_clip_train's ``parser`` and the plugin's flags, and check the whole.

    Bad input ends in ``parser.error``, which names the nearest flag to an unknown one.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser.error = functools.partial(_error, parser)
    own = _add_flags(parser)
    precision = parser.get_default("precision")
    parser.set_defaults(precision=None, loss="clip")
    check_repeated(parser, argv)
    try:
        args = parser.parse_args(expand_config(parser, argv))
    except (
        ValueError,
        SyntaxError,
    ) as error:  # of the one type that open_clip_train has of its own
        parser.error(f"argument --aug-cfg: expected NAME=VALUE, as scale=(0.9,1.0) ({error})")
    for action in own:
        if "" in as_list(getattr(args, action.dest)):
            parser.error(f"argument {action.option_strings[-1]}: expected a value, got ''")
    _check_model(parser, args)
    if args.loss not in LOSSES:  # a patched open_clip_train also lists other packages' losses
        parser.error(f"--loss {args.loss} is not one of this plugin's: {', '.join(LOSSES)}")
    _check_reference_crop(parser, args)
    if args.zeroshot_data is not None:
        try:
            check_folder(args.zeroshot_data)
        except ValueError as error:
            parser.error(str(error))
    _check_unsupported(parser, args)
    if args.loss != "clip" and (fault := stock_flags.fault(parser, args)):
        parser.error(fault)
    _check_feature_cache(parser, args)
    _settle_flags(parser, args)
    _check_ema(parser, args)
    _settle_precision(args, precision)
    return args


def _error(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    message = name_nearest(message, parser._option_string_actions)
    # The usage line of 100 flags would bury the message.
    parser.exit(2, f"{parser.prog}: error: {message}\nSee {parser.prog} --help for all flags.\n")


def model_config(args: argparse.Namespace) -> dict[str, Any]:
    """The JSON of ``--model``, whatever its schema; {} if it cannot be read here."""
    try:
        schema = parse_model_name(args.model)[0]
        config = open_clip.get_model_config(args.model if schema else args.model.replace("/", "-"))
    except Exception:  # open_clip says what is wrong with a folder or a repository
        config = None
    return config or {}


def logit_bias_message(args: argparse.Namespace) -> str:
    """Why a model with a logit bias is refused."""
    return (
        f"--loss {args.loss} does not go with {args.model}: it has a logit bias, which belongs to "
        "SigLIP's sigmoid loss; use a CLIP model, or --loss clip --siglip"
    )


def _check_model(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Name the nearest to a model that open_clip does not know."""
    name, known = args.model.replace("/", "-"), open_clip.list_models()
    try:
        schema = parse_model_name(args.model)[0]
    except ValueError as error:
        parser.error(f"--model {args.model}: {error}")
    if schema is None and name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        if os.path.isfile(os.path.join(args.model, CONFIG_FILE)):
            near = [f"{LOCAL_DIR_PREFIX}{args.model}"]
        hint = (
            f"did you mean {', '.join(near)}?" if near else "open_clip.list_models() has the names"
        )
        parser.error(f"open_clip knows no --model {args.model}; {hint}")


def _check_reference_crop(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if not args.reference_crop:
        return
    if args.aug_cfg:
        parser.error("--reference-crop has no augmentation but its crop; drop it or --aug-cfg")
    if args.image_resize_mode not in (None, "shortest"):
        parser.error(
            f"--reference-crop resizes the shorter side; drop it or --image-resize-mode "
            f"{args.image_resize_mode}"
        )
    if args.image_interpolation == "random":
        parser.error("--reference-crop takes --image-interpolation bicubic or bilinear, not random")


def _check_unsupported(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.loss == "clip":
        return
    name = f"--loss {args.loss}"
    if args.siglip:
        parser.error(
            f"{name} does not go with --siglip: its targets are for the softmax loss, not the "
            "sigmoid one; drop --siglip, or use --loss clip --siglip"
        )
    config = model_config(args)
    if "coca" in args.model.lower() or "multimodal_cfg" in config:
        parser.error(
            f"{name} does not go with the CoCa model {args.model}: its captioning loss is not part "
            "of the method; use a CLIP model, or --loss clip"
        )
    if "init_logit_bias" in config and args.loss in PAIR_LOSSES:
        parser.error(logit_bias_message(args))
    built_in = "text_cfg" in config and "hf_model_name" not in config["text_cfg"]
    if args.lock_text and not args.lock_text_freeze_layer_norm and built_in:
        parser.error(
            "--lock-text needs --lock-text-freeze-layer-norm too: open_clip cannot leave the layer "
            f"norms of {args.model}'s text tower unlocked; add it"
        )
    if "lookahead" in args.opt.lower() and args.loss in TEACHER_LOSSES:
        parser.error(
            f"{name} does not go with --opt {args.opt}: teacher and second scale hang on torch's "
            "optimizer hooks, which timm's Lookahead has not; use the optimizer without it"
        )
    # open_clip 4.x has neither of these two.
    if getattr(args, "horovod", False):
        parser.error(
            f"{name} does not go with --horovod: the transport plan is sharded with "
            "torch.distributed; launch with torchrun instead"
        )
    if getattr(args, "torchscript", False) and args.loss in TEACHER_LOSSES:
        parser.error(
            f"{name} does not go with --torchscript: a scripted model cannot be copied into a "
            "teacher; use --torchcompile instead"
        )
    has_distill = (args.distill_model is not None, args.distill_pretrained is not None)
    if any(has_distill) and args.loss not in TEACHER_LOSSES:
        parser.error(
            f"{name} has no teacher, so --distill-model and --distill-pretrained have no meaning; "
            "use --loss kd or --loss otter"
        )
    if any(has_distill) and not all(has_distill):
        parser.error("--distill-model and --distill-pretrained must be given together")
    if all(has_distill) and (args.ema_decay is not None or args.teacher_mode is not None):
        parser.error(
            "--ema-decay and --teacher-mode are for the EMA teacher, but --distill-model asks for a "
            "fixed one; drop one or the other"
        )
    if args.share_logit_scale and args.init_distill_logit_scale is not None:
        parser.error(
            "--share-logit-scale has no second scale to start at --init-distill-logit-scale; drop one"
        )


def has_ema(args: argparse.Namespace) -> bool:
    """Whether a run with these settled flags keeps an EMA of its model."""
    return args.ema_decay is not None and args.teacher_model is None


def _check_ema(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.loss == "clip" and has_ema(args):
        given = {f"--opt {args.opt}": "lookahead" in args.opt.lower()}
        given |= {f"--{name}": getattr(args, name, False) for name in ("horovod", "torchscript")}
        for flag in (flag for flag, value in given.items() if value):
            parser.error(
                f"--ema-decay does not go with {flag}: the EMA copies the model, and hangs on torch's "
                "optimizer hooks; drop one of them"
            )
    if args.zeroshot_weights is None:
        args.zeroshot_weights = ZEROSHOT_WEIGHTS[0]
        return
    if args.zeroshot_data is None:
        parser.error("--zeroshot-weights belongs to --zeroshot-data DIR; give that too, or drop it")
    if args.zeroshot_weights == "teacher" and not (has_ema(args) and args.train_data):
        parser.error(
            f"--zeroshot-weights teacher: this run (--loss {args.loss}) keeps no EMA; train with --loss "
            "kd or otter without --distill-model, or with --loss clip --ema-decay D"
        )


def _check_feature_cache(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.feature_cache is None:
        for flag in ("--feature-views", "--feature-precision"):
            if getattr(args, _dest(flag)) is not None:
                parser.error(f"{flag} belongs to --feature-cache DIR; give that too, or drop it")
        return
    if open_clip.__version__ >= "4":
        parser.error(
            "--feature-cache works with open_clip 3.x only; without it training is the same"
        )
    cache = Path(args.feature_cache).absolute()
    there = next(path for path in (cache, *cache.parents) if os.path.lexists(path))
    if not there.is_dir():
        parser.error(
            f"--feature-cache {args.feature_cache}: {there} is not a folder; name a new or an old one"
        )
    given = {"--siglip": args.siglip, "--torchscript": args.torchscript, "--trace": args.trace}
    given |= {"--horovod": args.horovod, "--distill-model": args.distill_model is not None}
    given |= {"--use-bnb-linear": args.use_bnb_linear is not None}
    for flag in (flag for flag, value in given.items() if value):
        parser.error(f"--feature-cache does not go with {flag}; drop one of them")
    config = model_config(args)
    if "coca" in args.model.lower() or "multimodal_cfg" in config:
        parser.error(f"--feature-cache does not go with the CoCa model {args.model}; drop it")
    if not (args.lock_image or args.lock_text):
        parser.error(
            "--feature-cache keeps what locked towers give, but none is: add --lock-image, "
            "--lock-text or both"
        )
    for flag, name in (("unlocked_groups", "image"), ("unlocked_layers", "text")):
        count = getattr(args, f"lock_{name}_{flag}")
        if getattr(args, f"lock_{name}") and count:
            parser.error(
                f"--feature-cache: --lock-{name}-{flag.replace('_', '-')} {count} trains the end of the "
                "trunk, so what is frozen is no whole trunk or tower; lock all of it, or drop the cache"
            )
    if not (args.train_data and args.dataset_type in ("webdataset", "csv", "auto")):
        parser.error("--feature-cache takes --train-data of type webdataset or csv")
    args.feature_views = args.feature_views or 1
    args.feature_precision = args.feature_precision or FEATURE_PRECISIONS[0]
    if args.aug_cfg and args.lock_image and args.feature_views == 1:
        parser.error(
            "--aug-cfg: with --feature-cache a locked image tower sees its images without augmentation; "
            "add --feature-views K to keep K augmented views, or drop it"
        )
    if args.feature_views > 1 and not args.lock_image:
        parser.error("--feature-views keeps views of images, which needs --lock-image")


def _settle_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    for flag, (losses, default, _) in _FLAGS.items():
        given = getattr(args, _dest(flag))
        if given is None or given is False:
            per_loss = isinstance(default, dict)
            setattr(args, _dest(flag), default.get(args.loss) if per_loss else default)
        elif args.loss not in losses:
            wanted = " or ".join(f"--loss {loss}" for loss in losses)
            parser.error(f"{flag} has no meaning with --loss {args.loss}; it needs {wanted}")
    # The fixed teacher is created by the plugin, so that it also works with --accum-freq; open_clip
    # itself must not see it.
    args.teacher_model = args.teacher_pretrained = None
    if args.loss != "clip":
        args.teacher_model, args.distill_model = args.distill_model, None
        args.teacher_pretrained, args.distill_pretrained = args.distill_pretrained, None


def _settle_precision(args: argparse.Namespace, default: str) -> None:
    """On a CPU float32 unless asked otherwise: open_clip's ``default``, amp, is tens of times slower."""
    if args.precision is None:
        on_cpu = args.device == "cpu" or not (
            torch.cuda.is_available() or args.device.split(":")[0] not in ("cuda", "cpu")
        )
        args.precision = "fp32" if on_cpu and args.loss != "clip" else default


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """The flags that define the run's objective, as stored in a checkpoint."""
    used = {
        _dest(flag): getattr(args, _dest(flag))
        for flag, (losses, _, _) in _FLAGS.items()
        if args.loss in losses and flag not in _NOT_OF_THE_OBJECTIVE
    }
    return {"loss": args.loss, **used}
