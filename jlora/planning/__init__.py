"""Before training: prepare rows and batches, and forecast memory and time on a device."""
