"""Helpers for messages that tell the user what to write instead."""

import difflib
from collections.abc import Iterable


class ArchitectureError(ValueError, RuntimeError):
    """Parameters of a policy of another architecture, for which torch, and so Stable-Baselines3, has a ``RuntimeError``."""


def did_you_mean(given: object, valid: Iterable[object]) -> str:
    """
    A sentence that names the nearest valid name, or nothing if none is near.

    :param given: what the user wrote
    :param valid: the valid names
    """
    nearest = difflib.get_close_matches(str(given), [str(name) for name in valid], n=1, cutoff=0.5)
    return f" Did you mean {nearest[0]!r}?" if nearest else ""
