"""The shard writer: the same bytes for any number of workers, after any kill, or an error."""

import fcntl
import itertools
import multiprocessing
import os
import signal
import tempfile
from pathlib import Path

import pytest
from data_helpers import jpeg, refused, run, tree, write_files
from fuzz import MEMORY
from test_data_eval import DICTIONARY

from otter_openclip.data import building
from otter_openclip.data.plan import Plan


@pytest.fixture
def data():
    names = [f"n{n % 3}/n{n % 3}_{n}.JPEG" for n in range(14)]
    rows = "".join(f"{name}\t{n % 6}\n" for n, name in enumerate(names))
    files = {f"images/{name}": jpeg(n) for n, name in enumerate(names)}
    for n in (5, *range(9, 12)):  # the fourth shard of 3 loses all of its images
        files[f"images/{names[n]}"] = jpeg(n)[:-99]
    files |= {"dictionary.txt": DICTIONARY.encode(), "val.txt": rows.encode()}
    with tempfile.TemporaryDirectory(dir=MEMORY) as name:
        yield write_files(Path(name), files)


def command(data, out, *extra):
    words = ["imagenet10k", "--classes", data / "dictionary.txt", "--labels", data / "val.txt"]
    words += ["--images", data / "images", "--output", data / out, "--shard-size", "3"]
    return [*words, "--max-missing", "4", *extra]


@pytest.fixture
def whole(data):
    assert run(*command(data, "whole")) == 0
    return tree(data / "whole")


def _build_until(moment: int, where: str, line: tuple) -> None:
    """Runs in a child: kill -9 itself just before or after the ``moment``-th rename."""
    moments, rename = itertools.count(1), os.replace

    def replace(source, target):
        kill = next(moments) == moment
        if not kill or where == "after":
            rename(source, target)
        if kill:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = replace
    os._exit(run(*line))


def killed(*args) -> bool:
    child = multiprocessing.get_context("fork").Process(target=_build_until, args=args)
    child.start()
    child.join()
    assert child.exitcode in (0, -signal.SIGKILL)
    return child.exitcode != 0


@pytest.mark.parametrize("where", ["before", "after"])
def test_kill_at_every_rename(data, whole, where):
    moment = 1
    while killed(moment, where, line := command(data, f"{moment}")):
        assert run(*line) == 0
        assert tree(data / f"{moment}") == whole, f"killed {where} rename {moment}"
        moment += 1
    # the plan, 4 shards with samples, dropped, 4 sidecars, report
    assert moment == 1 + 4 + 1 + 4 + 1 + 1


def test_resume_writes_only_missing_and_damaged_shards(data, whole):
    assert killed(4, "after", command(data, "out"))  # the plan and three shards
    shards = data / "out" / "test"
    assert {path.name for path in shards.iterdir()} == {"0.tar", "1.tar", "2.tar"}
    (shards / "1.tar").write_bytes((shards / "1.tar").read_bytes()[:512])
    before = (shards / "0.tar").stat().st_ino
    assert run(*command(data, "out", "--workers", "2")) == 0
    assert (shards / "0.tar").stat().st_ino == before
    assert tree(data / "out") == whole
    # No gap where a shard would have had no sample.
    assert {path.name for path in shards.glob("*.tar")} == {f"{n}.tar" for n in range(4)}


def test_millions_that_are_skipped_take_no_space(tmp_path):
    plan = Plan(tmp_path / "plan.db", "row")
    plan.skip("video", 2), plan.skip("video")
    assert plan.db.execute("SELECT * FROM skipped").fetchall() == [("video", 3)]


@pytest.mark.parametrize("complete", [False, True])
def test_other_settings_or_inputs_are_refused(data, capsys, complete):
    assert killed(99 if complete else 4, "after", command(data, "out")) != complete
    before = tree(data / "out")
    refused(capsys, run(*command(data, "out", "--resize", "8")), "--resize was not given")
    line = [w for w in command(data, "out") if w not in ("--shard-size", "3")]
    refused(capsys, run(*line), "--shard-size was 3")
    with open(data / "val.txt", "a", encoding="utf-8") as labels:
        labels.write("n0_0.JPEG\t1\n")
    refused(capsys, run(*command(data, "out")), "val.txt was [")
    assert tree(data / "out") == before


def test_a_complete_build_is_left_as_it_is(data, whole, capsys):
    capsys.readouterr()
    before = {p: p.stat().st_mtime_ns for p in (data / "whole").rglob("*.tar")}
    assert run(*command(data, "whole")) == 0
    assert "10 samples, 4 shards" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in (data / "whole").rglob("*.tar")} == before
    (data / "whole" / "test" / "2.tar").unlink()
    refused(capsys, run(*command(data, "whole")), "2.tar is not as it was written")


def test_a_plan_that_cannot_be_read_is_an_error_that_names_it(data, whole, capsys):
    assert killed(4, "after", command(data, "out"))
    plan = data / "out" / ".otter-build" / "plan.db"
    plan.write_bytes(b"SQLite format 3" + bytes(5000))
    refused(capsys, run(*command(data, "out")), f"{plan}: file is not a database")
    plan.unlink()
    for name in ("unfinished.db", "unfinished.db-journal"):  # of one killed before it had a plan
        plan.with_name(name).write_bytes(b"half a plan")
    assert run(*command(data, "out")) == 0 and tree(data / "out") == whole


def test_a_folder_of_something_else_is_left_alone(data, capsys):
    (data / "out").mkdir()
    (data / "out" / "thesis.tex").touch()
    refused(capsys, run(*command(data, "out")), "choose another --output")
    assert [path.name for path in (data / "out").iterdir()] == ["thesis.tex"]
    refused(capsys, run(*command(data, "val.txt")), "val.txt")


def test_two_builds_of_one_folder_do_not_meet(data, monkeypatch, capsys):
    monkeypatch.setattr(building, "_LOCK_SECONDS", 0.2)
    (data / "out" / ".otter-build").mkdir(parents=True)
    with open(data / "out" / ".otter-build" / "lock", "w", encoding="utf-8") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        refused(capsys, run(*command(data, "out")), "another process is building")


def test_too_many_lost_keeps_the_work_and_a_higher_limit_ends_it(data, whole, monkeypatch):
    few = [3 if w == "4" else w for w in command(data, "out")]
    assert run(*few) == 2
    monkeypatch.setattr(building, "prepare", None)  # no image may be read again
    assert run(*command(data, "out")) == 0
    assert tree(data / "out") == whole
