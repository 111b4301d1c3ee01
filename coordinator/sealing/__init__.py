"""What lies between the rounds and the network: tasks go out sealed and signed, answers come so."""
