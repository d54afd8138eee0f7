"""Models as they come: where from, which family, which files."""
