"""Rows of the teacher: where they are stored, when they may be used again, and whether storing them pays."""

from stablekd_fast.cache.settings import CacheSettings

__all__ = ["CacheSettings"]
