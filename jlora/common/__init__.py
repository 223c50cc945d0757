"""Shared by every package: errors, cache paths, atomic file writes, malloc tuning."""
