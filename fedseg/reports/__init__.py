"""What people read: the report of a study, its figures and its curves."""
