"""
Sample reuse: each update learns from the last M rollouts, combined into one by the functions of :mod:`sb3_klip.replay`.

Rollouts are kept as the buffer has them, with what it takes to compute their advantages anew: rewards without the value of the
last state, the states at which a time limit ended an episode, and the state after the last step.
"""

import copy
import os
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch as th
from stable_baselines3.common.utils import obs_as_tensor, update_learning_rate

from sb3_klip.diagnostics import UpdateLog
from sb3_klip.divergence import PolicySnapshot
from sb3_klip.replay import (
    Replayed,
    adapted_learning_rate,
    effective_sample_size,
    reduced_clip_range,
    total_variation,
    vtrace_advantages,
    weights_by_age,
)
from sb3_klip.rollout import BUFFERS
from sb3_klip.surrogate import kl_estimate
from sb3_klip.training import PerSampleKLTraining, Update

#: The arrays of SB3's and sb3-contrib's buffers, of shape (n_steps, n_envs, …).
_ARRAYS = (
    *("observations", "actions", "action_masks", "rewards", "episode_starts"),
    *("values", "log_probs", "advantages", "returns"),
)


class KeptRollout(NamedTuple):
    """
    A rollout, and what it takes to compute its advantages under another value function.

    :param arrays: of the buffer, by name, each of shape (n_steps, n_envs, …); observations may be a dict of such arrays
    :param rewards: rewards as the environment gave them, shape (n_steps, n_envs)
    :param positions: step of each sample in its episode, same shape
    :param time_limits: where a time limit ended an episode: step, environment, and its last observation
    :param last_obs: observations after the last step
    :param last_dones: whether the last step ended an episode, shape (n_envs,)
    """

    arrays: dict[str, Any]
    rewards: np.ndarray
    positions: np.ndarray
    time_limits: list[tuple[int, int, Any]]
    last_obs: Any
    last_dones: Any


class Pool(NamedTuple):
    """
    What an update learns from: several rollouts as one, each column in the order of the flattened buffer.

    :param buffer: a rollout buffer with all samples
    :param replayed: weights and clip centres
    :param weights: weights p by age, which sum to 1
    :param positions: step of each sample in its episode
    :param ages: updates since each sample was collected
    """

    buffer: Any
    replayed: Replayed
    weights: np.ndarray
    positions: th.Tensor
    ages: th.Tensor


class SampleReuse(PerSampleKLTraining):
    """``collect_rollouts`` and ``train`` for ``reuse`` above 1; with 1, they are the base class's."""

    # Argument of the constructor, see sb3_klip.algorithm.
    reuse: int | Sequence[float] = 1
    # The last rollouts, the newest first; between two rollouts, those that the next update will need.
    _kept_rollouts: tuple[KeptRollout, ...] = ()
    # While a rollout is collected: for each step, where a time limit ended an episode, and the last observation.
    _time_limits: list[list[tuple[int, Any]]] | None = None
    # While the policy is updated.
    _replay_pool: Pool | None = None
    # What the schedule's learning rate is multiplied by.
    _learning_rate_scale: float = 1.0
    # Of the PPO that this is mixed into.
    gamma: float
    gae_lambda: float

    def _check_reuse(self) -> None:
        """
        Refuse what cannot be kept, and say how much memory the rollouts take.

        :raises ValueError: if they do not fit into memory, or the rollout buffer is not one of SB3's or sb3-contrib's
        """
        weights, buffer = weights_by_age(self.reuse), self.rollout_buffer
        if len(weights) == 1:
            return
        if (np.diff(weights) > 0).any():
            warnings.warn(
                f"reuse={self.reuse!r} weighs older rollouts more; the first weight is that of the newest one", stacklevel=4
            )
        if type(buffer) not in BUFFERS:
            raise ValueError(
                f"reuse={self.reuse!r} works with the rollout buffers of SB3 and sb3-contrib only, not with "
                f"{type(buffer).__name__}: leave out rollout_buffer_class"
            )
        arrays = [array for name in _ARRAYS if hasattr(buffer, name) for array in _leaves(getattr(buffer, name))]
        # Twice while the policy is updated, as it is put together then, and SB3 flattens what it draws from.
        number = len(weights)
        needed, memory = 3 * number * sum(array.nbytes for array in arrays), _memory()
        if memory is not None and needed > memory:
            fit = {"n_steps": int(self.n_steps * memory / needed), "reuse": int(number * memory / needed)}
            advice = " or ".join(f"{name}={most}" for name, most in fit.items() if most)
            raise ValueError(
                f"reuse={self.reuse!r} with n_steps={self.n_steps} needs {needed / 2**30:.1f} GiB for {number} rollouts, but "
                f"there are {memory / 2**30:.1f} GiB of memory{f': {advice} would fit' if advice else ''}"
            )
        if self.verbose >= 1:
            print(f"Learning from the last {number} rollouts, which take up to {needed / 2**20:.1f} MiB")

    def forget_rollouts(self) -> None:
        """Begin anew with the next rollout, and with the schedule's learning rate."""
        self._kept_rollouts = ()
        self._learning_rate_scale = 1.0

    def set_env(self, *args: Any, **kwargs: Any) -> None:
        """Set the environment, as the base class does; rollouts of the one before are not learned from any more."""
        super().set_env(*args, **kwargs)
        self._kept_rollouts = ()

    # -- keeping rollouts ----------------------------------------------------------------------------------------------

    def collect_rollouts(self, *args: Any, **kwargs: Any) -> bool:
        """Collect a rollout, as the base class does, and keep it if later updates will learn from it."""
        number = len(weights_by_age(self.reuse))
        if number == 1:
            self.forget_rollouts()
            return super().collect_rollouts(*args, **kwargs)
        self._time_limits = []
        try:
            finished = super().collect_rollouts(*args, **kwargs)
            if finished:
                self._kept_rollouts = (self._collected(self._time_limits), *self._kept_rollouts)[:number]
        finally:
            self._time_limits = None
        return finished

    def _update_info_buffer(self, infos: list[dict[str, Any]], dones: np.ndarray | None = None) -> None:
        # The one method that SB3 calls at every step with what the environments say of its end.
        super()._update_info_buffer(infos, dones)
        if self._time_limits is not None and dones is not None:
            self._time_limits.append(
                [
                    (index, info["terminal_observation"])
                    for index, (info, done) in enumerate(zip(infos, dones, strict=True))
                    if done and info.get("TimeLimit.truncated", False) and info.get("terminal_observation") is not None
                ]
            )

    def _collected(self, by_step: list[list[tuple[int, Any]]]) -> KeptRollout:
        """The rollout that has just been collected."""
        buffer = self.rollout_buffer
        arrays = {name: _held(getattr(buffer, name)) for name in _ARRAYS if hasattr(buffer, name)}
        time_limits = [(step, index, obs) for step, ended in enumerate(by_step) for index, obs in ended]
        rewards = buffer.rewards.copy()
        for step, index, obs in time_limits:
            rewards[step, index] -= self.gamma * self._terminal_value(obs)
        positions = _unflattened(super()._positions().cpu().numpy(), rewards.shape)
        return KeptRollout(arrays, rewards, positions, time_limits, self._last_obs, self._last_episode_starts)

    # -- learning from them --------------------------------------------------------------------------------------------

    def train(self) -> None:
        """
        Update the policy on the current rollout and those that were kept.

        :raises ValueError: if an advantage is NaN or infinite, or the learning rate is NaN; or if a gradient is NaN or
            infinite, and then the policy is reset to its parameters before the update
        """
        if len(weights_by_age(self.reuse)) == 1:
            self.forget_rollouts()
        if not self._kept_rollouts:
            super().train()
            return
        current = self.rollout_buffer
        self._replay_pool = self._pooled()
        self.rollout_buffer = self._replay_pool.buffer
        try:
            super().train()
        finally:
            self.rollout_buffer, self._replay_pool = current, None
            # What the next update will need beside the next rollout.
            self._kept_rollouts = self._kept_rollouts[: len(weights_by_age(self.reuse)) - 1]

    def _pooled(self) -> Pool:
        """All rollouts as one, the newest first, with advantages under the present policy and value function."""
        newest, *older = self._kept_rollouts
        renewed = [(newest.arrays, np.ones_like(newest.rewards)), *map(self._renewed, older)]
        number, lengths = len(renewed), [len(kept.rewards) for kept in self._kept_rollouts]
        arrays = {name: _joined([arrays[name] for arrays, _ in renewed]) for name in newest.arrays}
        weights = weights_by_age(self.reuse)[:number]
        weights = weights / weights.sum()

        def column(by_sample: np.ndarray) -> th.Tensor:
            return th.as_tensor(by_sample.T.flatten(), dtype=th.float32, device=self.device)

        def repeated(by_age: np.ndarray) -> th.Tensor:
            return column(np.repeat(by_age, lengths)[:, None].repeat(self.rollout_buffer.n_envs, axis=1))

        centre = column(np.concatenate([ratios for _, ratios in renewed]))
        positions = column(np.concatenate([kept.positions for kept in self._kept_rollouts]))
        # The weight of a rollout is shared by its samples, and the mean over all samples is 1.
        replayed = Replayed(repeated(weights * (sum(lengths) / np.array(lengths))), centre)
        return Pool(self._buffer_of(arrays), replayed, weights, positions, repeated(np.arange(number)))

    def _renewed(self, kept: KeptRollout) -> tuple[dict[str, Any], np.ndarray]:
        """The arrays of an older rollout as an update needs them now, and the ratio c of each sample."""
        shape = kept.rewards.shape
        log_probs, values = np.empty((2, kept.rewards.size), dtype=np.float32)
        for samples in self.evaluate_rollout(self._buffer_of(kept.arrays)):
            places = samples.indices.numpy()
            log_probs[places], values[places] = samples.log_prob.cpu().numpy(), samples.values.cpu().numpy()
        ratios = np.exp(_unflattened(log_probs, shape) - kept.arrays["log_probs"])
        values = _unflattened(values, shape)
        self.policy.set_training_mode(False)
        rewards = kept.rewards.copy()
        for step, index, obs in kept.time_limits:
            rewards[step, index] += self.gamma * self._terminal_value(obs)
        last_values = self._values(obs_as_tensor(kept.last_obs, self.device))
        advantages, returns = vtrace_advantages(
            *(rewards, values, kept.arrays["episode_starts"], last_values, kept.last_dones),
            *(ratios, self.gamma, self.gae_lambda),
        )
        return {**kept.arrays, "values": values, "advantages": advantages, "returns": returns}, ratios

    def _values(self, obs: Any) -> np.ndarray:
        """V of some observations, shape (B,)."""
        with th.no_grad():
            return self.policy.predict_values(obs).flatten().cpu().numpy()

    def _terminal_value(self, obs: Any) -> Any:
        """V of an observation as an environment gives it."""
        return self._values(self.policy.obs_to_tensor(obs)[0])[0]

    def _buffer_of(self, arrays: dict[str, Any]) -> Any:
        """A buffer like the model's with these arrays, from which no samples have been drawn yet."""
        buffer = copy.copy(self.rollout_buffer)
        vars(buffer).update({name: _held(array) for name, array in arrays.items()})
        buffer.buffer_size = buffer.pos = len(arrays["rewards"])
        buffer.full, buffer.generator_ready = True, False
        return buffer

    def _begin_update(self) -> Update:
        update = super()._begin_update()
        return update if self._replay_pool is None else update._replace(replayed=self._replay_pool.replayed)

    def _present_clip_range(self) -> float:
        clip_range = super()._present_clip_range()
        return clip_range if self._replay_pool is None else reduced_clip_range(clip_range, self._replay_pool.weights)

    def _positions(self) -> th.Tensor:
        return super()._positions() if self._replay_pool is None else self._replay_pool.positions

    def _ages(self) -> th.Tensor:
        return super()._ages() if self._replay_pool is None else self._replay_pool.ages

    def _update_learning_rate(self, optimizers: Any) -> None:
        super()._update_learning_rate(optimizers)
        if self._learning_rate_scale != 1:
            learning_rate = self._learning_rate_scale * self.lr_schedule(self._current_progress_remaining)
            update_learning_rate(self.policy.optimizer, learning_rate)
            self.logger.record("train/learning_rate", learning_rate)

    def _rollout_kl(self, snapshot: PolicySnapshot | None) -> float:
        if self._replay_pool is None or snapshot is not None:  # which is of the policy at the start of the update
            return super()._rollout_kl(snapshot)
        log_prob, old_log_prob = self._log_probs()
        centre = self._replay_pool.replayed.centre
        return (centre * kl_estimate("k3", log_prob, old_log_prob + centre.log())).mean().item()

    def _log_probs(self) -> tuple[th.Tensor, th.Tensor]:
        """log π and log μ of all samples."""
        log_prob = th.empty(self.rollout_buffer.buffer_size * self.rollout_buffer.n_envs, device=self.device)
        old_log_prob = th.empty_like(log_prob)
        for samples in self.evaluate_rollout():
            log_prob[samples.indices] = samples.log_prob.to(log_prob.dtype)
            old_log_prob[samples.indices] = samples.rollout_data.old_log_prob
        return log_prob, old_log_prob

    def _end_update(self, update: Update, log: UpdateLog) -> None:
        super()._end_update(update, log)
        if update.replayed is None:
            return
        log_prob, old_log_prob = self._log_probs()
        variation = total_variation((log_prob - old_log_prob).exp(), update.replayed).item()
        self.logger.record("train/total_variation", variation)
        self.logger.record("train/clip_centre_std", update.replayed.centre.std().item())
        self.logger.record("train/effective_sample_size", effective_sample_size(update.replayed).item())
        self._learning_rate_scale = adapted_learning_rate(self._learning_rate_scale, variation, float(update.clip_range))


def _leaves(array: Any) -> list[np.ndarray]:
    """An array, or those of a dict."""
    return list(array.values()) if isinstance(array, dict) else [array]


def _held(array: Any) -> Any:
    """An array, which buffers replace and do not write to, or a copy of a dict of arrays, in which they replace them."""
    return dict(array) if isinstance(array, dict) else array


def _joined(pieces: list[Any]) -> Any:
    """Arrays one after the other, or dicts of arrays."""
    if isinstance(pieces[0], dict):
        return {key: np.concatenate([piece[key] for piece in pieces]) for key in pieces[0]}
    return np.concatenate(pieces)


def _unflattened(column: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A column in the order of the flattened buffer, in the shape (n_steps, n_envs)."""
    return column.reshape(shape[1], shape[0]).T


def _memory() -> int | None:
    """Bytes of memory of this machine, where the system tells."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
