"""Every flag of every command, with every kind of wrong value: status 2, and flag and value are named.

The tables below are held against the parsers: a flag without an entry fails.
"""

import argparse
from importlib import import_module

import open_clip
import pytest
from open_clip_train.params import parse_args as stock_parse
from training_helpers import parse_args

from otter_openclip import cli, data, flags
from otter_openclip.training import stock_flags, train_flags

WORDS, FREE = ("zzz",), ()  # no choice; any text is good
COUNTS = ("0", "-3", "1.5", "many", "nan", "99999999999999999999")
SEEDS = COUNTS[1:]
POSITIVE = ("0", "-1", "nan", "inf", "wide")
WORDS_OF_ONE = {"--csv-separator": FREE, "--csv-img-key": FREE, "--csv-caption-key": FREE}
OUTPUT = {"--output": FREE, "--resize": COUNTS, "--shard-size": COUNTS, "--shards": COUNTS}
OUTPUT |= {"--workers": COUNTS}
PAIRS = OUTPUT | {"--seed": SEEDS, "--no-shuffle": FREE}
PICTURES = {"--images": FREE, "--img2dataset": FREE}
LABELLED = {"--classes": FREE, "--labels": FREE, "--images": FREE}
LABELS_GIVEN = ["--classes", "a", "--labels", "b", "--images", "c", "--output", "d"]
LABELLED |= {"--max-missing": ("-1", "1.5", "120%", "some", "nan%")} | OUTPUT

# Words that are complete, then every flag with wrong values.
COMMANDS = {
    "export": (
        ["run", "out"],
        {
            "--model": FREE,
            "--weights": WORDS,
            "--overwrite": FREE,
            "--push-to-hub": FREE,
            "--license": FREE,
            "--results": FREE,
            "--private": FREE,
            "--force-image-size": COUNTS,
            "--force-context-length": COUNTS,
            "--force-quick-gelu": FREE,
            "--force-custom-text": FREE,
            "--image-mean": ("nan", "inf", "grey"),
            "--image-std": POSITIVE,
            "--image-interpolation": WORDS,
            "--image-resize-mode": WORDS,
            "--reference-crop": FREE,
        },
    ),
    "convert": (
        ["x.pth.tar", "out"],
        {"--weights": WORDS, "--text-model": FREE, "--overwrite": FREE},
    ),
    "towers": (
        ["out", "--image", "resnet18", "--text", "folder"],
        {
            "--image": FREE,
            "--image-weights": FREE,
            "--text": FREE,
            "--text-weights": FREE,
            "--text-pooler": WORDS,
            "--embed-dim": COUNTS,
            "--image-head": WORDS,
            "--text-head": WORDS,
            "--image-size": COUNTS,
            "--image-mean": ("nan 1 1", "1 inf 1", "1 1", "grey 1 1"),
            "--image-std": ("0 1 1", "1 1 -1", "1 1", "1 1 inf"),
            "--image-interpolation": WORDS,
            "--context-length": COUNTS,
            "--init-logit-scale": ("-1", "5", "nan", "warm"),
            "--seed": SEEDS,
            "--overwrite": FREE,
        },
    ),
    "analyze": (
        ["--train-data", "a.tar", "--model", "tiny-vit"],
        {
            "--train-data": FREE,
            "--dataset-type": WORDS,
            "--model": FREE,
            "--pretrained": FREE,
            "--feature-cache": FREE,
            "--samples": COUNTS,
            "--batch-sizes": COUNTS,
            "--output": FREE,
            "--device": FREE,
        }
        | WORDS_OF_ONE,
    ),
    "patch": (
        ["open_clip"],
        {"--check": FREE, "--apply": FREE, "--revert": FREE, "--target": FREE},
    ),
    "demo": (
        [],
        {
            "--output": FREE,
            "--seed": SEEDS,
            "--all": FREE,
            "--quick": FREE,
            "--data": FREE,
            "--eval": FREE,
        },
    ),
    "data open-images": (LABELS_GIVEN, LABELLED),
    "data imagenet10k": (LABELS_GIVEN, LABELLED),
    "data cc3m": (
        ["--captions", "a", "--img2dataset", "b", "--output", "d"],
        {"--captions": FREE, "--report": FREE} | PICTURES | PAIRS,
    ),
    "data yfcc15m": (
        ["--subset", "a", "--metadata", "b", "--images", "c", "--output", "d"],
        {"--subset": FREE, "--metadata": FREE} | PICTURES | PAIRS,
    ),
    "data wit": (
        ["--tables", "a", "--images", "c", "--output", "d"],
        {"--tables": FREE, "--languages": FREE, "--caption-fields": WORDS} | PICTURES | PAIRS,
    ),
    "data csv": (
        ["--captions", "a", "--output", "d"],
        {"--captions": FREE, "--no-quotes": FREE} | WORDS_OF_ONE | PICTURES | PAIRS,
    ),
    "data hf": (["--dataset", "a", "--output", "d"], {"--dataset": FREE, "--text-key": FREE} | PAIRS),
    "data inspect": (
        ["a.tar"],
        {"--sheet": FREE, "--pictures": COUNTS, "--json": FREE, "--workers": COUNTS},
    ),
}  # fmt: skip
CONTRADICTIONS = {
    "patch open_clip --check --apply": "--apply: not allowed with argument --check",
    "data csv --captions a --output b --images c --img2dataset d": "--img2dataset: not allowed with",
    "data csv --captions a --output b --shards 3 --shard-size 9": "--shard-size: not allowed with",
    "data wit --tables a --output b": "one of the arguments --images --img2dataset is required",
    "data csv --captons a --output b": "--captons (did you mean --captions?)",
    "data open-images --class a --label b --image c --outptu d": "--outptu (did you mean --output?)",
    "data csv --captions a --output b --shuffle": "unrecognized arguments: --shuffle",
    "data csv --captions a --output b --csv- c": "ambiguous option: --csv- could match --csv-sep",
    "towers out --image a --text b --image-we c --image- d": "ambiguous option: --image- could match",
    "export run out --force 3": "ambiguous option: --force could match",
    "export run out more": "unrecognized arguments: more",
    "export run": "the following arguments are required: OUT",
}


def parser_of(command):
    *group, name = command.split()
    module = import_module((data.COMMANDS if group else cli.COMMANDS)[name].module)
    parser = flags.Parser(prog=command)
    module.add_arguments(parser)
    return parser


def flags_of(parser):
    return {flags.name_of(a): a for a in parser._actions if a.option_strings and a.dest != "help"}


def refused(run, words, capsys):
    with pytest.raises(SystemExit) as stop:
        run(words)
    said = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2, (words, stop.value.code)
    return next(line for line in said if "error: " in line)


def choosy(action):
    """Whether some words are no value of a flag."""
    try:
        return bool(action.choices) or (action.type or str)("a word") is None
    except (ValueError, argparse.ArgumentTypeError):
        return True


def wrong_words(action, flag, values, *, lists=True):
    """(words, what the message says) for a flag; with ``lists`` two lists of values are wrong."""
    good = next(iter(action.choices)) if action.choices else "1" if action.type else "text"
    several = action.nargs if isinstance(action.nargs, int) else 1
    if action.nargs == 0:
        yield [f"{flag}=yes"], "yes"
        return
    yield [flag], "expected"
    if not choosy(action) and action.type is not str:
        yield [flag, ""], "expected a value, got ''"
    if (action.nargs in ("+", "*") and lists) or flag == "--config":
        yield [flag, good, flag, good], "given more than once"
    for value in values:
        words = value.split()
        yield [flag, *words] if several > 1 else [f"{flag}={value}"], "" if several > 1 else value


def without(base, flag):
    """``base`` without the flag and its values."""
    if flag not in base:
        return base
    start = base.index(flag)
    return base[:start] + base[start + 2 :]


@pytest.mark.parametrize("command", COMMANDS)
def test_wrong_values(command, capsys):
    base, table = COMMANDS[command]
    found = flags_of(parser_of(command))
    assert table.keys() == found.keys(), "a flag without wrong values to try, or one that is gone"
    for flag, action in found.items():
        assert bool(table[flag]) == choosy(action), flag
        given = without(base, flag)
        if flag in ("--images", "--img2dataset"):
            given = without(without(given, "--images"), "--img2dataset")
        for words, value in wrong_words(action, flag, table[flag]):
            said = refused(cli.main, [*command.split(), *given, *words], capsys)
            assert flag in said and value in said, (words, said)


def test_every_command_is_here():
    named = {*cli.COMMANDS, *(f"data {name}" for name in data.COMMANDS)} - {"data", "train", "eval"}
    assert COMMANDS.keys() == named


@pytest.mark.parametrize("line", CONTRADICTIONS)
def test_contradictions_and_misspellings(line, capsys):
    assert CONTRADICTIONS[line] in refused(cli.main, line.split(), capsys)


def test_a_seed_for_no_shuffle(tmp_path, capsys):
    (tmp_path / "t.csv").write_text("filepath,title\n")
    words = ["data", "csv", "--captions", tmp_path / "t.csv", "--output", tmp_path / "out"]
    assert cli.main([*map(str, words), "--no-shuffle", "--seed", "0"]) == 2
    assert "--no-shuffle has no use for --seed; drop one" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_an_abbreviation_is_the_flag_or_ambiguous(command):
    parser, (base, _) = parser_of(command), COMMANDS[command]
    for flag, action in flags_of(parser).items():
        for end in range(3, len(flag)):
            found = flags.find_flags(parser, flag[:end])
            assert action in found or flag[:end] in parser._option_string_actions
            if found == [action] and action.nargs == 0:
                args = parser.parse_args([*base, flag[:end]])
                assert vars(args) == vars(parser.parse_args([*base, flag]))


# Of the plugin's own flags; open_clip's are in `stock_flags.CHECKS`.
OTTER = {
    "--loss": ("otterr", "OTTER", ""),
    "--config": FREE,
    "--reference-crop": FREE,
    "--zeroshot-data": FREE,
    "--feature-cache": FREE,
    "--feature-views": COUNTS,
    "--feature-precision": ("fp16", "bf8"),
    "--alpha": ("-0.1", "1.1", "nan", "half"),
    "--label-smoothing": ("-0.1", "1.1", "nan"),
    "--ema-decay": ("-0.1", "1.1", "inf"),
    "--sinkhorn-lambda": ("0", "-1", "1e-4", "inf", "nan", "small"),
    "--sinkhorn-iter": COUNTS,
    "--vv-coef": ("-1", "2e6", "nan"),
    "--tt-coef": ("-1", "2e6", "nan"),
    "--keep-diag": FREE,
    "--ot-scope": WORDS,
    "--loss-impl": ("fast", ""),
    "--distill-T-t": ("0", "-1", "2e6", "nan"),
    "--share-logit-scale": FREE,
    "--init-distill-logit-scale": ("-1", "4.7", "nan"),
    "--teacher-mode": WORDS,
    "--zeroshot-weights": WORDS,
}
STOCK = {
    "--train-num-samples": COUNTS,
    "--val-num-samples": COUNTS,
    "--logs": ("",),
    "--name": ("",),
    "--workers": SEEDS,
    "--batch-size": COUNTS,
    "--epochs": COUNTS,
    "--epochs-cooldown": SEEDS,
    "--lr": ("-1", "nan", "inf", "high"),
    "--beta1": ("-1", "1.5", "nan"),
    "--beta2": ("-1", "1.5", "nan"),
    "--eps": ("-1", "nan"),
    "--wd": ("-1", "inf"),
    "--momentum": ("-1", "nan"),
    "--warmup": SEEDS,
    "--opt": ("adam", "timm/adamwww", "sgd"),
    "--lr-scheduler": ("cosin", "step", ""),
    "--lr-cooldown-end": ("-1", "nan"),
    "--lr-cooldown-power": ("-1", "nan"),
    "--save-frequency": SEEDS,
    "--zeroshot-frequency": SEEDS,
    "--val-frequency": SEEDS,
    "--lock-image-unlocked-groups": SEEDS,
    "--lock-text-unlocked-layers": SEEDS,
    "--image-mean": ("nan", "inf", "1 1"),
    "--image-std": ("0", "-1", "nan", "1 1"),
    "--force-context-length": COUNTS,
    "--force-image-size": (*COUNTS, "32 32 32"),
    "--force-patch-dropout": ("-0.1", "1.1", "nan"),
    "--accum-freq": COUNTS,
    "--device": ("gpu", "cuda:x", ""),
    "--report-to": ("tensorbord", "tb"),
    "--seed": SEEDS,
    "--grad-clip-norm": ("0", "-1", "nan"),
    "--log-every-n-steps": COUNTS,
    "--remote-sync-frequency": COUNTS,
}
ELSEWHERE = {
    *("--dataset-type", "--precision", "--image-interpolation", "--image-resize-mode"),
    "--remote-sync-protocol",  # argparse has their choices
    "--aug-cfg",  # a case of its own below
    *("--coca-caption-loss-weight", "--coca-contrastive-loss-weight"),  # CoCa is refused
}
NEEDED = {"--label-smoothing": "ls", "--distill-T-t": "kd"}
TRAIN = ["--train-data", "x.tar", "--model", "tiny-vit"]
TOGETHER = {
    "--train-data-upsampling-factors 1::2": "add it",
    "--lr-scheduler const-cooldown": "needs --epochs-cooldown N",
    "--opt timm/adamw": "has no learning rate of its own; add --lr",
    "--opt timm/adamw --lr 1 --beta1 0.9": "--beta1 and --beta2 go together",
    "--opt timm/lamb --lr 1": "--opt timm/lamb needs --eps",
    "--opt timm/lars --lr 1": "--opt timm/lars needs --eps",  # fails in its first step
    "--trace": "a traced model cannot be trained; drop it",
    "--aug-cfg scale": "argument --aug-cfg: expected NAME=VALUE",
    "--aug-cfg scale=(0.9,": "argument --aug-cfg: expected NAME=VALUE",
    "--aug-cfg scal=(0.9,1.0)": "argument --aug-cfg: invalid choice: 'scal'; did you mean scale?",
    "--alpah 0.3": "did you mean --alpha?",
    "--lock 3": "ambiguous option: --lock could match",
}


@pytest.fixture(scope="module")
def stock_parser():
    parsers = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", lambda self, *_: parsers.append(self))
        with pytest.raises(AttributeError):
            stock_parse(["--model", "tiny-vit"])
    return parsers[0]


def train(words):
    parse_args(*words)


@pytest.mark.skipif(hasattr(open_clip, "task"), reason="the table is of open_clip 3.x's flags")
def test_wrong_values_of_training(stock_parser, capsys):
    actions = {a.option_strings[0]: a for a in stock_parser._actions if a.dest != "help"}
    assert stock_flags.CHECKS.keys() == STOCK.keys()
    numbers = {f for f, a in actions.items() if a.type not in (None, str) or a.choices}
    assert numbers <= STOCK.keys() | ELSEWHERE
    for flag, values in STOCK.items():
        several = actions[flag].nargs == "+"
        for value in values:
            words = [flag, *value.split()] if several else [f"{flag}={value}"]
            said = refused(train, [*TRAIN, "--loss", "otter", *words], capsys)
            assert f"argument {flag}: " in said and (
                several or value.removeprefix("timm/") in said
            ), said


def test_wrong_values_of_the_plugins_flags(capsys):
    parser = argparse.ArgumentParser()
    own = {a.option_strings[0]: a for a in train_flags._add_flags(parser)}
    assert own.keys() == OTTER.keys(), "a flag without wrong values to try, or one that is gone"
    for flag, action in own.items():
        given = [*TRAIN] if flag == "--loss" else [*TRAIN, "--loss", NEEDED.get(flag, "otter")]
        for words, value in wrong_words(action, flag, OTTER[flag]):
            said = refused(train, [*given, *words], capsys)
            assert flag in said and value in said, (words, said)


@pytest.mark.parametrize("line", TOGETHER)
def test_flags_of_training_together(line, capsys):
    if line == "--trace" and hasattr(open_clip, "task"):
        pytest.skip("open_clip 4.x has no --trace")
    assert TOGETHER[line] in refused(train, [*TRAIN, "--loss", "otter", *line.split()], capsys)


def test_of_a_repeated_flag_the_last_counts_and_that_is_said(capsys):
    words = ["--batch-size", "2", "--batch=3", "--loss", "kd", "--loss", "otter", "--lock-image"]
    args = parse_args(*TRAIN, *words, "--lock-image")
    assert (args.batch_size, args.loss) == (3, "otter")
    said = capsys.readouterr().err.splitlines()
    for flag in ("--batch-size", "--loss"):
        assert (
            sum(f"argument {flag}: given more than once; the last counts" in x for x in said) == 1
        )
    assert "--lock-image" not in str(said)
    parser = parser_of("data csv")
    line = ["--captions", "a", "--output", "b", "--resize", "3", "--resize", "4"]
    assert parser.parse_args(line).resize == 4
    assert "--resize: given more than once; the last counts" in capsys.readouterr().err
