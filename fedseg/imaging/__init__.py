"""From scans on disk to prepared cases: manifests, readers, checks, phantoms."""
