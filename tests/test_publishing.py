"""Model cards, and pushing to a stand-in of the hub."""

from __future__ import annotations

import json
import sys
from unittest import mock

import open_clip
import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.utils import filter_repo_objects
from training_helpers import train

from otter_openclip import cli
from otter_openclip.model_folders import card, publish
from otter_openclip.model_folders.export import export_checkpoint

COMMIT = "0" * 40


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in of the hub's API; what is pushed is in the cache, as if it came from the hub."""
    for name, module in list(sys.modules.items()):
        for constant in ("HF_HUB_CACHE", "TRANSFORMERS_CACHE"):
            if name.startswith(("huggingface_hub", "transformers")) and hasattr(module, constant):
                monkeypatch.setattr(module, constant, str(tmp_path / "cache"))
    cached = tmp_path / "cache" / "models--lab--model"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(COMMIT, encoding="utf-8")
    api = mock.create_autospec(HfApi, instance=True)
    api.files = cached / "snapshots" / COMMIT
    api.files.mkdir(parents=True)

    def upload_folder(*, repo_id, folder_path, ignore_patterns):
        names = [path.name for path in folder_path.iterdir()]
        for name in filter_repo_objects(names, ignore_patterns=ignore_patterns):
            (api.files / name).write_bytes((folder_path / name).read_bytes())

    def upload_file(*, repo_id, path_or_fileobj, path_in_repo):
        (api.files / path_in_repo).write_bytes(path_or_fileobj)

    api.create_repo.side_effect = lambda name, **_: f"https://hub/{name}"
    api.file_exists.side_effect = lambda _, name: (api.files / name).exists()
    api.upload_folder.side_effect, api.upload_file.side_effect = upload_folder, upload_file
    monkeypatch.setattr(publish, "HfApi", lambda: api)
    return api


@pytest.fixture(scope="module")
def run(pairs, tmp_path_factory, hf_model):
    """A run with a text tower from a folder of this machine."""
    logs = tmp_path_factory.mktemp("logs")
    train(pairs, logs, "--loss", "otter", "--model", hf_model, "--epochs", "1", "--seed", "7")
    return logs / "run"


def result(path, **changes):
    metrics = {"flat_hit@1": 0.25, "mean_average_precision": 0.5, "recall": None, "worst": "nan"}
    contents = {"dataset": "wds/my birds", "model": "local-dir:/home/me/out", "pretrained": ""}
    contents |= {"task": "zeroshot_classification", "metrics": metrics, "language": "en"}
    path.write_text(json.dumps(contents | changes), encoding="utf-8")
    return path


def export(run, out, *words):
    return cli.main(["export", str(run), str(out), *map(str, words)])


def test_a_pushed_model_loads_and_names_nothing_of_this_machine(run, hub, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["--license", "cc-by-nc-4.0", "--results", result(tmp_path / "r.json"), "--private"]
    assert export(run, out, *words, "--push-to-hub", "lab/model") == 0
    assert "Pushed to https://hub/lab/model" in capsys.readouterr().out
    hub.create_repo.assert_called_once_with("lab/model", private=True, exist_ok=True)
    files = {path.name: path.read_bytes() for path in hub.files.iterdir()}
    assert files.keys() == {path.name for path in out.iterdir()}
    text = json.loads(files["open_clip_config.json"])["model_cfg"]["text_cfg"]
    assert text["hf_model_name"] == text["hf_tokenizer_name"] == "lab/model"
    for name, content in files.items():
        assert str(tmp_path.parent).encode() not in content, name
        assert b"/home/me" not in content, name
    tokens = open_clip.get_tokenizer("hf-hub:lab/model")(["red circle"])
    assert tokens.tolist() == [[2, 5, 11, 3, 0, 0, 0, 0]]
    names = "hf-hub:lab/model", f"local-dir:{out}"
    with torch.no_grad():
        features = [open_clip.create_model(name).eval().encode_text(tokens) for name in names]
    assert torch.equal(*features)


def test_the_card_states_licence_settings_results_and_how_to_load(run, tmp_path):
    files = [result(tmp_path / "a.json")]
    files += [result(tmp_path / "b.json", dataset="鳥", metrics={"flat_hit@5": 1})]
    words = {"license": "apache-2.0", "results": files, "weights": "teacher"}
    out = export_checkpoint(run, tmp_path / "out", **words)
    written = ModelCard.load(out / "README.md")
    assert written.data.license == "apache-2.0" and written.data.library_name == "open_clip"
    assert written.data.pipeline_tag == "zero-shot-image-classification"
    found = {(r.dataset_name, r.metric_name): r.metric_value for r in written.data.eval_results}
    expected = {("my birds", "flat_hit@1"): 0.25, ("my birds", "mean_average_precision"): 0.5}
    assert found == expected | {("鳥", "flat_hit@5"): 1}
    assert {r.dataset_type for r in written.data.eval_results} == {"my-birds", "鳥"}
    for line in (
        "The teacher of an open_clip training run with `--loss otter` after epoch 1",
        "open_clip.create_model_and_transforms('local-dir:out')",
        "| `sinkhorn_lambda` | 0.15 |",
        "| `batch_size` | 12 |",
        "| my birds | mean_average_precision | 0.5000 |",
        "Of the weights: apache-2.0.",
        "wu2022otter",
    ):
        assert line in written.content
    assert str(tmp_path.parent) not in written.content


def test_the_card_says_how_results_were_made_and_of_which_model(exported, tmp_path):
    changes = [
        {"templates": "a photo of {c}."},
        {"templates": ["the {c}"], "reference_crop": True, "metrics": {"flat_hit@1": 0.5}},
        {"templates": ["a {c}", "the {c}"], "language": "fr", "metrics": {"flat_hit@1": 0.75}},
    ]
    files = [result(tmp_path / f"{n}.json", **change) for n, change in enumerate(changes)]
    evaluated, model = card.read_results([*files, files[0]])  # twice the same is once
    made = {"weights": "student", "epoch": 1, "settings": {}, "licence": None}
    text = card.model_card("m", "m", **made, results=evaluated, evaluated_as=model)
    for line in (
        "Evaluated as `local-dir:out`:",
        "| my birds (a photo of {c}.) | flat_hit@1 | 0.2500 |",
        "| my birds (the {c}; resized to 256, cropped to 224) | flat_hit@1 | 0.5000 |",
        "| my birds (2 templates; fr) | flat_hit@1 | 0.7500 |",
    ):
        assert text.count(line) == 1 and text.count("mean_average_precision |") == 1
    assert len({r.dataset_config for r in ModelCard(text).data.eval_results}) == 3
    for change, message in (
        ({"model": "ViT-B-32"}, "0.json is of local-dir:out, .*other.json is of ViT-B-32; a card"),
        ({"pretrained": "/home/me/b.pt"}, "other.json is of local-dir:out, b.pt; a card is of one"),
        ({"metrics": {"flat_hit@1": 0.3}}, "other.json has another flat_hit@1 of my birds than"),
    ):
        other = result(tmp_path / "other.json", **changes[0] | change)
        with pytest.raises(ValueError, match=message):
            card.read_results([files[0], other])


def test_without_a_licence_none_is_stated(tmp_path):
    torch.save(open_clip.create_model("tiny-vit").state_dict(), tmp_path / "bare.pt")
    out = export_checkpoint(tmp_path / "bare.pt", tmp_path / "out", model="tiny-vit")
    written = ModelCard.load(out / "README.md")
    assert written.data.license is None and written.data.eval_results is None
    assert "mit" not in written.content.lower().split("# out")[0]
    assert "Of the weights: not stated." in written.content
    assert "wu2022otter" not in written.content


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--push-to-hub", "lab/model"], "--push-to-hub needs --license"),
        (["--license", "mit", "--push-to-hub", "model"], "takes OWNER/NAME, got model"),
        (["--results", "{tmp}/list.json"], "list.json: not a result file of otter-openclip eval"),
        (["--results", "{tmp}/none.json"], "none.json: no finite number among its metrics"),
    ],
)
def test_what_cannot_be_published_is_refused_at_once(run, hub, tmp_path, capsys, words, message):
    (tmp_path / "list.json").write_text("[1]", encoding="utf-8")
    result(tmp_path / "none.json", metrics={"acc1": float("nan"), "x": None})
    assert export(run, tmp_path / "out", *(w.format(tmp=tmp_path) for w in words)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not hub.mock_calls


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    return export_checkpoint(run, tmp_path_factory.mktemp("exported") / "out", license="mit")


def test_a_card_that_is_there_stays(exported, hub):
    (hub.files / "README.md").write_text("written by hand", encoding="utf-8")
    done = publish.push(exported, "lab/model", private=False)
    assert "it has a README.md already, the new one is in" in done
    assert (hub.files / "README.md").read_text(encoding="utf-8") == "written by hand"
    assert (hub.files / "open_clip_model.safetensors").is_file()


def test_a_failed_push_leaves_the_folder_and_says_so(exported, hub):
    hub.upload_folder.side_effect = OSError("no network")
    fault = f"{exported} is complete, but could not be pushed to lab"
    with pytest.raises(RuntimeError, match=fault):
        publish.push(exported, "lab/model", private=False)


def test_settings_name_no_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "towers").mkdir()
    kept = {"teacher_model": "hf-hub:lab/b", "opt": "timm/momentum", "model": "local-dir:towers"}
    params = kept | {"pretrained": "/home/me/secret/epoch_3.pt"}
    params |= {"train_data": "/home/me/x.tar", "momentum": "None", "lock_image": "False"}
    shown = card.read_settings(params, {"settings": {"loss": "kd", "alpha": 0.5}})
    assert shown == kept | {"pretrained": "epoch_3.pt", "loss": "kd", "alpha": "0.5"}
    shown = card.read_settings({"model": f"local-dir:{tmp_path}/towers"}, {})
    assert shown == {"model": "local-dir:towers"}


def test_results_are_not_deleted_by_an_overwrite(run, exported, capsys):
    inside = result(exported / "r.json")
    assert export(run, exported, "--overwrite", "--results", inside) == 2
    assert "which is replaced" in capsys.readouterr().err and inside.is_file()
