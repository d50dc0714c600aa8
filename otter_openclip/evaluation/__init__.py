"""What runs inside clip_benchmark, and the metrics on their own."""

from otter_openclip.zeroshot.metrics import multilabel_metrics

__all__ = ["multilabel_metrics"]
