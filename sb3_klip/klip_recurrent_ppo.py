"""Recurrent PPO with one KL coefficient per sample."""

from typing import Any, TypeVar

import torch as th
from sb3_contrib import RecurrentPPO
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule

from sb3_klip.algorithm import KLipAlgorithm
from sb3_klip.coefficients import CoefficientLike
from sb3_klip.surrogate import masked_mean

SelfKLipRecurrentPPO = TypeVar("SelfKLipRecurrentPPO", bound="KLipRecurrentPPO")


class KLipRecurrentPPO(KLipAlgorithm, RecurrentPPO):
    """
    KLip-PPO with an LSTM: sb3-contrib's ``RecurrentPPO`` with a per-sample KL coefficient.

    With the default coefficient, the policy after training is that of ``RecurrentPPO``, bit for bit, as long as
    ``RecurrentPPO`` gives no NaN (as it does after a minibatch of a single sample). The padding of sequences is ignored.

    The arguments up to ``_init_setup_model`` are those of ``RecurrentPPO``, which documents them.

    :param policy: The policy model to use (MlpLstmPolicy, CnnLstmPolicy, MultiInputLstmPolicy)
    :param env: The environment to learn from (if registered in Gym, can be str)
    :param beta: The coefficient, see :class:`~sb3_klip.KLipPPO`
    :param beta_kwargs: Parameters of the coefficient
    :param log_kl: Whether to log ``train/kl``
    :param reuse: Must be 1, as the LSTM states in an older rollout come from an older policy
    :raises ValueError: if ``beta`` or ``policy`` is unknown, the policy is not recurrent, or a parameter is out of range
    :raises TypeError: if a parameter is unknown, or an argument is of a wrong type
    """

    def __init__(
        self,
        policy: str | type[RecurrentActorCriticPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 3e-4,
        n_steps: int = 128,
        batch_size: int | None = 128,
        n_epochs: int = 10,
        gamma: float = 0.99,
        gae_lambda: float = 0.95,
        clip_range: float | Schedule = 0.2,
        clip_range_vf: float | Schedule | None = None,
        normalize_advantage: bool = True,
        ent_coef: float = 0.0,
        vf_coef: float = 0.5,
        max_grad_norm: float = 0.5,
        use_sde: bool = False,
        sde_sample_freq: int = -1,
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
        reuse: int = 1,
    ):
        self._take_arguments(policy, RecurrentActorCriticPolicy, n_epochs, device, beta, beta_kwargs, log_kl, reuse=reuse)
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
            use_sde=use_sde,
            sde_sample_freq=sde_sample_freq,
            target_kl=target_kl,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            seed=seed,
            device=device,
            _init_setup_model=_init_setup_model,
        )

    def _check_reuse(self) -> None:
        if self.reuse != 1:
            raise ValueError(
                f"reuse={self.reuse!r} must be 1 for {type(self).__name__}: an older rollout holds the LSTM's states of an "
                "earlier policy, with which the present one cannot be evaluated. KLipPPO and KLipMaskablePPO can."
            )

    def _evaluate_actions(self, rollout_data: Any, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor | None]:
        return self.policy.evaluate_actions(  # type: ignore[call-arg]
            rollout_data.observations, actions, rollout_data.lstm_states, rollout_data.episode_starts
        )

    def _valid_steps(self, rollout_data: Any) -> th.Tensor:
        return rollout_data.mask > 1e-8

    def _value_function_loss(self, returns: th.Tensor, values: th.Tensor, mask: th.Tensor | None) -> th.Tensor:
        # Written as in RecurrentPPO: F.mse_loss rounds differently.
        return masked_mean((returns - values) ** 2, mask)

    def learn(
        self: SelfKLipRecurrentPPO,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str = "KLipRecurrentPPO",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfKLipRecurrentPPO:
        return super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)
