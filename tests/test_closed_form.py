"""``fit_heads``: canonical correlation, its invariances, and which pairs look wrong."""

import numpy as np
import pytest
import torch
from data_helpers import write_tar
from sklearn.base import clone
from sklearn.cross_decomposition import CCA
from sklearn.metrics import roc_auc_score

from otter_openclip import ClosedFormHeads, fit_heads
from otter_openclip.closed_form import course
from otter_openclip.closed_form.blocks import FOLDS, ArrayPairs, Rows, ShardPairs
from otter_openclip.closed_form.heads import Moments
from otter_openclip.closed_form.listing import WrongPair, better_captions
from otter_openclip.closed_form.wrong_pairs import similarities
from otter_openclip.frozen.store import FeatureFiles

FIXED = {"weights": False, "ridge": (0.5, 0.2), "power": 1.0}


def made(count=600, noise=0.0, seed=0, shared=8, widths=(24, 14)):
    """Features of pairs that share some directions, and which pairs are right."""
    rng = np.random.default_rng(seed)
    topics = rng.normal(size=(count, shared))
    mixing = np.random.default_rng(99)
    sides = [
        topics @ mixing.normal(size=(shared, width)) + 1.5 * rng.normal(size=(count, width)) + 2.0
        for width in widths
    ]
    wrong = rng.permutation(count)[: round(noise * count)]
    sides[1][wrong] = sides[1][np.roll(wrong, 1)]
    right = np.ones(count, bool)
    right[wrong] = False
    return *(side.astype(np.float32) for side in sides), right


def similarity(images, texts, *probes, **options):
    """All similarities of the probes under the heads fitted to images and texts."""
    model, _, _ = fit_heads(images, texts, **{**FIXED, **options})
    v, t = model.transform(*(probes or (images[:50], texts[:50])))
    return v @ t.T


def test_at_ridge_0_it_is_canonical_correlation():
    images, texts, _ = made(2000)
    heads = fit_heads(images, texts, weights=False, ridge=(0, 0), power=1.0)[0].heads_
    cca = CCA(n_components=6, max_iter=5000, tol=1e-12).fit(images, texts)
    # The heads' own columns have these correlations, too.
    x = (torch.tensor(images) - heads.image_mean) @ heads.image_weight
    y = (torch.tensor(texts) - heads.text_mean) @ heads.text_weight
    for columns in ((x, y), cca.transform(images, texts)):
        found = [abs(np.corrcoef(*(s[:, n] for s in columns))[0, 1]) for n in range(6)]
        assert found == pytest.approx(heads.correlations[:6].tolist(), abs=1e-4)


def rotated(features, seed):
    rotation = np.linalg.qr(np.random.default_rng(seed).normal(size=(features.shape[1],) * 2))[0]
    return (features @ rotation).astype(np.float32)


def test_invariances():
    images, texts, _ = made()
    plain, probes = similarity(images, texts), (images[:50], texts[:50])
    order = np.random.default_rng(3).permutation(len(images))
    for same in (
        similarity(rotated(images, 1), rotated(texts, 2)),
        similarity(images[order], texts[order], *probes),
        similarity(7 * images, texts / 5),
    ):
        np.testing.assert_allclose(same, plain, atol=1e-4)
    # Weights are repetitions.
    weight = np.random.default_rng(0).integers(0, 4, len(images))
    rows = np.repeat(np.arange(len(images)), weight)
    weighted = similarity(images, texts, *probes, sample_weight=weight)
    np.testing.assert_allclose(weighted, similarity(images[rows], texts[rows], *probes), atol=1e-4)


@pytest.mark.parametrize("noise", [0.0, 0.2, 0.4])
def test_wrong_pairs_are_counted_and_found(noise):
    images, texts, right = made(3000, noise)
    model, weights, statistics = fit_heads(images, texts)
    assert statistics.wrong.share == pytest.approx(noise, abs=0.04)
    assert abs(statistics.wrong.share - noise) < 4 * statistics.wrong.error + 0.02
    assert weights.shape == (3000,) and weights.min() > 0 and weights.max() <= 1
    if noise:
        assert roc_auc_score(right, weights) > 0.9
        assert weights[right].mean() > 0.85 and weights[~right].mean() < 0.3
        unseen = made(1000, seed=5)[:2]
        plain, _, _ = fit_heads(images, texts, weights=False)
        assert model.score(*unseen) > plain.score(*unseen)


def test_pairs_that_do_not_count_are_judged():
    images, texts, right = made(1000, noise=0.3)
    wrong = np.flatnonzero(~right)[:50]
    _, weights, _ = fit_heads(images, texts, sample_weight=~np.isin(np.arange(1000), wrong))
    assert weights[wrong].mean() < 0.3


def test_pictures_with_the_same_caption_count_as_its_own():
    """800 pictures of one kind and one caption, and 200 others: no pair is wrong."""
    rng = np.random.default_rng(0)
    images, texts, _ = made(1000)
    images[:800] = images[:1] + 0.3 * rng.normal(size=(800, images.shape[1]))
    texts[:800] = texts[:1]
    _, weights, statistics = fit_heads(images, texts)
    assert statistics.wrong.share < 0.05 and weights[:800].min() > 0.5


def test_a_picture_is_in_one_fold():
    images, texts, _ = made(303)
    images[203:] = images[:100]
    images, texts = torch.tensor(images), torch.tensor(texts)
    block = next(ArrayPairs(images, texts, torch.ones(303).double()).blocks(""))
    assert torch.equal(block.folds[:100], block.folds[203:])
    assert len(block.folds.unique()) == FOLDS


def test_a_pair_is_not_matched_with_itself(monkeypatch):
    plans, stock = [], course.sinkhorn
    monkeypatch.setattr(course, "sinkhorn", lambda *a: plans.append(stock(*a)) or plans[-1])
    images, texts, _ = made(100)
    fit_heads(images, texts, weights=False, transport_pairs=True)
    assert [plan.shape for plan in plans] == [(100, 100)] * 2
    assert all(not plan.diagonal().any() and abs(plan.sum() - 1) < 1e-4 for plan in plans)


def test_moments_of_a_plan_are_those_of_its_pairs():
    rng = torch.Generator().manual_seed(0)
    images, texts, plan = (torch.rand(*s, generator=rng) for s in ((7, 5), (9, 4), (7, 9)))
    i, j = torch.meshgrid(torch.arange(7), torch.arange(9), indexing="ij")
    rows = torch.cat([torch.ones(63, 1), images[i.flatten()], texts[j.flatten()]], dim=1).double()
    matched = Moments.matched(images, texts, plan)
    torch.testing.assert_close(matched.sums, rows.T @ (plan.double().view(-1, 1) * rows))
    texts_centre = matched.covariances(text_mean=False)
    assert not texts_centre.mean[5:].any() and texts_centre.mean[:5].all()
    every = texts[j.flatten()].double()
    expected = (plan.flatten()[:, None] * every).T @ every
    torch.testing.assert_close(texts_centre.matrix[5:, 5:], expected / plan.sum().double())


def test_unpaired_data_help_few_pairs():
    images, texts, _ = made(2000, seed=1, widths=(120, 80))
    order = np.random.default_rng(2).permutation(900)
    more = {"unpaired_images": images[100:1000], "unpaired_texts": texts[100:1000][order]}
    shares = []
    for options in (FIXED, FIXED | more):
        heads, _, _ = fit_heads(images[:100], texts[:100], **options)
        v, t = heads.transform(images[1200:], texts[1200:])
        shares.append(((v @ t.T).argmax(axis=1) == np.arange(800)).mean())
    assert shares[1] > shares[0] + 0.15


def test_with_unpaired_data_smaller_ridges_are_chosen():
    images, texts, _ = made(2000, seed=1, widths=(60, 40), shared=20)
    order = np.random.default_rng(2).permutation(900)
    more = {"unpaired_images": images[200:1100], "unpaired_texts": texts[200:1100][order]}
    pairs = images[:200], texts[:200]
    few, many = (fit_heads(*pairs, weights=False, **each)[2].setting for each in ({}, more))
    assert many.ridge_images < few.ridge_images and many.ridge_texts < few.ridge_texts


def test_it_has_the_habits_of_scikit_learn():
    images, texts, _ = made()
    model = clone(ClosedFormHeads(embed_dim=5, ridge=(1.0, 1.0)).set_params(power=0.5))
    v = model.fit(images, texts).transform(images)
    assert isinstance(v, np.ndarray) and v.shape == (600, 5)
    np.testing.assert_allclose(np.linalg.norm(v, axis=1), 1, atol=1e-5)
    w, t = model.transform(torch.tensor(images), torch.tensor(texts))
    assert isinstance(t, torch.Tensor) and torch.equal(w, torch.tensor(v))


NAN = made(100)[0]
NAN[3, 4] = np.nan
ONES = np.ones((100, 6), np.float32)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"images": NAN}, "image_features has NaN or infinity in 1 rows, first row 3"),
        ({"texts": made(99)[1]}, "image_features has 100 rows, text_features 99"),
        ({"images": made(100)[0][:20], "texts": made(100)[1][:20]}, "too few to fit heads to"),
        ({"texts": ONES}, "1 captions are too few"),
        ({"images": ONES}, "1 pictures"),
        ({"embed_dim": 15}, "embed_dim is 15, but the features have 14 directions"),
        ({"embed_dim": 0}, "embed_dim must be at least 1"),
        ({"ridge": (-1, 1)}, "ridge must lie in"),
        ({"sample_weight": np.zeros(100)}, "sample_weight must be 100 numbers"),
        ({"unpaired_images": NAN[:0]}, "unpaired_images and unpaired_texts go together"),
        ({"unpaired_images": ONES, "unpaired_texts": made(9)[1]}, "must be 24 wide as in fit"),
        ({"texts": made(100, seed=7)[1]}, "of the pairs look wrong"),
    ],
)
def test_bad_input_is_named(change, said):
    images, texts, _ = made(100)
    arguments = {"images": images, "texts": texts, **change}
    with pytest.raises(ValueError, match=said):
        fit_heads(arguments.pop("images"), arguments.pop("texts"), **arguments)


def test_fewer_pairs_than_dimensions_and_constant_features():
    images, texts, _ = made(120, widths=(300, 200))
    images[:, :9] = 4.0
    model, _, statistics = fit_heads(images, texts)
    assert statistics.rank <= 119
    assert np.isfinite(model.transform(images)).all() and model.score(images, texts) > -2
    with pytest.raises(ValueError, match="use ridges above 0"):
        fit_heads(images, texts, ridge=(0, 0), weights=False)


def test_files_of_shards_are_arrays(tmp_path):
    images, texts, _ = made(500, noise=0.2)
    sides = FeatureFiles(tmp_path / "image"), FeatureFiles(tmp_path / "text")
    shards = [str(write_tar(tmp_path / f"{number}.tar", {})) for number in range(3)]
    for files, side in zip(sides, (images, texts), strict=True):
        for shard, part in zip(shards, np.array_split(side[:, None], 3), strict=True):
            files.write(shard, part)
    pairs = ShardPairs(*sides, shards, device=torch.device("cpu"))
    heads, statistics = course.Fit(pairs, course.Options()).run()
    model, _, of_arrays = fit_heads(images, texts)
    assert statistics.setting == of_arrays.setting
    found, expected = heads.images(torch.tensor(images)), torch.tensor(model.transform(images))
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0)
    every = [WrongPair((shards[0], number), "", 0.1, 0.1) for number in range(40)]
    better = zip(every, better_captions(pairs, heads, every), strict=True)
    assert all(pair.place not in places for pair, places in better)
    rows = np.full((4, 1, 24), 1.0, np.float32)
    rows[2] = np.nan
    assert len(Rows([rows], torch.device("cpu"))[0:4]) == 3


def test_a_pair_is_judged_by_heads_that_have_not_seen_it():
    """Memorising heads give every pair they have seen a high similarity, and no other."""
    images, texts, _ = made(150, widths=(140, 120), shared=0)
    images, texts = torch.tensor(images), torch.tensor(texts)
    pairs = ArrayPairs(images, texts, torch.ones(150).double())
    fit = course.Fit(pairs, course.Options(ridge=(0.01, 0.01), power=1.0))
    with pytest.raises(ValueError, match="of the pairs look wrong"):
        fit.run()
    own, others, _ = similarities(fit.fold_heads, next(pairs.blocks("")))
    assert abs(own.mean() - others.mean()) < 0.05
    heads, _ = course.Fit(pairs, course.Options(False, (0.01, 0.01), 1.0)).run()
    assert (heads.images(images) * heads.texts(texts)).sum(dim=1).mean() > 0.5
