"""What a fitted model is asked about itself: thresholds, reasons, and the pictures that show them."""
