"""Command line: Sgfr's own commands beside those of anomalib."""
