"""Parameters of a coefficient: which values are allowed, and what they are at a given point of training."""

import inspect
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Annotated, Any, Literal, TypeAlias, get_args, get_origin

import torch as th

from sb3_klip.errors import did_you_mean


@dataclass(frozen=True)
class Interval:
    """
    Numbers that a parameter may take.

    :param low: lower end
    :param high: upper end
    :param low_open: whether the lower end itself is excluded
    :param high_open: whether the upper end itself is excluded
    """

    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False

    def __contains__(self, value: float) -> bool:
        above = self.low < value if self.low_open else self.low <= value
        below = value < self.high if self.high_open else value <= self.high
        return above and below and math.isfinite(value)

    def nearest(self, value: float) -> float:
        """The allowed number nearest to ``value``; an excluded end is kept off by 1e-6."""
        return min(max(value, self.low + 1e-6 * self.low_open), self.high - 1e-6 * self.high_open)

    def __str__(self) -> str:
        low = f"{self.low:g} {'<' if self.low_open else '<='} " if math.isfinite(self.low) else ""
        high = f" {'<' if self.high_open else '<='} {self.high:g}" if math.isfinite(self.high) else ""
        return f"{low}value{high}" if low or high else "any finite number"


# What coefficients write in their signatures, as in `def ramp(..., *, width: NonNegative = 0.05)`.
NonNegative: TypeAlias = Annotated[float, Interval(0.0)]
Positive: TypeAlias = Annotated[float, Interval(0.0, low_open=True)]
Fraction: TypeAlias = Annotated[float, Interval(0.0, 1.0)]

Schedule: TypeAlias = Callable[[float], float]


def constant_like(value: float | th.Tensor, like: th.Tensor) -> th.Tensor:
    """
    A tensor with one number for all samples.

    Not ``full_like``, which ``torch.compile`` would compile anew for each number that a schedule takes.

    :param value: the number, or a tensor of one
    :param like: tensor of one value per sample
    """
    return th.zeros_like(like) + value


@dataclass(frozen=True)
class Parameter:
    """One keyword-only argument of a coefficient: its name, its default, and its allowed values."""

    name: str
    default: Any
    interval: Interval | None = None
    choices: tuple[Any, ...] = ()
    optional: bool = False

    @classmethod
    def of(cls, argument: inspect.Parameter) -> "Parameter":
        """Read the declaration off a signature."""
        annotation, default = argument.annotation, argument.default
        if get_origin(annotation) is Literal:
            return cls(argument.name, default, choices=get_args(annotation))
        for part in (annotation, *get_args(annotation)):
            if get_origin(part) is Annotated:
                interval = next((extra for extra in get_args(part)[1:] if isinstance(extra, Interval)), None)
                return cls(argument.name, default, interval, optional=default is None)
        is_number = isinstance(default, (int, float)) and not isinstance(default, bool)
        return cls(argument.name, default, Interval() if is_number else None, optional=default is None)

    def check(self, value: Any, owner: str) -> None:
        """
        Refuse a value that the parameter cannot take, a schedule by its value at the start of training.

        :param value: as the user gave it
        :param owner: name of the coefficient, for the message
        :raises TypeError: if the value is neither a number nor a schedule
        :raises ValueError: if it is out of range
        """
        if self.choices:
            if value not in self.choices:
                hint = did_you_mean(value, self.choices)
                raise ValueError(f"{self.name}={value!r} of {owner!r} must be one of {_listing(self.choices)}.{hint}")
        elif self.interval is not None and not (self.optional and value is None):
            number = at_progress(value, 1.0, f"{self.name} of {owner!r}")
            if number not in self.interval:
                start = "" if number == value else f", which starts at {number:g},"
                raise ValueError(f"{self.name}={value!r} of {owner!r}{start} is out of range: {self.interval}")

    def value(self, given: Any, progress_remaining: float, owner: str) -> Any:
        """
        The value in force; a schedule that leaves the allowed range later on is held at its end.

        :param given: as the user gave it
        :param progress_remaining: from 1 (start) to 0 (end of training)
        :param owner: name of the coefficient, for the message
        """
        if self.interval is None or given is None or isinstance(given, int | float):
            return given  # as it is: `check` has seen it, and a whole number stays one
        number = at_progress(given, progress_remaining, f"{self.name} of {owner!r}")
        if math.isnan(number):
            raise ValueError(f"{self.name}={given!r} of {owner!r} is NaN at progress_remaining={progress_remaining:g}")
        return self.interval.nearest(number)

    def __str__(self) -> str:
        allowed = f"one of {_listing(self.choices)}, " if self.choices else f"{self.interval}, " if self.interval else ""
        default = "required" if self.default is inspect.Parameter.empty else f"default {self.default!r}"
        return f"{self.name} ({allowed}{default})"


def at_progress(value: Any, progress_remaining: float, name: str) -> float:
    """
    Evaluate a number, ``"lin_x"`` (from x down to 0, as in RL Zoo) or a callable of the remaining progress.

    :raises TypeError: if it is none of these
    """
    if isinstance(value, str) and value.startswith("lin_"):
        try:
            return float(value[4:]) * progress_remaining
        except ValueError:
            pass
    elif callable(value):
        try:
            return float(value(progress_remaining))
        except (TypeError, ValueError, ArithmeticError) as error:
            raise TypeError(
                f"{name} must be a number, or a function of the remaining progress that returns one; {value!r} fails at "
                f"{progress_remaining:g}: {error}"
            ) from error
    elif isinstance(value, Real) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:  # a whole number that no float holds
            return math.inf
    # YAML's numbers with an exponent have a dot.
    is_yaml = isinstance(value, str) and re.fullmatch(r"[-+]?\d+[eE][-+]?\d+", value)
    hint = f" (which YAML reads as text: write {float(value)!r})" if is_yaml else ""
    raise TypeError(
        f"{name} must be a number, a schedule such as 'lin_0.1', or a function of the remaining progress, not {value!r}{hint}"
    )


def check_names(given: Mapping[str, Any], parameters: Mapping[str, Parameter], owner: str) -> None:
    """
    Refuse parameters that a coefficient does not have.

    :raises TypeError: naming the parameter, the nearest valid one and all valid ones
    """
    for name in given:
        if name not in parameters:
            hint = did_you_mean(name, parameters)
            takes = f"It takes: {'; '.join(map(str, parameters.values()))}" if parameters else "It takes none"
            raise TypeError(f"coefficient {owner!r} has no parameter {name!r}.{hint} {takes}.")


def _listing(values: tuple[Any, ...]) -> str:
    return ", ".join(map(repr, values))
