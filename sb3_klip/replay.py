"""
Learning from the last M rollouts, as pure functions: weights, clip range, advantages and learning rate of GePPO.

Source: J. Queeney, I. C. Paschalidis and C. G. Cassandras, *Generalized Proximal Policy Optimization with Sample Reuse*,
NeurIPS 2021, arXiv 2111.00072. ``μ`` is the policy that collected a sample, ``π_k`` is the policy at the start of the update,
and ``π`` is the current policy. The ratio is ``w = π/μ`` as usual, and the clip is centred at ``c = π_k/μ``. The *age* i of a
sample is the number of updates since it was collected. Its rollout has the weight ``p_(i+1)``, and the sample has the weight
``ω = M p_(i+1)`` in a mean over all samples. ``sb3_klip/reuse.py`` trains with these functions.
"""

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple

import numpy as np
import torch as th

#: The largest number of rollouts, far more than fit into any memory.
MOST = 1_000_000
#: Weights below this are dropped from the optimal ones, as in the authors' code.
SMALLEST_WEIGHT = 0.01
#: The factor by which the learning rate changes, as in the paper.
LEARNING_RATE_STEP = 1.03


class Replayed(NamedTuple):
    """
    The weight and the clip centre of each sample in a loss over several rollouts.

    :param weights: weight ω, of mean 1 over the update, shape (B,)
    :param centre: c, the ratio at the start of the update, where the clip is centred, shape (B,)
    """

    weights: th.Tensor
    centre: th.Tensor

    def at(self, indices: th.Tensor) -> "Replayed":
        """
        Select samples.

        :param indices: indices of the samples
        """
        places = indices.to(self.weights.device)
        return Replayed(self.weights.index_select(0, places), self.centre.index_select(0, places))


def weights_by_age(reuse: Any) -> np.ndarray:
    """
    The weight of each rollout, the newest first.

    :param reuse: number of rollouts with equal weights, or a sequence of weights
    :return: weights p, shape (M,), which sum to 1
    :raises TypeError: if it is neither
    :raises ValueError: if the number is below 1 or too large, or the weights are negative, do not sum to 1, or leave out the
        newest rollout
    """
    allowed = f"a whole number from 1 to {MOST}, or weights by age, the newest first, such as [0.5, 0.3, 0.2]"
    if isinstance(reuse, Integral) and not isinstance(reuse, bool):
        if not 1 <= int(reuse) <= MOST:
            raise ValueError(f"reuse={reuse!r} must be {allowed}")
        return np.full(int(reuse), 1 / int(reuse))
    is_array = isinstance(reuse, np.ndarray) and reuse.ndim == 1
    is_sequence = is_array or (isinstance(reuse, Sequence) and not isinstance(reuse, str))
    if not is_sequence or not all(isinstance(p, Real) for p in reuse):
        raise TypeError(f"reuse={reuse!r} must be {allowed}")
    weights = np.array(reuse, dtype=np.float64)
    if not ((weights >= 0) & np.isfinite(weights)).all():
        raise ValueError(f"reuse={reuse!r} must have finite weights of 0 or more")
    if not math.isclose(total := weights.sum(), 1, abs_tol=1e-6):
        advice = f"divided by their sum, they are {(weights / total).tolist()}" if total else f"it must be {allowed}"
        raise ValueError(f"reuse={reuse!r} must sum to 1, not {total:g}; {advice}")
    if weights[0] == 0:
        raise ValueError(f"reuse={reuse!r} must have a weight above 0 for the newest rollout, which stands first")
    return weights / total


def reduced_clip_range(clip_range: float, weights: np.ndarray) -> float:
    """
    ``ε / Σ i p_i``, i = 1 … M.

    With this clip range, an update has the same bound on the total variation as PPO with ε. Uniform weights give
    ``2ε / (M + 1)``. Source: arXiv 2111.00072.

    :param clip_range: half-width ε of PPO
    :param weights: weights p by age, shape (M,)
    :return: half-width around c
    """
    return clip_range / float(_mean_order(weights))


def _mean_order(weights: np.ndarray) -> Any:
    """``Σ i p_i``, i = 1 … M."""
    return weights @ np.arange(1, len(weights) + 1)


def optimal_weights(batches: float, most: int = 20, tradeoff: float = 1.0) -> list[float]:
    """
    The weights by age that use old samples best, within PPO's bounds.

    They minimise ``κ ‖p‖² / (1/B - ‖p_ess‖²) + (1 - κ) Σ i p_i / (B - Σ i p_i^tv)`` subject to ``Σ p_i = 1``, ``p >= 0``,
    ``Σ i p_i <= B`` (updates as far as PPO's) and ``‖p‖² <= 1/B`` (at least PPO's effective sample size). p_ess and p_tv are
    the minimisers for κ = 1 and κ = 0. Source: arXiv 2111.00072.

    The authors use a commercial solver. But by the optimality conditions, weights fall linearly with age,
    ``p_i = max(0, a - s i)``. So only the slope s is unknown. A larger s gives a smaller ``Σ i p_i`` and a larger ``‖p‖²``.

    :param batches: B, the number of rollouts that make up one rollout of PPO: 2 for n_steps 1024 instead of 2048
    :param most: largest number of rollouts
    :param tradeoff: κ, from 0 (the largest updates) to 1 (the largest effective sample size)
    :return: weights p, the newest rollout first; those below 0.01 are dropped
    :raises ValueError: if an argument is out of range
    """
    if not isinstance(most, Integral) or most < 1:
        raise ValueError(f"most={most!r} must be a whole number, at least 1")
    if not isinstance(batches, Real) or not 1 <= batches <= most:
        raise ValueError(f"batches={batches!r} must be from 1 to most={most!r}")
    if not isinstance(tradeoff, Real) or not 0 <= tradeoff <= 1:
        raise ValueError(f"tradeoff={tradeoff!r} must be from 0 to 1")

    def steepest(sample_size_is_kept: bool) -> float:
        """The slope at which one of the two constraints is tight."""
        low, high = 0.0, 1.0  # weights of the same size, and the newest rollout alone
        for _ in range(60):
            slope = (low + high) / 2
            weights = _linear_weights(slope, most)
            steeper = weights @ weights <= 1 / batches if sample_size_is_kept else _mean_order(weights) > batches
            low, high = (slope, high) if steeper else (low, slope)
        return low

    flat, steep = steepest(False), steepest(True)
    p_ess, p_tv = _linear_weights(flat, most), _linear_weights(steep, most)
    slope = flat if tradeoff == 1 else steep
    if 0 < tradeoff < 1:
        sample_size, variation = 1 / batches - p_ess @ p_ess, batches - _mean_order(p_tv)
        ratio = sample_size / variation if variation > 0 else 0.0
        slope = min(max((1 - tradeoff) / tradeoff * ratio / 2, flat), steep)
    kept = _linear_weights(slope, most)
    kept = kept[kept >= SMALLEST_WEIGHT]
    return (kept / kept.sum()).tolist()


def _linear_weights(slope: float, most: int) -> np.ndarray:
    """``max(0, a - slope · i)``, i = 1 … most, with the a for which they sum to 1."""
    order = np.arange(1, most + 1)
    positive = order[slope * order * (order - 1) < 2]
    weights = np.zeros(most)
    weights[: len(positive)] = 1 / len(positive) + slope * (positive.mean() - positive)
    return weights


def vtrace_advantages(
    rewards: np.ndarray,
    values: np.ndarray,
    episode_starts: np.ndarray,
    last_values: np.ndarray,
    last_dones: np.ndarray,
    ratios: np.ndarray,
    gamma: float,
    gae_lambda: float,
) -> tuple[np.ndarray, np.ndarray]:
    """
    Advantages under π_k for a rollout that another policy collected: GAE with the importance ratios of V-trace.

    ``Â_t = Σ_j (γλ)^j (Π_(i=1..j) ρ_(t+i)) δ_(t+j)`` with ``ρ = min(c, 1)`` and the temporal differences δ of GAE; the value
    target is ``ρ_t Â_t + V(s_t)``. With c = 1, both equal those of SB3's ``compute_returns_and_advantage``, which has the same
    conventions. Sources: arXiv 2111.00072; V-trace, arXiv 1802.01561.

    :param rewards: rewards, shape (n_steps, n_envs); where a time limit ended the episode, plus the discounted value of the
        last state
    :param values: V(s_t), same shape
    :param episode_starts: 1 where an episode starts, same shape
    :param last_values: value of the state after the last step, shape (n_envs,)
    :param last_dones: whether the last step ended an episode, shape (n_envs,)
    :param ratios: c, not truncated, shape (n_steps, n_envs)
    :param gamma: discount factor γ
    :param gae_lambda: λ
    :return: advantages and value targets, each of shape (n_steps, n_envs)
    """
    rewards = rewards.astype(np.result_type(rewards, np.float32), copy=False)  # whole numbers, too
    truncated = np.minimum(ratios, 1).astype(rewards.dtype)
    goes_on = 1 - np.concatenate([episode_starts[1:], last_dones[None]]).astype(rewards.dtype)
    next_values = np.concatenate([values[1:], last_values[None]])
    deltas = rewards + gamma * next_values * goes_on - values
    advantages = np.empty_like(rewards)
    following = np.zeros_like(deltas[0])  # ρ Â of the next step
    for step in reversed(range(len(rewards))):
        advantages[step] = deltas[step] + gamma * gae_lambda * goes_on[step] * following
        following = truncated[step] * advantages[step]
    return advantages, truncated * advantages + values


def normalized_advantages(advantages: th.Tensor, replayed: Replayed) -> th.Tensor:
    """
    Advantages minus ``mean(c ω Â) / mean(c ω)``, divided by the standard deviation of ``c ω Â``.

    This mean estimates the mean under π_k from samples of other policies. Source: the code of arXiv 2111.00072.

    :param advantages: shape (B,)
    :param replayed: weights and centres, of the same samples
    :return: shape (B,); a single sample, which has no standard deviation, is unchanged
    """
    if len(advantages) <= 1:
        return advantages
    importance = replayed.centre * replayed.weights
    weighted = importance * advantages
    return (advantages - weighted.mean() / importance.mean()) / (weighted.std() + 1e-8)


def total_variation(ratio: th.Tensor, replayed: Replayed) -> th.Tensor:
    """
    ``½ mean(ω |w - c|)``: the total variation distance of π from π_k, over the states of all rollouts.

    Source: arXiv 2111.00072.

    :param ratio: w, shape (B,)
    :param replayed: weights and centres, of the same samples
    :return: scalar, from 0 to 1 in expectation
    """
    return 0.5 * (replayed.weights * (ratio - replayed.centre).abs()).mean()


def effective_sample_size(replayed: Replayed) -> th.Tensor:
    """
    ``(Σ ω c)² / Σ (ω c)²``: the number of samples of π_k that would estimate a mean equally well.

    :param replayed: weights and centres of all samples, shape (B,)
    :return: scalar, at most B
    """
    importance = replayed.weights * replayed.centre
    return importance.sum().square() / importance.square().sum()


def adapted_learning_rate(learning_rate: float, variation: float, clip_range: float) -> float:
    """
    The learning rate of the next update: divided by 1.03 if the total variation is above ε/2, multiplied by 1.03 if below ε/4.

    At a total variation of ε/2, the ratios of all samples would be at the bound. Source: the code of arXiv 2111.00072.

    :param learning_rate: learning rate of the update
    :param variation: total variation distance between the policies before and after the update
    :param clip_range: reduced half-width ε
    :return: learning rate of the next update
    """
    if variation > clip_range / 2:
        return learning_rate / LEARNING_RATE_STEP
    return learning_rate * LEARNING_RATE_STEP if variation < clip_range / 4 else learning_rate
