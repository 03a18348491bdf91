"""The table of coefficients that are known by name."""

import copy
import importlib
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, TypeVar

from sb3_klip.coefficients.coefficient import (
    LEADING,
    QUANTITIES,
    Coefficient,
    CoefficientLike,
    constructor_signature,
    read_signature,
)
from sb3_klip.coefficients.parameters import Parameter, check_names
from sb3_klip.errors import did_you_mean

AnyFunction = TypeVar("AnyFunction", bound=Callable[..., Any])


class UnknownCoefficientError(ValueError):
    """The name of a coefficient is not registered and cannot be imported."""


@dataclass(frozen=True, eq=False)
class Entry:
    """
    The definition of a registered coefficient.

    :param name: its name
    :param function: the function; or a class whose objects are such functions; or, with ``factory``, a function that returns
        the coefficient
    :param aliases: further names, each with the parameters that it presets
    :param formula: the removal g, or the weight b on the KL divergence, in the names of its parameters
    :param source: where it was published
    :param search: range of each parameter for the tuner, on a logarithmic scale; None if the tuner does not try it
    :param factory: whether the function takes the parameters and returns a :class:`Coefficient`
    """

    name: str
    function: Callable[..., Any]
    aliases: Mapping[str, Mapping[str, Any]]
    formula: str
    source: str
    search: Mapping[str, tuple[float, float]] | None
    factory: bool


#: Each word that names a coefficient, aliases included, with the entry that it belongs to.
_WORDS: dict[str, Entry] = {}


def register(
    name: str,
    *aliases: str,
    formula: str = "",
    source: str = "",
    search: Mapping[str, tuple[float, float]] | None = None,
    factory: bool = False,
    **presets: dict[str, Any],
) -> Callable[[AnyFunction], AnyFunction]:
    """
    Register a function or a class under a name, as a decorator. Formula and source are added to its docstring.

    :param name: its name in ``beta=``, in YAML files and on the command line
    :param aliases: further names
    :param formula: the removal g, or the weight b on the KL divergence, in the names of its parameters
    :param source: where it was published
    :param search: range of each parameter that RL Zoo's tuner samples, on a logarithmic scale; with None, the tuner does not
        try this coefficient by itself
    :param factory: whether the function takes the parameters, all keyword-only, and returns a :class:`Coefficient`
    :param presets: further names, each with a dict of the parameters that it presets
    :return: decorator that returns the same function
    :raises ValueError: if a name is taken by another coefficient, or is not allowed; or a range of ``search`` is none
    :raises TypeError: if there is no name, ``search`` or a preset names something that is no parameter, or there is no such
        argument
    """

    preset_aliases = {**{alias: {} for alias in aliases}, **presets}
    if callable(name):
        raise TypeError(f"register needs a name: @register({getattr(name, '__name__', 'name')!r})")
    for word in (name, *preset_aliases):
        if not isinstance(word, str) or not word or {*word} & {*":=,"}:
            raise ValueError(f"the name of a coefficient must be a text without colon, comma or equals sign, not {word!r}")

    _check_declarations(name, presets, search or {})

    def decorate(function: AnyFunction) -> AnyFunction:
        _check_parameters(name, function, {"search": search or {}, **preset_aliases})
        entry = Entry(name, function, preset_aliases, formula, source, search, factory)
        for word in (name, *preset_aliases):
            # The same function again is a module that was run twice (a notebook cell, a reload).
            if word in _WORDS and _qualified_name(_WORDS[word].function) != _qualified_name(function):
                raise ValueError(f"the coefficient name {word!r} is already taken")
        for word in [word for word, before in _WORDS.items() if before.name == name and word not in preset_aliases]:
            del _WORDS[word]  # an alias that it has no more
        _WORDS.update(dict.fromkeys((name, *preset_aliases), entry))
        what = "Weight" if formula.startswith("b ") else "Removal"
        facts = [f"{what}: ``{formula}``." if formula else "", f"Source: {source}." if source else ""]
        first, *rest = (inspect.getdoc(function) or "").split("\n\n")
        function.__doc__ = "\n\n".join(filter(None, [first, " ".join(filter(None, facts)), *rest])) or None
        return function

    return decorate


def _check_declarations(name: str, presets: Mapping[str, Any], search: Mapping[str, Any]) -> None:
    """Refuse a misspelt argument, which would be one more name, and a range that the tuner could not sample."""
    for word, preset in presets.items():
        if not isinstance(preset, dict) or any(isinstance(value, (tuple, list)) for value in preset.values()):
            hint = did_you_mean(word, ("formula", "source", "search", "factory"))
            raise TypeError(f"register has no argument {word!r}, and a further name presets parameters by a dict.{hint}")
    if not isinstance(search, Mapping):
        raise TypeError(f"search of the coefficient {name!r} must be a dict of ranges, not {search!r}")
    for key, bounds in search.items():
        is_range = isinstance(bounds, (tuple, list)) and len(bounds) == 2 and all(isinstance(bound, Real) for bound in bounds)
        if not (is_range and 0 < bounds[0] <= bounds[1] < math.inf):
            expected = "(low, high) with 0 < low <= high"
            raise ValueError(f"search of the coefficient {name!r}: {key!r} must have {expected}, not {bounds!r}")


def _check_parameters(name: str, function: Any, declared: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse names of parameters that the function does not have."""
    if not callable(function):
        raise TypeError(f"the coefficient {name!r} must be a function or a class, not {function!r}")
    try:
        known = _names_of_arguments(function)
    except ValueError as error:
        raise TypeError(f"coefficient {name!r} must be written in Python, as its arguments are read: {error}") from error
    for where, keys in declared.items():
        if unknown := next((key for key in keys if key not in known), None):
            hint = did_you_mean(unknown, known)
            raise TypeError(f"{where} of the coefficient {name!r} has {unknown!r}, which is no parameter of it.{hint}")


def entries() -> list[Entry]:
    """
    All registered coefficients.

    :return: their definitions, in the order of registration
    """
    return list(dict.fromkeys(_WORDS.values()))


def available() -> list[str]:
    """
    Names of all registered coefficients, without aliases.

    :return: the names, sorted
    """
    return sorted(entry.name for entry in entries())


def find(name: str) -> Entry | None:
    """
    Look up the definition of a coefficient.

    :param name: its name, an alias, or ``"module:function"``
    :return: None if the function was not registered
    :raises ValueError: if there is no such coefficient
    """
    if name in _WORDS:
        return _WORDS[name]
    function = _imported(name)
    return next((entry for entry in entries() if entry.function is function), None)


def make(name: str | CoefficientLike, /, **parameters: Any) -> Coefficient:
    """
    Build a coefficient.

    :param name: a registered name or alias, ``"module:function"``, ``"module:Class"``, your own function or object, or a
        :class:`Coefficient`; with other parameters, a coefficient gives a new one with the same state
    :param parameters: its parameters, see :class:`Coefficient`; for a class, also the arguments of its constructor
    :return: the coefficient
    :raises ValueError: if the name is unknown or a parameter out of range
    :raises TypeError: if ``name`` is of another type, or a parameter unknown or of a wrong type
    """
    if isinstance(name, Coefficient):
        return _with_parameters(name, parameters) if parameters else name
    if isinstance(name, str):
        entry = _WORDS.get(name)
        if entry is None:
            return _made(_imported(name), name, parameters)
        parameters = {**entry.aliases.get(name, {}), **parameters}
        if not entry.factory:
            return _made(entry.function, entry.name, parameters)
        declared = inspect.signature(entry.function, eval_str=True).parameters.values()
        check_names(parameters, {each.name: Parameter.of(each) for each in declared}, entry.name)
        if not isinstance(coefficient := entry.function(**parameters), Coefficient):
            raise TypeError(f"the factory of coefficient {entry.name!r} must return a Coefficient, not {coefficient!r}")
        return coefficient
    if inspect.isclass(name):
        where = _qualified_name(name)
        raise TypeError(
            f"beta={name.__name__} is a class: give an instance, {name.__name__}(…), or its name, beta={where!r}. "
            "An instance is called with (ratio, advantages, clip_range, ...) and returns the removal of each sample."
        )
    if not callable(name):
        raise TypeError(f"beta must be the name of a coefficient, a Coefficient or a callable, not {name!r}.{_hint(name)}")
    return _made(name, _name_of(name), parameters)


def _hint(value: object) -> str:
    """A sentence that says which coefficient may be meant by a value that is none."""
    if value is None:
        return " For no clip and no penalty, give beta='none'."
    if isinstance(value, Real) and not isinstance(value, bool):
        return f" For a constant weight on the KL divergence, give beta='fixed' and beta_kwargs={{'value': {value}}}."
    return ""


def make_beta(beta: str | CoefficientLike, beta_kwargs: dict[str, Any] | None = None) -> Coefficient:
    """
    The coefficient that the constructor arguments ``beta`` and ``beta_kwargs`` ask for, with a state of its own.

    :raises ValueError: if the name is unknown or a parameter out of range
    :raises TypeError: if an argument is of a wrong type or a parameter unknown
    """
    if beta_kwargs is not None and not isinstance(beta_kwargs, dict):
        raise TypeError(f"beta_kwargs must be a dict of parameters of the coefficient or None, not {beta_kwargs!r}")
    if beta_kwargs and not all(isinstance(key, str) for key in beta_kwargs):
        raise TypeError(f"beta_kwargs={beta_kwargs!r} must have names of parameters as its keys")
    coefficient = make(beta, **(beta_kwargs or {}))
    # One that was made by the user may be in use in another model.
    return copy.deepcopy(coefficient) if coefficient is beta else coefficient


def _with_parameters(coefficient: Coefficient, parameters: Mapping[str, Any]) -> Coefficient:
    """A coefficient like another, which has learned the same, with other parameters."""
    if parameters.keys() <= coefficient.settings.keys():
        return Coefficient(coefficient.function, coefficient.name, {**coefficient.settings, **parameters})
    made = make(coefficient.name, **{**coefficient.parameters, **parameters})
    made.load_state_dict(coefficient.state_dict())
    return made


def _made(function: Any, name: str, parameters: Mapping[str, Any]) -> Coefficient:
    """A coefficient of a function or an object, or of a class, some of whose parameters are its constructor's."""
    given = dict(parameters)
    if inspect.isclass(function):
        arguments = constructor_signature(function)
        own = {argument.name: given.pop(argument.name) for argument in arguments if argument.name in given}
        if missing := [a.name for a in arguments if a.default is a.empty and a.kind < a.VAR_POSITIONAL and a.name not in own]:
            raise TypeError(
                f"coefficient {name!r} needs {missing[0]!r} in beta_kwargs, for the constructor of {function.__name__}"
            )
        function = function(**own)
        constructors = {a.name: Parameter.of(a) for a in arguments if a.kind not in (a.VAR_POSITIONAL, a.VAR_KEYWORD)}
        check_names(given, {**constructors, **read_signature(function, name)[2]}, name)
    return Coefficient(function, name, given)


def _imported(name: str) -> Callable[..., Any]:
    """Resolve ``"module:function"``, which is how a function that was never registered is saved."""
    module, separator, attribute = name.partition(":")
    reason = did_you_mean(name, _WORDS)
    if module in _WORDS:
        reason = f" Parameters are given as beta_kwargs, and the name alone as beta={module!r}."
    if separator and attribute.isidentifier():
        try:
            found = getattr(importlib.import_module(module), attribute, None)
        except Exception as error:  # whatever the module raises; ValueError where there is none before the colon
            if module not in _WORDS:
                reason = f" {module} cannot be imported: {type(error).__name__}: {error}."
        else:
            if callable(found):
                return found
            reason = f" {module} has no function {attribute}."
    raise UnknownCoefficientError(
        f"beta={name!r} is not a coefficient.{reason} "
        f"Available: {_listing()}; or your own: a function, registered by @register, or 'module:function'."
    )


def _listing() -> str:
    """All names, each with its aliases."""
    listed = sorted((entry.name, ", ".join(entry.aliases)) for entry in entries())
    return ", ".join(f"{name} ({aliases})" if aliases else name for name, aliases in listed)


def _names_of_arguments(function: Callable[..., Any]) -> list[str]:
    """The parameters of a function; of a class, those of its constructor and of its objects."""
    arguments = list(inspect.signature(function).parameters)
    if inspect.isclass(function):
        of_objects: Any = function.__call__
        arguments = [*inspect.signature(of_objects).parameters, *(each.name for each in constructor_signature(function))]
    return [name for name in arguments if name not in ("self", *LEADING, *QUANTITIES)]


def _qualified_name(function: Callable[..., Any]) -> str:
    kind = function if hasattr(function, "__qualname__") else type(function)
    return f"{kind.__module__}:{kind.__qualname__}"


def _name_of(function: Callable[..., Any]) -> str:
    """The registered name of a function or of an object's class, or else where it can be imported from."""
    known = (entry.name for entry in entries() if entry.function is function or entry.function is type(function))
    return next(known, _qualified_name(function))
