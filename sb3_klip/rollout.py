"""The minibatches of a rollout, each with the indices of its samples, and the time step of each sample in its episode."""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch as th
from sb3_contrib.common.maskable.buffers import (
    MaskableDictRolloutBuffer,
    MaskableDictRolloutBufferSamples,
    MaskableRolloutBuffer,
    MaskableRolloutBufferSamples,
)
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer
from stable_baselines3.common.type_aliases import DictRolloutBufferSamples, RolloutBufferSamples

from sb3_klip.fast.standing_in import is_changed

#: What the minibatches of SB3's and sb3-contrib's buffers are made of, by the type of the buffer.
BUFFERS: dict[type[RolloutBuffer], Any] = {
    RolloutBuffer: RolloutBufferSamples,
    DictRolloutBuffer: DictRolloutBufferSamples,
    MaskableRolloutBuffer: MaskableRolloutBufferSamples,
    MaskableDictRolloutBuffer: MaskableDictRolloutBufferSamples,
}
#: The arrays of such a buffer that have one number per sample, in the order of a minibatch.
_COLUMNS = ("values", "log_probs", "advantages", "returns")
#: Size of a cache line, in bytes.
_CACHE_LINE = 64
#: Bytes of the samples that are taken out of a rollout at a time, where they are of several minibatches.
_BLOCK = 1_000_000


def rollout_copy(buffer: RolloutBuffer) -> RolloutBuffer:
    """
    A copy of a rollout that stays as it is when samples are drawn from the other, which replaces arrays but writes to none.

    :param buffer: any rollout buffer, from which no samples have been drawn yet
    """
    twin = copy.copy(buffer)
    if isinstance(buffer.observations, dict):
        twin.observations = dict(buffer.observations)  # type: ignore[assignment]
    return twin


def indexed_minibatches(
    buffer: RolloutBuffer, batch_size: int | None, gathered: bool = True
) -> Iterator[tuple[Any, th.Tensor | None]]:
    """
    The buffer's own minibatches, from its own random numbers, each with the places of its samples in the flattened rollout.

    :param buffer: any rollout buffer
    :param batch_size: minibatch size; None for all samples at once
    :param gathered: False for the samples of the whole rollout each time, of a buffer that :func:`has_columns`
    :return: pairs of samples and indices; None for indices if the buffer does not hand out its samples through
        ``_get_samples``, as SB3's do
    """
    if has_columns(buffer):
        return _minibatches(buffer, batch_size, gathered)
    return _observed_minibatches(buffer, batch_size)


def has_columns(buffer: RolloutBuffer) -> bool:
    """
    Whether the samples are what SB3 makes of its arrays, in the memory where they are.

    :param buffer: any rollout buffer
    """
    methods = ("get", "_get_samples", "to_torch", "swap_and_flatten")
    return type(buffer) in BUFFERS and buffer.device.type == "cpu" and not is_changed(buffer, *methods)


def non_finite(buffer: Any, n_steps: int, last_obs: Any) -> str | None:
    """
    What makes advantages NaN or infinite, at which step, and in which environment.

    :param buffer: any rollout buffer, from which no samples have been drawn yet; of several rollouts, the newest first
    :param n_steps: number of steps of a rollout
    :param last_obs: observations after the last step of the newest
    :return: the first cause, in the order of steps; None if all advantages are finite, or the buffer has its own way to hand
        out samples, and may leave some out
    """
    if is_changed(buffer, "get", "_get_samples"):
        return None
    advantages, rewards, values = (np.asarray(array) for array in (buffer.advantages, buffer.rewards, buffer.values))
    if np.isfinite(advantages).all():
        return None
    # Samples have been drawn; or advantages are not those of SB3.
    if not advantages.shape == rewards.shape == values.shape or is_changed(buffer, "compute_returns_and_advantage"):
        return "an advantage is NaN or infinite"

    def place(step: int, env: int) -> str:
        return f"at step {step % n_steps + 1} of the rollout's {n_steps}, in environment {env}"

    for step, env in np.argwhere(~(np.isfinite(rewards) & np.isfinite(values))):
        if not np.isfinite(values[step, env]):
            return f"{_valued(buffer.observations, (step, env))} {values[step, env]}, {place(step, env)}"
        # Where a time limit ends an episode, SB3 adds the value of its last observation.
        ends = step + 1 < len(rewards) and buffer.episode_starts[step + 1, env]
        what = "the reward, or the value of the observation that ended the episode," if ends else "the reward"
        spread = len(rewards[step]) > 1 and np.isnan(rewards[step]).all()
        others = " and all others, as VecNormalize makes all rewards NaN if one is" if spread else ""
        return f"{what} is {rewards[step, env]}, {place(step, env)}{others}"
    step, env = np.argwhere(~np.isfinite(advantages))[-1]
    if step % n_steps == n_steps - 1:
        return f"{_valued(last_obs, (env,))} {advantages[step, env]}, after the last step of the rollout, in environment {env}"
    return f"rewards are too large: their sum is {advantages[step, env]}, {place(step, env)}"


def non_finite_observation(observations: Any) -> tuple[int, str] | None:
    """
    The first observation that has a NaN or infinite element.

    :param observations: an array, or a dict of arrays; the first dimension is that of the environments or samples
    :return: its index, and a clause that names the element; None if all are finite
    """
    for key, array in observations.items() if isinstance(observations, dict) else [("", observations)]:
        bad = ~np.isfinite(array)
        if bad.any():
            place = tuple(map(int, np.unravel_index(bad.argmax(), bad.shape)))
            where = "".join(f"[{part!r}]" for part in (*filter(None, [key]), *place[1:]))
            return place[0], f"observation{where} is {array[place]}"
    return None


def non_finite_sample(buffer: Any, n_steps: int) -> str | None:
    """
    The first observation of a rollout that has a NaN or infinite element.

    :param buffer: any rollout buffer, from which samples have been drawn
    :param n_steps: number of steps of a rollout
    :return: a clause that names the element, its step and its environment; None if all are finite, or the samples are not
        those of SB3's arrays on the CPU
    """
    if not has_columns(buffer) or (found := non_finite_observation(buffer.observations)) is None:
        return None
    env, step = divmod(found[0], buffer.buffer_size)
    return f"{found[1]}, at step {step % n_steps + 1} of the rollout's {n_steps}, in environment {env}"


def _valued(observations: Any, place: tuple[int, ...]) -> str:
    """What to say is not finite where the value of this observation is not."""
    seen = observations.values() if isinstance(observations, dict) else [observations]
    if any(np.isnan(np.asarray(array[place], dtype=float)).any() for array in seen):
        return "the observation has an element that is NaN, so its value is"
    return "the value of the observation is"


def _minibatches(buffer: Any, batch_size: int | None, gathered: bool) -> Iterator[tuple[Any, th.Tensor]]:
    """
    The minibatches of ``buffer.get``, drawn as it draws them.

    SB3's buffers index and convert each of their arrays for each minibatch. Here they are converted once, which gives the
    same tensors in less time.
    """
    assert buffer.full
    size = int(buffer.buffer_size * buffer.n_envs)
    batch_size = min(int(batch_size or size), size)  # of any kind of integer
    places = th.from_numpy(np.random.permutation(size))
    _flatten(buffer)
    is_dict = isinstance(buffer.observations, dict)
    observations = {
        key: _tensor(array) for key, array in (buffer.observations if is_dict else {"": buffer.observations}).items()
    }
    columns = [_tensor(getattr(buffer, name)).flatten() for name in _COLUMNS]
    if hasattr(buffer, "action_masks"):
        masks = _tensor(buffer.action_masks).reshape(-1, buffer.mask_dims)
        columns = [_tensor(buffer.actions), *columns, masks]
    else:
        columns.insert(0, _tensor(buffer.actions.astype(np.float32, copy=False)))
    kind = BUFFERS[type(buffer)]
    if not gathered:
        samples = kind(observations if is_dict else observations[""], *columns)
        yield from ((samples, indices) for indices in places.split(batch_size))
        return
    arrays = [*columns, *observations.values()]
    for block in places.split(_block_size(batch_size, arrays)):
        # Not as views, into which an extractor could not write.
        taken = [th.unsafe_split(array.index_select(0, block), batch_size) for array in arrays]
        for indices, *rows in zip(block.split(batch_size), *taken, strict=True):
            seen = dict(zip(observations, rows[len(columns) :], strict=True))
            yield kind(seen if is_dict else seen[""], *rows[: len(columns)]), indices


def _tensor(array: np.ndarray) -> th.Tensor:
    """The array as a tensor: in the same memory, unless it is read-only, or reversed, as a callback may have left it."""
    return th.from_numpy(np.require(array, requirements=("C", "W")))


def _block_size(batch_size: int, arrays: Sequence[th.Tensor]) -> int:
    """
    How many samples to take out of the rollout at a time: those of one minibatch, or, in fewer calls, of several.

    A product of matrices may be rounded otherwise where its operands begin elsewhere than at a cache line, as those of a
    minibatch by itself do.
    """
    widths = [array[:1].nbytes for array in arrays]
    if any(width * batch_size % _CACHE_LINE for width in widths):
        return batch_size
    return batch_size * max(1, _BLOCK // (sum(widths) * batch_size))


def _flatten(buffer: Any) -> None:
    """Bring the arrays into the order in which SB3's buffers number samples, as their ``get`` does when first asked."""
    if buffer.generator_ready:
        return
    arrays = vars(buffer)
    if isinstance(buffer.observations, dict):
        buffer.observations.update({key: buffer.swap_and_flatten(array) for key, array in buffer.observations.items()})
    else:
        arrays["observations"] = buffer.swap_and_flatten(buffer.observations)
    for name in ("actions", "action_masks", *_COLUMNS):
        if name in arrays:
            arrays[name] = buffer.swap_and_flatten(arrays[name])
    buffer.generator_ready = True


def _observed_minibatches(buffer: RolloutBuffer, batch_size: int | None) -> Iterator[tuple[Any, th.Tensor | None]]:
    """The minibatches of a buffer that makes them in its own way, watched as it does."""
    if not hasattr(buffer, "_get_samples"):
        yield from ((samples, None) for samples in buffer.get(batch_size))
        return
    taken: list[tuple[Any, Any]] = []
    get_samples, users = buffer._get_samples, vars(buffer).get("_get_samples")

    def recording(*args: Any, **kwargs: Any) -> Any:
        samples = get_samples(*args, **kwargs)
        taken.append((samples, args[0] if args else next(iter(kwargs.values()), None)))
        return samples

    buffer._get_samples = recording  # type: ignore[method-assign]
    try:
        for samples in buffer.get(batch_size):
            yield samples, _places(buffer, taken, samples)
    finally:
        del buffer._get_samples
        if users is not None:
            buffer._get_samples = users  # type: ignore[method-assign]


def _places(buffer: Any, taken: list[tuple[Any, Any]], samples: Any) -> th.Tensor | None:
    """
    The places of samples in the flattened rollout.

    :param buffer: any rollout buffer
    :param taken: what it has made so far, and of which indices: arrays, lists, slices, masks; what is found is removed
    :param samples: what it has handed out: as they were made, or with some tensors replaced, or else in the same order
    :return: None if only the buffer knows
    """
    if not taken:
        return None

    def tensors(made: Any) -> set[int]:
        return {id(value) for value in made if isinstance(value, th.Tensor)} if isinstance(made, tuple) else set()

    own = tensors(samples)
    _, indices = taken.pop(next((number for number, (made, _) in enumerate(taken) if own & tensors(made)), 0))
    try:
        return th.from_numpy(np.array(np.arange(buffer.buffer_size * buffer.n_envs)[indices]))
    except Exception:  # whatever a buffer has for an index, or for its size
        return None


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
