"""A run from its settings: assembled, trained, evaluated, written down."""
