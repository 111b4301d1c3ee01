"""What one site does in one round: draw patients and patches, augment, take steps."""
