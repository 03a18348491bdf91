"""torch's distributions without their checks of data, which cannot be traced or compiled."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch.distributions import Distribution


class _Validation:
    """How many threads want the parameters of distributions unchecked, and what to put back afterwards."""

    lock = threading.Lock()
    users = 0
    before = True


@contextmanager
def unvalidated_distributions() -> Iterator[None]:
    """
    While this lasts, torch's distributions do not look for NaN in their parameters.

    The switch is the process's. It is put back when the last of several threads leaves.
    """
    with _Validation.lock:
        if _Validation.users == 0:
            _Validation.before = Distribution._validate_args
            Distribution.set_default_validate_args(False)
        _Validation.users += 1
    try:
        yield
    finally:
        with _Validation.lock:
            _Validation.users -= 1
            if _Validation.users == 0:
                Distribution.set_default_validate_args(_Validation.before)
