"""Files appear whole or not at all; links and devices stay what they are."""

import os
import signal
import subprocess
import sys

import pytest

from otter_openclip.files import written_whole


def test_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    with written_whole(path, "w") as file:
        file.write("a\n")
    with pytest.raises(ZeroDivisionError), written_whole(path, "w") as file:
        file.write("b")
        1 / 0  # noqa: B018
    assert path.read_bytes() == b"a\n" and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_two_processes_write_one_file(tmp_path):
    """No write fails, a reader sees the whole text of one of them, and nothing is left over."""
    path = tmp_path / "file"
    path.write_text("a" * 50_000, encoding="utf-8")
    code = "import pathlib, sys; from otter_openclip.files import write_text as write\n"
    code += "for _ in range(200): write(pathlib.Path(sys.argv[1]), sys.argv[2] * 50_000)"
    writers = [subprocess.Popen([sys.executable, "-c", code, path, text]) for text in "ab"]
    while any(writer.poll() is None for writer in writers):
        text = path.read_text(encoding="utf-8")
        assert len(text) == 50_000 and len(set(text)) == 1
    assert [writer.returncode for writer in writers] == [0, 0]
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_left_goes_with_the_next_write(tmp_path):
    """Of the same file only, and only once the process is gone: checkpoints are large."""
    path = tmp_path / "file"
    code = "import sys, time; from otter_openclip.files import written_whole as w\n"
    code += "with w(sys.argv[1], 'w') as file: print('open', flush=True); time.sleep(60)"
    line = [sys.executable, "-c", code, path]
    with subprocess.Popen(line, stdout=subprocess.PIPE) as writer:
        assert writer.stdout.readline() == b"open\n"
        for left in (2, 1):
            with written_whole(path, "w") as file:
                file.write("a")
            assert len(list(tmp_path.iterdir())) == left
            writer.send_signal(signal.SIGKILL)
            writer.wait()


def test_temporary_files_of_others_stay(tmp_path, monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "node")
    others = {f"file.node-1-{2**22 + 1}-01234567.tmp", "file.node-backup.tmp"}  # no process's
    for name in others:
        (tmp_path / name).touch()
    with written_whole(tmp_path / "file", "w") as file:
        file.write("a")
    assert {path.name for path in tmp_path.iterdir()} == {*others, "file"}


def test_the_error_of_a_full_disk_names_the_file():
    """Python names it when a file is opened, not when it is written."""
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        with written_whole("/dev/full") as file:
            file.write(b"a")


def test_a_link_is_followed_and_a_pipe_written_to(tmp_path):
    link, target, pipe = (tmp_path / name for name in ("link", "target", "pipe"))
    target.touch()
    link.symlink_to("target")
    with written_whole(link) as file:
        file.write(b"new")
    assert link.is_symlink() and target.read_bytes() == b"new"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    with written_whole(pipe) as file:
        file.write(b"out")
    assert os.read(reader, 9) == b"out" and not pipe.is_file()
    os.close(reader)
