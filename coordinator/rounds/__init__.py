"""The rounds of a study: who is asked, what comes back, when a stage is over. No keys, no files."""
