"""What runs beside us: child processes with limits, and what this machine has for them."""
