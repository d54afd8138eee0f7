"""Search for the best model of a device: candidates, what they cost, and a race between them."""
