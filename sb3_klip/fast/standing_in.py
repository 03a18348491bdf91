"""Faster replacements for methods of single objects, during a rollout or an update."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar


class StandIn:
    """
    A function that is called in place of a method, and has the same result.

    If the owner is copied or pickled meanwhile, the copy has the method itself.

    :param owner: the object whose method it replaces
    """

    #: Name of the method.
    method: ClassVar[str]

    def __init__(self, owner: Any):
        self.owner = owner

    def __reduce__(self) -> Any:
        return getattr, (self.owner, self.method)  # as methods are pickled; the copy has no attribute of that name yet


@contextmanager
def standing_in(functions: Sequence[StandIn]) -> Iterator[None]:
    """
    Call these functions in the place of their methods, until this ends.

    :param functions: the functions; what somebody puts in their place in the meantime stays
    """
    for function in functions:
        setattr(function.owner, function.method, function)
    try:
        yield
    finally:
        for function in functions:
            if vars(function.owner).get(function.method) is function:
                delattr(function.owner, function.method)


def is_replaced(owner: Any, *methods: str) -> bool:
    """
    Whether an object has other methods than its class.

    :param owner: the object
    :param methods: their names
    """
    attributes = vars(owner)
    for name in methods:
        if name in attributes and getattr(attributes[name], "__func__", None) is not getattr(type(owner), name):
            return True
    return False
