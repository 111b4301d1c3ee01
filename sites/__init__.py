"""What a hospital runs. It sees patients; what leaves it goes through the trainer's answers alone."""
