"""What tasks and scorers share: worked solutions in columns, and answers found in a text."""
