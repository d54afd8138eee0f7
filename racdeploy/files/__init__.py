"""Files on disk: atomic writes, reads with size limits, locks, hashes, stage folders."""
