"""Ways to store zeros: one file each."""
