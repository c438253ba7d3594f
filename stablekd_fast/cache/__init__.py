"""Rows of the teacher: how and where they are stored, and when stored ones may be used again."""

from stablekd_fast.cache.settings import CacheSettings

__all__ = ["CacheSettings"]
