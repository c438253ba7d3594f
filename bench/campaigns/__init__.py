"""Campaigns for accuracy: many runs of one task."""
