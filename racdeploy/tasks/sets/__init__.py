"""Tasks: what is asked of a model, one file each."""
