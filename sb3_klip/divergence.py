"""
The closed-form KL divergence between the rollout policy and the current policy, from the parameters of their distributions.

The functions take parameters, not distribution objects, as SB3's policies hold only one distribution object, which the next
evaluation overwrites.
"""

from typing import Any, TypeAlias

import torch as th
from torch.distributions import Bernoulli, Categorical, Normal
from torch.nn import functional as F

#: Mean and standard deviation of a Gaussian, or the logits of each categorical or of all Bernoulli variables.
Parameters: TypeAlias = tuple[th.Tensor, ...]


def gaussian_kl(old: Parameters, new: Parameters) -> th.Tensor:
    """
    KL(π_old ‖ π_new) of diagonal Gaussians: ``log σ_n/σ_o + (σ_o² + (μ_o - μ_n)²) / (2 σ_n²) - 1/2``, summed over dimensions.

    A bijection such as tanh, applied to both distributions, does not change the divergence.

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
        terms = old_log.exp() * (old_log - new_log)
        # An action that is impossible in both adds nothing, and not 0 times (-inf + inf).
        divergence = divergence + terms.masked_fill(old_log.isneginf(), 0.0).sum(dim=-1)
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
    return (true.masked_fill(old_logits.isneginf(), 0.0) + false.masked_fill(old_logits.isposinf(), 0.0)).sum(dim=-1)


def parameters_of(distribution: Any) -> tuple[str, Parameters]:
    """
    Family and parameters of an action distribution of SB3 or sb3-contrib.

    :param distribution: of Stable-Baselines3 or sb3-contrib: Gaussian (gSDE and squashed ones included), categorical,
        multi-categorical or Bernoulli, with action masks or without
    :return: ``"gaussian"``, ``"categorical"`` or ``"bernoulli"``, and the tensors, with their gradient
    :raises TypeError: if this package has no closed form for the family
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
                "KL divergence is not at hand. Use beta='fixed' or 'adaptive' with the estimator 'k3' or 'k1', and not log_kl."
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
        old = tuple(kept[indices] for kept in self.parameters)
        _, current = parameters_of(policy.action_dist)
        if mask is not None:  # the padding of a sequence stays out of the graph, where a NaN of it would reach the weights
            current = tuple(parameter[mask] for parameter in current)
        return scatter_to_mask(DIVERGENCES[self.family](old, current), mask)


def scatter_to_mask(values: th.Tensor, mask: th.Tensor | None) -> th.Tensor:
    """
    Put values of the samples that count where the mask is True, and 0 elsewhere.

    :param values: shape (n,), n being the number of True values in the mask
    :param mask: shape (B,); None leaves the values as they are
    :return: shape (B,)
    """
    if mask is None:
        return values
    return th.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)
