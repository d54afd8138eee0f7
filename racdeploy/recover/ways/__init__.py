"""Ways to recover: one file each, with the members of :class:`racdeploy.recover.Way`."""
