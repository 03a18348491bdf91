"""The arguments of a loaded model: from the file, from the caller, and defaults for those that could not be restored."""

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

from stable_baselines3.common.vec_env import VecEnv

from sb3_klip.arguments import check_arguments
from sb3_klip.checkpoints.file import Checkpoint
from sb3_klip.checkpoints.zoo_run import zoo_schedule
from sb3_klip.coefficients.coefficient import Coefficient
from sb3_klip.coefficients.registry import make_beta
from sb3_klip.errors import did_you_mean

#: Hyperparameters that may be functions, which RL Zoo writes as a number or as "lin_x".
SCHEDULES = ("learning_rate", "clip_range", "clip_range_vf")


class LoadArguments:
    """
    The arguments of Stable-Baselines3's ``load``, put together.

    :param algorithm: the class that loads
    :param custom_objects: attributes that the caller gives in place of the file's
    :param kwargs: arguments of the constructor that the caller gives, likewise
    :raises ValueError: if a coefficient that is given is unknown, or a parameter out of range
    :raises TypeError: if one is of a wrong type
    """

    def __init__(self, algorithm: type, custom_objects: Mapping[str, Any] | None, kwargs: Mapping[str, Any]):
        self.algorithm = algorithm
        given = dict(custom_objects or {})
        self.kwargs = dict(kwargs)
        # A coefficient comes with its own parameters, and not with the file's, however it is given.
        for name in ("beta", "beta_kwargs"):
            if name in given:
                self.kwargs.setdefault(name, given.pop(name))
        check_arguments({**given, **self.kwargs})
        self._has_state = isinstance(self.kwargs.get("beta"), Coefficient)
        if "beta" in self.kwargs:
            self.kwargs["beta"] = make_beta(self.kwargs["beta"], self.kwargs.setdefault("beta_kwargs", None))
        self.given = given
        self._arguments = {name for each in algorithm.__mro__ for name in inspect.signature(each).parameters}
        #: For ``custom_objects``.
        self.objects: dict[str, Any] = {}
        #: Attributes that could not be restored, with the reason.
        self.lost: dict[str, str] = {}
        self._found: dict[str, Any] = {}
        self._source = ""

    def read(self, checkpoint: Checkpoint, trusted: bool, resume: bool = False) -> None:
        """
        Take what the file has, but for what the caller gives; in place of what is lost, RL Zoo's schedules, or defaults.

        :param checkpoint: the file
        :param trusted: whether it may run code
        :param resume: whether the run goes on, so that the coefficient goes on, too, however it is given
        :raises ValueError: if the file cannot be loaded, or is not trusted and holds more than plain data
        """
        self.checkpoint = checkpoint
        self._check_names()
        # Those of policy_kwargs are compared with the file's.
        replaced = {*self.given, *(self.kwargs.keys() - {"policy_kwargs"})}
        self.objects, self.lost = checkpoint.restore(replaced, trusted)
        if {*self.lost} & {*SCHEDULES} and (config := checkpoint.config()) is not None:
            file, hyperparams = config
            schedules = {name: zoo_schedule(hyperparams.get(name)) for name in SCHEDULES if name in self.lost}
            self._found = {name: schedule for name, schedule in schedules.items() if schedule is not None}
            self._source = str(file)
        self.objects.update({name: self._found.get(name, self._default(name)) for name in self.lost})
        self.objects.update(self.given)
        # What the file's coefficient has learned is for one that is named, and not for an object, which has its own.
        if self._has_state and not resume:
            self.objects["beta_state"] = {}
        if "beta_kwargs" in self.kwargs and "beta" not in self.kwargs:
            # Other parameters than the file's must fit its coefficient, whereas its own are allowed to be unknown.
            beta = self.objects.get("beta", checkpoint.data.get("beta", "step"))
            make_beta(beta, self.kwargs["beta_kwargs"])

    def _check_names(self) -> None:
        """
        Refuse what is a letter or two away from an argument. With any other name, the same happens as with SB3: it becomes an
        attribute of the model, or nothing if it is in ``custom_objects``, where code for several algorithms has those of all.

        :raises TypeError: with the nearest name
        """
        of_load = inspect.signature(self.algorithm.load).parameters  # type: ignore[attr-defined]
        candidates = {*self._arguments, *of_load} - {"kwargs"}
        for name in (*self.kwargs, *self.given):
            known = name in self._arguments or name in self.checkpoint.data or hasattr(self.algorithm, name)
            if not known and (hint := did_you_mean(name, candidates, cutoff=0.85)):
                raise TypeError(f"{self.algorithm.__name__}.load has no argument {name!r}.{hint}")

    def _default(self, name: str) -> Any:
        """The default of an argument of the constructor, which a subclass may pass on as ``**kwargs``."""
        for each in self.algorithm.__mro__:
            argument = inspect.signature(each).parameters.get(name) if "__init__" in vars(each) else None
            if argument is not None and argument.default is not argument.empty:
                return argument.default
        return None

    def fit(self, env: VecEnv) -> None:
        """
        Take the spaces of an environment.

        :param env: the environment
        :raises ValueError: if they do not fit those that the policy was made for
        """
        self.objects.update(self.checkpoint.fit_spaces(self.objects, env.observation_space, env.action_space))

    def warn_of_lost(self, model: Any) -> None:
        """
        Say in one warning what could not be restored, and what there is in its place.

        :param model: the loaded model
        """
        if not self.lost:
            return

        def value(name: str) -> str:
            found = getattr(model, name, None)
            shown = f"{found(1.0):g} at the start" if callable(found) else repr(found)
            return f"{shown} (from {self._source})" if name in self._found else shown

        reasons = ", ".join(dict.fromkeys(self.lost.values()))
        values = "; ".join(f"{name} is now {value(name)}" for name in self.lost)
        warnings.warn(
            f"{self.checkpoint.name} holds what cannot be restored ({reasons}): {values}. To set other values, give them as "
            "keyword arguments of load(), or as custom_objects.",
            stacklevel=3,
        )
