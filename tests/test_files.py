"""Files appear whole or not at all; links and devices stay what they are."""

import os

import pytest

from otter_openclip.files import replace_together, written_whole


def test_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    with written_whole(path, "w") as file:
        file.write("a\n")
    with pytest.raises(ZeroDivisionError), written_whole(path, "w") as file:
        file.write("b")
        1 / 0  # noqa: B018
    assert path.read_bytes() == b"a\n" and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_the_error_of_a_full_disk_names_the_file():
    """Python names it when a file is opened, not when it is written."""
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        with written_whole("/dev/full") as file:
            file.write(b"a")


def test_a_link_is_followed_but_by_replace_together(tmp_path):
    (tmp_path / "target").write_text("old")
    link = tmp_path / "link"
    link.symlink_to("target")
    with written_whole(link, "w") as file:
        file.write("new")
    assert link.is_symlink() and (tmp_path / "target").read_text() == "new"
    replace_together([(link, b"new", b"other")])  # may lead into a cache that others use
    assert not link.is_symlink() and link.read_text() == "other"
    assert (tmp_path / "target").read_text() == "new"


def test_a_pipe_is_written_to(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    with written_whole(pipe) as file:
        file.write(b"out")
    assert os.read(reader, 9) == b"out" and not pipe.is_file()
    os.close(reader)
