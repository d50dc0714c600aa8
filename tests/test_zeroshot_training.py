"""``--zeroshot-data``: F@K at epoch ends and ``best.pt``, without touching the training itself."""

import io
import json
import shutil
import tarfile

import numpy as np
import open_clip
import pytest
import torch
from conftest import CLASSES
from data_helpers import write_tar
from PIL import Image
from training_helpers import assert_same, load, parse_args, train

from otter_openclip import cli
from otter_openclip.training import zeroshot
from otter_openclip.training.launcher import main
from otter_openclip.training.zeroshot import ZeroShotEvaluation


def results(folder):
    lines = (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()
    return list(map(json.loads, lines))


def files_of(shard):
    with tarfile.open(shard) as tar:
        return {name: tar.extractfile(name).read() for name in tar.getnames()}


def plain_flat_hit(checkpoint, labelled, name="tiny-rn"):
    """F@1 of a checkpoint's student, one image at a time, on stock open_clip; of one label, accuracy."""
    model, _, preprocess = open_clip.create_model_and_transforms(name, str(checkpoint))
    model.eval()
    tokens = open_clip.get_tokenizer(name)([f"a {name}" for name in CLASSES])
    files = files_of(labelled / "test" / "0.tar")
    hits = []
    with torch.no_grad():
        classes = model.encode_text(tokens, normalize=True)
        for i in range(30):
            image = Image.open(io.BytesIO(files[f"{i:04d}.png"])).convert("RGB")
            feature = model.encode_image(preprocess(image)[None], normalize=True)
            nearest = int((feature @ classes.T).argmax())
            if f"{i:04d}.cls" in files:
                hits.append(int(files[f"{i:04d}.cls"]) == nearest)
            else:
                hits.append(np.load(io.BytesIO(files[f"{i:04d}.npy"]))[nearest])
    return float(np.mean(hits))


@pytest.fixture(scope="module")
def best_teacher(pairs, labelled, tmp_path_factory):
    """The checkpoints folder of a run whose best.pt is its teacher's best epoch."""
    words = f"--loss otter --ema-decay 0.7 --lr 0.02 --zeroshot-data {labelled}"
    words += " --zeroshot-frequency 1 --zeroshot-weights teacher"
    return train(pairs, tmp_path_factory.mktemp("best"), words)


@pytest.mark.parametrize("loss", ["otter", "clip"])
def test_epochs_are_evaluated_and_the_best_is_kept(pairs, labelled, tmp_path, loss):
    words = f"--loss {loss} --epochs 3 --lr 0.02 --precision fp32 --train-num-samples 24"
    given = f"--zeroshot-data {labelled} --zeroshot-frequency 1"
    folder = train(pairs, tmp_path / "with", words, given)
    lines = results(folder)
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    scores = [line["zeroshot-flat_hit@1"] for line in lines]
    assert {"zeroshot-flat_hit@10", "zeroshot-mean_average_precision"} <= lines[0].keys()
    for epoch, score in enumerate(scores, 1):
        assert score == pytest.approx(plain_flat_hit(folder / f"epoch_{epoch}.pt", labelled))
    best = load(folder / "best.pt")
    first_best = scores.index(max(scores)) + 1
    judged = best.pop("zeroshot")
    assert len(judged.pop("data")) == 24  # a fingerprint
    assert judged == {**lines[first_best - 1], "weights": "student"}
    assert_same(best, load(folder / f"epoch_{first_best}.pt"))
    if loss == "otter":
        without = train(pairs, tmp_path / "without", words)
        assert_same(load(without / "epoch_3.pt"), load(folder / "epoch_3.pt"))


def test_the_best_survives_a_resume(pairs, labelled, tmp_path, caplog):
    """Wherever its test set lies by then."""
    copy = shutil.copytree(labelled, tmp_path / "copy")
    words = "--loss otter --save-most-recent --delete-previous-checkpoint --zeroshot-frequency 1"
    words += " --train-num-samples 12"
    folder = train(pairs, tmp_path, words, f"--epochs 1 --zeroshot-data {labelled}")
    best = load(folder / "best.pt")

    def best_after(score, epochs):
        best["zeroshot"]["zeroshot-flat_hit@1"] = score
        torch.save(best, folder / "best.pt")
        train(pairs, tmp_path, words, f"--epochs {epochs} --resume latest --zeroshot-data {copy}")
        return load(folder / "best.pt")["epoch"]

    assert best_after(1.5, "2") == 1  # beyond what epoch 2 can reach
    assert len(results(folder)) == 2
    assert best_after(-0.5, "3") == 3
    # That of another test set says nothing.
    files = files_of(copy / "test" / "0.tar")
    write_tar(copy / "test" / "0.tar", {n: c for n, c in files.items() if "0029" not in n})
    assert best_after(1.5, "4") == 4 and "sought anew: " in caplog.text


def damaged(labelled, folder):
    """A copy of ``labelled`` whose last image is cut short."""
    shard = shutil.copytree(labelled, folder) / "test" / "0.tar"
    files = files_of(shard)
    write_tar(shard, files | {"0029.png": files["0029.png"][:-60]})
    return folder


def test_flags_are_parsed_without_reading_samples(labelled, monkeypatch):
    monkeypatch.setattr(tarfile, "open", None)
    assert parse_args(f"--zeroshot-data {labelled}").zeroshot_data == [str(labelled)]


def test_metrics_are_named_after_what_tells_folders_apart():
    for folders, names in (
        (["a/eval", "b/mine/"], ["eval", "mine"]),
        (["a/eval", "b/eval"], ["a-eval", "b-eval"]),
        (["/a/x/eval", "/b/x/eval"], ["a-x-eval", "b-x-eval"]),
    ):
        assert zeroshot._names(folders) == names


@pytest.mark.parametrize("cached", [False, True])
def test_a_bad_sample_ends_the_run_before_the_first_epoch(
    pairs, labelled, tmp_path, caplog, cached
):
    """It once cost the epoch. With kept features the images are encoded at that time."""
    bad = damaged(labelled, tmp_path / "bad")
    words = f"--loss otter --workers 2 --zeroshot-data {labelled} {bad}"
    if cached:
        words += f" --model tiny-timm --lock-image --feature-cache {tmp_path}/f"
    with pytest.raises(SystemExit) as stop:
        train(pairs, tmp_path, words)
    said = f"error: --zeroshot-data {bad} cannot be used: {bad}/test/0.tar: sample 0029: unreadable"
    assert said in stop.value.code and len(stop.value.code.splitlines()) == 1
    assert "Train Epoch" not in caplog.text


def test_several_folders_with_one_label_or_several(pairs, labelled, tmp_path):
    """Each folder's figures are those of a run of its own; F@1 of single labels is the accuracy."""
    single = shutil.copytree(labelled, tmp_path / "single")
    (single / "dataset_type.txt").unlink()
    files = files_of(labelled / "test" / "0.tar")
    for name in [name for name in files if name.endswith(".npy")]:
        first = int(np.load(io.BytesIO(files.pop(name))).argmax())
        files[name.replace("npy", "cls")] = str(first).encode()
    write_tar(single / "test" / "0.tar", dict(sorted(files.items())))
    (several := tmp_path / "several").symlink_to(labelled)
    words = "--loss otter --train-num-samples 24 --lr 0.02 --zeroshot-frequency 1 --zeroshot-data"
    both = train(pairs, tmp_path / "both", words, single, several)
    for folder in (single, several):
        alone = results(train(pairs, tmp_path / folder.name[:3], words, folder))
        name = f"zeroshot-{folder.name}-"
        for line, expected in zip(results(both), alone, strict=True):
            found = {key.replace(name, "zeroshot-"): value for key, value in line.items()}
            assert expected.items() <= found.items()
    best = load(both / "best.pt")["zeroshot"]
    scores = [line["zeroshot-single-flat_hit@1"] for line in results(both)]
    assert best["zeroshot-single-flat_hit@1"] == max(scores)
    assert scores[1] == pytest.approx(plain_flat_hit(both / "epoch_2.pt", single))


def test_a_fault_after_an_epoch_costs_the_evaluation_only(
    pairs, labelled, tmp_path, caplog, monkeypatch
):
    data = shutil.copytree(labelled, tmp_path / "data")
    metrics = ZeroShotEvaluation.metrics

    def damaged_before_the_first(self, model, tokenizer, epoch, args):
        shard = data / "test" / "0.tar"
        shard.write_bytes((labelled / "test" / "0.tar").read_bytes()[: 700 if epoch == 1 else None])
        return metrics(self, model, tokenizer, epoch, args)

    monkeypatch.setattr(ZeroShotEvaluation, "metrics", damaged_before_the_first)
    words = f"--loss otter --zeroshot-data {data} --zeroshot-frequency 1"
    folder = train(pairs, tmp_path, words, "--train-num-samples 12")
    [said] = [record.message for record in caplog.records if record.levelname == "ERROR"]
    assert said.startswith("--zeroshot-data is not evaluated after epoch 1: ") and "0.tar" in said
    assert [line["epoch"] for line in results(folder)] == [2]
    assert load(folder / "epoch_1.pt")["epoch"] == 1 and load(folder / "best.pt")["epoch"] == 2
    # Without training it costs the command. Published checkpoints often have these entries only.
    whole = load(folder / "epoch_1.pt")
    weights = tmp_path / "weights.pt"
    torch.save({key: whole[key] for key in ("epoch", "name", "state_dict")}, weights)
    only = f"{words} --model tiny-rn --resume {weights} --logs {tmp_path} --name eval".split()
    with pytest.raises(SystemExit, match=r"error: --zeroshot-data: .*0\.tar"):
        main(only)
    monkeypatch.undo()
    shutil.copytree(labelled, data, dirs_exist_ok=True)
    assert main(only) == 0
    assert results(tmp_path / "eval" / "checkpoints")[0]["epoch"] == 1


@pytest.mark.parametrize("words", [[], ["--weights", "student"]])
def test_best_is_exported_as_it_was_judged(best_teacher, tmp_path, capsys, words):
    """Unless the user names other weights."""
    path = best_teacher / "best.pt"
    assert load(path)["zeroshot"]["weights"] == "teacher"
    assert cli.main(["export", str(path), str(tmp_path / "out"), *words]) == 0
    said = capsys.readouterr().out
    assert f"Exporting the {'student' if words else 'teacher'} of {path}" in said
    assert (f"{path} is the best epoch of the teacher; --weights takes others" in said) != bool(
        words
    )
    model = open_clip.create_model(f"local-dir:{tmp_path / 'out'}")
    assert_same(
        dict(model.state_dict()), dict(load(path)["state_dict" if words else "state_dict_ema"])
    )


def test_a_damaged_best_is_named_with_the_fix(
    pairs, labelled, best_teacher, tmp_path, capsys, caplog
):
    """torch itself loads one with a flipped byte. What --resume says is in test_endings.py."""
    folder = shutil.copytree(best_teacher.parent, tmp_path / "run") / "checkpoints"
    bad, whole = folder / "best.pt", folder / "epoch_2.pt"
    content = bytearray(bad.read_bytes())
    content[len(content) // 2] ^= 1
    bad.write_bytes(content)
    said = f"{bad} cannot be read as a checkpoint"
    data = f"--dataset wds/x --dataset_root {labelled} --output {tmp_path}/x.json --num_workers 0"
    for line in (
        f"eval --model tiny-rn --pretrained {bad} --no_amp {data}",
        f"export {bad} {tmp_path}/out",
    ):
        assert cli.main(line.split()) == 2
        message = capsys.readouterr().err
        assert said in message and f"beside it {whole} (epoch 2) is whole" in message
    assert not (tmp_path / "x.json").exists() and not (tmp_path / "out").exists()
    # A run that goes on from another checkpoint looks for its best anew.
    words = f"--loss otter --ema-decay 0.7 --zeroshot-data {labelled} --epochs 3 --resume latest"
    train(pairs, tmp_path, words)
    assert f"The best epoch is sought anew: {said}" in caplog.text
    assert load(bad)["epoch"] == 3 and load(bad)["zeroshot"]["weights"] == "student"
