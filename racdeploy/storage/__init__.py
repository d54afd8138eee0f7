"""What lies on disk and what runs beside us: files, stage folders, locks, child processes."""
