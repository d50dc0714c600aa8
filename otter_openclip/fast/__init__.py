"""The numbers of ``losses`` for less. Nothing here defines them: all is tested against plain."""

from otter_openclip.fast.engine import covers, terms

__all__ = ["covers", "terms"]
