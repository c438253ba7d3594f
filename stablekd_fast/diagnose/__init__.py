"""Measures how the blocks of a pair disturb one another in training, and judges whether decomposition should help it.

docs/diagnose.md says what is measured and why.
"""
