"""Child processes with limits, and the cores and memory of this machine."""
