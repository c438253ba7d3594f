"""The loop: stages, groups of blocks, steps; merges; exact resume."""
