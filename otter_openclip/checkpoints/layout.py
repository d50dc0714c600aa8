"""Where a training checkpoint has what open_clip does not know of: two keys beside open_clip's own.

``state_dict_ema`` are the EMA teacher's weights, open_clip 4.x's own name; ``otter`` is the rest:
settings, the second scale with its optimizer state, the teacher's counter. Stock open_clip ignores both.
``best.pt`` also has ``zeroshot``: the metrics it was chosen by, and whose they are, student or teacher.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TEACHER = "state_dict_ema"
ENTRY = "otter"
JUDGED = "zeroshot"
JUDGED_WEIGHTS = "weights"


def upgraded(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """``checkpoint`` in this layout: the first version had its entry in the optimizer's state."""
    optimizer = checkpoint.get("optimizer")
    if not isinstance(optimizer, Mapping) or ENTRY not in optimizer:
        return dict(checkpoint)
    entry = dict(optimizer[ENTRY])
    teacher = {TEACHER: entry.pop("teacher")} if "teacher" in entry else {}
    optimizer = {key: value for key, value in optimizer.items() if key != ENTRY}
    return {**checkpoint, **teacher, "optimizer": optimizer, ENTRY: entry}
