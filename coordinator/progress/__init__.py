"""Where a study stands, for people who look: `run/progress.json`, counted up and kept."""
