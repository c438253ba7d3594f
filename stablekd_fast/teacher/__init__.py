"""The teacher in three forms that serve one protocol: live, behind a cache, in parts on several ranks."""
