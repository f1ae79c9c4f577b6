"""Images: files and frames to tensors, and results back to pixels of the original."""
