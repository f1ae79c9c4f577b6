"""Features: multi-scale patch embeddings of a timm backbone."""
