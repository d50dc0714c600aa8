"""The benchmark of the builders, on a few pictures."""

from benchmarks import data


def test_the_benchmark_runs(tmp_path):
    bench = data.Bench(tmp_path, images=30)
    assert 10_000 < bench.bytes / 30 < 30_000
    bench.runs = {name: bench.runs[name] for name in ("data csv, all.zip", "plain loop")}
    rows = {row["what"]: row for row in data.compare(bench, [1], rounds=1)}
    assert rows["plain loop"]["of plain"] == 1 and rows["data csv, all.zip"]["images/s"] > 0
    index = data.index(1000)
    assert index["names"] == 1000 and index["disk MiB"] > 0.01
