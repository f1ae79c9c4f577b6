"""Report of a run: score table, explanations, predictions, result images and the page."""
