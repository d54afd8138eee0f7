"""Everything that is done to a finished bundle."""
