"""Recipes and programs around the optimizer; they need the extras `demo` or `lab`."""
