"""Who said what, and who may read it: keys, identities, sealed messages, certificates."""
