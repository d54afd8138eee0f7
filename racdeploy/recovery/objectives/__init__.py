"""Objectives of a training, one file each; see :class:`racdeploy.recovery.Objective`."""
