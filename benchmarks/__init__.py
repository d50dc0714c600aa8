"""Measurements: ``python -m benchmarks.loss``, ``.step``, ``.scaling``; each compares side by side."""
