"""Exported models: whole files, and eight bits where they do no harm."""
