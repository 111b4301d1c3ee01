"""From answers to the next model: exact sums, server rules, the rounds of a study."""
