"""racdeploy as a library: a function for each step, with the command line's options as keywords."""
