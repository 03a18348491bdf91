"""The checks that a constructor and ``load`` share."""

from collections.abc import Mapping
from operator import index
from typing import Any

from sb3_klip.errors import check_flag
from sb3_klip.fast.compiling import check_compile
from sb3_klip.replay import weights_by_age


def check_arguments(given: Mapping[str, Any]) -> None:
    """
    Refuse wrong values of the arguments that the base class does not have, or does not check.

    :param given: any of ``n_epochs``, ``log_kl``, ``compile`` and ``reuse``, by name; others are left alone
    :raises ValueError: if one has a wrong value
    :raises TypeError: if one is of a wrong type
    """
    check_flag("log_kl", given.get("log_kl", False))
    # With 0 epochs, the base class would fail only after its first rollout.
    if not _is_size(n_epochs := given.get("n_epochs", 1)):
        raise ValueError(f"n_epochs={n_epochs!r} must be a whole number, at least 1")
    check_compile(given.get("compile", False))
    weights_by_age(given.get("reuse", 1))


def _is_size(value: Any) -> bool:
    try:
        return index(value) >= 1
    except TypeError:
        return False
