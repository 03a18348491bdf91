"""Saving and loading files of any age and origin, and resuming runs exactly."""
