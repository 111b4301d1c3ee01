"""The papers of a study: how it is founded, who takes part, what is signed, and until when."""
