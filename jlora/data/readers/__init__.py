"""Readers, one per file format, each a stream of conversations; files.py finds the files and selects their reader."""
