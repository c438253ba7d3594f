"""Blockwise knowledge distillation after StableKD (arXiv 2312.13223)."""

__version__ = "0.1.0"
