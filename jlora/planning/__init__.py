"""Preparation of training: rows and batches, and a forecast of memory and time on a device."""
