"""Training: losses, metrics, the step and the loop."""
