"""Readers: one file format each, as a stream of conversations."""
