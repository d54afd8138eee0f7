"""Devices: what decides speed and memory there, measured, and what a model will take on one."""
