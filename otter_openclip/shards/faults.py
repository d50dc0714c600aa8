"""What is wrong with a data set, said alike by whoever finds it."""

from __future__ import annotations

from typing import NamedTuple

_JOINTS = {"line ": ", ", "no ": " has ", "is ": " ", "cannot ": " "}


class Fault(NamedTuple):
    """A fault of ``file``, or of a sample in it; ``text`` says what it is and how to mend it."""

    file: str
    sample: str
    text: str

    def __str__(self) -> str:
        where = f"{self.file}: sample {self.sample}" if self.sample else self.file
        joint = next((j for begin, j in _JOINTS.items() if self.text.startswith(begin)), ": ")
        return f"{where}{joint}{self.text}"


class SampleError(ValueError):
    """A sample that loaders would refuse or misread; the message is a fault's text."""
