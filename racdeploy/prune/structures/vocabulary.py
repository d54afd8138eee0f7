"""The vocabulary: tokens that the user's texts do not need, with their rows and merges."""

STEP = "folder"
