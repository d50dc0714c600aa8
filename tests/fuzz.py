"""How many examples hypothesis tries: few and always the same ones, or OTTER_FUZZ=1000 new ones."""

import os

from hypothesis import HealthCheck, settings

# For files: the builders wait for the disk, a thousand of them for long.
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
EXAMPLES = int(os.environ.get("OTTER_FUZZ", "0"))


def examples(few):
    """Settings of a property: ``few`` examples, unless the environment asks for more."""
    return settings(
        max_examples=EXAMPLES or few,
        derandomize=not EXAMPLES,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
