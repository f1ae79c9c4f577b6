"""Post-processing: calibrated thresholds, normalised scores, labels and masks."""
