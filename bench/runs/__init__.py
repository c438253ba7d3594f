"""Steps, loaders, caches and whole runs timed."""
