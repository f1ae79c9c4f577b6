"""Training: fit, checkpoints, input settings, several processes, feedback and adaptation."""
