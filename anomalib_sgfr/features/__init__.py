"""From an image to patch embeddings: pre-processing, backbones and their weights."""
