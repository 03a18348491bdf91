"""The analytic KL divergence instead of the sampled one: how much of the gradient remains with the best coefficient."""

from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.distributions import TanhBijector
from torch.distributions import Normal
from torch.nn import functional as F

from sb3_klip.divergence import DIVERGENCES, Parameters, parameters_of
from sb3_klip.surrogate import partition


def analytic_step(ratio: th.Tensor, advantages: th.Tensor, clip_range: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """A coefficient: the identity's \\|β\\|, put on the analytic KL divergence in place of the sampled one."""
    kill, _, _ = partition(ratio, advantages, clip_range)
    return th.zeros_like(ratio), kill * ratio * advantages.abs()


analytic_step.estimator = "analytic"  # type: ignore[attr-defined]


def analytic_residual(model: Any, buffer: Any, snapshot: Any, clip_range: float) -> np.ndarray:
    """
    What remains of the gradient of a sample that the clip removes when the analytic KL divergence is set against it, with the
    coefficient that is best for this one sample.

    The clip takes away w Â ∇log π(a|s). A penalty b KL(π_old ‖ π) can do so only where ∇KL is a multiple of ∇log π; both are
    taken with respect to the parameters of the distribution in this state. What the best b leaves is the sine of their angle.

    :param model: after the update
    :param buffer: the rollout
    :param snapshot: the rollout policy's distributions
    :param clip_range: half-width ε of the update
    :return: a number from 0 (nothing remains) to 1 (all does) for each sample on the kill set
    """
    shares = []
    for samples in model.evaluate_rollout(buffer):
        rollout_data, indices, mask = samples.rollout_data, samples.indices, samples.mask
        rows = slice(None) if mask is None else mask
        family, parameters = parameters_of(model.policy.action_dist)
        leaves = tuple(parameter.detach()[rows].double().requires_grad_() for parameter in parameters)
        old = tuple(parameter[indices].double() for parameter in snapshot.parameters)
        actions = rollout_data.actions[rows].double()
        if model.policy.squash_output:
            actions = TanhBijector.inverse(actions)
        score = _per_sample_gradient(_log_prob(family, leaves, actions), leaves)
        divergence = _per_sample_gradient(DIVERGENCES[family](old, leaves), leaves)
        ratio = (samples.log_prob - rollout_data.old_log_prob).exp()
        kill, _, _ = partition(ratio, samples.advantages, clip_range)
        cosine = F.cosine_similarity(score, divergence, dim=1)[kill[rows]]
        shares.append((1 - cosine.square()).clamp(min=0).sqrt())
    return th.cat(shares).numpy()


def _log_prob(family: str, parameters: Parameters, actions: th.Tensor) -> th.Tensor:
    """log π(a|s), up to a constant, from the parameters of the distribution."""
    if family == "gaussian":
        mean, std = parameters
        return Normal(mean, std).log_prob(actions).sum(dim=-1)
    if family == "bernoulli":
        return -F.binary_cross_entropy_with_logits(parameters[0], actions, reduction="none").sum(dim=-1)
    choices = actions.long().reshape(len(actions), len(parameters)).unbind(dim=1)
    chosen = [logits.log_softmax(dim=-1).gather(1, a[:, None])[:, 0] for logits, a in zip(parameters, choices, strict=True)]
    return th.stack(chosen).sum(dim=0)


def _per_sample_gradient(values: th.Tensor, parameters: Parameters) -> th.Tensor:
    """One row per sample: its gradient with respect to the parameters of its own distribution."""
    return th.cat(th.autograd.grad(values.sum(), parameters), dim=1)
