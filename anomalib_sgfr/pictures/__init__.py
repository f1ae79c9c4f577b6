"""Pictures as cameras give them, files and arrays, at their true range: needs NumPy and Pillow alone, no PyTorch."""
