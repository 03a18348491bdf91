"""What a coefficient is: a function of per-sample tensors, with its parameters and its state."""

import copy
import functools
import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
import torch as th

from sb3_klip.coefficients.parameters import Parameter, check_names
from sb3_klip.errors import did_you_mean
from sb3_klip.surrogate import ESTIMATORS

#: What a coefficient can request by naming it as an argument, beyond ``ratio``, ``advantages`` and ``clip_range``.
QUANTITIES: dict[str, str] = {
    "kl": "KL(π_old(·|s) ‖ π_new(·|s)) of each state in nats, summed over action dimensions; tensor like the ratio",
    "position": "time step of each sample within its episode, 0 at the start; tensor like the ratio",
    "old_log_prob": "log π_old(a|s) of each sample, a log-density for continuous actions; tensor like the ratio",
    "least_ratio": "smallest ratio of the action under a policy with KL(π_old ‖ π) <= delta, where delta is a parameter of "
    "the coefficient (sb3_klip.trust_region); tensor like the ratio",
    "greatest_ratio": "largest such ratio; tensor like the ratio",
    "age": "number of updates since the sample was collected: 0 in the newest rollout, and always 0 with reuse=1; tensor like "
    "the ratio",
    "progress": "fraction of training that is done, from 0 to 1; float",
}

#: The names of a coefficient's first three arguments, which may stand in any order.
LEADING = ("ratio", "advantages", "clip_range")

CoefficientFunction: TypeAlias = Callable[..., th.Tensor | tuple[th.Tensor, th.Tensor]]


class Coefficient:
    """
    A function with its parameters, which returns the share of each sample's gradient that is removed.

    Called with detached per-sample tensors, it returns the *removal* g in β = -w Â g (the gradient is multiplied by
    ``1 - g``). A penalty also returns a weight. If the function is an object, it can have two optional methods, which receive
    the parameters as keywords: ``stop(ratio)`` returns True to end the epochs of an update, and ``end_update(kl)`` receives
    the mean KL divergence of the final policy over the rollout. ``state_dict()`` and ``load_state_dict()`` save and restore
    the state of the object.

    :param function: ``function(ratio, advantages, clip_range, ...)``, see :mod:`sb3_klip.coefficients`; an object is copied,
        so that this coefficient does not share its state
    :param name: name for messages and checkpoints
    :param parameters: values for its keyword-only arguments: a number, ``"lin_x"`` or a function of the remaining progress
    :raises TypeError: if the signature of the function or of a method does not fit, if a parameter is unknown or of a wrong
        type, or if the object could not be saved, as its constructor takes ``*args`` or ``**kwargs`` or does not store an
        argument, or as it has only one of ``state_dict`` and ``load_state_dict``
    :raises ValueError: if a parameter is out of range, if the result of the function on a small batch is not valid, or if the
        function changes its arguments in place
    """

    def __init__(self, function: CoefficientFunction, name: str, parameters: Mapping[str, Any] | None = None):
        self.function = _own(function)
        self.name = name
        #: The quantities that it requests, see :data:`QUANTITIES`.
        self._order, self.requests, self._declared = read_signature(function, name)
        # NumPy's numbers as Python's, which files hold.
        given = {key: value.item() if isinstance(value, np.generic) else value for key, value in (parameters or {}).items()}
        check_names(given, self._declared, name)
        #: Its parameters, as they were given: numbers or schedules.
        self.settings = {key: given.get(key, parameter.default) for key, parameter in self._declared.items()}
        for key, parameter in self._declared.items():
            parameter.check(self.settings[key], name)
        _check_methods(function, self.settings, name)
        #: What is needed to construct it again under its name: arguments of an object's constructor, and its parameters.
        self.parameters = {**_constructor_arguments(function, name), **self.settings}
        #: The KL estimate that its weight multiplies; None if it has no weight.
        self.estimator: str | None = self.settings.get("estimator", getattr(function, "estimator", None))
        if self.estimator not in (None, *ESTIMATORS):
            hint = did_you_mean(self.estimator, ESTIMATORS)
            allowed = ", ".join(map(repr, ESTIMATORS))
            raise ValueError(f"estimator={self.estimator!r} of {name!r} must be one of {allowed}.{hint}")
        #: Whether it needs a clip range above 0.
        self.needs_clip_range: bool = getattr(function, "needs_clip_range", False)
        #: Whether it needs exp(``old_log_prob``) to be a probability, so that it cannot be used with continuous actions.
        self.needs_probabilities: bool = getattr(function, "needs_probabilities", False)
        #: Whether it needs a ratio of two policies: with ``reuse``, older samples have π/π_k, and not the shifted ratio.
        self.needs_policy_ratio: bool = getattr(function, "needs_policy_ratio", False)
        #: Whether its function has a method ``end_update``.
        self.learns = hasattr(function, "end_update")
        for progress_remaining in (0.0, 1.0):  # schedules may make it fail at their end
            self.set_progress(progress_remaining)
            self._try_out()

    @property
    def needs_kl(self) -> bool:
        """Whether it needs the distribution of the rollout policy in every minibatch."""
        return "kl" in self.requests or self.estimator == "analytic"

    @property
    def needs_ratio_bounds(self) -> bool:
        """Whether it requests ``least_ratio`` or ``greatest_ratio``."""
        return "least_ratio" in self.requests or "greatest_ratio" in self.requests

    @property
    def delta(self) -> float | None:
        """The parameter ``delta``: size in nats of the trust region of ``least_ratio`` and ``greatest_ratio``."""
        return self.values.get("delta")

    @property
    def is_constant(self) -> bool:
        """Whether it belongs to this package, and its removal and weight depend only on the tensors that it receives."""
        own = getattr(self.function, "__module__", "").startswith("sb3_klip.")
        numbers = all(isinstance(value, (int, float, str, type(None))) for value in self.settings.values())
        scheduled = any(isinstance(value, str) and value.startswith("lin_") for value in self.settings.values())
        return own and numbers and not scheduled and not self.learns and "progress" not in self.requests

    def set_progress(self, progress_remaining: float) -> None:
        """
        Evaluate the schedules of its parameters.

        :param progress_remaining: from 1 (start) to 0 (end of training); the last rollout may go beyond the end, as in SB3,
            and counts as the end
        """
        progress_remaining = min(max(progress_remaining, 0.0), 1.0)
        self.progress = 1.0 - progress_remaining
        self.values = {
            key: parameter.value(self.settings[key], progress_remaining, self.name)
            for key, parameter in self._declared.items()
        }

    def __call__(
        self,
        ratio: th.Tensor,
        advantages: th.Tensor,
        clip_range: float | th.Tensor,
        **quantities: th.Tensor | float | None,
    ) -> tuple[th.Tensor, th.Tensor | None]:
        """
        Removal and weight of each sample.

        :param ratio: importance ratio w, detached
        :param advantages: advantage Â, same shape
        :param clip_range: half-width ε
        :param quantities: the requested quantities by name; others are ignored
        :return: removal, and weight or None; both like the ratio
        :raises ValueError: if a quantity is missing, or a returned tensor has a wrong shape, dtype or device
        :raises TypeError: if the function does not return tensors
        """
        asked = {}
        for key in self.requests:
            value = quantities.get(key, self.progress if key == "progress" else None)
            if value is None:
                raise ValueError(f"coefficient {self.name!r} needs {key!r}: {QUANTITIES[key]}")
            asked[key] = value.detach() if isinstance(value, th.Tensor) else value
        leading = {"ratio": ratio, "advantages": advantages, "clip_range": clip_range}
        result = self.function(*(leading[key] for key in self._order), **asked, **self.values)
        removal, weight = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
        self._check("removal", removal, ratio)
        if weight is not None:
            self._check("weight", weight, ratio)
        if weight is None and self.estimator is not None:
            raise ValueError(
                f"coefficient {self.name!r} names the estimator {self.estimator!r}, but returned no weight for it"
            )
        if weight is not None and self.estimator is None:
            raise ValueError(f"coefficient {self.name!r} returned a weight, but names no `estimator` to put it on")
        return removal, weight

    def stop(self, ratio: th.Tensor, mask: th.Tensor | None = None) -> bool:
        """
        Whether to end the epochs of the update before the next gradient step.

        :param ratio: importance ratio w
        :param mask: samples that count; None if all do
        """
        hook = getattr(self.function, "stop", None)
        return hook is not None and bool(hook(ratio if mask is None else ratio[mask], **self.values))

    def end_update(self, kl: float) -> None:
        """
        Learn from the update that has ended.

        :param kl: mean of KL(π_old ‖ π_new) over the rollout under the policy that the update ended with, in nats
        """
        if self.learns:
            self.function.end_update(kl, **self.values)  # type: ignore[attr-defined]

    def state_dict(self) -> dict[str, Any]:
        """The state of the coefficient, as plain JSON values; empty for a pure function."""
        hook = getattr(self.function, "state_dict", None)
        return {} if hook is None else hook()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """
        Restore a state.

        :param state: what :meth:`state_dict` returned
        """
        if state:
            self.function.load_state_dict(state)  # type: ignore[attr-defined]

    def __repr__(self) -> str:
        learned = {key: value for key, value in self.state_dict().items() if isinstance(value, (int, float))}
        return f"{self._named()}, now {assignments(learned)}" if learned else self._named()

    def _named(self) -> str:
        """Name and parameters, in the words of an object that has some."""
        if _has_own_repr(self.function):
            return " with ".join(filter(None, [repr(self.function), assignments(self.settings)]))
        return f"{self.name}({assignments(self.parameters)})"

    def _check(self, what: str, tensor: object, ratio: th.Tensor) -> None:
        """Only what costs no synchronisation with the device; NaN is looked for when an epoch ends."""
        if isinstance(tensor, th.Tensor):
            like = tensor.shape == ratio.shape and tensor.dtype == ratio.dtype and tensor.device == ratio.device
            if like and not tensor.requires_grad:
                return
        expected = f"a tensor of shape {tuple(ratio.shape)}, dtype {ratio.dtype} and device {ratio.device}, without gradient"
        if not isinstance(tensor, th.Tensor):
            raise TypeError(f"the {what} of coefficient {self.name!r} is {type(tensor).__name__}, expected {expected}")
        raise ValueError(
            f"the {what} of coefficient {self.name!r} has shape {tuple(tensor.shape)}, dtype {tensor.dtype}, "
            f"device {tensor.device}, requires_grad={tensor.requires_grad}, expected {expected}"
        )

    def _try_out(self) -> None:
        """Call the function once on every kind of sample, so that it does not fail hours later; what it learns is not kept."""
        with th.inference_mode(False):  # its tensors do not know how often they were changed
            ratio = th.tensor([1.0, 1.1, 2.0, 0.3, 2.0, 0.3, 1.0, 2.0])
            advantages = th.tensor([1.0, -1.0, 1.0, -1.0, -1.0, 1.0, 0.0, 0.0])
            samples = {
                "kl": th.full_like(ratio, 0.05),
                "position": th.zeros_like(ratio),
                "age": th.zeros_like(ratio),
                "old_log_prob": th.full_like(ratio, -1.0),
                "least_ratio": th.full_like(ratio, 0.7),
                "greatest_ratio": th.full_like(ratio, 1.5),
            }
            given = {"ratio": ratio, "advantages": advantages, **samples}
            before = {key: tensor._version for key, tensor in given.items()}
            trial = copy.copy(self)
            trial.function = _own(self.function)
            result = trial(ratio, advantages, 0.2, **samples)
            if trial.function is not self.function:
                trial._try_methods(ratio)
        if changed := [key for key, tensor in given.items() if tensor._version != before[key]]:
            raise ValueError(f"coefficient {self!r} must return new tensors, but it changes {changed[0]!r} in place")
        for what, tensor in zip(("removal", "weight"), result, strict=True):
            if tensor is not None and not tensor.isfinite().all():
                scheduled = f"{assignments(self.values)} at {self.progress:.0%} of training and "
                raise ValueError(
                    f"the {what} of {self!r} must be finite, but is {tensor.tolist()} for "
                    f"{scheduled if self.values != self.settings else ''}"
                    f"ratio {ratio.tolist()}, advantages {advantages.tolist()}, clip_range 0.2"
                )

    def _try_methods(self, ratio: th.Tensor) -> None:
        """Call the methods of a copy that change nothing, as training and saving would."""
        try:
            self.stop(ratio)
        except (ValueError, RuntimeError) as error:  # of an array or a tensor of several numbers
            raise ValueError(f"the method stop of {self.name!r} must return True or False: {error}") from error
        state = self.state_dict()
        if not isinstance(state, Mapping):
            raise TypeError(f"the method state_dict of {self.name!r} must return a dict, not {state!r}")
        self.load_state_dict(state)


CoefficientLike: TypeAlias = Coefficient | CoefficientFunction

_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType)


def assignments(values: Mapping[str, Any]) -> str:
    """Arguments as they are written in a call."""
    return ", ".join(f"{key}={value!r}" for key, value in values.items())


def _has_own_repr(function: CoefficientFunction) -> bool:
    """Whether an object says of itself, in its own words, what it is."""
    return not isinstance(function, _FUNCTIONS) and type(function).__repr__ is not object.__repr__


def _own(function: CoefficientFunction) -> CoefficientFunction:
    """A copy of an object, with a state of its own; a function, which has none, as it is."""
    if isinstance(function, (types.FunctionType, types.BuiltinFunctionType)):
        return function
    try:
        return copy.deepcopy(function)
    except Exception:  # whatever an object may raise that cannot be copied
        return function


def constructor_signature(kind: Any) -> list[inspect.Parameter]:
    """The arguments that a class is made with; none if it has no constructor of its own, or one that is not in Python."""
    if kind.__init__ is object.__init__ and kind.__new__ is object.__new__:
        return []
    try:
        return list(inspect.signature(kind).parameters.values())
    except ValueError:  # as of functools.partial
        return []


def _constructor_arguments(function: CoefficientFunction, name: str) -> dict[str, Any]:
    """
    What an object was made with, from its attributes of the same names: the convention of scikit-learn's estimators.

    :raises TypeError: if an argument of its constructor is none of its attributes, or has no name
    """
    if isinstance(function, _FUNCTIONS):
        return {}
    kind: Any = type(function)
    arguments = constructor_signature(kind) if kind.__init__ is not th.nn.Module.__init__ else []
    if any(argument.kind in (argument.VAR_POSITIONAL, argument.VAR_KEYWORD) for argument in arguments):
        raise TypeError(
            f"coefficient {name!r} could not be saved and loaded again: the constructor of {kind.__name__} must name its "
            "arguments, and not take *args or **kwargs"
        )
    named = [argument.name for argument in arguments]
    if hidden := [argument for argument in named if not hasattr(function, argument)]:
        raise TypeError(
            f"coefficient {name!r} could not be saved and loaded again: {kind.__name__} must keep the argument "
            f"{hidden[0]!r} of its constructor as an attribute of that name (self.{hidden[0]} = {hidden[0]})"
        )
    return {argument: copy.copy(getattr(function, argument)) for argument in named}


def _check_methods(function: CoefficientFunction, parameters: Mapping[str, Any], name: str) -> None:
    """Refuse an object whose optional methods could not be called, which otherwise shows in training or in loading."""
    for method, first in (("stop", "ratio"), ("end_update", "kl"), ("load_state_dict", "state")):
        if (hook := getattr(function, method, None)) is not None:
            keywords = {} if method == "load_state_dict" else parameters
            try:
                inspect.signature(hook).bind(None, **keywords)
            except ValueError:  # of a method that is not in Python
                continue
            except TypeError as error:
                also = f", and the parameters {', '.join(keywords)} as keywords" if keywords else ""
                raise TypeError(
                    f"coefficient {name!r}: its method {method} must take ({first}){also}, not {inspect.signature(hook)}"
                ) from error
    saving = [hasattr(function, method) for method in ("state_dict", "load_state_dict")]
    if any(saving) and not all(saving):
        raise TypeError(
            f"coefficient {name!r} could not be saved and loaded again: it needs both of state_dict and "
            "load_state_dict, or neither"
        )


def read_signature(function: CoefficientFunction, name: str) -> tuple[tuple[str, ...], tuple[str, ...], dict[str, Parameter]]:
    """The order of a function's first three arguments, what it asks for, and its parameters."""
    if not callable(function):
        raise TypeError(f"a coefficient must be a name or a callable, not {function!r}")
    try:
        signature = inspect.signature(function, eval_str=True)
    except Exception:  # annotations that only a type checker can resolve, which may raise anything
        try:
            signature = inspect.signature(function)
        except ValueError as error:
            raise TypeError(f"coefficient {name!r} must be written in Python, as its arguments are read: {error}") from error
    arguments = list(signature.parameters.values())
    order = tuple(a.name for a in arguments if a.kind in (a.POSITIONAL_ONLY, a.POSITIONAL_OR_KEYWORD))[:3]
    if {*order} != {*LEADING}:
        other = next((argument for argument in order if argument not in LEADING), "")
        raise TypeError(
            f"coefficient {name!r} must take (ratio, advantages, clip_range, ...), these three in any order, not {signature}."
            f"{did_you_mean(other, LEADING)}"
        )
    requests: list[str] = []
    parameters: dict[str, Parameter] = {}
    for argument in arguments[3:]:
        if argument.kind in (argument.VAR_POSITIONAL, argument.VAR_KEYWORD):
            raise TypeError(f"coefficient {name!r} must name its arguments, not take *args or **kwargs")
        is_fixed = isinstance(function, functools.partial) and argument.name in function.keywords
        if argument.default is not argument.empty and argument.name in QUANTITIES and not is_fixed:
            raise TypeError(
                f"coefficient {name!r}: {argument.name!r} is a quantity ({QUANTITIES[argument.name]}). To receive it, write "
                "it without a default; a parameter needs another name."
            )
        if argument.default is not argument.empty:
            parameters[argument.name] = Parameter.of(argument)
        elif argument.name in QUANTITIES:
            requests.append(argument.name)
        else:
            hint = did_you_mean(argument.name, QUANTITIES)
            raise TypeError(
                f"coefficient {name!r} asks for {argument.name!r}, which has no default and is not one of "
                f"{', '.join(map(repr, QUANTITIES))}.{hint}"
            )
    return order, tuple(requests), parameters
