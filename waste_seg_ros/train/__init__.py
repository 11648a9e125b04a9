"""Training: targets, losses, the loop, metrics and evaluation."""
