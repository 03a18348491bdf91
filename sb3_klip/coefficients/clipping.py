"""Coefficients that drop samples past a bound on the ratio: PPO-Clip and its relatives."""

from typing import Annotated

import torch as th

from sb3_klip.coefficients.parameters import Interval, NonNegative, Positive
from sb3_klip.coefficients.registry import register


def clip_removal(ratio: th.Tensor, advantages: th.Tensor, lower: float | th.Tensor, upper: float | th.Tensor) -> th.Tensor:
    """
    The share of the gradient of w Â that is removed in ``min(w Â, clamp(w, lower, upper) Â)``: 1 on the kill set, else 0.

    One or two ulps outside the band, the two products can round to the same number. Then autograd gives half of the gradient
    to each argument of the minimum, and the half of the clamped one is lost. So the removal is 1/2 there. This happens to
    about one sample in 10^8, which is often enough to change a long run.

    :param ratio: importance ratio w
    :param advantages: advantage Â
    :param lower: lower bound, as given to ``torch.clamp``
    :param upper: upper bound, likewise
    :return: removal
    """
    surrogate, clamped = advantages * ratio, advantages * th.clamp(ratio, lower, upper)  # type: ignore[arg-type]
    tie = (surrogate == clamped) & ((ratio < lower) | (ratio > upper))
    return (clamped < surrogate).to(ratio.dtype).masked_fill(tie, 0.5)


@register(
    "step",
    "ppo_clip",
    formula="1 on the kill set, else 0",
    source="PPO-Clip, arXiv 1707.06347, eq. 7; the identity, arXiv 2606.23932, theorem 1",
    search={},
)
def step(ratio: th.Tensor, advantages: th.Tensor, clip_range: float | th.Tensor) -> th.Tensor:
    """
    PPO-Clip's gradient, exactly (see :func:`clip_removal` on rounding).

    :param ratio: importance ratio w
    :param advantages: advantage Â
    :param clip_range: half-width ε
    :return: removal
    """
    return clip_removal(ratio, advantages, 1 - clip_range, 1 + clip_range)


@register(
    "clip_higher",
    "dapo",
    formula="1 above 1 + high where Â > 0, 1 below 1 - low where Â < 0, else 0",
    source="DAPO, arXiv 2503.14476",
    search={"low": (0.05, 0.5), "high": (0.05, 1.0)},
)
def clip_higher(
    ratio: th.Tensor,
    advantages: th.Tensor,
    clip_range: float | th.Tensor,
    *,
    low: Annotated[float, Interval(0.0, 1.0, high_open=True)] = 0.2,
    high: NonNegative = 0.28,
) -> th.Tensor:
    """
    ``step`` with the band [1 - low, 1 + high] in place of ε.

    :param ratio: importance ratio w
    :param advantages: advantage Â
    :param clip_range: not used
    :param low: ε below 1
    :param high: ε above 1
    :return: removal
    """
    return clip_removal(ratio, advantages, 1 - low, 1 + high)


@register(
    "dual_clip",
    formula="1 on the kill set, and where Â < 0 and w > bound",
    source="D. Ye et al., arXiv 1912.09729, eq. 5",
    search={"bound": (1.5, 10.0)},
)
def dual_clip(
    ratio: th.Tensor,
    advantages: th.Tensor,
    clip_range: float | th.Tensor,
    *,
    bound: Annotated[float, Interval(1.0, low_open=True)] = 3.0,
) -> th.Tensor:
    """
    ``step`` that also bounds PPO-Clip's loss on actions with Â < 0.

    :param ratio: importance ratio w
    :param advantages: advantage Â
    :param clip_range: half-width ε
    :param bound: largest ratio at which an action with Â < 0 still has a gradient
    :return: removal
    """
    return step(ratio, advantages, clip_range).masked_fill((advantages < 0) & (ratio > bound), 1.0)


@register(
    "dynamic_clip",
    "dcpo",
    formula="1 above 1/2 + sqrt(1 + 4 high / q) / 2 where Â > 0, 1 below 1/2 + sqrt(max(1 - 4 low / q, 0)) / 2 where Â < 0, "
    "else 0",
    source="DCPO, arXiv 2509.02333",
    search={"low": (0.03, 0.5), "high": (0.03, 0.5)},
)
def dynamic_clip(
    ratio: th.Tensor,
    advantages: th.Tensor,
    clip_range: float | th.Tensor,
    old_log_prob: th.Tensor,
    *,
    low: Positive = 0.16,
    high: Positive = 0.2,
) -> th.Tensor:
    """
    ``step`` with a wider band for less probable actions: ``q w |w - 1|`` is bounded.

    The other parts of DCPO, its advantages and its averages over tokens, are not included.

    :param ratio: importance ratio w
    :param advantages: advantage Â
    :param clip_range: not used
    :param old_log_prob: log q, the log-probability (not density) of the action under the rollout policy
    :param low: bound on q w (1 - w) where w < 1; where Â < 0, every w < 1/2 is removed, too, as q w (1 - w) falls again there
    :param high: bound on q w (w - 1) where w > 1
    :return: removal
    """
    inverse = (-old_log_prob).exp()
    lower = 0.5 + (1 - 4 * low * inverse).clamp(min=0).sqrt() / 2
    upper = 0.5 + (1 + 4 * high * inverse).sqrt() / 2
    return clip_removal(ratio, advantages, lower, upper)


dynamic_clip.needs_probabilities = True  # type: ignore[attr-defined]
dynamic_clip.needs_policy_ratio = True  # type: ignore[attr-defined]


@register(
    "probability_clip",
    "dppo",
    formula="1 where Â > 0 and q (w - 1) > high, and where Â < 0 and q (1 - w) > low, else 0",
    source="DPPO, with the total variation of the sampled action against all others, arXiv 2602.04879",
    search={"low": (0.01, 0.5), "high": (0.01, 0.5)},
)
def probability_clip(
    ratio: th.Tensor,
    advantages: th.Tensor,
    clip_range: float | th.Tensor,
    old_log_prob: th.Tensor,
    *,
    low: NonNegative = 0.2,
    high: NonNegative = 0.2,
) -> th.Tensor:
    """
    ``step`` with a bound on the change of the action's probability instead of its ratio.

    The change ``q |w - 1|`` is the total variation between the two policies if all other actions count as one.

    :param ratio: importance ratio w
    :param advantages: advantage Â
    :param clip_range: not used
    :param old_log_prob: log q, the log-probability (not density) of the action under the rollout policy
    :param low: largest allowed decrease of the probability
    :param high: largest allowed increase of the probability
    :return: removal
    """
    change = old_log_prob.exp() * (ratio - 1)
    return (((advantages > 0) & (change > high)) | ((advantages < 0) & (change < -low))).to(ratio.dtype)


probability_clip.needs_probabilities = True  # type: ignore[attr-defined]
probability_clip.needs_policy_ratio = True  # type: ignore[attr-defined]
