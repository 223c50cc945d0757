"""Checks of the training rows before training: a data quality report, and personal data."""
