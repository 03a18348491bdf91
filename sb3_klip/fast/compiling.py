"""The loss compiled by ``torch.compile``, where the whole step cannot be: equal to the eager loss up to rounding."""

import inspect
import types
from collections.abc import Callable, MutableMapping
from typing import Any

import torch as th
from torch.utils.weak import WeakIdKeyDictionary

from sb3_klip.errors import did_you_mean
from sb3_klip.fast.validation import unvalidated_distributions

# By model, so that a copy of a model, or one that is pickled, does not carry the other's.
_COMPILED: MutableMapping[Any, Callable[..., Any]] = WeakIdKeyDictionary()


def compiled_loss(model: Any) -> Callable[..., Any]:
    """
    The loss of a minibatch, compiled once for each model.

    :param model: an algorithm of this package, whose ``compile`` has the arguments of ``torch.compile``, or True for none
    :return: a function of what ``model._minibatch_loss`` takes, which returns the same
    """

    def compute(*args: Any) -> Any:
        # torch also switches the validation off for good when it first compiles anything.
        with unvalidated_distributions():
            if model not in _COMPILED:
                options = {} if model.compile is True else dict(model.compile)
                # A function of its own for each model: torch compiles one function for a few models only.
                own = types.FunctionType(_minibatch_loss.__code__.replace(), _minibatch_loss.__globals__)
                _COMPILED[model] = th.compile(own, **options)
            return _COMPILED[model](model, *args)

    return compute


def _minibatch_loss(model: Any, *args: Any) -> Any:
    result = model._minibatch_loss(*args)
    # Or it would have to leave the compiled code together with its gradient, which costs time.
    model.policy.action_dist.distribution = None
    return result


def check_compile(options: bool | dict[str, Any]) -> None:
    """
    Refuse what cannot be compiled with, before anything is built.

    :param options: arguments of ``torch.compile``, or True for none; or False
    :raises TypeError: if it is of another type, or names what is not an argument of ``torch.compile``
    :raises ValueError: if the backend, the mode, or an option of the backend "inductor" is unknown
    :raises RuntimeError: if torch cannot compile here
    """
    if options is False:
        return
    if options is not True and not isinstance(options, dict):
        raise TypeError(f"compile must be True, False or a dict of arguments of torch.compile, not {options!r}")
    given = {} if options is True else options
    allowed = [name for name in inspect.signature(th.compile).parameters if name != "model"]
    for name in given:
        if name not in allowed:
            hint = did_you_mean(name, allowed)
            raise TypeError(f"compile has {name!r}, which is not an argument of torch.compile: {', '.join(allowed)}.{hint}")
    if given.keys() >= {"mode", "options"}:
        raise ValueError(f"compile={options!r} has a mode and options, and torch.compile takes one of them")
    backend = given.get("backend", "inductor")
    backends = th.compiler.list_backends(exclude_tags=None)
    if isinstance(backend, str) and backend not in backends:
        raise ValueError(
            f"compile's backend={backend!r} must be one of {', '.join(backends)}.{did_you_mean(backend, backends)}"
        )
    if backend == "inductor":
        # Only here: importing torch's compiler takes time and memory.
        from torch._inductor import list_mode_options, list_options
        from torch._inductor.cpp_builder import get_cpp_compiler

        modes, mode = list_mode_options(), given.get("mode")
        if mode is not None and mode not in modes:
            raise ValueError(f"compile's mode={mode!r} must be one of {', '.join(modes)}.{did_you_mean(mode, modes)}")
        for name in given.get("options") or ():
            if name.replace("-", "_") not in list_options():
                raise ValueError(
                    f"compile's options have {name!r}, which torch does not know.{did_you_mean(name, list_options())}"
                )
        try:
            get_cpp_compiler()
        except Exception as error:
            raise RuntimeError(
                "compile=True needs a C++ compiler, and torch finds none: install g++ (or clang, or name one in the "
                "environment variable CXX), or leave compile out. The update is then slower, and bit-identical to PPO's."
            ) from error
