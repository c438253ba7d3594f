"""Whether decomposition should help a pair: how its blocks disturb one another in training, measured.

docs/diagnose.md says what is measured and why.
"""
