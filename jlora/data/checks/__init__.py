"""Checks of the rows before training: oddities and personal data."""
