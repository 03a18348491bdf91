"""What a coefficient may ask to know of each sample beyond what SB3's rollout buffers hand out."""

import copy
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer
from stable_baselines3.common.type_aliases import DictRolloutBufferSamples, RolloutBufferSamples

from sb3_klip.divergence import DIVERGENCES, Parameters, parameters_of


def copied(buffer: RolloutBuffer) -> RolloutBuffer:
    """
    A copy of a rollout that stays as it is when samples are drawn from the other, which replaces arrays but writes to none.

    :param buffer: any rollout buffer, from which no samples have been drawn yet
    """
    twin = copy.copy(buffer)
    if isinstance(buffer.observations, dict):
        twin.observations = dict(buffer.observations)  # type: ignore[assignment]
    return twin


def indexed_minibatches(buffer: RolloutBuffer, batch_size: int | None) -> Iterator[tuple[Any, th.Tensor | None]]:
    """
    The buffer's own minibatches, from its own random numbers, each with the places of its samples in the flattened rollout.

    SB3's buffers index and convert each of their arrays for each minibatch. Here they are converted once, which gives the
    same tensors in less time; a buffer with a ``_get_samples`` of its own is asked as it wants to be.

    :param buffer: any rollout buffer
    :param batch_size: minibatch size; None for all samples at once
    :return: pairs of samples and indices; None for indices if the buffer does not hand out its samples through
        ``_get_samples``, as SB3's do
    """
    taken: deque[np.ndarray] = deque()
    get_samples = _converted_once(buffer) if _is_plain(buffer) else buffer._get_samples

    def recording(batch_inds: np.ndarray, *args: Any, **kwargs: Any) -> Any:
        taken.append(batch_inds)
        return get_samples(batch_inds, *args, **kwargs)

    buffer._get_samples = recording  # type: ignore[method-assign]
    try:
        for samples in buffer.get(batch_size):
            yield samples, th.from_numpy(taken.popleft()) if taken else None
    finally:
        del buffer._get_samples


def _is_plain(buffer: RolloutBuffer) -> bool:
    """Whether the samples are what SB3 makes of its arrays, in the memory where they are."""
    names = ("get", "_get_samples", "to_torch")
    base = DictRolloutBuffer if isinstance(buffer, DictRolloutBuffer) else RolloutBuffer
    return buffer.device.type == "cpu" and all(getattr(type(buffer), name) is getattr(base, name) for name in names)


def _converted_once(buffer: RolloutBuffer) -> Callable[..., Any]:
    """A ``_get_samples`` that indexes tensors; these are made at the first call, when the buffer has been flattened."""
    columns: list[th.Tensor] = []
    observations: dict[str, th.Tensor] = {}

    def get_samples(batch_inds: np.ndarray, env: Any = None) -> Any:
        is_dict = isinstance(buffer, DictRolloutBuffer)
        if not columns:
            for array in (buffer.values, buffer.log_probs, buffer.advantages, buffer.returns):
                columns.append(th.from_numpy(array).flatten())
            columns.insert(0, th.from_numpy(buffer.actions.astype(np.float32, copy=False)))
            arrays: Any = buffer.observations if is_dict else {"": buffer.observations}
            observations.update({key: th.from_numpy(array) for key, array in arrays.items()})
        index = th.from_numpy(batch_inds)
        rows = [column.index_select(0, index) for column in columns]
        seen = {key: tensor.index_select(0, index) for key, tensor in observations.items()}
        return DictRolloutBufferSamples(seen, *rows) if is_dict else RolloutBufferSamples(seen[""], *rows)

    return get_samples


def episode_positions(episode_starts: np.ndarray, carried: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """
    Steps since the start of the episode, for each sample of a rollout.

    :param episode_starts: non-zero where an episode starts, shape (n_steps, n_envs)
    :param carried: steps already done in the episodes that run on from the last rollout, shape (n_envs,)
    :return: positions, shape (n_steps, n_envs), and the steps to carry to the next rollout, shape (n_envs,)
    """
    step = np.arange(len(episode_starts))[:, None]
    # Where the current episode started: a negative step if in an earlier rollout.
    start = np.maximum.accumulate(np.where(episode_starts > 0, step, -carried[None, :]), axis=0)
    positions = step - start
    return positions, positions[-1] + 1


class PolicySnapshot:
    """
    The rollout policy's action distribution at every sample of a rollout.

    :param size: number of samples, n_steps * n_envs
    """

    def __init__(self, size: int):
        self.size = size
        self.family = ""
        self.parameters: Parameters = ()
        self._seen: th.Tensor | None = None

    def store(self, indices: th.Tensor, mask: th.Tensor | None, policy: Any) -> None:
        """
        Take in the distribution that the policy holds.

        :param indices: places of the samples in the rollout
        :param mask: rows of the distribution that are samples, None if all are
        :param policy: the policy, after it has evaluated these samples
        :raises ValueError: if the policy does not hold the distribution that it evaluated the samples with
        """
        self.family, parameters = parameters_of(policy.action_dist)
        rows = len(indices) if mask is None else len(mask)
        if parameters[0] is self._seen or len(parameters[0]) != rows:
            raise ValueError(
                f"{type(policy).__name__}.evaluate_actions does not use the policy's action_dist, so the closed form of the "
                "KL divergence is not at hand. Use beta='fixed' or 'adaptive' with the estimator 'k3' or 'k1'."
            )
        self._seen = parameters[0]
        if not self.parameters:
            self.parameters = tuple(p.new_empty(self.size, *p.shape[1:]) for p in parameters)
        for kept, current in zip(self.parameters, parameters, strict=True):
            kept[indices] = current if mask is None else current[mask]

    def kl(self, indices: th.Tensor, mask: th.Tensor | None, policy: Any) -> th.Tensor:
        """
        KL(π_old ‖ π_new) at each sample of a minibatch, 0 where the mask is False.

        :param indices: places of the samples in the rollout
        :param mask: rows of the distribution that are samples, None if all are
        :param policy: the policy, after it has evaluated these samples
        :return: divergence in nats, shape (B,), differentiable
        """
        _, current = parameters_of(policy.action_dist)
        if mask is None:
            return DIVERGENCES[self.family](tuple(kept[indices] for kept in self.parameters), current)
        # The padding of a sequence stays out of the graph, where a NaN of it would reach the weights.
        divergence = DIVERGENCES[self.family](
            tuple(kept[indices] for kept in self.parameters), tuple(parameter[mask] for parameter in current)
        )
        return padded(divergence, mask)


def padded(values: th.Tensor, mask: th.Tensor | None) -> th.Tensor:
    """
    Put values of the samples that count where the mask is True, and 0 elsewhere.

    :param values: shape (n,), n being the number of True values in the mask
    :param mask: shape (B,); None leaves the values as they are
    :return: shape (B,)
    """
    if mask is None:
        return values
    return th.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)
