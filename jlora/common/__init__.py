"""What every package needs and none owns: errors, paths, atomic files, memory."""
