"""Maskable PPO with one KL coefficient per sample."""

import functools
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from sb3_contrib import MaskablePPO
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule

from sb3_klip.algorithm import KLipAlgorithm
from sb3_klip.coefficients import CoefficientLike

SelfKLipMaskablePPO = TypeVar("SelfKLipMaskablePPO", bound="KLipMaskablePPO")


class KLipMaskablePPO(KLipAlgorithm, MaskablePPO):
    """
    KLip-PPO with invalid action masking: sb3-contrib's ``MaskablePPO`` with a per-sample KL coefficient.

    With the default coefficient, the policy after training is that of ``MaskablePPO``, bit for bit, as long as ``MaskablePPO``
    gives no NaN (as it does after a minibatch of a single sample). KL divergences are over the allowed actions.

    The arguments up to ``_init_setup_model`` are those of ``MaskablePPO``, which documents them.

    :param policy: The policy model to use (MlpPolicy, CnnPolicy, MultiInputPolicy)
    :param env: The environment to learn from, with a method ``action_masks`` or wrapped in an ``ActionMasker``
    :param beta: The coefficient, see :class:`~sb3_klip.KLipPPO`
    :param beta_kwargs: Parameters of the coefficient
    :param log_kl: Whether to log ``train/kl``
    :param reuse: Number of rollouts that each update learns from, or a list of their weights, the newest first
    :raises ValueError: if ``beta`` or ``policy`` is unknown, or a parameter is out of range
    :raises TypeError: if a parameter is unknown, or an argument is of a wrong type
    """

    def __init__(
        self,
        policy: str | type[MaskableActorCriticPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 3e-4,
        n_steps: int = 2048,
        batch_size: int | None = 64,
        n_epochs: int = 10,
        gamma: float = 0.99,
        gae_lambda: float = 0.95,
        clip_range: float | Schedule = 0.2,
        clip_range_vf: float | Schedule | None = None,
        normalize_advantage: bool = True,
        ent_coef: float = 0.0,
        vf_coef: float = 0.5,
        max_grad_norm: float = 0.5,
        rollout_buffer_class: type[RolloutBuffer] | None = None,
        rollout_buffer_kwargs: dict[str, Any] | None = None,
        target_kl: float | None = None,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
        beta: str | CoefficientLike = "step",
        beta_kwargs: dict[str, Any] | None = None,
        log_kl: bool = False,
        reuse: int | Sequence[float] = 1,
    ):
        self._take_arguments(policy, MaskableActorCriticPolicy, n_epochs, device, beta, beta_kwargs, log_kl, reuse=reuse)
        super().__init__(
            policy,
            env,
            learning_rate=learning_rate,
            n_steps=n_steps,
            batch_size=batch_size,
            n_epochs=n_epochs,
            gamma=gamma,
            gae_lambda=gae_lambda,
            clip_range=clip_range,
            clip_range_vf=clip_range_vf,
            normalize_advantage=normalize_advantage,
            ent_coef=ent_coef,
            vf_coef=vf_coef,
            max_grad_norm=max_grad_norm,
            rollout_buffer_class=rollout_buffer_class,
            rollout_buffer_kwargs=rollout_buffer_kwargs,
            target_kl=target_kl,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            seed=seed,
            device=device,
            _init_setup_model=_init_setup_model,
        )

    def _evaluate_actions(self, rollout_data: Any, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor | None]:
        return self.policy.evaluate_actions(rollout_data.observations, actions, action_masks=rollout_data.action_masks)

    def collect_rollouts(self, *args: Any, **kwargs: Any) -> bool:
        """
        Collect experiences, as ``MaskablePPO`` does.

        :raises ValueError: if a mask forbids every action, which would silently make all of them equally likely
        """
        # A function that knows neither the model nor its policy: callbacks may copy the policy in the middle of a rollout.
        check = functools.partial(_refuse_empty_masks, id(self.policy), _choices(self.action_space))
        hook = self.policy.register_forward_pre_hook(check, with_kwargs=True)
        try:
            return super().collect_rollouts(*args, **kwargs)
        finally:
            hook.remove()

    def learn(  # type: ignore[override]
        self: SelfKLipMaskablePPO,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str = "KLipMaskablePPO",
        reset_num_timesteps: bool = True,
        use_masking: bool = True,
        progress_bar: bool = False,
    ) -> SelfKLipMaskablePPO:
        return super().learn(
            total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, use_masking, progress_bar
        )


def _choices(space: spaces.Space) -> list[int]:
    """Number of choices in each of an action's dimensions."""
    if isinstance(space, spaces.Discrete):
        return [int(space.n)]
    if isinstance(space, spaces.MultiDiscrete):
        return [int(size) for size in space.nvec]
    return [2] * int(np.prod(space.shape or ()))  # MultiBinary: off and on in each dimension


def _refuse_empty_masks(
    owner: int, choices: list[int], policy: th.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Refuse masks that leave no choice in one of the action's dimensions; for the policy of this id, and not for copies."""
    masks = kwargs.get("action_masks")
    if masks is None or id(policy) != owner:
        return
    masks = np.asarray(masks, dtype=bool)
    if (masks.size if masks.ndim == 1 else masks[0].size) % sum(choices):
        raise ValueError(
            f"action_masks() must have {' + '.join(map(str, choices))} entries for each environment, but the masks of all "
            f"environments have the shape {masks.shape}"
        )
    rows = masks.reshape(-1, sum(choices))
    for dimension, part in enumerate(np.split(rows, np.cumsum(choices)[:-1], axis=1)):
        if not (allowed := part.any(axis=1)).all():
            where = f" in dimension {dimension}" if len(choices) > 1 else ""
            raise ValueError(f"action_masks() of environment {int(allowed.argmin())} forbids every action{where}")
