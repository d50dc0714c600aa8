"""Every flag of every command, with wrong values: status 2, and flag and value are named."""

import argparse
import re
from importlib import import_module

import pytest
from training_helpers import parse_args

from otter_openclip import cli
from otter_openclip.training import flags as train_flags

LABELLED = "--classes a --labels b --images c --output d"
# Words that are complete.
COMMANDS = {
    "fit": "o --model t --train-data a.tar",
    "export": "run out",
    "convert": "x.pth.tar out",
    "towers": "out --image resnet18 --text folder",
    "analyze": "--train-data a.tar --model tiny-vit",
    "patch": "open_clip",
    "compare": "o --model t --train-data a.tar --eval e",
    "demo": "",
    "data open-images": LABELLED,
    "data imagenet10k": LABELLED,
    "data cc3m": "--captions a --img2dataset b --output d",
    "data yfcc15m": "--subset a --metadata b --images c --output d",
    "data wit": "--tables a --images c --output d",
    "data csv": "--captions a --output d",
    "data hf": "--dataset a --output d",
    "data inspect": "a.tar",
}
CSV = "data csv --captions a --output b"
TOWERS = f"towers {COMMANDS['towers']}"
WRONG_LINES = {
    # Values beyond a bound.
    f"{CSV} --resize 0": "--resize: must be at least 1, got 0",
    f"{CSV} --workers 1.5": "--workers: expected a whole number, got '1.5'",
    f"{CSV} --shard-size 99999999999999999999": "--shard-size: must be at",
    f"{CSV} --seed -3": "--seed: must be at least 0",
    "analyze --train-data a.tar --model tiny-vit --batch-sizes 8 0": "--batch-sizes: must be at",
    f"{TOWERS} --image-std 1 1 -1": "--image-std: must be above 0",
    f"{TOWERS} --image-mean 0 inf 0": "--image-mean: must be finite, got inf",
    f"{TOWERS} --init-logit-scale 5": "--init-logit-scale: must be at least 0",
    "export run out --image-std inf": "--image-std: must be",
    f"fit {COMMANDS['fit']} --precision bf16": "invalid choice: 'bf16'",  # needs other weights
    # Contradictions.
    "patch open_clip --check --apply": "--apply: not allowed with argument --check",
    f"{CSV} --images c --img2dataset d": "--img2dataset: not allowed with",
    "data wit --tables a --output b": "one of the arguments --images --img2dataset is required",
    # Misspellings and abbreviations.
    "dta inspect": "did you mean data?",
    "data imagenet-10k": "did you mean imagenet10k?",
    "convert a b --weights techer": "did you mean teacher?",
    "data csv --captons a --output b": "--captons (did you mean --captions?)",
    "data open-images --class a --label b --image c --outptu d": "--outptu (did you mean --output?)",
    f"{CSV} --csv- c": "ambiguous option: --csv- could match --csv-sep",
}


def parser_of(command):
    *group, name = command.split()
    module = import_module((cli.DATA_COMMANDS if group else cli.COMMANDS)[name].module)
    parser = cli.Parser(prog=command)
    module.add_arguments(parser)
    return parser


def flags_of(parser):
    flags = {cli.name_of(action): action for action in parser._actions if action.option_strings}
    return {name: flag for name, flag in flags.items() if flag.dest not in ("help", "version")}


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


def wrong_words(action, flag):
    """(words, what the message says) for a flag."""
    good = next(iter(action.choices)) if action.choices else "2" if action.type else "text"
    several = action.nargs if isinstance(action.nargs, int) else 1
    if action.nargs == 0:
        yield [f"{flag}=yes"], "yes"
        return
    yield [flag], "expected"
    if flag == "--config":
        yield [flag, good, flag, good], "given more than once"
    if choosy(action):
        for value in ("zzz", "nan"):
            yield [flag, *[value] * several], value
    elif action.type is not str:
        yield [flag, ""], "expected a value, got ''"


@pytest.mark.parametrize("command", COMMANDS)
def test_wrong_values(command, capsys):
    for flag, action in flags_of(parser_of(command)).items():
        given = "--images|--img2dataset" if flag in ("--images", "--img2dataset") else flag
        line = re.sub(rf"({given}) \S+", "", COMMANDS[command]).split()
        for words, value in wrong_words(action, flag):
            said = refused(cli.main, [*command.split(), *line, *words], capsys)
            assert flag in said and value in said, (words, said)


def test_every_command_is_here():
    commands = {*cli.COMMANDS, *(f"data {name}" for name in cli.DATA_COMMANDS)}
    assert COMMANDS.keys() == commands - {"data", "train", "eval"}


@pytest.mark.parametrize("line", WRONG_LINES)
def test_wrong_lines(line, capsys):
    assert WRONG_LINES[line] in refused(cli.main, line.split(), capsys)


# Of the plugin's own flags of training; open_clip's are its own business.
LOSS_WITH = {"--label-smoothing": "ls", "--distill-T-t": "kd"}
TRAIN = ["--train-data", "x.tar", "--model", "tiny-vit"]


def test_wrong_values_of_the_plugins_flags(capsys):
    parser = argparse.ArgumentParser()
    train_flags._add_flags(parser)
    for flag, action in flags_of(parser).items():
        loss = [] if flag == "--loss" else ["--loss", LOSS_WITH.get(flag, "otter")]
        for words, value in wrong_words(action, flag):
            said = refused(lambda line: parse_args(*line), [*TRAIN, *loss, *words], capsys)
            assert flag in said and value in said, (words, said)


def test_lists_that_are_given_twice_are_joined():
    line = "--captions a --output b --images c --images d e".split()
    assert [path[-1] for path in parser_of("data csv").parse_args(line).images] == ["c", "d", "e"]
    for command in COMMANDS:  # but numbers, of which the last ones count
        for flag in flags_of(parser_of(command)).values():
            if (
                flag.nargs == "+"
                and not flag.default
                and getattr(flag.type, "__name__", "") != "parse"
            ):
                assert type(flag) is argparse._ExtendAction, (command, flag.dest)
