"""
The hook that makes RL Zoo know this package, with no wrapper script.

RL Zoo has no plugins, but it imports torch, and torch calls the entry points of the group ``torch.backends`` when it has
been imported. Ours runs in every process that imports torch, so it does next to nothing: it puts one finder on
``sys.meta_path``, which never finds anything, and waits for the first script of RL Zoo to be looked for. At that moment
``rl_zoo3.utils``, which holds the table of algorithms, is complete, and no argument parser has been built yet.
"""

import importlib
import sys
import warnings
from typing import Any


class ZooWatch:
    """A meta path finder that only watches."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        """Register with RL Zoo when a module of it is looked for after ``rl_zoo3.utils`` is complete."""
        if not name.startswith("rl_zoo3."):
            return
        utils = sys.modules.get("rl_zoo3.utils")
        if utils is None or getattr(utils.__spec__, "_initializing", False):
            return
        if self in sys.meta_path:
            sys.meta_path.remove(self)  # type: ignore[arg-type]
            try:
                importlib.import_module("sb3_klip.zoo").register()
            except Exception as error:  # RL Zoo itself must go on working
                warnings.warn(f"sb3-klip could not register with RL Zoo: {error!r}", RuntimeWarning, stacklevel=2)


def watch_for_zoo() -> None:
    """Entry point of the group ``torch.backends``."""
    if not any(isinstance(finder, ZooWatch) for finder in sys.meta_path):
        sys.meta_path.insert(0, ZooWatch())  # type: ignore[arg-type]
