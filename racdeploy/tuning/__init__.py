"""Search for the best model of a device: candidates, their predicted costs, and a race."""
