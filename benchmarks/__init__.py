"""Measurements behind the project's claims; each module runs by itself: ``python -m benchmarks.<name>``."""
