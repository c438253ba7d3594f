"""Benches of the operators alone: against PyTorch and the speed of memory, and what can be shown without a GPU."""
