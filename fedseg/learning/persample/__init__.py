"""Per-patient gradients in about the time of a plain step, their norms and their clipped sum."""
