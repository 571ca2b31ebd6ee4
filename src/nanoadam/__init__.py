"""Finetuning with Adam moments for the smallest weights only."""

__version__ = "0.1.0"

__all__ = ["__version__"]
