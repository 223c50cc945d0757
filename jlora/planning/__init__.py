"""Before training: rows become batches, and memory and time are forecast for a device."""
