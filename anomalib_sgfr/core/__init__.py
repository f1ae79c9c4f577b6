"""Core: sparse reconstruction, subspace sampling and bounds as functions of tensors."""
