"""PPO with one KL coefficient per sample."""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch as th
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule

from sb3_klip.algorithm import KLipAlgorithm
from sb3_klip.coefficients import CoefficientLike

SelfKLipPPO = TypeVar("SelfKLipPPO", bound="KLipPPO")


class KLipPPO(KLipAlgorithm, PPO):
    """
    KLip-PPO: Proximal Policy Optimization with a per-sample KL coefficient in place of the clip.

    With the default coefficient, the policy after training is that of ``PPO``, bit for bit (on the same machine, with the same
    thread count and deterministic kernels). ``beta`` selects another coefficient.

    Paper: https://arxiv.org/abs/2606.23932

    :param policy: The policy model to use (MlpPolicy, CnnPolicy, ...)
    :param env: The environment to learn from (if registered in Gym, can be str)
    :param learning_rate: The learning rate, a number or a function of the remaining progress (from 1 to 0)
    :param n_steps: Steps to run in each environment per update; the rollout has n_steps * n_envs samples
    :param batch_size: Minibatch size
    :param n_epochs: Number of passes over the rollout per update
    :param gamma: Discount factor
    :param gae_lambda: Trade-off of bias and variance in the Generalized Advantage Estimator
    :param clip_range: Clipping parameter ε, a number or a function of the remaining progress
    :param clip_range_vf: Clipping range of the value function, a number or a function of the remaining progress;
        None for no clipping. It depends on the scale of the rewards.
    :param normalize_advantage: Whether to normalize the advantages of each minibatch
    :param ent_coef: Entropy coefficient of the loss
    :param vf_coef: Value function coefficient of the loss
    :param max_grad_norm: Maximum norm of the gradient
    :param use_sde: Whether to use generalized State Dependent Exploration
    :param sde_sample_freq: Sample a new noise matrix every n steps with gSDE; -1 for once per rollout
    :param rollout_buffer_class: Rollout buffer class to use; chosen by the observation space if None
    :param rollout_buffer_kwargs: Keyword arguments for the rollout buffer
    :param target_kl: Stop the epochs of an update when the approximate KL divergence exceeds 1.5 times this value
    :param stats_window_size: Number of episodes over which success rate, length and reward are averaged for the logger
    :param tensorboard_log: Log folder for TensorBoard; None for no logging
    :param policy_kwargs: Keyword arguments for the policy
    :param verbose: Verbosity level: 0 for no output, 1 for info messages, 2 for debug messages
    :param seed: Seed of the pseudo-random generators
    :param device: Device (cpu, cuda, ...) on which to run; "auto" uses a GPU if there is one
    :param _init_setup_model: Whether to build the network at the creation of the instance
    :param beta: The coefficient: a name (see :func:`sb3_klip.coefficients.available`), or your own function or object with the
        signature that :mod:`sb3_klip.coefficients` describes
    :param beta_kwargs: Parameters of the coefficient; instead of a number, "lin_x" or a function of the remaining progress
    :param log_kl: Whether to log ``train/kl``, the closed-form KL divergence of the final policy of each update from the
        rollout policy, averaged over the rollout; costs two forward passes per update
    :param compile: Whether to compile the update with ``torch.compile``, or a dict of its arguments. The compilation takes
        5 to 30 seconds. The update is then faster; it equals that of ``PPO`` up to rounding, but not bit for bit.
    :param reuse: Number of rollouts that each update learns from, as in GePPO; or a list of their weights, the newest first
        (see :func:`sb3_klip.replay.optimal_weights`). 1 is PPO. With M rollouts, an update has M times as many minibatches,
        the clip range is reduced, and the learning rate is adapted to the size of the updates.
    :raises ValueError: if ``beta`` or ``policy`` is unknown, a parameter is out of range, or the rollouts for ``reuse`` do not
        fit into memory
    :raises TypeError: if a parameter is unknown, or an argument is of a wrong type
    :raises RuntimeError: if ``compile`` is set and there is no C++ compiler
    """

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 3e-4,
        n_steps: int = 2048,
        batch_size: int = 64,
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
        compile: bool | dict[str, Any] = False,
        reuse: int | Sequence[float] = 1,
    ):
        self._take_arguments(policy, BasePolicy, n_epochs, device, beta, beta_kwargs, log_kl, compile, reuse)
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

    def learn(
        self: SelfKLipPPO,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str = "KLipPPO",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfKLipPPO:
        return super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)
