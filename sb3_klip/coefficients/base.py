"""What a coefficient is, and the registry that finds one by name."""

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias, TypeVar

import torch as th

from sb3_klip.coefficients.parameters import Parameter, check_names
from sb3_klip.errors import did_you_mean

#: What a coefficient may ask for by naming it as an argument, beyond ``ratio``, ``advantages`` and ``clip_range``.
QUANTITIES: dict[str, str] = {
    "kl": "KL(π_old(·|s) ‖ π_new(·|s)) of each state in nats, summed over action dimensions; tensor like the ratio",
    "position": "step of each sample in its episode, 0 at the start; tensor like the ratio",
    "age": "updates since each sample was collected, 0 for on-policy data; tensor like the ratio",
    "progress": "share of training done, from 0 to 1; float",
}

#: Names of the KL estimates that a weight can be put on, see :func:`sb3_klip.surrogate.kl_estimate`.
ESTIMATORS = ("analytic", "k1", "k3")

GateFunction: TypeAlias = Callable[..., th.Tensor | tuple[th.Tensor, th.Tensor]]
AnyFunction = TypeVar("AnyFunction", bound=Callable[..., Any])

_REGISTRY: dict[str, tuple[Callable[..., Any], type["Coefficient"]]] = {}
_ALIASES: dict[str, tuple[str, dict[str, Any]]] = {}


class UnknownCoefficientError(ValueError):
    """The name of a coefficient is not registered and cannot be imported."""


class Coefficient:
    """
    A gate function with its parameters.

    Called with detached per-sample tensors, it returns a gate and, in the KL-penalty family, a weight. Two optional methods
    of the function object take part in training, each given the parameters as keywords: ``stop(ratio)`` returns True to end
    the inner loop, ``end_update(kl)`` is told the mean KL over the rollout under the final policy. ``state_dict()`` and
    ``load_state_dict()`` carry what such an object learns.

    :param function: ``function(ratio, advantages, clip_range, ...)``, see :mod:`sb3_klip.coefficients`
    :param name: how it is shown and saved
    :param parameters: values for its keyword-only arguments: a number, ``"lin_x"`` or a function of the remaining progress
    :raises TypeError: if the function's signature does not fit, or a parameter is unknown or of a wrong type
    :raises ValueError: if a parameter is out of range, or what the function returns on a small batch does not fit
    """

    def __init__(self, function: GateFunction, name: str, parameters: Mapping[str, Any] | None = None):
        self.function = function
        self.name = name
        self._arguments, self._declared = _read_signature(function, name)
        given = dict(parameters or {})
        check_names(given, self._declared, name)
        self.parameters = {key: given.get(key, declared.default) for key, declared in self._declared.items()}
        for key, declared in self._declared.items():
            declared.check(self.parameters[key], name)
        self.set_progress(1.0)
        self._try_out()

    @property
    def requests(self) -> tuple[str, ...]:
        """The quantities that it asks for, see :data:`QUANTITIES`."""
        return self._arguments

    @property
    def estimator(self) -> str | None:
        """The KL estimate that the weight is for; None if the coefficient has no weight."""
        return self.parameters.get("estimator", getattr(self.function, "estimator", None))

    @property
    def needs_kl(self) -> bool:
        """Whether the rollout policy's distribution is needed in every minibatch."""
        return "kl" in self.requests or self.estimator == "analytic"

    @property
    def needs_clip_range(self) -> bool:
        """Whether it is undefined for a clip range of 0 or less."""
        return getattr(self.function, "needs_clip_range", False)

    @property
    def learns(self) -> bool:
        """Whether :meth:`end_update` does anything."""
        return hasattr(self.function, "end_update")

    def set_progress(self, progress_remaining: float) -> None:
        """
        Bring scheduled parameters up to date.

        :param progress_remaining: from 1 (start) to 0 (end of training)
        """
        self.progress = 1.0 - progress_remaining
        self.values = {
            key: declared.value(self.parameters[key], progress_remaining, self.name)
            for key, declared in self._declared.items()
        }

    def __call__(
        self,
        ratio: th.Tensor,
        advantages: th.Tensor,
        clip_range: float | th.Tensor,
        **quantities: th.Tensor | float | None,
    ) -> tuple[th.Tensor, th.Tensor | None]:
        """
        Gate and weight of each sample.

        :param ratio: importance ratio w, detached
        :param advantages: advantage Â, same shape
        :param clip_range: half-width ε
        :param quantities: what the coefficient asks for by name; more may be given
        :return: gate, and weight or None; both like the ratio
        :raises ValueError: if a quantity is missing, or what the function returns does not fit
        :raises TypeError: if it returns something else than tensors
        """
        gate, weight = self._evaluate(ratio, advantages, clip_range, quantities)
        if weight is None and self.estimator is not None:
            raise ValueError(
                f"coefficient {self.name!r} names the estimator {self.estimator!r}, but returned no weight for it"
            )
        if weight is not None and self.estimator is None:
            raise ValueError(f"coefficient {self.name!r} returned a weight, but names no `estimator` to put it on")
        return gate, weight

    def _evaluate(
        self, ratio: th.Tensor, advantages: th.Tensor, clip_range: float | th.Tensor, quantities: Mapping[str, Any]
    ) -> tuple[th.Tensor, th.Tensor | None]:
        """Call the function, and check that what it returns is like the ratio."""
        asked = {}
        for key in self._arguments:
            value = self.progress if key == "progress" else quantities.get(key)
            if value is None:
                raise ValueError(f"coefficient {self.name!r} needs {key!r}: {QUANTITIES[key]}")
            asked[key] = value.detach() if isinstance(value, th.Tensor) else value
        result = self.function(ratio, advantages, clip_range, **asked, **self.values)
        gate, weight = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
        self._check("gate", gate, ratio)
        if weight is not None:
            self._check("weight", weight, ratio)
        return gate, weight

    def stop(self, ratio: th.Tensor, mask: th.Tensor | None = None) -> bool:
        """
        Whether to end the inner loop before the next step.

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
        """What the coefficient learned, as plain JSON values; empty for a pure function."""
        hook = getattr(self.function, "state_dict", None)
        return {} if hook is None else hook()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        if state:
            self.function.load_state_dict(state)  # type: ignore[attr-defined]

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(f'{key}={value!r}' for key, value in self.parameters.items())})"

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
        """Call the function once on every kind of sample, so that it does not fail hours later."""
        ratio = th.tensor([1.0, 1.1, 2.0, 0.3, 2.0, 0.3, 1.0, 2.0])
        advantages = th.tensor([1.0, -1.0, 1.0, -1.0, -1.0, 1.0, 0.0, 0.0])
        result = self(
            ratio,
            advantages,
            0.2,
            kl=th.full_like(ratio, 0.05),
            position=th.zeros_like(ratio),
            age=th.zeros_like(ratio),
        )
        for what, tensor in zip(("gate", "weight"), result, strict=True):
            if tensor is not None and not tensor.isfinite().all():
                raise ValueError(
                    f"the {what} of {self!r} must be finite, but is {tensor.tolist()} "
                    f"for ratio {ratio.tolist()}, advantages {advantages.tolist()}, clip_range 0.2"
                )


CoefficientLike: TypeAlias = Coefficient | GateFunction


def _read_signature(function: GateFunction, name: str) -> tuple[tuple[str, ...], dict[str, Parameter]]:
    """Split a function's arguments after the first three into what it asks for and its parameters."""
    if not callable(function):
        raise TypeError(f"a coefficient must be a name or a callable, not {function!r}")
    try:
        signature = inspect.signature(function, eval_str=True)
    except NameError:  # annotations that only a type checker can resolve
        signature = inspect.signature(function)
    arguments = list(signature.parameters.values())
    leading = [a for a in arguments if a.kind in (a.POSITIONAL_ONLY, a.POSITIONAL_OR_KEYWORD)][:3]
    if len(leading) < 3:
        raise TypeError(f"coefficient {name!r} must take (ratio, advantages, clip_range, ...), not {signature}")
    requests: list[str] = []
    parameters: dict[str, Parameter] = {}
    for argument in arguments[3:]:
        if argument.kind in (argument.VAR_POSITIONAL, argument.VAR_KEYWORD):
            raise TypeError(f"coefficient {name!r} must name its arguments, not take *args or **kwargs")
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
    return tuple(requests), parameters


def register(
    name: str, *aliases: str, kind: type[Coefficient] = Coefficient, **presets: dict[str, Any]
) -> Callable[[AnyFunction], AnyFunction]:
    """
    Make a coefficient known by name, as a decorator of a function, or of a class without constructor arguments.

    :param name: its name in ``beta=``, in YAML files and on the command line
    :param aliases: further names
    :param kind: the class of coefficient to make of it
    :param presets: further names that come with parameters of their own
    :return: decorator that returns the function unchanged
    :raises ValueError: if a name is taken by another coefficient
    """

    def decorate(function: AnyFunction) -> AnyFunction:
        for word in (name, *aliases, *presets):
            owner = _ALIASES[word][0] if word in _ALIASES else word
            # The same function again is a module that was run twice (a notebook cell, a reload).
            if owner in _REGISTRY and _qualified_name(_REGISTRY[owner][0]) != _qualified_name(function):
                raise ValueError(f"the coefficient name {word!r} is already taken")
        _REGISTRY[name] = (function, kind)
        _ALIASES.update({alias: (name, {}) for alias in aliases})
        _ALIASES.update({alias: (name, parameters) for alias, parameters in presets.items()})
        return function

    return decorate


def available() -> list[str]:
    """Names of all registered coefficients, without aliases, sorted."""
    return sorted(_REGISTRY)


def make(name: str | CoefficientLike, /, **parameters: Any) -> Coefficient:
    """
    Build a coefficient.

    :param name: a registered name or alias, ``"module:function"``, your own function, or a coefficient already made
    :param parameters: its parameters, see :class:`Coefficient`
    :return: the coefficient
    :raises ValueError: if the name is unknown or a parameter out of range
    :raises TypeError: if ``name`` is of another type, or a parameter unknown or of a wrong type
    """
    if isinstance(name, Coefficient):
        return type(name)(name.function, name.name, {**name.parameters, **parameters}) if parameters else name
    if isinstance(name, str):
        presets: dict[str, Any] = {}
        if name in _ALIASES:
            name, presets = _ALIASES[name]
        function, kind = _REGISTRY[name] if name in _REGISTRY else (_import(name), Coefficient)
        instance: Any = function() if inspect.isclass(function) else function
        return kind(instance, name, {**presets, **parameters})
    if not callable(name):
        raise TypeError(f"beta must be the name of a coefficient, a Coefficient or a callable, not {name!r}")
    return Coefficient(name, _name_of(name), parameters)


def _import(name: str) -> Callable[..., Any]:
    """Resolve ``"module:function"``, which is how a function that was never registered is saved."""
    module, separator, attribute = name.partition(":")
    reason = did_you_mean(name, [*_REGISTRY, *_ALIASES])
    if separator and attribute.isidentifier():
        try:
            found = getattr(importlib.import_module(module), attribute, None)
        except (ImportError, ValueError) as error:  # ValueError: no module before the colon
            reason = f" {module} cannot be imported: {error}."
        else:
            if callable(found):
                return found
            reason = f" {module} has no function {attribute}."
    raise UnknownCoefficientError(
        f"beta={name!r} is not a coefficient.{reason} "
        f"Available: {', '.join(available())}; or your own: a function, registered by @register, or 'module:function'."
    )


def _qualified_name(function: Callable[..., Any]) -> str:
    kind = function if hasattr(function, "__qualname__") else type(function)
    return f"{kind.__module__}:{kind.__qualname__}"


def _name_of(function: Callable[..., Any]) -> str:
    """The registered name of a function or of an object's class, or else where it can be imported from."""
    for name, (known, _) in _REGISTRY.items():
        if known is function or known is type(function):
            return name
    return _qualified_name(function)
