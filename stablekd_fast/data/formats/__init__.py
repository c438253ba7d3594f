"""Formats of data sets: what lies in folders, archives and arrays, as splits."""
