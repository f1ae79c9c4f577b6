"""The page an engineer signs: one self-contained HTML file of a test or a prediction."""
