"""
The hook that makes RL Zoo know sb3-klip, with no wrapper script.

RL Zoo has no plugin interface. But it imports torch, and after its import torch calls the entry points of the group
``torch.backends``. Our entry point runs in every process that imports torch, so it does very little: it adds a finder to
``sys.meta_path``. This finder never finds a module. It only waits until a script of RL Zoo is imported, and then registers the
algorithms. At this moment, ``rl_zoo3.utils``, which holds the table of algorithms, is complete, and no argument parser exists.

This module is separate from the package: if a file ``sb3_klip.py`` in the working directory hid the package, the import of
torch itself would fail.
"""

import sys

#: RL Zoo's scripts that ask for an algorithm; its other scripts import one of these. No other module is waited for:
#: registering imports most of them, and Python would then run the one that it was looking for a second time.
SCRIPTS = ("train", "enjoy", "load_from_hub", "push_to_hub", "record_training", "record_video")


class ZooWatch:
    """A meta path finder that only watches."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        """Register with RL Zoo when the first of its scripts is looked for."""
        package, _, script = name.partition(".")
        if package != "rl_zoo3" or script not in SCRIPTS or self not in sys.meta_path:
            return
        # A new list: Python is iterating over the old one, and would pass over the finder after this one.
        sys.meta_path = [finder for finder in sys.meta_path if finder is not self]
        try:
            from sb3_klip.zoo import register

            register()
        except (Exception, SystemExit) as error:  # RL Zoo itself must go on working
            import warnings

            found = getattr(sys.modules.get("sb3_klip"), "__file__", None)
            where = "" if found is None else f" (sb3_klip is {found})"
            warnings.warn(f"sb3-klip could not register with RL Zoo{where}: {error!r}", RuntimeWarning, stacklevel=2)


def watch_for_zoo() -> None:
    """Entry point of the group ``torch.backends``."""
    if not any(isinstance(finder, ZooWatch) for finder in sys.meta_path):
        sys.meta_path.insert(0, ZooWatch())
