"""Many devices and processes: the mesh, how arrays are sharded over it, and how processes agree."""
