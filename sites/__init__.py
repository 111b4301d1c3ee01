"""What a hospital runs. It sees patients; only its trainer's answers leave."""
