"""Accuracy: many runs of one task."""
