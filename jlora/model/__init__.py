"""The network, its attention, and its names on disk."""
