"""
The closed-form KL divergence of Stable-Baselines3's action distributions, from their parameters.

Working on parameters, and not on distribution objects, is what lets the rollout policy's be kept: SB3's policies hold one
distribution object, which the next evaluation overwrites.
"""

from typing import Any, TypeAlias

import torch as th
from sb3_contrib.common.maskable.distributions import (
    MaskableBernoulliDistribution,
    MaskableCategoricalDistribution,
    MaskableMultiCategoricalDistribution,
)
from stable_baselines3.common.distributions import (
    BernoulliDistribution,
    CategoricalDistribution,
    DiagGaussianDistribution,
    Distribution,
    MultiCategoricalDistribution,
    StateDependentNoiseDistribution,
)
from torch.distributions import Bernoulli, Categorical, Normal
from torch.nn import functional as F

#: Mean and standard deviation of a Gaussian, or the logits of each categorical or of all Bernoulli variables.
Parameters: TypeAlias = tuple[th.Tensor, ...]


#: The distributions of policies that :func:`parameters_of` reads.
CLOSED_FORM = (
    DiagGaussianDistribution,
    StateDependentNoiseDistribution,
    CategoricalDistribution,
    MultiCategoricalDistribution,
    BernoulliDistribution,
    MaskableCategoricalDistribution,
    MaskableMultiCategoricalDistribution,
    MaskableBernoulliDistribution,
)


def gaussian_kl(old: Parameters, new: Parameters) -> th.Tensor:
    """
    KL(π_old ‖ π_new) of diagonal Gaussians: ``log σ_n/σ_o + (σ_o² + (μ_o - μ_n)²) / (2 σ_n²) - 1/2``, summed over dimensions.

    A bijection such as tanh, applied to both, does not change it.

    :param old: mean and standard deviation, shape (B, A)
    :param new: likewise
    :return: divergence in nats, shape (B,)
    """
    (old_mean, old_std), (new_mean, new_std) = old, new
    scale = old_std / new_std
    distance = (old_mean - new_mean) / new_std
    return (0.5 * (scale.square() + distance.square() - 1) - scale.log()).sum(dim=-1)


def categorical_kl(old: Parameters, new: Parameters) -> th.Tensor:
    """
    KL(π_old ‖ π_new) of independent categorical variables: ``Σ p_o (log p_o - log p_n)``, summed over the variables.

    :param old: logits of each variable, shapes (B, K_i)
    :param new: likewise
    :return: divergence in nats, shape (B,)
    """
    divergence = th.zeros_like(new[0][..., 0])
    for old_logits, new_logits in zip(old, new, strict=True):
        old_log, new_log = old_logits.log_softmax(dim=-1), new_logits.log_softmax(dim=-1)
        divergence = divergence + (old_log.exp() * (old_log - new_log)).sum(dim=-1)
    return divergence


def bernoulli_kl(old: Parameters, new: Parameters) -> th.Tensor:
    """
    KL(π_old ‖ π_new) of independent Bernoulli variables, summed over them.

    :param old: logits, shape (B, A)
    :param new: likewise
    :return: divergence in nats, shape (B,)
    """
    (old_logits,), (new_logits,) = old, new
    probability = old_logits.sigmoid()
    true = probability * (F.logsigmoid(old_logits) - F.logsigmoid(new_logits))
    false = (1 - probability) * (F.logsigmoid(-old_logits) - F.logsigmoid(-new_logits))
    return (true + false).sum(dim=-1)


def parameters_of(distribution: Distribution) -> tuple[str, Parameters]:
    """
    Family and parameters of an action distribution as a policy of SB3 or sb3-contrib holds it.

    :param distribution: a Gaussian (gSDE and squashed ones included), categorical, multi-categorical or Bernoulli
        distribution, with action masks or without
    :return: ``"gaussian"``, ``"categorical"`` or ``"bernoulli"``, and the tensors, with their gradient
    :raises TypeError: if the family has no closed form here
    """
    # sb3-contrib's maskable multi-categorical and Bernoulli distributions keep a list under another name.
    inner: Any = getattr(distribution, "distributions", None) or getattr(distribution, "distribution", None)
    if isinstance(inner, Normal):
        return "gaussian", (inner.loc, inner.scale)
    if isinstance(inner, Bernoulli):
        return "bernoulli", (inner.logits,)
    if isinstance(inner, Categorical):
        return "categorical", (inner.logits,)
    if isinstance(inner, (list, tuple)) and inner and all(isinstance(part, Categorical) for part in inner):
        return "categorical", tuple(part.logits for part in inner)
    raise TypeError(f"no closed form of the KL divergence is known for {type(distribution).__name__}")


DIVERGENCES = {"gaussian": gaussian_kl, "categorical": categorical_kl, "bernoulli": bernoulli_kl}
