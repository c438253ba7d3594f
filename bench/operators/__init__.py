"""The operators alone: against PyTorch, and against the memory's speed; what can be shown of them without a GPU."""
