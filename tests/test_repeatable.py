"""What the data order depends on, one at a time."""

import random

from open_clip_train.data import SharedEpoch

from otter_openclip.training import order


def test_order_follows_from_seed_rank_worker_epoch_and_pass_alone(monkeypatch):
    """Each changes it, a pass over the shards within an epoch too; nothing that ran before does."""

    def draw(seed=1, rank=2, worker=3, epoch=4, passes=0, before=()):
        monkeypatch.setattr(order, "_worker_id", lambda: worker)
        shared, rng = SharedEpoch(0), random.Random()
        stage = order._SeedPass(shared, seed, rank, rng)
        for value in (*before, *[epoch] * (passes + 1)):
            shared.set_value(value)
            assert stage("source") == "source"
        return rng.random()

    same = draw()
    assert draw() == same == draw(before=(3,)) == draw(before=(0, 1, 1, 1, 2))
    others = [
        draw(**{name: value})
        for name in ("seed", "rank", "worker", "epoch", "passes")
        for value in (7, 8)
    ]
    assert len({same, *others}) == 11
    assert draw(passes=2, before=(3,)) == draw(passes=2)
