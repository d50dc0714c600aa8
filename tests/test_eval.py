"""``otter-openclip eval`` against stock ``clip_benchmark eval`` on the same exported folder."""

import io
import json
import random
import sys
from pathlib import Path

import forks
import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from clip_benchmark import cli as stock
from clip_benchmark.metrics import zeroshot_classification
from conftest import COLOURS, SHAPES, npy, picture, write_set
from data_helpers import as_file, encoded, jpeg
from PIL import Image
from safetensors.torch import save_file

from otter_openclip import cli
from otter_openclip.evaluation import classifier, evaluator, multilabel_metrics, prompts, run
from otter_openclip.model_folders.export import export_checkpoint
from otter_openclip.preprocessing import evaluation_transform

GOLDEN = Path(__file__).parent / "golden"
NAMES = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
NAMES[3:6] = ["Kakigōri 草", "Cucumber, gourd, and melon family", NAMES[0]]  # the last a duplicate


def vector(labels, value=1):
    array = np.zeros(len(NAMES), np.uint8)
    array[labels] = value
    return npy(array)


def write_data(folder, shards, **texts):
    return write_set(folder, shards, NAMES, **texts)


def shards(sizes=(17, 0, 13)):
    """Pictures of all modes and sizes, one without a label; the second shard is empty."""
    rng = random.Random(0)
    found = []
    for shard, size in enumerate(sizes):
        files = {}
        for i in range(size):
            image = picture(rng, rng.choice(COLOURS), rng.choice(SHAPES)).resize((60, 40 + i))
            files[f"{shard}{i:03d}.png"] = as_file(image)
            files[f"{shard}{i:03d}.npy"] = vector(rng.sample(range(len(NAMES)), 1 + i % 3))
        found.append(files)
    for i, mode in enumerate(("CMYK", "L", "RGB")):
        found[0] |= {f"mode{i}.jpg": encoded(i, "JPEG", mode), f"mode{i}.npy": vector([i, 7])}
    for i, mode in enumerate(("P", "LA", "RGBA", "1")):
        found[2] |= {f"mode{i}.png": encoded(i, "PNG", mode), f"mode{i}.npy": vector([i, 8])}
    found[2] |= {"none.jpg": jpeg(3), "none.npy": vector([])}
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"), shards())


def exported(folder):
    torch.manual_seed(0)
    flags = {"model": "tiny-vit", "force_context_length": 24}
    model = open_clip.create_model("tiny-vit", force_context_length=24)
    save_file(model.state_dict(), folder / "weights.safetensors")
    return export_checkpoint(folder / "weights.safetensors", folder / "model", **flags)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return exported(tmp_path_factory.mktemp("exported"))


def line(model, data, *flags, dataset="wds/made", output="out.json"):
    words = ["eval", "--model", f"local-dir:{model}", "--pretrained", "", "--dataset", dataset]
    words += ["--dataset_root", data, "--output", output, "--num_workers", "0"]
    return [str(word) for word in (*words, "--batch_size", "7", "--no_amp", *flags)]


@pytest.fixture
def ours(model, data, tmp_path, capsys):
    """Run our command, which may have to end with an error; returns the result file's contents."""

    def run(*flags, data=data, dataset="wds/made", error=None):
        output = tmp_path / "out" / "ours.json"
        output.unlink(missing_ok=True)
        code = cli.main(line(model, data, *flags, dataset=dataset, output=output))
        if error:
            assert (code, output.exists()) == (2, False)
            assert error in capsys.readouterr().err.splitlines()[-1]
            return None
        assert code == 0
        assert [path.name for path in output.parent.iterdir()] == [output.name]
        return json.loads(output.read_text(encoding="utf-8"))

    return run


@pytest.fixture
def stocks(model, data, tmp_path, monkeypatch):

    def run(*flags, data=data):
        output = tmp_path / "stock.json"
        words = line(model, data, *flags, output=output)
        monkeypatch.setattr(sys, "argv", ["clip_benchmark", *words])
        stock.main()
        return json.loads(output.read_text(encoding="utf-8"))

    return run


def test_results_are_stocks_and_flat_hit(ours, stocks, caplog):
    mine, its = ours(), stocks()
    metrics, expected = mine.pop("metrics"), its.pop("metrics")["mean_average_precision"]
    assert mine == its | {"templates": "a photo of {c}.", "reference_crop": False}
    assert list(metrics) == [*(f"flat_hit@{k}" for k in (1, 2, 5, 10)), "mean_average_precision"]
    assert metrics["mean_average_precision"] == pytest.approx(expected, abs=1e-6)
    assert 0 < metrics["flat_hit@1"] < metrics["flat_hit@10"] < 1
    assert "1 of 38 images have no true label" in caplog.text
    found = ours("--num_workers", "2", "--batch_size", "64", "--ks", "2", "18")["metrics"]
    assert found.pop("flat_hit@18") == 37 / 38
    assert found == pytest.approx({name: metrics[name] for name in found}, abs=1e-6)


def test_flat_hit_is_the_references():
    arrays = np.load(GOLDEN / "flat_hit.npz")
    recorded = json.loads((GOLDEN / "flat_hit.json").read_text(encoding="utf-8"))
    images, classes = arrays["image_features"], arrays["class_features"]
    found = multilabel_metrics(images, classes, recorded["labels"])
    for k, value in recorded["flat_hit_at_k"].items():
        assert found[f"flat_hit@{k}"] == value


def single_label(folder, templates=("a photo of {c}.",)):
    rng = random.Random(1)
    files = {}
    for i in range(20):
        files[f"{i}.png"] = as_file(picture(rng, rng.choice(COLOURS), rng.choice(SHAPES)))
        files[f"{i}.cls"] = str(i % 6).encode()
    return write_set(folder, [files], COLOURS, "classification", templates)


def test_single_label_is_stocks(ours, stocks, tmp_path, monkeypatch, caplog):
    single = single_label(tmp_path / "single")
    with monkeypatch.context() as patch:
        # Under NumPy 2.4 stock stops at float() of a one-element array.
        patch.setattr(zeroshot_classification, "float", lambda x: x.item(), raising=False)
        its = stocks(data=single)
    said = {"templates": "a photo of {c}.", "reference_crop": False}
    assert ours("--reference_crop", data=single) == its | said and "acc1" in its["metrics"]
    assert "--reference_crop is for several labels a picture" in caplog.text
    (tmp_path / "t.txt").write_text("the {} one\n", encoding="utf-8")
    other = ours("--templates", tmp_path / "t.txt", "--dump_templates", data=single)
    assert other["templates"] == ["the {c} one"]


def captioned(folder):
    rng = random.Random(2)
    files = {}
    for i, colour in enumerate(COLOURS):
        files[f"{i}.png"] = as_file(picture(rng, colour, "circle"))
        files[f"{i}.txt"] = f"a {colour} circle\na ball".encode()
    return write_data(folder, [files], kind="retrieval")


def test_retrieval_is_stocks(ours, stocks, tmp_path):
    pairs = captioned(tmp_path / "pairs")
    flags = ("--task", "zeroshot_retrieval")
    its = stocks(*flags, data=pairs)
    assert ours(*flags, data=pairs) == its and "image_retrieval_recall@5" in its["metrics"]


def test_two_processes_give_the_same_numbers(ours, model, data, tmp_path):
    """They share the images of multi-label runs; the others are dealt out whole."""
    (tmp_path / "made").symlink_to(data)
    single_label(tmp_path / "a"), single_label(tmp_path / "b")
    words = line(model, tmp_path / "{dataset}", "--distributed", output=tmp_path / "{dataset}.json")
    words += ["--dataset", "wds/a", "wds/made", "wds/b"]
    said = forks.ranks(2, "-m", "otter_openclip.cli", *words)
    files = [tmp_path / f"{name}.json" for name in ("made", *"ab")]
    made, a, b = (json.loads(file.read_text(encoding="utf-8"))["metrics"] for file in files)
    assert made == pytest.approx(ours()["metrics"], abs=1e-6)
    assert a == b == ours(data=tmp_path / "a")["metrics"]
    assert [said.count(f"Dump results to: {file}") for file in files] == [1] * 3


def test_false_is_not_true(ours, capsys):
    """clip_benchmark takes any text for true."""
    with pytest.raises(SystemExit, match="2"):
        ours("--normalize", "no")
    assert "must be True or False, got 'no'" in capsys.readouterr().err
    assert evaluator._truth("True") is True and evaluator._truth("False") is False


def test_templates(ours, data, stocks, tmp_path):
    default = ours("--dump_templates")
    assert ours("--templates", "simple", "--dump_templates") == default
    (tmp_path / "t.txt").write_text("a {c} café\n\nthe {} one, {{so}}\n", encoding="utf-8")
    mine = ours("--templates", tmp_path / "t.txt", "--dump_templates")
    assert mine["templates"] == ["a {c} café", "the {c} one, {{so}}"]
    assert ours("--templates", tmp_path / "t.txt")["templates"] == "t.txt: 2 templates"
    same = write_data(tmp_path / "same", shards(), templates=mine["templates"])
    assert ours(data=same)["templates"] == "the data set's own: 2 templates"
    its = stocks(data=same)["metrics"]["mean_average_precision"]
    assert mine["metrics"]["mean_average_precision"] == pytest.approx(its, abs=1e-6)
    assert its != default["metrics"]["mean_average_precision"]


@pytest.mark.parametrize("template", "a photo|a {name}|a {}|{c.x}|{c!z}|{".split("|"))
def test_bad_templates(template):
    with pytest.raises(ValueError, match=r"^here: line 2: ") as stop:
        prompts.check_prompts(["a {c}", template], (), "here")
    assert f"{template!r} is no template" in str(stop.value)


def test_templates_that_cannot_be_used(ours, tmp_path):
    """Each source of templates is checked, by the same function."""
    file, prompts_file = tmp_path / "t.txt", tmp_path / "c.json"
    ours("--templates", file, error="no such file; give simple, imagenet or a file")
    file.write_text("a {c}\n{c.x}", encoding="utf-8")
    prompts_file.write_text(json.dumps({"made": ["a {c}", "{c.x}"]}), encoding="utf-8")
    for flag, path in (("--templates", file), ("--custom_template_file", prompts_file)):
        ours(flag, path, error=f"{path}: line 2: '{{c.x}}' is no template")


def test_templates_of_the_data_set(ours, tmp_path):
    """Blank ones are passed over, and none is looked at beside --templates."""
    blank = write_data(tmp_path / "blank", shards(), templates=["", "a photo of {c}.", " ", ""])
    for data in (blank, single_label(tmp_path / "single", ["a photo of {c}.", ""])):
        found = ours("--dump_templates", data=data)
        assert found["templates"] == ["a photo of {c}."]
    assert ours("--dump_templates", data=blank) == ours("--dump_templates")
    bad = write_data(tmp_path / "bad", shards(), templates=["a photo of {}."])
    ours(data=bad, error="'a photo of {}.' is no template")
    assert ours("--templates", "simple", data=bad)["metrics"] == ours()["metrics"]


def test_prompts_of_each_class(ours, stocks, tmp_path):
    file = tmp_path / "prompts.json"
    prompts = {name: [f"the {name}", name] for name in NAMES}
    file.write_text(json.dumps({"made": prompts}), encoding="utf-8")
    mine = ours("--custom_template_file", file)
    assert mine["templates"] == "prompts.json for each class"
    its = stocks("--custom_template_file", file)["metrics"]["mean_average_precision"]
    assert mine["metrics"]["mean_average_precision"] == pytest.approx(its, abs=1e-6)
    ours("--custom_template_file", file, "--templates", "simple", error="exclude each other")
    file.write_text(json.dumps({"made": {name: [name] for name in NAMES[1:4]}}), encoding="utf-8")
    ours("--custom_template_file", file, error=f"'red circle'; correct {file}")


def test_reference_crop(ours, model, data, monkeypatch):
    encode, seen = run.encode_images, []
    monkeypatch.setattr(
        run, "encode_images", lambda *a, **k: seen.append(encode(*a, **k)) or seen[-1]
    )
    ours()
    found = ours("--reference_crop", "--templates", "imagenet")
    assert (found["templates"], found["reference_crop"]) == ("imagenet: 80 templates", True)
    plain, cropped = (features for features, _ in seen)
    network, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{model}")
    first = Image.open(io.BytesIO(shards()[0]["0000.png"]))
    for features, transform in ((plain, preprocess), (cropped, evaluation_transform(32))):
        with torch.no_grad():
            expected = network.eval().encode_image(transform(first)[None], normalize=True)
        assert torch.allclose(features[:1], expected, atol=1e-5)
    assert not torch.allclose(plain, cropped, atol=1e-3)


def test_a_named_data_set(ours, tmp_path):
    write_data(tmp_path / "eval" / "goi", shards())
    expected = ours() | {"dataset": "goi"}
    assert ours(data=tmp_path / "eval" / "{dataset}", dataset="goi") == expected
    task = ("--task", "zeroshot_classification")
    assert ours(*task, data=tmp_path / "eval", dataset="goi") == expected
    error = f"--dataset_root {tmp_path}/elsewhere cannot be used"
    ours(data=tmp_path / "elsewhere", dataset="goi", error=error)


def test_saved_and_loaded_classifier(ours, stocks, tmp_path):
    mine = ours("--save_clf", tmp_path / "clf.pt")["metrics"]
    weights = torch.load(tmp_path / "clf.pt")
    assert weights.shape == (16, len(NAMES)) and not list(tmp_path.glob("*.tmp"))
    stocks("--save_clf", str(tmp_path / "stock.pt"))
    assert torch.allclose(weights, torch.load(tmp_path / "stock.pt"), rtol=0, atol=1e-6)
    for files in (["clf.pt", "clf.pt"], ["stock.pt"]):
        loaded = ours("--load_clfs", *(tmp_path / file for file in files))
        assert loaded["templates"] == f"class features of {', '.join(files)}"
        assert loaded["metrics"] == pytest.approx(mine, abs=1e-6)


def test_a_folder_without_images(ours, tmp_path, caplog):
    """All faults of folders are in test_evaluation_folders.py."""
    error = f"no images in 2 shards, first {tmp_path}/empty/test/0.tar"
    ours(data=write_data(tmp_path / "empty", [{}, {}]), error=error)
    assert "1 names stand for several classes, e.g. 'red circle'" in caplog.text


@pytest.mark.parametrize(
    ("kind", "labels", "message", "workers"),
    [
        ("multilabel", {"x.npy": vector([1], value=2)}, "label vector with values other", "2"),
        ("multilabel", {"x.jpg": jpeg(3)[:-99], "x.npy": vector([1])}, "unreadable image:", "0"),
        ("classification", {"x.cls": b"18"}, "its cls, b'18', is none of the 18 classes", "0"),
        ("retrieval", {"x.txt": b" "}, "empty caption", "2"),
    ],
)
def test_a_bad_sample_ends_the_run(ours, tmp_path, kind, labels, message, workers):
    """With clip_benchmark's own loader too, and from a loader's process."""
    files = {"a.jpg": jpeg(0), "a.npy": vector([1]), "a.cls": b"1", "a.txt": b"a"}
    bad = write_data(tmp_path / "bad", [files, {"x.jpg": jpeg(1)} | labels], kind=kind)
    task = "zeroshot_retrieval" if kind == "retrieval" else "zeroshot_classification"
    error = f"otter-openclip eval: error: {bad}/test/1.tar: sample x: {message}"
    ours("--task", task, "--num_workers", workers, data=bad, error=error)


def test_class_features_are_the_plain_ones(model):
    network = open_clip.create_model(f"local-dir:{model}").eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{model}")
    texts = [(f"a photo of {name}.", name) for name in [*NAMES, *map(str.upper, NAMES)]]
    for size in (1, 5, 256):
        found = classifier.class_features(network, tokenizer, texts, device="cpu", batch_size=size)
        for written, feature in zip(texts, found, strict=True):
            with torch.no_grad():
                mean = network.encode_text(tokenizer(list(written)), normalize=True).mean(0)
            assert torch.allclose(feature, F.normalize(mean, dim=0), atol=1e-5)
        assert torch.equal(found[: len(NAMES)], found[len(NAMES) :])  # the tokens are equal
