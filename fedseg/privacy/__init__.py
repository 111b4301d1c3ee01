"""What differential privacy needs besides gradients."""
