"""A study that runs: the daemon, the programs that it keeps alive, and the run inside Flower."""
