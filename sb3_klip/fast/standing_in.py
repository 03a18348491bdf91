"""Faster replacements for methods of single objects, during a rollout or an update."""

import functools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import sb3_contrib
import stable_baselines3
import torch as th


class StandIn:
    """
    A function that is called in place of a method, and has the same result.

    If it is copied or pickled, the copy is the method itself.

    :param owner: the object whose method it replaces
    """

    #: Name of the method.
    method: ClassVar[str]

    def __init__(self, owner: Any):
        method = getattr(owner, self.method)
        functools.update_wrapper(self, method)  # type: ignore[arg-type]
        self.owner = owner
        # What a method has, for who binds its function to another object.
        self.__self__, self.__func__ = owner, getattr(method, "__func__", method)

    def __reduce__(self) -> Any:
        return getattr, (self.owner, self.method)  # as methods are pickled; the copy has no attribute of that name yet


class _GetState:
    """``__getstate__`` of an object with stand-ins: its copies, shallow ones too, and its pickles have none."""

    def __init__(self, owner: Any):
        self.owner = owner

    def __call__(self) -> Any:
        of_class = getattr(type(self.owner), "__getstate__", vars)  # before Python 3.11, object has none
        state = of_class(self.owner)
        if not isinstance(state, dict):
            return state
        return {name: value for name, value in state.items() if not isinstance(value, (StandIn, _GetState))}


@contextmanager
def standing_in(functions: Sequence[StandIn]) -> Iterator[None]:
    """
    Call these functions in the place of their methods, until this ends.

    :param functions: the functions; what somebody puts in their place in the meantime stays
    """
    attributes: list[tuple[Any, str, Any]] = [(function.owner, function.method, function) for function in functions]
    attributes += [(function.owner, "__getstate__", _GetState(function.owner)) for function in functions]
    for owner, name, value in attributes:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in attributes:
            if vars(owner).get(name) is value:
                delattr(owner, name)


def is_replaced(owner: Any, *methods: str) -> bool:
    """
    Whether an object has other methods than its class.

    :param owner: the object
    :param methods: their names
    """
    attributes = vars(owner)
    for name in methods:
        if name in attributes:
            attribute = attributes[name]
            if isinstance(attribute, StandIn) or getattr(attribute, "__func__", None) is not getattr(type(owner), name):
                return True
    return False


def is_changed(owner: Any, *methods: str) -> bool:
    """
    Whether an object of Stable-Baselines3 has other methods than those that its class was written with.

    :param owner: the object
    :param methods: their names
    """
    return is_replaced(owner, *methods) or is_patched(type(owner), *methods)


#: Where the code of these packages lies, and not that of others whose names begin alike, such as torchvision.
_PACKAGES = tuple(str(Path(package.__file__ or "").parent) + os.sep for package in (stable_baselines3, sb3_contrib, th))


def is_patched(owner: Any, *functions: str) -> bool:
    """
    Whether somebody has replaced a function of Stable-Baselines3 or torch, as ``unittest.mock.patch.object`` does.

    :param owner: the class, or the module
    :param functions: their names
    """
    return not all(_is_of_packages(getattr(owner, name)) for name in functions)


def _is_of_packages(function: Any) -> bool:
    """Whether the code of a function lies in these packages, and that of each function that it wraps."""
    code = getattr(function, "__code__", None)
    if code is None or not code.co_filename.startswith(_PACKAGES):
        return False
    # torch wraps whatever stands for the step of an optimizer when one is made.
    wrapped = getattr(function, "__wrapped__", None)
    return wrapped is None or _is_of_packages(wrapped)
