"""Code that all packages share: errors, cache paths, atomic file writes, malloc tuning, plurals."""
