"""How many examples hypothesis tries: few and always the same ones, or OTTER_FUZZ=1000 new ones."""

import os

from hypothesis import HealthCheck, settings

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
