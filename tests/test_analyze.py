"""`analyze`: its statistics against plain formulas, what it reads, its errors, its page in a browser."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from data_helpers import jpeg, write_tar
from scipy.special import entr, softmax
from training_helpers import train, trained_once

from otter_openclip import cli
from otter_openclip.analysis import duplicates, matching, pair_report, verdict
from otter_openclip.analysis.embedding import Embedded, embed, load_model
from otter_openclip.analysis.reading import Reader
from otter_openclip.losses import OtterLoss

HOSTILE = "<script>x=1</script><img src=x onerror='x=1'> $\\frac{ \"&amp; \u202e"


def unit(x):
    return torch.nn.functional.normalize(x, dim=-1)


def made_up(count, shuffled=0.0, seed=0, related=True):
    """Pairs in 40 topics; a share of the captions is of other pictures."""
    rng = torch.Generator().manual_seed(seed)
    topics = unit(torch.randn(40, 16, generator=rng))[torch.arange(count) % 40]
    images, texts = (unit(topics + 0.1 * torch.randn(count, 16, generator=rng)) for _ in range(2))
    if not related:
        texts = texts @ torch.linalg.qr(torch.randn(16, 16, generator=rng))[0]
    moved = torch.randperm(count, generator=rng)[: int(shuffled * count)]
    texts[moved] = texts[moved.roll(7)]
    return images, texts


def test_matching_statistics_are_the_formulas():
    images, texts = made_up(50)
    statistics = matching.batch_statistics(images, texts, 12)
    pairs = [x[:48].reshape(4, 12, 16) for x in (images, texts)]
    off = ~np.eye(12, dtype=bool)
    p = [softmax(100 * (v @ t.T).double().numpy(), axis=1) for v, t in zip(*pairs, strict=True)]
    others = [np.where(off, x, 0) for x in p]
    expected = {
        "batches": 4,
        "diagonal": np.mean([x[~off].mean() for x in p]),
        "off_diagonal": np.mean([x[off].mean() for x in p]),
        "largest_off_diagonal": np.mean([x.max(axis=1).mean() for x in others]),
        "own_is_largest": np.mean([(x[~off] > np.where(off, x, 0).max(1)).mean() for x in p]),
        "over_0.2": np.mean([(x > 0.2).sum() for x in others]),
        "rows_with_one_over_0.2": np.mean([(x > 0.2).any(axis=1).mean() for x in others]),
    }
    assert {key: statistics[key] for key in expected} == pytest.approx(expected, rel=1e-3)
    kd = statistics["targets"]["kd"]
    assert kd["entropy"] == pytest.approx(np.mean([entr(x).sum(axis=1) for x in p]), rel=1e-3)
    assert kd["off_pair"] == pytest.approx(1 - expected["diagonal"], rel=1e-3)
    assert statistics["targets"]["infonce"] == {"entropy": 0.0, "top_share": 1.0, "off_pair": 0.0}
    otter, loss = statistics["targets"]["otter"], OtterLoss()
    plans = [loss.targets(*batch)[0].numpy() for batch in zip(*pairs, strict=True)]
    assert otter["entropy"] == pytest.approx(np.mean([entr(x).sum(1) for x in plans]), rel=1e-3)
    assert otter["top_share"] == pytest.approx(np.mean([x.max(1).mean() for x in plans]), rel=1e-3)
    assert otter["off_pair"] == 1


def embedded(images, texts):
    count = len(images)
    captions = [f"caption {i}" for i in range(count)]
    return Embedded(images, texts, captions, [b""] * count, captions, captions)


def test_the_share_of_wrong_captions():
    """Under towers whose heads know nothing of each other; a fortieth of them fit by chance."""
    images, texts = made_up(1000, 0.4, related=False)
    wrong, suspects, chart = pair_report._wrong(embedded(images, texts))
    assert wrong["share"] == pytest.approx(0.4, abs=4 * wrong["standard_error"] + 0.02)
    assert len(suspects) == pytest.approx(400, abs=50) and chart.startswith("<svg")
    for suspect in suspects[:5]:
        i, best = suspect["number"], suspect["best"]
        assert best != i and suspect["best_similarity"] > suspect["similarity"]


def test_all_captions_at_chance_and_few_pairs():
    images, texts = made_up(500, 1.0)
    wrong, suspects, _ = pair_report._wrong(embedded(images, texts))
    assert "of the pairs look wrong" in wrong["fault"] and suspects == []
    assert "too few" in pair_report._wrong(embedded(images[:30], texts[:30]))[0]["fault"]


def test_duplicates(monkeypatch):
    monkeypatch.setattr(duplicates, "_ROWS", 3)
    images, texts = made_up(30, shuffled=0.3)
    first = [int((images @ caption).argmax()) == i for i, caption in enumerate(texts)]
    assert duplicates.own_is_nearest(images, texts) == np.mean(first)
    features = unit(torch.eye(8)[:, :7] + 0.01)
    features[5], features[6] = features[1], unit(features[2] + 0.1 * features[3])
    copies = duplicates.duplicates(features, ["a", "b", "c", "d", "e", "b", "f", "b"], 5)
    assert copies.groups == [[1, 5, 7]] and copies.equal_share == 3 / 8
    assert [pair[1:] for pair in copies.pairs] == [(6, 2)] and copies.near_share == 2 / 8
    assert copies.pairs[0][0] == pytest.approx(float(features[6] @ features[2]))


@pytest.mark.parametrize(
    ("figures", "answers", "sureness"),
    [
        ((0.02, 1500, 3000, 0.1), ("Hardly", "Probably"), "fairly sure"),
        ((0.22, 3500, 3000, 0.1), ("Some of them", "Hardly"), "fairly sure"),
        ((0.45, 3000, 3000, 0.1), ("Yes, many", "Probably"), "fairly sure"),
        ((0.02, 6000, 3000, 0.1), ("Hardly", "Probably not"), "fairly sure"),
        ((0.02, 3_000_000, 3000, 0.1), ("Hardly", "Not known"), "fairly sure"),
        ((0.02, None, 3000, 0.1), ("Hardly", "It depends"), "fairly sure"),
        ((0.02, 700, 700, 0.1), ("Hardly", "Not known"), "not very sure"),
        ((0.0, 3000, 3000, 0.98), ("Hardly, if new to the model", "Hardly"), "not very sure"),
        ((0.0, 900, 900, 0.98), ("Hardly", "Probably"), "not very sure"),
    ],
)
def test_the_verdict_follows_from_the_figures(figures, answers, sureness):
    share, total, pairs, nearest = figures
    wrong = {"share": share, "standard_error": 0.01, "own_is_nearest": nearest}
    data = {"pairs": pairs, "pairs_in_all": total}
    answer = verdict.verdict({"wrong": wrong, "data": data})
    assert (answer.noise[0], answer.otter[0], answer.sureness) == (*answers, sureness)


def shard(path, count, *broken):
    files = {}
    for i in range(count):
        files |= {f"{path.stem}{i}.jpg": jpeg(i), f"{path.stem}{i}.txt": f"caption {i}".encode()}
    return write_tar(path, files | dict(broken))


def test_pairs_come_from_all_shards_and_long_ones_make_up_for_short_ones(tmp_path):
    for number, count in enumerate((40, 3, 20)):
        shard(tmp_path / f"{number}.tar", count)
    shards = str(tmp_path / "{0..2}.tar")
    reader = Reader(shards, 33)
    shards_of = [Path(pair.shard).stem for pair in reader]
    assert {x: shards_of.count(x) for x in "012"} == {"1": 3, "2": 15, "0": 15}
    assert reader.pairs_in_all is None  # not all was read
    (tmp_path / "3.tar").write_bytes(b"x" * 10**6)
    few = Reader(str(tmp_path / "{0,1,3}.tar"), 2)
    assert len(list(few)) == 2 and not few.passed_over  # the last one is not opened
    again = Reader(shards, 1000)
    assert len(list(again)) == 63 == again.pairs_in_all
    (tmp_path / "sizes.json").write_text('{"0.tar": 40, "1.tar": 3, "2.tar": 20}', encoding="utf-8")
    both = f"{shards}::{tmp_path}/more/0.tar"
    shard(tmp_path / "more" / "0.tar", 5)
    two = Reader(both, 33)
    assert len(list(two)) == 33 and two.pairs_in_all is None  # not known of the second
    (tmp_path / "more" / "sizes.json").write_text('{"0.tar": 5}', encoding="utf-8")
    two = Reader(both, 33)
    assert len(list(two)) == 33 and two.pairs_in_all == 68


def test_what_cannot_be_used_is_counted_with_its_reason(tmp_path):
    broken = [("x.jpg", b"no image"), ("x.txt", b"a"), ("y.jpg", jpeg(0)), ("z.txt", b"a")]
    path = shard(tmp_path / "0.tar", 3, *broken, ("e.jpg", jpeg(1)), ("e.txt", b" "))
    (tmp_path / "1.tar").write_bytes(path.read_bytes()[:2000])
    reader = Reader(str(tmp_path / "{0..2}.tar"), 100)
    pairs = [pair for pair in reader if pair.shard == str(path)]
    assert all(pair.image.mode == "RGB" for pair in pairs)
    # Training takes an empty caption, and none of the others; a place is among all samples.
    last = [(pair.index, pair.key[-1], pair.caption) for pair in pairs][-2:]
    assert last == [(2, "2", "caption 2"), (6, "e", "")]
    reasons = dict(reader.passed_over)
    assert reasons.pop("unreadable image: not an image that Pillow can read") == 1
    assert reasons.pop("no txt with its caption") == 2  # of one a part
    assert reasons.pop("no image (jpg, png, webp, jpeg) among its files") == 1
    assert reasons.pop(f"{tmp_path}/2.tar: No such file or directory") == 1
    ((cut, number),) = reasons.items()
    damaged = f"{tmp_path}/1.tar: cannot be read to its end: damaged or cut short"
    assert cut.startswith(damaged) and number == 1


def test_a_pipe_and_a_compressed_shard_are_read(tmp_path):
    path = shard(tmp_path / "0.tar", 4)
    assert len(list(Reader(f"pipe:gzip -c {path}", 100))) == 4
    assert len(list(Reader(f"pipe:cat {path}", 2))) == 2


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "tiny.pt"
    trained_once("tiny-vit", path)
    return path


def analyze(*words):
    return cli.main(["analyze", *map(str, words)])


def test_the_command_with_fewer_pairs_than_a_batch(weights, tmp_path, capsys):
    broken = [("x.jpg", b""), ("x.txt", b"a"), ("h.jpg", jpeg(99)), ("h.txt", HOSTILE.encode())]
    shard(tmp_path / "0.tar", 30, *broken)
    model = ["--model", "tiny-vit", "--pretrained", weights]
    output = tmp_path / "out"
    assert analyze("--train-data", tmp_path / "0.tar", *model, "--output", output) == 0
    out = capsys.readouterr().out
    assert "31 pairs could be used, 4,096 were asked for." in out and "Cannot be told" in out
    assert "Too few pairs for batches of 512, 1,024, 2,048; one batch of all 31" in out
    assert "Samples were passed over, most often (1): unreadable image: empty file." in out
    stats = json.loads((output / "stats.json").read_text(encoding="utf-8"))
    assert list(stats["batches"]) == ["31"] and stats["data"]["pairs_in_all"] == 31
    assert stats["model"] == {"name": "tiny-vit", "pretrained": str(weights)}
    assert {path.name for path in output.iterdir()} == {"report.html", "stats.json"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "tiny-vit"], "without --pretrained has random weights"),
        (["--model", "tiny-vt", "--pretrained", "{weights}"], "config for 'tiny-vt' not found"),
        (["--model", "local-dir:{tmp}/no"], "Directory .* not found"),
        (["--model", "local-dir:x", "--pretrained", "{weights}"], "brings its own weights"),
        (["--model", "tiny-rn", "--pretrained", "{weights}"], "Missing key[^$]*visual.bn1"),
        (["--train-data", "t.csv"], "t.csv is a table; make shards with .* data csv"),
        (["--train-data", "no.tar"], r"gave 0 usable .*: 1 with: no.tar: No such file"),
        (["--train-data", "{tmp}/one.tar"], "gave 1 usable pairs, .*over: 1 with: no image"),
        (["--output", "{weights}"], "report.html is a folder, or not in one that can be written"),
    ],
)
def test_errors_name_input_and_fix(weights, pairs, tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.setattr(pair_report, "report", None)
    write_tar(tmp_path / "one.tar", {"a.jpg": jpeg(1), "a.txt": b"a", "b.txt": b"b"})
    model = [] if "--model" in words else ["--model", "tiny-vit", "--pretrained", weights]
    line = ["--train-data", pairs / "{00000..00001}.tar", "--output", tmp_path / "out", *model]
    assert analyze(*line, *(word.format(weights=weights, tmp=tmp_path) for word in words)) == 2
    assert re.search(message.format(tmp=tmp_path), capsys.readouterr().err)


def test_features_that_are_not_finite_are_refused(pairs, tmp_path):
    state = open_clip.create_model("tiny-vit").state_dict()
    torch.save(state | {"text_projection": state["text_projection"] * torch.inf}, tmp_path / "x.pt")
    model = load_model("tiny-vit", str(tmp_path / "x.pt"), "cpu")
    with pytest.raises(ValueError, match="features that are not finite"):
        embed(model, Reader(str(pairs / "00000.tar"), 5), 5)


def test_the_page_shows_all_of_it_and_runs_none(tmp_path):
    images, texts = made_up(300, shuffled=0.4)
    captions = [f"{HOSTILE} {i}" if i % 3 else "W" * 500 for i in range(300)]
    captions[5:9] = ["一只猫坐在垫子上"] * 4
    pictures = [jpeg(i % 290, (160, 107)) for i in range(300)]
    keys, places = [b"%d" % (i % 290) for i in range(300)], [f"{HOSTILE}: {i}" for i in range(300)]
    data = {"train_data": HOSTILE, "pairs": 300, "pairs_in_all": 3000}
    data["passed_over"] = [{"reason": HOSTILE, "samples": 3}]
    stats = {"data": data, "model": {"name": HOSTILE, "pretrained": None}, "notes": [HOSTILE]}
    pairs = Embedded(images, texts, captions, pictures, keys, places)
    pair_report.report(tmp_path, pairs, stats, [16, 32, 64])
    tags = []
    reader = HTMLParser()
    reader.handle_starttag = lambda tag, attributes: tags.append((tag, dict(attributes)))
    reader.feed((tmp_path / "report.html").read_text(encoding="utf-8"))
    shown = [attributes for tag, attributes in tags if tag == "img"]
    assert len(shown) > 50 and all(x["src"].startswith("data:image/jpeg") for x in shown)
    assert not [tag for tag, attributes in tags if tag == "script" or "onerror" in attributes]


def test_features_of_a_training_run_are_not_computed_again(pairs, hf_model, tmp_path, capsys):
    trained_once(hf_model, tmp_path / "start.pt")
    words = f"--loss infonce --model {hf_model} --pretrained {tmp_path}/start.pt --lock-image"
    words += f" --lock-text --lock-text-freeze-layer-norm --feature-cache {tmp_path}/cache"
    train(pairs, tmp_path / "run", words)
    shards = str(pairs / "{00000..00001}.tar")
    model = load_model(hf_model, str(tmp_path / "start.pt"), "cpu")
    live = embed(model, Reader(shards, 72), 72)
    calls = []
    for part in ("visual.trunk", "text.transformer"):
        model.network.get_submodule(part).register_forward_pre_hook(lambda *_: calls.append(1))
    again = embed(model, Reader(shards, 72), 72, str(tmp_path / "cache"))
    assert f"144 of 144 features are those of {tmp_path / 'cache'}" in capsys.readouterr().out
    torch.testing.assert_close(again.images, live.images, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(again.texts, live.texts, rtol=1e-4, atol=1e-5)
    assert not calls
