"""The method itself, tensors in and tensors out: needs PyTorch and NumPy, and nothing else of this package."""
