"""Measurements. Installed as `stablekd_fast.bench`."""
