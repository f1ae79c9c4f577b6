"""Exported models, run without PyTorch: their answers, size and latency."""
