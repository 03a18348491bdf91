"""The state of callbacks, which a resumed run restores: best returns so far, evaluations, counters."""

import contextlib
import hashlib
import inspect
import pathlib
import pickle
import warnings
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback, CallbackList
from stable_baselines3.common.vec_env import VecEnv

from sb3_klip.checkpoints.env_state import EnvState, at, held_by

_PLAIN = (type(None), bool, int, float, complex, str, bytes, pathlib.PurePath, np.generic, np.ndarray, th.Tensor)
#: What a callback is given anew by each call of ``learn``.
_GIVEN = ("model", "logger", "locals", "globals", "parent", "training_env")

#: Size of what is large, in bytes; each element of a collection counts as 50, and takes as long.
_LARGE = 1_000_000
#: Length of the longest collection that is looked through for callbacks.
_MOST_CALLBACKS = 1_000

#: What every callback counts.
_COUNTERS = ("n_calls", "num_timesteps")


def callbacks_of(callback: BaseCallback) -> list[BaseCallback]:
    """
    A callback and those that it calls, in a fixed order: members of lists, and what callbacks have as attributes, or in lists.

    :param callback: as ``learn`` uses it
    :return: each of them once
    """
    found: dict[int, BaseCallback] = {}

    def visit(each: BaseCallback) -> None:
        if id(each) not in found:
            found[id(each)] = each
            for value in [each.callbacks] if isinstance(each, CallbackList) else vars(each).values():
                for child in _members(value):
                    if isinstance(child, BaseCallback) and child is not each.parent:
                        visit(child)

    visit(callback)
    return list(found.values())


def _members(value: Any) -> list[Any]:
    """What an attribute holds that may be a callback; not of collections that are too large to be made of callbacks."""
    try:
        if isinstance(value, (dict, list, tuple)):
            return [] if len(value) > _MOST_CALLBACKS else list(value.values() if isinstance(value, dict) else value)
    except Exception:  # of a class of its own, or changed by another thread
        return []
    return [value]


def plain_state(callback: BaseCallback) -> dict[str, Any]:
    """
    The plain data of one callback: numbers, texts, arrays, and collections of them.

    :param callback: the callback
    """
    return {name: value for name, value in vars(callback).items() if name not in _GIVEN and _is_plain(value)}


def fingerprints(callback: BaseCallback) -> dict[int, dict[str, bytes]]:
    """
    What to tell by, later on, which data has changed, without a copy of it: callbacks may hold much.

    :param callback: as ``learn`` uses it
    :return: a digest of each attribute that is plain data, by the id of each of :func:`callbacks_of`; not of what would take
        long: it counts as changed
    """

    def of_each(each: BaseCallback) -> dict[str, bytes]:
        own = {name: value for name, value in vars(each).items() if name not in _GIVEN}
        return {name: _digest(value) for name, value in own.items() if not _is_large(value) and _is_plain(value)}

    return {id(each): of_each(each) for each in callbacks_of(callback)}


def _is_large(value: Any) -> bool:
    """Whether a digest would take more than some hundredths of a second, so that each call of ``learn`` would be slow."""
    left, values = _LARGE, [value]
    while values and left > 0:
        each = values.pop()
        if isinstance(each, (list, tuple, set, frozenset, deque, dict)):
            with contextlib.suppress(Exception):  # another thread changes it, or it is of a class of its own
                left -= 50 * len(each)
                if left > 0:
                    values += [*each, *each.values()] if isinstance(each, dict) else each
        elif isinstance(each, np.ndarray):
            left -= each.nbytes
        elif isinstance(each, th.Tensor):
            with contextlib.suppress(Exception):  # of a lazy parameter
                left -= each.numel() * each.element_size()  # a sparse one has no nbytes
        elif isinstance(each, (str, bytes)):
            left -= len(each)
    return left <= 0


def _digest(value: Any) -> bytes:
    buffers: list[pickle.PickleBuffer] = []
    try:
        digest = hashlib.blake2b(pickle.dumps(value, protocol=5, buffer_callback=buffers.append))
        for buffer in buffers:
            digest.update(buffer.raw())
    except Exception:  # a number of a local class, say: it counts as not changed
        return b""
    return digest.digest()


def _is_plain(value: Any) -> bool:
    try:
        return _consists_of_plain(value)
    except Exception:  # it holds itself, is nested too deeply, changed by another thread, or of a class of its own
        return False


def _consists_of_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_consists_of_plain(key) and _consists_of_plain(item) for key, item in value.items())
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return all(map(_consists_of_plain, value))
    return isinstance(value, _PLAIN) and not (isinstance(value, np.ndarray) and value.dtype.hasobject)


def remembered(callback: BaseCallback, before: dict[int, dict[str, bytes]]) -> list[dict[str, Any]]:
    """
    What a checkpoint keeps of callbacks.

    That is their plain data. An argument of a callback's constructor is what the user gives, also in the resumed run, and
    only kept if the callback has changed it.

    :param callback: as ``learn`` uses it
    :param before: :func:`fingerprints` when ``learn`` began
    :return: for each of :func:`callbacks_of`, its type, what it remembers, whether it has learned anything since ``learn``
        began, names of attributes that cannot be kept, the state of environments that it holds, and where the environments of
        training hold the same object as it does
    """
    kept = []
    held = {} if callback.model is None or callback.model.env is None else held_by(callback.model.env)
    for each in callbacks_of(callback):
        given, state = inspect.signature(type(each)).parameters, plain_state(each)
        initial = before.get(id(each), {})
        changed = {name for name, value in state.items() if _digest(value) != initial.get(name)}
        state = {name: value for name, value in state.items() if name not in given or name in changed}
        shared = {name: held[id(value)] for name, value in vars(each).items() if name not in _GIVEN and id(value) in held}
        own = {name: value for name, value in vars(each).items() if name not in _GIVEN and name not in shared}
        left = [name for name, value in own.items() if name not in given and _is_lost(value)]
        has_learned = any(name not in _COUNTERS and not name.startswith("_") for name in changed)
        envs = {name: EnvState.read(env)._asdict() for name, env in _own_environments(each).items()}
        of_each = {"type": type(each).__qualname__, "state": state, "has_learned": has_learned, "left": left, "envs": envs}
        kept.append({**of_each, "shared": shared})
    return kept


def _own_environments(callback: BaseCallback) -> dict[str, VecEnv]:
    """Environments that a callback holds, as those to evaluate on, by the names of its attributes; not those of training."""
    training = None if callback.model is None or callback.model.env is None else callback.model.env.unwrapped
    found = {name: value for name, value in vars(callback).items() if name not in _GIVEN and isinstance(value, VecEnv)}
    return {name: env for name, env in found.items() if env.unwrapped is not training}


def _is_lost(value: Any) -> bool:
    """Whether an attribute is data, but none that is kept: not what callbacks are connected with."""
    is_connection = isinstance(value, (BaseCallback, VecEnv, Callable)) or hasattr(value, "close")  # type: ignore[arg-type]
    nested = isinstance(value, (list, tuple)) and all(map(callable, value) or [isinstance(v, BaseCallback) for v in value])
    return not (_is_plain(value) or is_connection or nested)


def continue_callbacks(callback: BaseCallback, kept: list[dict[str, Any]], calls: int) -> None:
    """
    Let the callbacks of a resumed run go on with what those of the interrupted one remembered.

    A callback goes on with what the first one of its type remembered that no other has taken. One of a type that the
    interrupted run did not have begins anew, but counts calls as if it had been there.

    :param callback: as ``learn`` uses it
    :param kept: as from :func:`remembered`; empty for a checkpoint that has none
    :param calls: how often a callback would have been called if the run had not been interrupted
    """
    open_, lost = list(kept), []
    for each in callbacks_of(callback):
        own = next((one for one in open_ if one["type"] == type(each).__qualname__), None)
        if own is not None:
            open_.remove(own)
            vars(each).update(own["state"])
            lost += [f"{own['type']}.{name}" for name in own["left"]]
            _continue_environments(each, own.get("envs", {}))
            for name, place in own.get("shared", {}).items():
                with contextlib.suppress(KeyError):  # environments that could not be restored
                    vars(each)[name] = at(each.training_env, place)
        elif each.n_calls == 0:
            each.n_calls = calls
    if lost:
        warnings.warn(
            f"These attributes of callbacks are no plain data, so the checkpoint has not kept them: {', '.join(lost)}",
            stacklevel=6,
        )
    if gone := [one["type"] for one in open_ if one["has_learned"]]:
        warnings.warn(
            f"Callbacks of the run that is resumed are missing, and what they remembered is lost: {', '.join(gone)}",
            stacklevel=6,
        )


def warn_of_beginning_anew(callback: BaseCallback | None, restored: dict[int, dict[str, bytes]]) -> None:
    """
    Name what ``_on_training_start`` of callbacks has set after the checkpoint had restored it.

    :param callback: as ``learn`` uses it
    :param restored: :func:`fingerprints` after :func:`continue_callbacks`
    """
    changed = [
        f"{type(each).__name__}.{name}"
        for each in ([] if callback is None else callbacks_of(callback))
        for name, value in plain_state(each).items()  # and not a file that it has opened
        if name not in _COUNTERS and restored.get(id(each), {}).get(name, _digest(value)) != _digest(value)
    ]
    if changed:
        warnings.warn(
            f"_on_training_start of callbacks has set what the checkpoint had restored, so the run may differ: "
            f"{', '.join(changed)}",
            stacklevel=6,
        )


def _continue_environments(callback: BaseCallback, kept: dict[str, dict[str, Any]]) -> None:
    """Let the environments that a callback holds go on; where they cannot, evaluations are of other episodes."""
    for name, env in _own_environments(callback).items():
        if name not in kept:
            continue
        state = EnvState(**kept[name])
        problem = state.problem
        try:
            if state.restore(env):
                continue
        except ValueError as error:
            problem = str(error)
        warnings.warn(
            f"{type(callback).__name__}.{name} begins anew, so that what is evaluated there may differ: {problem}",
            stacklevel=7,
        )
