"""What the algorithms share in addition to the update: their own arguments, their setup, and their rollouts."""

import warnings
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import ProgressBarCallback
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.save_util import data_to_json

from sb3_klip.arguments import check_arguments
from sb3_klip.checkpoints.callback_state import callbacks_of
from sb3_klip.checkpoints.mixin import Checkpoints
from sb3_klip.coefficients import Coefficient, CoefficientLike
from sb3_klip.coefficients.registry import make_beta
from sb3_klip.errors import did_you_mean
from sb3_klip.fast.compiling import check_compile
from sb3_klip.fast.rollouts import short_rollout
from sb3_klip.reuse import SampleReuse
from sb3_klip.rollout import non_finite_observation
from sb3_klip.seam import DISTRIBUTIONS
from sb3_klip.trust_region import default_delta


class KLipAlgorithm(Checkpoints, SampleReuse):
    """The base class of this package's algorithms; ``isinstance(model, KLipAlgorithm)`` identifies them."""

    beta_kwargs: dict[str, Any] | None
    # A name only after loading a file whose coefficient is not known.
    _beta: str | Coefficient

    def _take_arguments(
        self,
        policy: str | type,
        policy_base: type,
        n_epochs: int,
        device: th.device | str,
        beta: str | CoefficientLike,
        beta_kwargs: dict[str, Any] | None,
        log_kl: bool,
        compile: bool | dict[str, Any] = False,
        reuse: int | Sequence[float] = 1,
    ) -> None:
        """
        Check the arguments before anything is built, and store those that the base class does not have.

        :param policy: policy, as in the constructor
        :param policy_base: class that the algorithm's policies derive from
        :param n_epochs: number of passes over the rollout
        :param device: device, as in the constructor
        :param beta: the coefficient
        :param beta_kwargs: its parameters
        :param log_kl: whether to log the KL divergence
        :param compile: whether to compile the update, or arguments of ``torch.compile``
        :param reuse: number of rollouts to learn from, or their weights
        :raises ValueError: if an argument has a wrong value
        :raises TypeError: if an argument is of a wrong type
        """
        self._beta, self.beta_kwargs = make_beta(beta, beta_kwargs), beta_kwargs
        check_arguments({"n_epochs": n_epochs, "log_kl": log_kl, "compile": compile, "reuse": reuse})
        self.log_kl = log_kl
        if str(device).startswith("cuda") and not th.cuda.is_available():  # SB3 says so with verbose=1 only
            warnings.warn(f"device={str(device)!r}: torch finds no GPU, so the model is on the CPU", stacklevel=3)
        self.compile, self.reuse = compile, reuse
        aliases = self.policy_aliases
        own_way = not type(self)._get_policy_from_name.__module__.startswith("stable_baselines3.")
        if isinstance(policy, str) and policy not in aliases and not own_way:
            raise ValueError(f"policy={policy!r} must be one of {', '.join(aliases)}.{did_you_mean(policy, aliases)}")
        if isinstance(policy, type) and not issubclass(policy, policy_base):
            names = ", ".join(aliases)
            raise ValueError(f"policy={policy.__name__} must derive from {policy_base.__name__}, as do {names}")

    @property
    def beta(self) -> Any:
        """The coefficient. You can set another one, by name or as a function; it has its default parameters."""
        return self._beta

    @beta.setter
    def beta(self, value: str | CoefficientLike) -> None:
        coefficient = make_beta(value)
        self._check_coefficient(coefficient)
        self._beta, self.beta_kwargs = coefficient, None

    def learn(self, *args: Any, **kwargs: Any) -> Any:
        """Train, as the base class does. An error or Ctrl-C also closes the progress bar."""
        try:
            return super().learn(*args, **kwargs)
        except BaseException:
            for callback in [] if self._learn_callback is None else callbacks_of(self._learn_callback):
                if isinstance(callback, ProgressBarCallback) and hasattr(callback, "pbar"):
                    callback.pbar.close()
            raise

    def _setup_learn(self, *args: Any, **kwargs: Any) -> Any:
        self._known_coefficient()
        self.update_beta = None
        return super()._setup_learn(*args, **kwargs)

    def _setup_model(self) -> None:
        self.compile = True if self.compile == {} else self.compile
        # As JSON has it.
        self.reuse = int(self.reuse) if isinstance(self.reuse, Integral) else np.array(self.reuse, dtype=float).tolist()
        if isinstance(self._beta, Coefficient):
            self._check_action_space(self._beta)
        if isinstance(self.clip_range, Real) and self.clip_range < 0:  # PPO trains with it
            warnings.warn(
                f"clip_range={self.clip_range} is negative, so the least ratio that it allows, {1 - self.clip_range:g}, is "
                f"above the greatest, {1 + self.clip_range:g}",
                stacklevel=4,
            )
        super()._setup_model()
        self._check_reuse()
        # A file has the coefficient as a name and parameters, and SB3 puts them where it puts all attributes.
        saved = {name: vars(self).pop(name) for name in ("beta", "beta_state") if name in vars(self)}
        if "beta" in saved:
            try:
                self._beta = make_beta(saved["beta"], self.beta_kwargs)
            except Exception as error:
                self._beta = saved["beta"]
                warnings.warn(
                    f"The coefficient {saved['beta']!r} of the saved model cannot be made: "
                    f"{str(error).rstrip('.')}. The model can predict, but not train.",
                    stacklevel=3,
                )
                return
            if self._beta.name in saved.get("beta_state", {}):
                self._beta.load_state_dict(saved["beta_state"][self._beta.name])
        self._check_coefficient(self._known_coefficient())
        if self.compile:
            try:  # the constructor has checked it, but a file may come from another machine
                check_compile(self.compile)
            except Exception as error:
                warnings.warn(f"The update of the saved model was compiled, but this one is not: {error}", stacklevel=3)
                self.compile = False

    def _check_coefficient(self, coefficient: Coefficient) -> None:
        """
        Check that the coefficient works with the policy, the action space and the clip range.

        :raises ValueError: with the reason, if it does not
        """
        self._check_action_space(coefficient)
        try:
            data_to_json({"state": coefficient.state_dict()})
        except Exception as error:  # whatever pickle meets
            raise TypeError(f"the state of beta={coefficient.name!r} cannot be saved: {error}") from error
        if coefficient.needs_clip_range and self.clip_range(1.0) <= 0:
            raise ValueError(f"clip_range={self.clip_range(1.0):g} must be positive for beta={coefficient!r}")
        needs_delta = coefficient.needs_ratio_bounds and coefficient.delta is None
        if needs_delta and not isinstance(self.action_space, spaces.Box):
            clip_range = self.clip_range(1.0)
            if clip_range == self.clip_range(0.0):  # one that falls may start too high, as the first update comes later
                default_delta("categorical", clip_range, get_action_dim(self.action_space))
        action_dist = getattr(self.policy, "action_dist", None)
        needs_kl = coefficient.needs_kl or coefficient.needs_ratio_bounds or self.log_kl
        if needs_kl and not isinstance(action_dist, DISTRIBUTIONS):
            estimates = "Use beta='fixed' or 'adaptive' with beta_kwargs={'estimator': 'k3'} (or 'k1'), which need none."
            raise ValueError(
                f"{'log_kl=True' if self.log_kl else f'beta={coefficient!r}'} needs the closed form of the KL divergence, "
                f"which is not known for the policy's {type(action_dist).__name__}. "
                f"{'Leave log_kl out.' if self.log_kl else estimates}"
            )

    def _check_action_space(self, coefficient: Coefficient) -> None:
        """
        Check that a coefficient which needs probabilities is not used with continuous actions.

        :raises ValueError: if it is, with an alternative
        """
        if coefficient.needs_probabilities and isinstance(self.action_space, spaces.Box):
            raise ValueError(
                f"beta={coefficient!r} needs actions that have a probability, in a Discrete, MultiDiscrete or MultiBinary "
                f"action space. The actions of {self.action_space} have a density, which depends on their unit. For these, "
                "use beta='trust_region_guided', which also adapts the bounds on the ratio to the action."
            )

    def collect_rollouts(self, env: Any, callback: Any, rollout_buffer: Any, *args: Any, **kwargs: Any) -> bool:
        """
        Collect experiences, as the base class does.

        :raises ValueError: if the policy is given an observation from which it can compute no action
        """
        try:
            with short_rollout(self.policy, env, rollout_buffer):
                return super().collect_rollouts(env, callback, rollout_buffer, *args, **kwargs)
        except ValueError as error:
            # Only those of a distribution, by torch or by us: others are of an environment or of a callback.
            of_distribution = str(error).startswith(("Expected parameter", "the policy has no action to take"))
            if not of_distribution or (found := non_finite_observation(self._last_obs)) is None:
                raise
            where = f"stopped at {self.num_timesteps} steps: {found[1]}, in environment {found[0]}"
            raise ValueError(f"{type(self).__name__} {where}. {error}") from error
