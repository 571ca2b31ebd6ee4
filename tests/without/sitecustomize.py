"""Hide packages from a Python process and from all that it starts, as if they had never been installed.

    PYTHONPATH=tests/without WITHOUT=triton,scipy python -m pytest

Python imports a module of this name at its start. noxfile.py uses it to run the suite with each extra missing.
"""

import importlib.machinery
import os
import sys

HIDDEN = set(filter(None, os.environ.get("WITHOUT", "").replace("-", "_").lower().split(",")))


class _Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        if fullname.partition(".")[0].lower() in HIDDEN:
            return None
        return super().find_spec(fullname, path, target)

    @classmethod
    def find_distributions(cls, *arguments, **named):
        found = importlib.machinery.PathFinder.find_distributions(*arguments, **named)
        return (one for one in found if one.metadata["Name"].replace("-", "_").lower() not in HIDDEN)


if HIDDEN:
    sys.meta_path[:] = [_Finder if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path]
