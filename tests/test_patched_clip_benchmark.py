"""clip_benchmark's own command, in a patched copy, with and without our entry points.

Every command runs in a process of its own, on copies in a temporary folder; nothing is installed.
"""

import json

import forks
import pytest
from patched import ROOT, copy_packages, declare, our_entry_points, patch
from test_eval import captioned, exported, line, shards, single_label, write_data

from otter_openclip import cli

GROUPS = ("clip_benchmark.datasets", "clip_benchmark.evaluators")


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Folders for ``sys.path``: stock, patched, and our entry points or none of ours."""
    folder = tmp_path_factory.mktemp("places")
    found = {name: folder / name for name in ("stock", "patched", "ours", "none")}
    copy_packages("clip_benchmark", found["stock"])
    patch("clip_benchmark", copy_packages("clip_benchmark", found["patched"]))
    declare(found["ours"], "otter-openclip", our_entry_points())
    declare(found["none"], "otter-openclip", {})  # hides an installed one's
    return found


CODE = "import sys; from clip_benchmark.cli import main; sys.argv[0] = 'clip_benchmark'; main()"


@pytest.fixture
def run_all(places, tmp_path):
    """Run (line, exit code) of several commands in ``tmp_path``; stdout and stderr of each."""

    def run_all(*commands, on=("patched", "ours")):
        path = [*(places.get(place, place) for place in on), ROOT]
        done = [forks.run("-c", CODE, *line, path=path, cwd=tmp_path) for line, _ in commands]
        assert [each.returncode for each in done] == [code for _, code in commands], done
        return [(each.stdout, each.stderr) for each in done]

    return run_all


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return exported(tmp_path_factory.mktemp("exported"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"), shards())


def result(folder, name="out.json"):
    return json.loads((folder / name).read_text(encoding="utf-8"))


def test_nothing_changes_without_plugins(run_all, model, data, tmp_path):
    (tmp_path / "names.txt").write_text("wds/made\n", encoding="utf-8")
    pairs, task = captioned(tmp_path / "pairs"), ("--task", "zeroshot_classification")
    commands = [
        (["eval", "--help"], 0),
        (["eval", "--task", "zeroshot_multilabel"], 2),
        (line(model, data, *task, "--dump_classnames", "--dump_templates"), 0),
        (line(model, data, *task, dataset="names.txt", output="second.json"), 0),
        (line(model, data, *task, "--skip_existing"), 0),
        (line(model, data, *task, "--distributed", "--quiet", output="third.json"), 0),
        (line(model, pairs, "--task", "zeroshot_retrieval", output="pairs.json"), 0),
        (line(model, data, dataset="goi"), 1),
        (line(model, data, dataset="wds/made", output="nowhere/out.json"), 1),
    ]
    found = {}
    for place in ("stock", "patched"):
        ran = zip(run_all(*commands, on=(place, "none")), commands, strict=True)
        # Not the progress bars and the line numbers of tracebacks.
        said = [(o, e if code == 2 else e.splitlines()[-1:] * code) for (o, e), (_, code) in ran]
        paths = list(tmp_path.glob("*.json"))
        found[place] = said, {path.name: path.read_text(encoding="utf-8") for path in paths}
        assert len(paths) == 4
        for path in paths:
            path.unlink()
    assert found["stock"] == found["patched"]
    said, _ = found["patched"]
    assert "usage: clip_benchmark eval" in said[0][0] and "zeroshot_multilabel" not in said[0][0]
    assert "Skip out.json, exists already." in said[4][0]
    assert said[7][1] == ["ValueError: Unsupported dataset: goi."]


def test_the_launchers_numbers(run_all, model, data, tmp_path):
    flags = ["--ks", "3", "1", "--templates", "imagenet", "--reference_crop", "--task"]
    words = line(model, data, "--dump_templates", *flags, "zeroshot_multilabel")
    again = line(model, data, *flags, "zeroshot_multilabel", output="again.json")
    named = line(model, data, *flags[:-1], dataset="imagenet10k", output="named.json")
    (said, _), *_ = run_all((words, 0), (again, 0), (named, 0))
    patched = result(tmp_path)
    assert "Running 'zeroshot_multilabel'" in said and patched["task"] == "zeroshot_multilabel"
    output = tmp_path / "launcher.json"
    words = line(model, data, "--dump_templates", *flags, "zeroshot_classification", output=output)
    assert cli.main(words) == 0
    changed = {"task": "zeroshot_classification", "reference_crop": True}
    assert result(tmp_path, "launcher.json") == patched | changed
    assert len(patched["templates"]) == 80 and 0 < patched["metrics"]["flat_hit@1"] < 1
    said = {"templates": "imagenet: 80 templates; reference crop"}
    assert result(tmp_path, "again.json") == patched | said
    assert result(tmp_path, "named.json") == patched | said | {"dataset": "imagenet10k"}


def test_flags_are_there_with_the_task(run_all):
    chosen = (["--task=zeroshot_multilabel"], ["--dataset", "cifar10", "goi"])
    helps = [(["eval", *words, "--help"], 0) for words in ([], *chosen)]
    wrong = [(f"eval --dataset {words}".split(), 2) for words in ("cifar10 --ks 1", "goi --ks 0")]
    (said, _), *chosen, (_, unknown), (_, low) = run_all(*helps, *wrong)
    assert "auto,zeroshot_multilabel}" in said and "--ks" not in said
    assert "Use --task=TASK --help" in " ".join(said.split())
    for said, _ in chosen:
        for flag in ("--ks", "--templates", "--reference_crop"):
            assert flag in said
    assert "unrecognized arguments: --ks 1" in unknown
    assert "argument --ks: must be at least 1, got 0" in low


def test_folders_that_cannot_be_used(run_all, model, tmp_path):
    folder = write_data(tmp_path / "eval" / "goi", shards())
    (folder / "zeroshot_classification_templates.txt").unlink()
    words = line(model, tmp_path / "eval", dataset="goi")
    single = line(model, single_label(tmp_path / "single"), "--task", "zeroshot_multilabel")
    commands = (words, 1), ([*words, "--templates", "simple"], 0), (single, 1)
    (_, bare), _, (_, one) = run_all(*commands)
    assert "Templates not specified for goi" in bare.splitlines()[-1]
    assert result(tmp_path)["metrics"]["flat_hit@1"] > 0
    assert "wds/made is no multi-label webdataset" in one.splitlines()[-1]


def test_all_processes_take_part(run_all, places, model, data, tmp_path):
    folders = [tmp_path / rank for rank in ("0", "1")]  # so that it is seen who writes what
    write_data(tmp_path / "eval" / "goi", shards())
    captioned(tmp_path / "eval" / "mscoco_captions")
    root = tmp_path / "eval" / "{dataset}"
    words = line(model, root, "--distributed", "--dataset", output="{dataset}.json")
    words += ["wds/mscoco_captions", "goi"]
    path = [places["patched"], places["ours"], ROOT]
    with forks.rank_environments(2) as ranks:
        settings = [
            {"path": path, "cwd": folder.mkdir() or folder, "env": env}
            for folder, env in zip(folders, ranks, strict=True)
        ]
        done = forks.together(2 * [("-c", CODE, *words)], settings)
    assert [rank.returncode for rank in done] == [0, 0], done[0].stderr + done[1].stderr
    said = [rank.stdout for rank in done]
    assert ["Running 'zeroshot_multilabel'" in text for text in said] == [True, False]
    first, second = ({path.name for path in folder.iterdir()} for folder in folders)
    assert first | second == {"goi.json", "mscoco_captions.json"}
    assert "goi.json" in first and not first & second
    (dealt,) = tmp_path.glob("[01]/mscoco_captions.json")
    assert "image_retrieval_recall@5" in json.loads(dealt.read_text(encoding="utf-8"))["metrics"]
    run_all((line(model, data, dataset="goi"), 0))
    found = result(tmp_path / "0", "goi.json")["metrics"]
    assert found == pytest.approx(result(tmp_path)["metrics"], abs=1e-6)


OTHER = """
import torch

class Pictures(list):
    classes, templates = ["a", "b"], ["a {c}"]

five = Pictures((torch.full((3, 32, 32), float(i)), i) for i in range(5))

def pictures(root, split, transform, download, task, **options):
    print("built", root, split, task, download, sorted(options))
    return five

pictures.default_task = "count"
pictures.collate_fn = lambda batch: [i for _, i in batch]

class Count:
    def add_arguments(self, parser):
        parser.add_argument("--factor", type=int, default=1)
    def prepare(self, args):
        print("prepared", args.factor)
        args.factor += 1
    def evaluate(self, model, dataset, dataloader, transform, tokenizer, args):
        assert len(tokenizer(["a"])) == 1 and len(dataset) == 5
        return {"count": args.factor * sum(map(sum, dataloader))}

count = Count()
plain_evaluate = type("Plain", (), {"evaluate": staticmethod(lambda **_: {"seen": sorted(_)})})
plain = lambda **_: five
"""


def test_any_package_can_take_part(run_all, model, data, tmp_path):
    (tmp_path / "other.py").write_text(OTHER, encoding="utf-8")
    (tmp_path / "broken.py").write_text("import there_is_no_such_module\n", encoding="utf-8")
    datasets = dict.fromkeys(("pictures", "twice"), "other:pictures") | {"plain": "other:plain"}
    evaluators = {"count": "other:count", "bad": "broken:x", "plain_task": "other:plain_evaluate"}
    declare(tmp_path, "some-package", dict(zip(GROUPS, (datasets, evaluators), strict=True)))
    declare(tmp_path, "rival", {GROUPS[0]: {"twice": "other:pictures"}})
    commands = (
        (["eval", "--help"], 0),  # imports none of them
        (line(model, "here", "--factor", "3", dataset="pictures"), 0),
        (line(model, "here", "--task", "plain_task", dataset="plain", output="plain.json"), 0),
        (line(model, data, "--task", "bad", output="bad.json"), 1),
        (line(model, data, dataset="twice", output="twice.json"), 1),
    )
    said = run_all(*commands, on=("patched", "none", tmp_path))
    (helped, _), (said, _), _, (_, bad), (_, twice) = said
    assert "auto,bad,count,plain_task}" in helped
    counted = result(tmp_path)
    assert counted["metrics"] == {"count": 4 * 10} and counted["task"] == "count"
    assert "prepared 3" in said
    assert "built here test count True ['annotation_file', 'custom_classname_file'," in said
    expected = ["args", "dataloader", "dataset", "model", "tokenizer", "transform"]
    assert result(tmp_path, "plain.json")["metrics"] == {"seen": expected}
    last = bad.splitlines()[-1]
    assert "'bad' of 'clip_benchmark.evaluators' cannot be loaded from the package" in last
    assert "'some-package' (broken:x)" in last and "there_is_no_such_module" in last
    assert "several packages, uninstall all but one of them: rival, some-package" in twice
