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
def test_a_bad_sample_ends_the_run_at_its_start(pairs, labelled, tmp_path, caplog, cached):
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


def test_a_fault_costs_the_evaluation_only(pairs, labelled, tmp_path, caplog, monkeypatch):
    data = shutil.copytree(labelled, tmp_path / "data")
    metrics = ZeroShotEvaluation.metrics

    def damaged_before_the_first(self, model, tokenizer, epoch, args):
        shard = data / "test" / "0.tar"
        shard.write_bytes((labelled / "test" / "0.tar").read_bytes()[: 700 if epoch == 1 else None])
        return metrics(self, model, tokenizer, epoch, args)

    monkeypatch.setattr(ZeroShotEvaluation, "metrics", damaged_before_the_first)
    words = f"--loss otter --zeroshot-data {data}"
    folder = train(pairs, tmp_path, words, "--zeroshot-frequency 1 --train-num-samples 12")
    [said] = [record.message for record in caplog.records if record.levelname == "ERROR"]
    assert said.startswith("--zeroshot-data is not evaluated after epoch 1: ") and "0.tar" in said
    assert [line["epoch"] for line in results(folder)] == [2]
    assert load(folder / "epoch_1.pt")["epoch"] == 1 and load(folder / "best.pt")["epoch"] == 2
    # Alone it is made at any epoch, and costs the command. Published weights have these entries only.
    whole = load(folder / "epoch_1.pt")
    weights = tmp_path / "weights.pt"
    torch.save({key: whole[key] for key in ("epoch", "name", "state_dict")}, weights)
    only = f"{words} --model tiny-rn --resume {weights} --logs {tmp_path} --name eval".split()
    with pytest.raises(SystemExit, match=r"error: --zeroshot-data: .*0\.tar"):
        main(only)
    monkeypatch.undo()
    shutil.copytree(labelled, data, dirs_exist_ok=True)
    assert main(only) == 0
    (line,) = results(tmp_path / "eval" / "checkpoints")
    score = plain_flat_hit(weights, labelled)
    assert line["epoch"] == 1 and line["zeroshot-flat_hit@1"] == pytest.approx(score)


@pytest.mark.parametrize("words", [[], ["--weights", "student"]])
def test_best_is_exported_as_it_was_judged(best_teacher, tmp_path, capsys, words):
    """Unless the user names other weights."""
    path = best_teacher / "best.pt"
    assert load(path)["zeroshot"]["weights"] == "teacher"
    assert cli.main(["export", str(path), str(tmp_path / "out"), *words]) == 0
    said = capsys.readouterr().out
    assert f"Exporting the {'student' if words else 'teacher'} of {path}" in said
    hint = f"{path} is the best epoch of the teacher; --weights takes others"
    assert (hint in said) != bool(words)
    model = open_clip.create_model(f"local-dir:{tmp_path / 'out'}")
    state = load(path)["state_dict" if words else "state_dict_ema"]
    assert_same(dict(model.state_dict()), dict(state))


def test_a_damaged_best_is_named(pairs, labelled, best_teacher, tmp_path, capsys, caplog):
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


# ``--loss clip --ema-decay``, and ``--zeroshot-weights``.
FEW = "--lr 0.02 --precision fp32 --train-num-samples 24"


def test_clip_keeps_evaluates_and_resumes_an_ema(pairs, labelled, tmp_path):
    words = f"--ema-decay 0.7 --zeroshot-frequency 1 {FEW}"
    zeroshot = f"--zeroshot-data {labelled} --zeroshot-weights teacher"
    folder = train(pairs, tmp_path / "ema", words, zeroshot)
    last = load(folder / "epoch_2.pt")
    assert last["otter"]["settings"] == {"loss": "clip", "ema_decay": 0.7}
    # The same data as with the other losses, and the student is what it is without the EMA.
    without = load(train(pairs, tmp_path / "without", "--loss infonce", FEW) / "epoch_2.pt")
    assert_same(last["state_dict"], without["state_dict"])
    # Parameters lag behind, buffers are the student's.
    own, ema = last["state_dict"], last["state_dict_ema"]
    assert not torch.equal(own["text_projection"], ema["text_projection"])
    assert torch.equal(own["visual.bn1.running_mean"], ema["visual.bn1.running_mean"])
    for epoch, line in enumerate(results(folder), 1):
        torch.save(load(folder / f"epoch_{epoch}.pt")["state_dict_ema"], tmp_path / "teacher.pt")
        score = plain_flat_hit(tmp_path / "teacher.pt", labelled)
        assert line["zeroshot-flat_hit@1"] == pytest.approx(score)
    assert "state_dict_ema" in load(folder / "best.pt")
    resume = f"--resume {folder / 'epoch_1.pt'}"
    assert_same(load(train(pairs, tmp_path / "again", words, resume) / "epoch_2.pt"), last)


def test_the_teacher_of_locked_towers_is_evaluated_whole(pairs, labelled, tmp_path):
    words = f"--loss otter --model tiny-timm --lock-image --feature-cache {tmp_path}/features"
    zeroshot = f"--epochs 1 --zeroshot-data {labelled} --zeroshot-weights teacher"
    folder = train(pairs, tmp_path, words, zeroshot, FEW)
    torch.save(load(folder / "epoch_1.pt")["state_dict_ema"], tmp_path / "t.pt")
    (line,) = results(folder)
    score = plain_flat_hit(tmp_path / "t.pt", labelled, "tiny-timm")
    assert line["zeroshot-flat_hit@1"] == pytest.approx(score)


def test_another_runs_checkpoint_starts_the_ema_anew(pairs, tmp_path, caplog):
    first = train(pairs, tmp_path / "one", "--epochs 1", FEW) / "epoch_1.pt"
    words = f"--resume {first} --ema-decay 0.5 {FEW}"
    last = load(train(pairs, tmp_path / "two", words) / "epoch_2.pt")
    assert "was not written with this plugin's losses" in caplog.text
    assert last["otter"]["teacher_state"]["num_updates"] == 3  # two steps
    state = load(first)["state_dict"]
    average = last["state_dict_ema"]["text_projection"] - state["text_projection"]
    step = last["state_dict"]["text_projection"] - state["text_projection"]
    assert 0 < average.norm() < step.norm()  # it started where the student did


@pytest.mark.parametrize("loss", ["clip", "otter --ema-decay 0"])
def test_an_ema_that_is_not_kept_on_is_said(pairs, tmp_path, caplog, loss):
    words = "--loss otter --ema-decay 0.7 --epochs 1"
    first = train(pairs, tmp_path / "one", words, FEW) / "epoch_1.pt"
    words = f"--resume {first} --loss {loss}"
    last = load(train(pairs, tmp_path / "two", words, FEW) / "epoch_2.pt")
    assert "state_dict_ema" not in last
    assert "Resuming with other settings than before: " in caplog.text
    assert "EMA ends here, this run's checkpoints have none; to keep it go on with" in caplog.text
