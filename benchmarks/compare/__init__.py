"""Sgfr against anomalib's memory-bank models: runs, tables and figures."""
