"""Every flag of every command, with every kind of wrong value: status 2, and flag and value are named.

The tables below are held against the parsers: a flag without an entry fails.
"""

import argparse
from importlib import import_module

import pytest
from training_helpers import parse_args

from otter_openclip import cli
from otter_openclip.training import flags as train_flags

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
LABELLED |= {"--max-missing": ("-1", "1.5", "some")} | OUTPUT

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
            "--model": FREE,
            "--pretrained": FREE,
            "--feature-cache": FREE,
            "--samples": COUNTS,
            "--batch-sizes": COUNTS,
            "--output": FREE,
            "--device": FREE,
        },
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
        {"--captions": FREE} | WORDS_OF_ONE | PICTURES | PAIRS,
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
    module = import_module((cli.DATA_COMMANDS if group else cli.COMMANDS)[name].module)
    parser = cli.Parser(prog=command)
    module.add_arguments(parser)
    return parser


def flags_of(parser):
    return {
        cli.name_of(a): a
        for a in parser._actions
        if a.option_strings and a.dest not in ("help", "version")
    }


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
    good = next(iter(action.choices)) if action.choices else "2" if action.type else "text"
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
    named = {*cli.COMMANDS, *(f"data {name}" for name in cli.DATA_COMMANDS)} - {
        "data",
        "train",
        "eval",
    }
    assert COMMANDS.keys() == named


@pytest.mark.parametrize("line", CONTRADICTIONS)
def test_contradictions_and_misspellings(line, capsys):
    assert CONTRADICTIONS[line] in refused(cli.main, line.split(), capsys)


@pytest.mark.parametrize("command", COMMANDS)
def test_an_abbreviation_is_the_flag_or_ambiguous(command):
    parser, (base, _) = parser_of(command), COMMANDS[command]
    for flag, action in flags_of(parser).items():
        for end in range(3, len(flag)):
            found = cli.find_flags(parser, flag[:end])
            assert action in found or flag[:end] in parser._option_string_actions
            if found == [action] and action.nargs == 0:
                args = parser.parse_args([*base, flag[:end]])
                assert vars(args) == vars(parser.parse_args([*base, flag]))


# Of the plugin's own flags; open_clip's are its own business.
OTTER = {
    "--loss": ("otterr", "OTTER", ""),
    "--config": FREE,
    "--reference-crop": FREE,
    "--zeroshot-data": FREE,
    "--feature-cache": FREE,
    "--feature-views": COUNTS,
    "--feature-dropout": ("-0.1", "1", "nan"),
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
NEEDED = {"--label-smoothing": "ls", "--distill-T-t": "kd"}
TRAIN = ["--train-data", "x.tar", "--model", "tiny-vit"]
TOGETHER = {
    "--alpah 0.3": "did you mean --alpha?",
    "--lock 3": "ambiguous option: --lock could match",
}


def train(words):
    parse_args(*words)


def test_wrong_values_of_the_plugins_flags(capsys):
    parser = argparse.ArgumentParser()
    train_flags._add_flags(parser)
    own = flags_of(parser)
    assert own.keys() == OTTER.keys(), "a flag without wrong values to try, or one that is gone"
    for flag, action in own.items():
        given = [*TRAIN] if flag == "--loss" else [*TRAIN, "--loss", NEEDED.get(flag, "otter")]
        for words, value in wrong_words(action, flag, OTTER[flag], lists=False):
            said = refused(train, [*given, *words], capsys)
            assert flag in said and value in said, (words, said)


@pytest.mark.parametrize("line", TOGETHER)
def test_flags_of_training_together(line, capsys):
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
