"""Report: what a run leaves for people (tables, explanations, page, images)."""
