"""What is cut as a whole: units, how many of them, and which."""
