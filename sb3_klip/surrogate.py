"""
PPO's policy objective in its three forms, as pure functions of tensors.

- :func:`clip_loss`: the minimum of two terms (Schulman et al. 2017, arXiv 1707.06347, eq. 7)
- :func:`weight_space_loss`: the surrogate less a weight-space penalty Φ, equal in value (arXiv 2606.23932, theorem 2)
- :func:`per_sample_kl_loss`: the surrogate with one KL coefficient β per sample, equal in gradient (theorem 1), and, with any
  other coefficient, a family of algorithms

All return the scalar to minimise. Tensors have shape ``(B,)``, or ``(B, T)`` for sequences of tokens, and any float dtype;
``mask`` is True where a sample counts.
"""

from typing import Any, NamedTuple

import torch as th

from sb3_klip.coefficients import ESTIMATORS, Coefficient, CoefficientLike, make
from sb3_klip.errors import did_you_mean
from sb3_klip.partition import Partition, harmful_distance, partition

__all__ = [
    "Partition",
    "PerSampleKL",
    "clip_loss",
    "clip_objective",
    "harmful_distance",
    "kl_estimate",
    "masked_mean",
    "partition",
    "per_sample_beta",
    "per_sample_kl",
    "per_sample_kl_loss",
    "weight_space_loss",
    "weight_space_penalty",
]


REDUCTIONS = ("mean", "sequence_mean", "none")


def masked_mean(values: th.Tensor, mask: th.Tensor | None) -> th.Tensor:
    """
    Mean over the samples that count.

    :param values: any shape
    :param mask: boolean, same shape; ``None`` counts every sample
    :return: scalar
    """
    # Indexing, and not a weighted sum: it is what RecurrentPPO does, and the bits of its gradient are to be met.
    return values.mean() if mask is None else values[mask].mean()


def clip_loss(
    log_prob: th.Tensor,
    old_log_prob: th.Tensor,
    advantages: th.Tensor,
    clip_range: float | th.Tensor = 0.2,
    mask: th.Tensor | None = None,
) -> th.Tensor:
    """
    PPO-Clip: ``-E[min(w Â, clip(w, 1 - ε, 1 + ε) Â)]`` (arXiv 1707.06347, eq. 7).

    :param log_prob: log π_new(a|s), differentiable
    :param old_log_prob: log π_old(a|s)
    :param advantages: advantage Â
    :param clip_range: half-width ε
    :param mask: True where a sample counts; ``None`` counts all
    :return: scalar to minimise
    :raises ValueError: if shapes differ
    :raises TypeError: if a dtype does not fit
    """
    _check(log_prob, old_log_prob, advantages, mask)
    return -masked_mean(clip_objective(th.exp(log_prob - old_log_prob), advantages, clip_range), mask)


def clip_objective(ratio: th.Tensor, advantages: th.Tensor, clip_range: float | th.Tensor = 0.2) -> th.Tensor:
    """
    ``min(w Â, clip(w, 1 - ε, 1 + ε) Â)`` for each sample (arXiv 1707.06347, eq. 7).

    :param ratio: importance ratio w, any shape
    :param advantages: advantage Â, same shape
    :param clip_range: half-width ε
    :return: objective per sample, same shape
    """
    clipped = th.clamp(ratio, 1 - clip_range, 1 + clip_range)  # type: ignore[arg-type]
    return th.min(advantages * ratio, advantages * clipped)


def weight_space_penalty(ratio: th.Tensor, advantages: th.Tensor, clip_range: float | th.Tensor = 0.2) -> th.Tensor:
    """
    ``Φ(w, Â) = |Â| max(d, 0)``, d being the distance past the harmful bound: what PPO-Clip takes off ``w Â``.

    Source: arXiv 2606.23932, theorem 2. Φ >= 0, and zero outside the kill set.

    :param ratio: importance ratio w, any shape
    :param advantages: advantage Â, same shape
    :param clip_range: half-width ε
    :return: Φ per sample, same shape
    """
    return advantages.abs() * harmful_distance(ratio, advantages, clip_range).clamp(min=0)


def weight_space_loss(
    log_prob: th.Tensor,
    old_log_prob: th.Tensor,
    advantages: th.Tensor,
    clip_range: float | th.Tensor = 0.2,
    mask: th.Tensor | None = None,
) -> th.Tensor:
    """
    PPO-Clip as a penalty on the ratio: ``-E[w Â - Φ(w, Â)]`` (arXiv 2606.23932, theorem 2).

    Equal to :func:`clip_loss` in value and gradient, up to rounding.

    :param log_prob: log π_new(a|s), differentiable
    :param old_log_prob: log π_old(a|s)
    :param advantages: advantage Â
    :param clip_range: half-width ε
    :param mask: True where a sample counts; ``None`` counts all
    :return: scalar to minimise
    :raises ValueError: if shapes differ
    :raises TypeError: if a dtype does not fit
    """
    _check(log_prob, old_log_prob, advantages, mask)
    ratio = th.exp(log_prob - old_log_prob)
    return -masked_mean(advantages * ratio - weight_space_penalty(ratio, advantages, clip_range), mask)


class PerSampleKL(NamedTuple):
    """
    The terms of one evaluation of :func:`per_sample_kl`, each of the shape of ``log_prob``.

    :param loss: per-sample loss, the only differentiable term
    :param log_ratio: log w
    :param ratio: importance ratio w
    :param gate: g in β = -w Â g
    :param weight: weight on the KL estimate, or None
    :param estimate: the KL estimate the weight is for, or None
    """

    loss: th.Tensor
    log_ratio: th.Tensor
    ratio: th.Tensor
    gate: th.Tensor
    weight: th.Tensor | None
    estimate: th.Tensor | None


def kl_estimate(estimator: str, log_prob: th.Tensor, old_log_prob: th.Tensor, kl: th.Tensor | None = None) -> th.Tensor:
    """
    Estimate KL(π_old ‖ π_new) for each sample.

    ``k1 = -log w`` and ``k3 = (w - 1) - log w`` (J. Schulman, "Approximating KL divergence", 2020) use the sampled action;
    ``analytic`` is the divergence of the two distributions at the state.

    :param estimator: ``"analytic"``, ``"k1"`` or ``"k3"``
    :param log_prob: log π_new(a|s), differentiable
    :param old_log_prob: log π_old(a|s)
    :param kl: ``KL(π_old(·|s) ‖ π_new(·|s))`` per state, differentiable; needed by ``"analytic"`` only
    :return: estimate in nats, same shape
    :raises ValueError: if the estimator is unknown, or ``"analytic"`` and ``kl`` is None
    """
    log_ratio = log_prob - old_log_prob
    if estimator == "k1":
        return -log_ratio
    if estimator == "k3":
        return log_ratio.expm1() - log_ratio
    if estimator != "analytic":
        raise ValueError(f"estimator={estimator!r} must be one of {', '.join(map(repr, ESTIMATORS))}")
    if kl is None:
        raise ValueError("the analytic estimator needs `kl`, the KL divergence KL(π_old ‖ π_new) of each state")
    return kl


def per_sample_kl(
    log_prob: th.Tensor,
    old_log_prob: th.Tensor,
    advantages: th.Tensor,
    coefficient: Coefficient,
    clip_range: float | th.Tensor = 0.2,
    kl: th.Tensor | None = None,
    **quantities: th.Tensor | float,
) -> PerSampleKL:
    """
    ``-(w Â + β log π) + weight · KL`` for each sample, with the detached β = -w Â gate.

    β being detached, the gradient of ``w Â + β log π`` is that of ``Â c log π`` with ``c = w (1 - gate)``. The graph holds
    this one product; what only contributes to the value is added as a constant. Autograd then associates the gradient,
    ``(g Â) c``, as it does for PPO, and the bits are PPO's for any number of samples. Two paths that cancel (one for
    ``w Â``, one for ``β log π``) round differently as soon as 1/N is not a power of two.

    :param log_prob: log π_new(a|s), differentiable
    :param old_log_prob: log π_old(a|s)
    :param advantages: advantage Â
    :param coefficient: gives gate and weight
    :param clip_range: half-width ε
    :param kl: ``KL(π_old(·|s) ‖ π_new(·|s))`` per state, differentiable, where the coefficient asks for it
    :param quantities: whatever else the coefficient asks for, see :data:`sb3_klip.coefficients.QUANTITIES`
    :return: loss and terms per sample
    """
    with th.no_grad():
        log_ratio = log_prob - old_log_prob
        ratio = log_ratio.exp()
        gate, weight = coefficient(ratio, advantages, clip_range, kl=kl, **quantities)
        # A removed sample contributes nothing, also where its ratio overflowed and inf * 0 would be NaN (as it is in PPO).
        finite = ratio.masked_fill(((gate == 1) | (advantages == 0)) & ratio.isinf(), 0.0)
        score = (1 - gate) * finite
        constant = finite - finite * log_prob

    loss = -(advantages * (score * log_prob + constant))
    if weight is None:
        return PerSampleKL(loss, log_ratio, ratio, gate, None, None)
    assert coefficient.estimator is not None
    estimate = kl_estimate(coefficient.estimator, log_prob, old_log_prob, kl)
    return PerSampleKL(loss + weight * estimate, log_ratio, ratio, gate, weight, estimate.detach())


def per_sample_beta(
    ratio: th.Tensor,
    advantages: th.Tensor,
    gate: th.Tensor,
    weight: th.Tensor | None = None,
    estimator: str | None = None,
) -> th.Tensor:
    """
    The coefficient β of log π in the objective: ``-w Â gate``, plus ``b`` for a weight b on k1, or ``-b (w - 1)`` on k3.

    The analytic KL has no such coefficient, as its gradient is not a multiple of ∇log π(a|s).

    :param ratio: importance ratio w
    :param advantages: advantage Â
    :param gate: gate g
    :param weight: weight b on a KL estimate
    :param estimator: the estimate the weight is for
    :return: β, same shape; zero where the gate is zero, also if w is infinite
    """
    beta = th.where(gate == 0, 0.0, -ratio * advantages * gate)
    if weight is not None and estimator == "k1":
        beta = beta + weight
    elif weight is not None and estimator == "k3":
        beta = beta - weight * (ratio - 1)
    return beta


def per_sample_kl_loss(
    log_prob: th.Tensor,
    old_log_prob: th.Tensor,
    advantages: th.Tensor,
    coefficient: str | CoefficientLike = "step",
    clip_range: float | th.Tensor = 0.2,
    mask: th.Tensor | None = None,
    reduction: str = "mean",
    **quantities: Any,
) -> th.Tensor:
    """
    The surrogate with one KL coefficient per sample: ``-E[w Â + β log π] + E[weight · KL]`` (arXiv 2606.23932, theorem 1).

    With ``"step"``, β = -w Â on the samples that PPO-Clip would clip and 0 elsewhere, and the gradient is PPO-Clip's.

    :param log_prob: log π_new(a|s), differentiable
    :param old_log_prob: log π_old(a|s)
    :param advantages: advantage Â
    :param coefficient: name of a coefficient, a :class:`~sb3_klip.coefficients.Coefficient`, or your own function; in a
        training loop, make it once with :func:`~sb3_klip.coefficients.make`, as a name is looked up and checked each time
    :param clip_range: half-width ε, a number or a tensor
    :param mask: True where a sample counts; ``None`` counts all
    :param reduction: ``"mean"`` over all samples that count (PPO); ``"sequence_mean"`` over those of each row of ``(B, T)``
        and then over the rows (GRPO, arXiv 2402.03300), 0 for a row of which none counts; ``"none"`` for the losses
        themselves, 0 where the mask is False
    :param quantities: what the coefficient asks for beyond ratio, advantages and clip range, by name
        (see :data:`sb3_klip.coefficients.QUANTITIES`); a ``kl`` that is penalised must be differentiable
    :return: scalar to minimise, or with ``reduction="none"`` a tensor like ``log_prob``
    :raises ValueError: if shapes differ, reduction or coefficient are unknown, or a quantity that it asks for is missing
    :raises TypeError: if the log-probabilities are not of a floating dtype
    """
    _check(log_prob, old_log_prob, advantages, mask)
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction={reduction!r} must be one of {REDUCTIONS}.{did_you_mean(reduction, REDUCTIONS)}")
    if reduction == "sequence_mean" and log_prob.ndim != 2:
        raise ValueError(f"reduction='sequence_mean' needs shape (B, T), not {tuple(log_prob.shape)}")
    loss = per_sample_kl(log_prob, old_log_prob, advantages, make(coefficient), clip_range, **quantities).loss
    if reduction == "mean":
        return masked_mean(loss, mask)
    kept = th.ones_like(loss, dtype=th.bool) if mask is None else mask
    loss = th.where(kept, loss, 0.0)
    return loss if reduction == "none" else (loss.sum(dim=1) / kept.sum(dim=1).clamp(min=1)).mean()


def _check(log_prob: th.Tensor, old_log_prob: th.Tensor, advantages: th.Tensor, mask: th.Tensor | None) -> None:
    """Refuse what would broadcast or count by accident."""
    if not log_prob.is_floating_point():
        raise TypeError(f"log_prob must have a floating dtype, not {log_prob.dtype}")
    for name, tensor in (("old_log_prob", old_log_prob), ("advantages", advantages), ("mask", mask)):
        if tensor is not None and tensor.shape != log_prob.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, but log_prob has {tuple(log_prob.shape)}")
    if mask is not None and mask.dtype != th.bool:
        raise TypeError(f"mask must be boolean, not {mask.dtype}")
