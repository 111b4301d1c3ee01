"""Networks by name, and the tensors they are made of."""
