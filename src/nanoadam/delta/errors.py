"""What goes wrong with patches: one sentence that names the thing, the value and the remedy."""

from __future__ import annotations


class DeltaError(ValueError):
    """A patch cannot be made, read or applied. Nothing was changed."""
