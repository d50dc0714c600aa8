"""The benchmark of the builders, on a few pictures."""

import json

from benchmarks import data


def test_the_benchmark_runs(tmp_path, capsys):
    output = tmp_path / "data.json"
    data.main(["--images", "30", "--workers", "1", "--names", "1000", "--output", str(output)])
    results = json.loads(output.read_text(encoding="utf-8"))
    rows = {row["what"]: row for row in results["builds"]}
    built = [f"data csv, {source}" for source in ("folder", "all.tar", "all.zip")]
    assert [*rows] == [*built, "plain loop", "plain loop, no decoding"]
    assert rows["plain loop"]["of plain"] == 1 and rows["data csv, folder"]["images/s"] > 0
    assert results["index"]["names"] == 1000 and results["index"]["disk MiB"] > 0.01
    assert 10_000 < results["bytes an image"] < 30_000
