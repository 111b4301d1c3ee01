"""The live, read-only web page of a study."""
