"""Saving, loading and resuming: files of any age and origin, and runs that go on where they were."""
