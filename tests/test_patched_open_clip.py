"""open_clip_train with our patch: the stock command, with ``--loss`` and without."""

import json
import re
import shutil
import textwrap
from pathlib import Path

import forks
import open_clip
import pytest
from data_helpers import tree
from patched import ROOT, copy_packages, declare, our_entry_points, patch
from training_helpers import assert_same, flags, load, train

pytestmark = pytest.mark.skipif(
    open_clip.__version__ != "3.3.0",
    reason=f"the patch is for open_clip_torch 3.3.0, found {open_clip.__version__}",
)

# Several command lines in one process: importing open_clip takes longer than running them.
DRIVER = """
    import json, logging, sys
    import open_clip_train.main
    for line in json.load(open(sys.argv[1])):
        print("$", *line)
        try:
            result = open_clip_train.main.main(line)
        except SystemExit as stop:
            result = stop.code
        print("exit", result, file=sys.stderr)
        logging.getLogger().handlers.clear()
"""


def stock_main(lines, *, path, cwd):
    """Standard output and error of open_clip_train's main, called with each of ``lines``."""
    (cwd / "lines.json").write_text(json.dumps(lines), encoding="utf-8")
    done = forks.run("-c", textwrap.dedent(DRIVER), "lines.json", path=[*path, ROOT], cwd=cwd)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout, done.stderr


def packages(folder: Path, model_configs: Path) -> Path:
    """A copy of open_clip in ``folder`` that knows the tests' models."""
    copy_packages("open_clip", folder)
    for config in model_configs.glob("*.json"):
        shutil.copy(config, folder / "open_clip" / "model_configs")
    return folder


@pytest.fixture(scope="module")
def stock(tmp_path_factory, model_configs):
    return packages(tmp_path_factory.mktemp("stock"), model_configs)


@pytest.fixture(scope="module")
def patched(tmp_path_factory, model_configs):
    folder = packages(tmp_path_factory.mktemp("patched"), model_configs)
    patch("open_clip", folder)
    return folder


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """Folder that makes our entry points visible."""
    return declare(tmp_path_factory.mktemp("ours"), "otter-openclip", our_entry_points())


@pytest.fixture(scope="module")
def nothing(tmp_path_factory):
    """Folder that hides our entry points."""
    return declare(tmp_path_factory.mktemp("nothing"), "otter-openclip", {})


FEW = "--train-num-samples 24 --workers 1 --name"
RUNS = {
    "kd": "--loss=kd --model tiny-timm --share-logit-scale",
    "otter": "--loss otter --save-most-recent",
    "cache": "--loss=otter --model tiny-timm --lock-image --feature-cache cache",
    "crop": "--loss clip --reference-crop --workers 0 --precision fp32",
}
RESUMED = ("--epochs 2", "--epochs 3 --skip-scheduler --resume latest")


@pytest.fixture(scope="module")
def stock_command(patched, ours, pairs, labelled, tmp_path_factory):
    """Logs of the runs of RUNS, and of one that is resumed, by the patched package's own main."""
    logs = tmp_path_factory.mktemp("patched-logs")
    lines = []
    for name, extra in RUNS.items():
        lines.append(flags(pairs, logs, f"{FEW} {name} {extra}", csv=name == "crop"))
    zeroshot = f"--loss otter --zeroshot-data {labelled} --name resumed"
    lines += [flags(pairs, logs, zeroshot, more) for more in RESUMED]
    _, errors = stock_main(lines, path=(ours, patched), cwd=logs)
    assert errors.count("exit None") == len(lines), errors[-4000:]
    return logs


@pytest.mark.parametrize("name", RUNS)
def test_same_run_as_the_launchers(stock_command, pairs, tmp_path, monkeypatch, name):
    """Every step's losses, the whole checkpoint bit by bit, its keys, the arguments."""
    monkeypatch.chdir(tmp_path)
    train(pairs, tmp_path, f"{FEW} {name} {RUNS[name]}", csv=name == "crop")
    runs = []
    for folder in (stock_command / name, tmp_path / name):
        log = (folder / "out.log").read_text(encoding="utf-8")
        steps = re.findall("Logit Scale: .*", log)
        arguments = (folder / "params.txt").read_text(encoding="utf-8")
        arguments = re.sub(r"(?m)^(\w+_path|logs): .*\n", "", arguments)  # folders of the run
        files = sorted(path.name for path in (folder / "checkpoints").iterdir())
        runs.append((load(folder / "checkpoints" / "epoch_2.pt"), steps, arguments, files))
    assert steps
    assert_same(*runs)


def test_resume_and_zeroshot_data(stock_command, pairs, labelled, tmp_path):
    for more in RESUMED:
        checkpoints = train(pairs, tmp_path, f"--loss otter --zeroshot-data {labelled}", more)
    theirs = stock_command / "resumed" / "checkpoints"
    names = {"best.pt", "epoch_1.pt", "epoch_2.pt", "epoch_3.pt", "results.jsonl"}
    assert {p.name for p in theirs.iterdir()} == names
    assert (theirs / "results.jsonl").read_bytes() == (checkpoints / "results.jsonl").read_bytes()
    for file in ("best.pt", "epoch_3.pt"):
        one, other = load(checkpoints / file), load(theirs / file)
        one["name"] = other["name"]
        assert_same(one, other)


def test_two_processes_by_the_command_itself(patched, ours, pairs, tmp_path):
    """``python -m open_clip_train.main`` on two ranks: DDP on the CPU, the launcher's results."""
    words = "--loss otter --local-loss --gather-with-grad --batch-size 6 --name"
    for name, module in (("theirs", "open_clip_train.main"), ("ours", "otter_openclip.train")):
        line = flags(pairs, tmp_path, f"{words} {name}")
        forks.ranks(2, "-m", module, *line, path=(ours, patched, ROOT), cwd=tmp_path)
    one, other = (load(tmp_path / n / "checkpoints" / "epoch_2.pt") for n in ("ours", "theirs"))
    assert next(iter(one["state_dict"])).startswith("module.")
    one["name"] = other["name"]
    assert_same(one, other)


def test_launcher_on_the_patched_package(patched, nothing, pairs, tmp_path):
    """It hands the plugin over itself, whatever the entry points say, and keeps its own name."""
    path = (nothing, patched, ROOT)
    line = flags(pairs, tmp_path, "--loss otter")
    done = forks.run("-m", "otter_openclip.train", *line, path=path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    theirs = load(tmp_path / "run" / "checkpoints" / "epoch_2.pt")
    unpatched = train(pairs, tmp_path / "unpatched", "--loss otter")
    assert_same(theirs, load(unpatched / "epoch_2.pt"))
    done = forks.run("-m", "otter_openclip.train", "--sinkhron-iter", path=path, cwd=tmp_path)
    assert done.returncode == 2
    assert "python -m otter_openclip.train: error: unrecognized" in done.stderr


def without_times(text: str) -> str:
    text = re.sub(r"\d{4}-\d\d-\d\d,\d\d:\d\d:\d\d", "TIME", text)
    text = re.sub(r"Data \(t\): \S+ Batch \(t\): \S+, \S+/s, \S+/s/gpu", "SPEED", text)
    return "\n".join(line for line in text.splitlines() if line.startswith("TIME"))


@pytest.mark.parametrize("installed", [False, True])
def test_without_loss_nothing_changes(stock, patched, ours, nothing, pairs, tmp_path, installed):
    """Checkpoints byte by byte, parameters, results, logs; without plugins the help as well."""
    outputs = []
    words = f"--precision fp32 --val-data {pairs}/pairs.csv --save-most-recent"
    line = flags(pairs, Path("logs"), words, csv=True)
    bad = [["--no-such-flag"], ["--loss-dist", "x", "--lo"], ["--train-data"]]
    lines = [line] if installed else [["--help"], *bad, line]
    for name, folder in (("stock", stock), ("patched", patched)):
        cwd = tmp_path / name
        cwd.mkdir()
        path = (ours if installed else nothing, folder)
        stdout, stderr = stock_main(lines, path=path, cwd=cwd)
        usage, _, records = stderr.rpartition("exit 2\n")
        outputs.append((stdout, usage, without_times(records)))
        log = cwd / "logs" / "run" / "out.log"
        log.write_text(without_times(log.read_text(encoding="utf-8")), encoding="utf-8")
    assert outputs[0] == outputs[1]
    assert outputs[0][2] and (installed or ("--logs LOGS" in outputs[0][0] and outputs[0][1]))
    made = tree(tmp_path / "stock")
    assert {Path(f).name for f in made} >= {"epoch_2.pt", "epoch_latest.pt", "results.jsonl"}
    assert made == tree(tmp_path / "patched")


def test_errors(patched, ours, nothing, tmp_path):
    """Each names the input and what to do; the exit code is 2."""
    wrong = {
        "--loss oter": "no installed package offers 'oter' in open_clip_train.losses; there are: cl",
        "--loss": "argument --loss: expected one argument",
        "--loss twice": "several packages offer 'twice': a:A, b:B",
        "--loss otter --sinkhron-iter=4": "did you mean --sinkhorn-iter?",
        "--loss ls --alpha 1": "--alpha has no meaning with --loss ls",
    }
    points = {"one": {"twice": "a:A"}, "other": {"twice": "b:B"}}
    for name, offered in points.items():
        declare(tmp_path, name, {"open_clip_train.losses": offered})
    lines = [words.split() for words in wrong]
    _, stderr = stock_main(lines, path=(ours, patched, tmp_path), cwd=tmp_path)
    for message, found in zip(wrong.values(), stderr.split("exit 2\n")[:-1], strict=True):
        assert message in found
    (alone := tmp_path / "alone").mkdir()
    _, stderr = stock_main([["--loss", "x"]], path=(nothing, patched), cwd=alone)
    assert "'x' in open_clip_train.losses; there are: none" in stderr
    # What the plugin refuses leaves no folder.
    lines = [flags(tmp_path, tmp_path / "logs", "--loss otter --resume none.pt")]
    _, stderr = stock_main(lines, path=(ours, patched), cwd=tmp_path)
    assert "none.pt cannot be read as a checkpoint" in stderr
    assert not list((tmp_path / "logs").iterdir())


PLUGIN = """
    from open_clip_train.plugins import LossPlugin


    class Scaled(LossPlugin):
        def parse_args(self, parser, args):
            parser.add_argument("--factor", type=float, default=1.0)
            return super().parse_args(parser, args)

        def create_loss(self, args):
            stock = super().create_loss(args)

            def loss(**features):
                return {"scaled_loss": args.factor * stock(**features)["contrastive_loss"]}

            return loss
"""


def test_a_plugin_of_another_package(patched, nothing, pairs, tmp_path):
    """The seam knows nothing of ours: hooks that are not overridden do what open_clip does."""
    (tmp_path / "scaled.py").write_text(textwrap.dedent(PLUGIN), encoding="utf-8")
    declare(tmp_path, "scaled", {"open_clip_train.losses": {"scaled": "scaled:Scaled"}})
    words = "--precision fp32 --epochs 1 --name"
    names = (f"{words} x3 --loss scaled --factor 3", f"{words} stock")
    lines = [flags(pairs, tmp_path / "logs", name, csv=True) for name in names]
    stock_main(lines, path=(nothing, patched, tmp_path), cwd=tmp_path)
    first = {}
    for name, term in (("x3", "Scaled_loss"), ("stock", "Contrastive_loss")):
        log = (tmp_path / "logs" / name / "out.log").read_text(encoding="utf-8")
        first[name] = float(re.search(rf"{term}: (\S+)", log)[1])
    assert first["x3"] == pytest.approx(3 * first["stock"], rel=1e-3)
    assert load(tmp_path / "logs" / "x3" / "checkpoints" / "epoch_1.pt")["epoch"] == 1
