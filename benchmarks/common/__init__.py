"""Shared parts: records, data sets, models, metrics, embeddings, figures and the Engine."""
