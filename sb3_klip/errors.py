"""Helpers for messages that tell the user what to write instead."""

import difflib
from collections.abc import Iterable

import numpy as np


class ArchitectureError(ValueError, RuntimeError):
    """Parameters of a policy of another architecture, for which torch, and so Stable-Baselines3, has a ``RuntimeError``."""


def check_flag(name: str, value: object) -> None:
    """
    Refuse what is neither True nor False, as any text, also "False", would count as True.

    :param name: the argument
    :param value: what the user gave
    :raises TypeError: if it is not a bool
    """
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}={value!r} must be True or False")


def did_you_mean(given: object, valid: Iterable[object], cutoff: float = 0.5) -> str:
    """
    A sentence that names the nearest valid name, whatever its case, or nothing if none is near.

    :param given: what the user wrote
    :param valid: the valid names
    :param cutoff: how near it must be, from 0 to 1 (a name that is equal but for its case)
    """
    by_lower_case = {str(name).lower(): str(name) for name in valid}
    nearest = difflib.get_close_matches(str(given).lower(), by_lower_case, n=1, cutoff=cutoff)
    return f" Did you mean {by_lower_case[nearest[0]]!r}?" if nearest else ""
