"""The former place of what is wrong with a data set; import it from `otter_openclip.shards.read`."""

from otter_openclip.shards.read import Fault, SampleError

__all__ = ["Fault", "SampleError"]
