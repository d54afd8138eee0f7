"""Recovery methods, one file each; see :class:`racdeploy.recovery.RecoverMethod`."""
