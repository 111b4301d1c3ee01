"""Privacy of patients: what is guaranteed, what was spent, and who keeps the book."""
