"""What callbacks remember, so that a resumed run goes on with it: best returns so far, evaluations, counters."""

import copy
import inspect
import pathlib
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback, CallbackList
from stable_baselines3.common.vec_env import VecEnv

_PLAIN = (type(None), bool, int, float, complex, str, bytes, pathlib.PurePath, np.generic, np.ndarray, th.Tensor)
#: What a callback is given anew by each call of ``learn``.
_GIVEN = ("model", "logger", "locals", "globals", "parent", "training_env")


def callbacks_of(callback: BaseCallback) -> Iterator[BaseCallback]:
    """
    A callback and those that it calls, in a fixed order: members of lists, and what event callbacks have as attributes.

    :param callback: as ``learn`` uses it
    """
    yield callback
    children = callback.callbacks if isinstance(callback, CallbackList) else vars(callback).values()
    for child in children:
        if isinstance(child, BaseCallback) and child is not callback.parent:
            yield from callbacks_of(child)


def plain_state(callback: BaseCallback) -> list[dict[str, Any]]:
    """
    The plain data of each callback: numbers, texts, arrays, and collections of them.

    :param callback: as ``learn`` uses it
    :return: a dictionary of attributes for each of :func:`callbacks_of`, a copy
    """
    return [
        copy.deepcopy({name: value for name, value in vars(each).items() if name not in _GIVEN and _is_plain(value)})
        for each in callbacks_of(callback)
    ]


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_is_plain(key) and _is_plain(item) for key, item in value.items())
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return all(_is_plain(item) for item in value)
    return isinstance(value, _PLAIN) and not (isinstance(value, np.ndarray) and value.dtype.hasobject)


def remembered(callback: BaseCallback, before: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """
    What a checkpoint keeps of callbacks.

    That is their plain data. An argument of a callback's constructor is what the user gives, also in the resumed run, and
    only kept if the callback has changed it.

    :param callback: as ``learn`` uses it
    :param before: :func:`plain_state` when ``learn`` began
    :return: for each of :func:`callbacks_of`, its type, what it remembers, and names of attributes that cannot be kept
    """
    kept = []
    for each, state, initial in zip(callbacks_of(callback), plain_state(callback), before, strict=True):
        given = inspect.signature(type(each)).parameters
        state = {
            name: value for name, value in state.items() if name not in given or not _same(value, initial.get(name, value))
        }
        left = [name for name, value in vars(each).items() if name not in _GIVEN and name not in given and _is_lost(value)]
        kept.append({"type": type(each).__qualname__, "state": state, "left": left})
    return kept


def _is_lost(value: Any) -> bool:
    """Whether an attribute is data, but none that is kept: not what callbacks are connected with."""
    is_connection = isinstance(value, (BaseCallback, VecEnv, Callable)) or hasattr(value, "close")  # type: ignore[arg-type]
    nested = isinstance(value, (list, tuple)) and all(map(callable, value) or [isinstance(v, BaseCallback) for v in value])
    return not (_is_plain(value) or is_connection or nested)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, (np.ndarray, th.Tensor)) or isinstance(b, (np.ndarray, th.Tensor)):
        return type(a) is type(b) and a.shape == b.shape and bool((a == b).all())
    return bool(a == b)


def continue_callbacks(callback: BaseCallback, kept: list[dict[str, Any]], calls: int) -> None:
    """
    Let the callbacks of a resumed run go on with what those of the interrupted one remembered.

    Callbacks that are not those of the interrupted run begin anew, but count calls as if they had been there.

    :param callback: as ``learn`` uses it
    :param kept: as from :func:`remembered`; empty for a checkpoint that has none
    :param calls: how often a callback would have been called if the run had not been interrupted
    """
    now = list(callbacks_of(callback))
    if [type(each).__qualname__ for each in now] == [each["type"] for each in kept]:
        for each, one in zip(now, kept, strict=True):
            vars(each).update(copy.deepcopy(one["state"]))
        lost = [f"{one['type']}.{name}" for one in kept for name in one["left"]]
        if lost:
            warnings.warn(
                f"Callbacks remember what a checkpoint cannot keep, and begin anew with it: {', '.join(lost)}", stacklevel=6
            )
        return
    if kept:
        names, earlier = (
            [name for name in each if name != "CallbackList"]
            for each in ([type(each).__qualname__ for each in now], [each["type"] for each in kept])
        )
        warnings.warn(
            f"The callbacks are not those of the run that is resumed, so they begin anew: {', '.join(names) or 'none'} "
            f"instead of {', '.join(earlier) or 'none'}",
            stacklevel=6,
        )
    for each in now:
        if each.n_calls == 0:
            each.n_calls = calls
