"""
PPO's policy objective in its three forms, as pure functions of tensors. Start reading here.

- :func:`clip_loss`: the minimum of two terms (Schulman et al. 2017, arXiv 1707.06347, eq. 7)
- :func:`weight_space_loss`: the surrogate minus a penalty Φ on the ratio, equal in value (arXiv 2606.23932, theorem 2)
- :func:`per_sample_kl_loss`: the surrogate with one KL coefficient β per sample, equal in gradient (theorem 1); other
  coefficients give other algorithms

All return the scalar to minimise. Tensors have shape ``(B,)``, or ``(B, T)`` for sequences of tokens, and any float dtype;
``mask`` is True where a sample counts. Notation: ratio ``w = π_new(a|s) / π_old(a|s)``, advantage ``Â``, half-width ``ε``, and
the *removal* ``g`` in ``β = -w Â g``: the share of a sample's gradient that is removed. It is multiplied by ``1 - g``.
"""

from numbers import Real
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, get_args

import torch as th

from sb3_klip.errors import did_you_mean

if TYPE_CHECKING:
    from sb3_klip.coefficients import Coefficient, CoefficientLike

#: Names of the KL estimates that a weight can be put on, see :func:`kl_estimate`.
Estimator: TypeAlias = Literal["analytic", "k1", "k3"]
ESTIMATORS = get_args(Estimator)
REDUCTIONS = ("mean", "sequence_mean", "none")
RATIOS = ("token", "sequence")


class Partition(NamedTuple):
    """
    Three disjoint boolean masks that cover a batch, each of the shape of the ratio.

    :param kill: the clip removes the gradient: the ratio has moved in the right direction, and left the band
    :param passed: the clip keeps the gradient: the ratio has left the band in the wrong direction
    :param inside: the ratio is in the band, including its boundary, or the advantage is zero
    """

    kill: th.Tensor
    passed: th.Tensor
    inside: th.Tensor


def bounds(clip_range: float | th.Tensor) -> tuple[float | th.Tensor, float | th.Tensor]:
    """
    Bounds of the band ``[1 - ε, 1 + ε]`` in which ``torch.clamp`` leaves a ratio unchanged.

    A linear schedule gives ε < 0 when the last rollout exceeds the number of training steps. Then ``torch.clamp`` returns its
    upper bound for any ratio, so both bounds are ``1 + ε``.

    :param clip_range: half-width ε, a number or a tensor that broadcasts against the ratio
    :return: lower and upper bound
    """
    upper = 1 + clip_range
    if isinstance(clip_range, th.Tensor):
        return th.minimum(1 - clip_range, th.as_tensor(upper)), upper
    return min(1 - clip_range, upper), upper


def partition(ratio: th.Tensor, advantages: th.Tensor, clip_range: float | th.Tensor) -> Partition:
    """
    Split a batch by what PPO-Clip does to each sample's gradient.

    - kill: ``(w > upper and Â > 0) or (w < lower and Â < 0)``, the gradient is zero
    - passed: ``(w > upper and Â < 0) or (w < lower and Â > 0)``, the gradient is kept
    - inside: all others, the gradient is kept (it is zero where ``Â = 0``)

    Source: arXiv 2606.23932; the boundary counts as inside, as it does in the gradient of ``torch.clamp``.

    :param ratio: importance ratio w, any shape
    :param advantages: advantage Â, same shape
    :param clip_range: half-width ε of the band
    :return: the masks ``kill``, ``passed`` and ``inside``
    """
    lower, upper = bounds(clip_range)
    above, below = ratio > upper, ratio < lower
    gain, loss = advantages > 0, advantages < 0
    kill = (above & gain) | (below & loss)
    passed = (above & loss) | (below & gain)
    return Partition(kill, passed, ~(kill | passed))


def harmful_distance(ratio: th.Tensor, advantages: th.Tensor, clip_range: float | th.Tensor) -> th.Tensor:
    """
    Signed distance d of a ratio beyond the bound at which PPO-Clip starts to remove its gradient.

    ``d = w - upper`` where ``Â >= 0``, and ``d = lower - w`` where ``Â < 0``. With ``Â ≠ 0``, d is positive exactly on the
    kill set. Source: arXiv 2606.23932.

    :param ratio: importance ratio w, any shape
    :param advantages: advantage Â, same shape
    :param clip_range: half-width ε of the band
    :return: distance in units of the ratio, same shape
    """
    lower, upper = bounds(clip_range)
    return th.where(advantages < 0, lower - ratio, ratio - upper)


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
    :raises TypeError: if an argument is no tensor, or a dtype does not fit
    """
    log_prob, old_log_prob, advantages = _checked(log_prob, old_log_prob, advantages, clip_range, mask)
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
    ``Φ(w, Â) = |Â| max(d, 0)``, the amount that PPO-Clip subtracts from ``w Â``; d is :func:`harmful_distance`.

    Φ is positive on the kill set, and zero elsewhere. Source: arXiv 2606.23932, theorem 2.

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
    :raises TypeError: if an argument is no tensor, or a dtype does not fit
    """
    log_prob, old_log_prob, advantages = _checked(log_prob, old_log_prob, advantages, clip_range, mask)
    ratio = th.exp(log_prob - old_log_prob)
    return -masked_mean(advantages * ratio - weight_space_penalty(ratio, advantages, clip_range), mask)


class PerSampleKL(NamedTuple):
    """
    The terms of one evaluation of :func:`per_sample_kl`, each of the shape of ``log_prob``.

    :param loss: per-sample loss, the only differentiable term
    :param log_ratio: log w
    :param ratio: importance ratio w
    :param removal: g in β = -w Â g
    :param weight: weight on the KL estimate, or None
    :param estimate: the KL estimate that the weight multiplies, or None
    """

    loss: th.Tensor
    log_ratio: th.Tensor
    ratio: th.Tensor
    removal: th.Tensor
    weight: th.Tensor | None
    estimate: th.Tensor | None


def kl_estimate(estimator: str, log_prob: th.Tensor, old_log_prob: th.Tensor, kl: th.Tensor | None = None) -> th.Tensor:
    """
    Estimate KL(π_old ‖ π_new) for each sample.

    ``k1 = -log w`` and ``k3 = (w - 1) - log w`` (J. Schulman, "Approximating KL divergence", 2020) use the sampled action;
    ``analytic`` is the closed-form divergence of the two distributions in the state.

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
        hint = did_you_mean(estimator, ESTIMATORS)
        raise ValueError(f"estimator={estimator!r} must be one of {', '.join(map(repr, ESTIMATORS))}.{hint}")
    if kl is None:
        raise ValueError("the analytic estimator needs `kl`, the KL divergence KL(π_old ‖ π_new) of each state")
    return kl


def per_sample_kl(
    log_prob: th.Tensor,
    old_log_prob: th.Tensor,
    advantages: th.Tensor,
    coefficient: "Coefficient",
    clip_range: float | th.Tensor = 0.2,
    kl: th.Tensor | None = None,
    log_ratio: th.Tensor | None = None,
    centre: th.Tensor | None = None,
    **quantities: th.Tensor | float,
) -> PerSampleKL:
    """
    ``-(w Â + β log π) + weight · KL`` for each sample, with the detached β = -w Â g.

    As β is detached, ``w Â + β log π`` has the gradient of ``Â c log π`` with ``c = w (1 - g)``. The graph contains this
    single product. The rest of the value is added as a constant. So autograd multiplies in the same order as for PPO, and the
    bits are PPO's for any number of samples N. Two terms that cancel (``w Â`` and ``β log π``) round differently if 1/N is not
    a power of two.

    :param log_prob: log π_new(a|s), differentiable
    :param old_log_prob: log π_old(a|s)
    :param advantages: advantage Â
    :param coefficient: coefficient, which returns removal and weight
    :param clip_range: half-width ε
    :param kl: ``KL(π_old(·|s) ‖ π_new(·|s))`` per state, differentiable, if the coefficient requests it
    :param log_ratio: log w, if it is not ``log_prob - old_log_prob``
    :param centre: c = π_k/π_old, where π_k is the policy at the start of the update, for samples of older policies. Then the
        coefficient is evaluated at ``w - c + 1``, or at ``w / c`` if it needs a ratio of two policies, and the KL estimates
        are those of KL(π_k ‖ π_new). None for c = 1
    :param quantities: further quantities that the coefficient requests, see :data:`sb3_klip.coefficients.QUANTITIES`
    :return: loss and terms per sample
    :raises ValueError: if a quantity that the coefficient requests, or ``kl`` for an analytic penalty, is missing
    """
    with th.no_grad():
        if log_ratio is None:
            log_ratio = log_prob - old_log_prob
        ratio = log_ratio.exp()
        seen, reference = ratio, old_log_prob
        if centre is not None:
            reference = old_log_prob + centre.log()
            seen = (log_ratio - centre.log()).exp() if coefficient.needs_policy_ratio else ratio - centre + 1
        removal, weight = coefficient(seen, advantages, clip_range, kl=kl, old_log_prob=reference, **quantities)
        # A removed sample contributes nothing, also where its ratio overflowed and inf * 0 would be NaN (as it is in PPO).
        finite = ratio.masked_fill(((removal == 1) | (advantages == 0)) & ratio.isinf(), 0.0)
        score = (1 - removal) * finite
        constant = finite - finite * log_prob

    loss = -(advantages * (score * log_prob + constant))
    if weight is None:
        return PerSampleKL(loss, log_ratio, ratio, removal, None, None)
    assert coefficient.estimator is not None
    estimate = kl_estimate(coefficient.estimator, log_prob, reference, kl)
    if centre is not None and coefficient.estimator != "analytic":
        estimate = centre * estimate  # a mean over actions of π_k, from actions of π_old
    return PerSampleKL(loss + weight * estimate, log_ratio, ratio, removal, weight, estimate.detach())


def per_sample_beta(
    ratio: th.Tensor,
    advantages: th.Tensor,
    removal: th.Tensor,
    weight: th.Tensor | None = None,
    estimator: str | None = None,
    centre: th.Tensor | None = None,
) -> th.Tensor:
    """
    The coefficient β of log π in the objective: ``-w Â g``, plus ``b c`` for a weight b on k1, or ``-b (w - c)`` on k3.

    The analytic KL has no such coefficient, as its gradient is not a multiple of ∇log π(a|s).

    :param ratio: importance ratio w
    :param advantages: advantage Â
    :param removal: removal g
    :param weight: weight b on a KL estimate
    :param estimator: the estimate that the weight multiplies
    :param centre: c, see :func:`per_sample_kl`; None for 1
    :return: β, same shape; the part with g is zero where g is zero, even if w is infinite
    """
    beta = th.where(removal == 0, 0.0, -ratio * advantages * removal)
    if weight is not None and estimator == "k1":
        beta = beta + (weight if centre is None else weight * centre)
    elif weight is not None and estimator == "k3":
        beta = beta - weight * (ratio - (1 if centre is None else centre))
    return beta


def per_sample_kl_loss(
    log_prob: th.Tensor,
    old_log_prob: th.Tensor,
    advantages: th.Tensor,
    coefficient: "str | CoefficientLike" = "step",
    clip_range: float | th.Tensor = 0.2,
    mask: th.Tensor | None = None,
    reduction: str = "mean",
    ratio: str = "token",
    **quantities: Any,
) -> th.Tensor:
    """
    The surrogate with one KL coefficient per sample: ``-E[w Â + β log π] + E[weight · KL]`` (arXiv 2606.23932, theorem 1).

    With ``"step"``, β = -w Â on the samples that PPO-Clip would clip and 0 elsewhere, and the gradient is PPO-Clip's.

    :param log_prob: log π_new(a|s), differentiable
    :param old_log_prob: log π_old(a|s)
    :param advantages: advantage Â
    :param coefficient: name of a coefficient, a :class:`~sb3_klip.coefficients.Coefficient`, or your own function. In a
        training loop, create it once with :func:`~sb3_klip.coefficients.make`, as a name is looked up and checked in each
        call.
    :param clip_range: half-width ε, a number or a tensor
    :param mask: True where a sample counts; ``None`` counts all
    :param reduction: ``"mean"``: mean over all samples that count (PPO). ``"sequence_mean"``: mean over the samples that count
        in each row of ``(B, T)``, and then over the rows (GRPO, arXiv 2402.03300); a row in which no sample counts adds 0.
        ``"none"``: no mean; the losses are 0 where the mask is False.
    :param ratio: ``"token"``: one ratio per sample. ``"sequence"``: in each row of ``(B, T)``, all ratios are replaced by
        their geometric mean over the samples that count. The gradient is still that of each log-probability (GSPO-token in
        arXiv 2507.18071); with ``"sequence_mean"`` and one advantage per row, it is that of GSPO. KL estimates remain those
        of each sample.
    :param quantities: further quantities that the coefficient requests, by name, beyond ratio, advantages, clip range and
        ``old_log_prob`` (see :data:`sb3_klip.coefficients.QUANTITIES`); a ``kl`` that is penalised must be differentiable
    :return: scalar to minimise, or with ``reduction="none"`` a tensor like ``log_prob``
    :raises ValueError: if shapes differ, ``coefficient``, ``reduction`` or ``ratio`` is unknown, a requested quantity is
        missing, or a ``kl`` that is penalised has no gradient
    :raises TypeError: if an argument is no tensor, ``log_prob`` has no floating dtype, ``mask`` is not boolean, ``clip_range``
        is neither a number nor a tensor, or there is no such argument
    """
    log_prob, old_log_prob, advantages = _checked(log_prob, old_log_prob, advantages, clip_range, mask)
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction={reduction!r} must be one of {REDUCTIONS}.{did_you_mean(reduction, REDUCTIONS)}")
    if ratio not in RATIOS:
        raise ValueError(f"ratio={ratio!r} must be one of {RATIOS}.{did_you_mean(ratio, RATIOS)}")
    for argument, value in (("reduction", reduction), ("ratio", ratio)):
        if value.startswith("sequence") and log_prob.ndim != 2:
            raise ValueError(f"{argument}={value!r} needs shape (B, T), not {tuple(log_prob.shape)}")
    # Only here: the coefficients are made of this module's functions.
    from sb3_klip.coefficients import make

    coefficient = make(coefficient)
    _check_quantities(quantities, coefficient, log_prob)
    if isinstance(clip_range, th.Tensor):
        clip_range = clip_range.to(log_prob)
    quantities = {name: _without_padding(value, mask) for name, value in quantities.items()}
    log_ratio = _sequence_log_ratio(log_prob, old_log_prob, mask) if ratio == "sequence" else None
    terms = per_sample_kl(log_prob, old_log_prob, advantages, coefficient, clip_range, log_ratio=log_ratio, **quantities)
    loss = terms.loss
    if reduction == "mean":
        return masked_mean(loss, mask)
    if reduction == "none":
        return loss if mask is None else loss.masked_fill(~mask, 0.0)
    if mask is None:
        return loss.mean(dim=1).mean()
    return (loss.masked_fill(~mask, 0.0).sum(dim=1) / mask.sum(dim=1).clamp(min=1)).mean()


def _check_quantities(quantities: dict[str, Any], coefficient: "Coefficient", log_prob: th.Tensor) -> None:
    """Refuse what is none, would broadcast, or would leave a penalty without gradient."""
    from sb3_klip.coefficients import QUANTITIES

    for name, value in quantities.items():
        if name not in QUANTITIES:
            hint = did_you_mean(name, [*QUANTITIES, "coefficient", "clip_range", "mask", "reduction", "ratio"])
            raise TypeError(
                f"per_sample_kl_loss has no argument {name!r}.{hint} Parameters of a coefficient are given when it is made: "
                "make('linear_ramp', width=0.1)."
            )
        if name != "progress" and not (isinstance(value, th.Tensor) and value.shape == log_prob.shape):
            shown = f"the shape {tuple(value.shape)}" if isinstance(value, th.Tensor) else f"the value {value!r}"
            raise ValueError(f"{name} has {shown}, but must be a tensor of the shape of log_prob, {tuple(log_prob.shape)}")
    differentiates = log_prob.requires_grad and th.is_grad_enabled()
    if differentiates and coefficient.estimator == "analytic" and "kl" in quantities and not quantities["kl"].requires_grad:
        raise ValueError(f"kl must be differentiable, as {coefficient!r} penalises it, but it has no gradient")


def _sequence_log_ratio(log_prob: th.Tensor, old_log_prob: th.Tensor, mask: th.Tensor | None) -> th.Tensor:
    """Mean of log w over each row, in the place of each of them; 0 in a row of which none counts. Padding is 0 in both."""
    log_ratio = log_prob.detach() - old_log_prob
    count = log_ratio.shape[1] if mask is None else mask.sum(dim=1, keepdim=True).clamp(min=1)
    return (log_ratio.sum(dim=1, keepdim=True) / count).expand_as(log_ratio)


def _without_padding(value: Any, mask: th.Tensor | None) -> Any:
    """A tensor with 0 where the mask is False: an infinity there would turn gradients into NaN (0 times inf)."""
    is_padded = mask is not None and isinstance(value, th.Tensor) and value.shape == mask.shape
    return value.masked_fill(~mask, 0) if is_padded else value  # type: ignore[operator]


def _checked(
    log_prob: th.Tensor, old_log_prob: th.Tensor, advantages: th.Tensor, clip_range: object, mask: th.Tensor | None
) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
    """Refuse what would broadcast or count by accident; what is returned has no padding."""
    samples = {"log_prob": log_prob, "old_log_prob": old_log_prob, "advantages": advantages}
    for name, value in (samples if mask is None else samples | {"mask": mask}).items():
        if not isinstance(value, th.Tensor):
            raise TypeError(f"{name} must be a tensor, not {type(value).__name__}")
    if not isinstance(clip_range, (Real, th.Tensor)):
        raise TypeError(f"clip_range={clip_range!r} must be a number or a tensor")
    if not log_prob.is_floating_point():
        raise TypeError(f"log_prob must have a floating dtype, not {log_prob.dtype}")
    for name, tensor in (("old_log_prob", old_log_prob), ("advantages", advantages), ("mask", mask)):
        if tensor is not None and tensor.shape != log_prob.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, but log_prob has {tuple(log_prob.shape)}")
    if mask is not None and mask.dtype != th.bool:
        raise TypeError(f"mask must be boolean, not {mask.dtype}")
    if isinstance(clip_range, th.Tensor):
        sizes = zip(reversed(clip_range.shape), reversed(log_prob.shape), strict=False)
        if clip_range.ndim > log_prob.ndim or any(size not in (1, whole) for size, whole in sizes):
            raise ValueError(f"clip_range has shape {tuple(clip_range.shape)}, but log_prob has {tuple(log_prob.shape)}")
    return _without_padding(log_prob, mask), _without_padding(old_log_prob, mask), _without_padding(advantages, mask)
