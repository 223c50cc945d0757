"""Answers from a base with adapters."""
