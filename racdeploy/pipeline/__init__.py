"""Stages of a build, from the traces to the bundle."""
