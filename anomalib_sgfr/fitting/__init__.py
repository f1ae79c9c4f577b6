"""From embeddings that stream past to banks: what a fit does, and the files it is given."""
