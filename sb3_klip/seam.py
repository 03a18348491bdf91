"""What differs between SB3's and sb3-contrib's PPO, and how each evaluates its rollouts."""

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch as th
from gymnasium import spaces
from sb3_contrib.common.maskable import distributions as maskable
from stable_baselines3.common import distributions
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.type_aliases import RolloutBufferSamples
from torch.nn import functional as F

from sb3_klip.divergence import PolicySnapshot
from sb3_klip.reproducibility import unchanged_generators
from sb3_klip.rollout import indexed_minibatches, rollout_copy
from sb3_klip.surrogate import kl_estimate
from sb3_klip.trust_region import policy_ratio_bounds

#: The action distributions of their policies; the KL divergence of each has a closed form, see :mod:`sb3_klip.divergence`.
DISTRIBUTIONS = (
    *(distributions.DiagGaussianDistribution, distributions.SquashedDiagGaussianDistribution),
    *(distributions.StateDependentNoiseDistribution, distributions.CategoricalDistribution),
    *(distributions.MultiCategoricalDistribution, distributions.BernoulliDistribution),
    *(maskable.MaskableCategoricalDistribution, maskable.MaskableMultiCategoricalDistribution),
    maskable.MaskableBernoulliDistribution,
)


def policy_copy(policy: Any) -> Any:
    """
    A policy of its own with the same parameters.

    :param policy: any policy
    """
    # The distribution that it holds may be in an autograd graph, which cannot be copied; each evaluation replaces it.
    held = policy.action_dist
    return copy.deepcopy(policy, {id(held): copy.copy(held)})


class EvaluatedSamples(NamedTuple):
    """
    A minibatch that the policy has just evaluated.

    :param rollout_data: the samples, as the buffer hands them out
    :param indices: their places in the flattened rollout
    :param mask: samples that count; None if all do
    :param values: V(s) under the present policy
    :param log_prob: log π(a|s) under the present policy
    :param advantages: advantage Â, as the loss sees it
    """

    rollout_data: Any
    indices: th.Tensor
    mask: th.Tensor | None
    values: th.Tensor
    log_prob: th.Tensor
    advantages: th.Tensor


class Seam(OnPolicyAlgorithm):
    """
    What the update asks of a variant.

    What differs between them is in four small methods, here as in SB3's ``PPO``: :meth:`_evaluate_actions`,
    :meth:`_valid_steps`, :meth:`_normalized_advantages` and :meth:`_value_function_loss`.
    """

    # Of sb3_klip.algorithm.
    beta: Any
    # Of the PPO that this is mixed into.
    batch_size: Any
    normalize_advantage: bool

    def _evaluate_actions(
        self, rollout_data: RolloutBufferSamples, actions: th.Tensor
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor | None]:
        """Values, log-probabilities and entropy (None if it has no closed form) under the current policy."""
        return self.policy.evaluate_actions(rollout_data.observations, actions)

    def _valid_steps(self, rollout_data: RolloutBufferSamples) -> th.Tensor | None:
        """Boolean mask of the samples that count; None if all do."""
        return None

    def _normalized_advantages(self, advantages: th.Tensor, mask: th.Tensor | None) -> th.Tensor:
        """Advantages with mean 0 and standard deviation 1; a single sample, which has none, is left as it is."""
        valid = advantages if mask is None else advantages[mask]
        if len(valid) <= 1:
            return advantages
        return (advantages - valid.mean()) / (valid.std() + 1e-8)

    def _value_function_loss(self, returns: th.Tensor, values: th.Tensor, mask: th.Tensor | None) -> th.Tensor:
        """Mean squared error of the value function."""
        return F.mse_loss(returns, values)

    def _taken_actions(self, rollout_data: RolloutBufferSamples) -> th.Tensor:
        """Actions as the policy takes them; the buffer holds discrete ones as floats."""
        actions = rollout_data.actions
        return actions.long().flatten() if isinstance(self.action_space, spaces.Discrete) else actions

    def _known(self, indices: th.Tensor | None) -> th.Tensor:
        """Indices of a minibatch, which a user's rollout buffer may keep to itself."""
        if indices is None:
            raise ValueError(
                f"{type(self.rollout_buffer).__name__}.get does not take its samples from _get_samples, so what "
                f"beta={self.beta!r} asks to know of each sample cannot be told"
            )
        return indices

    def evaluate_rollout(self, buffer: Any = None, at_least: int = 1) -> Iterator[EvaluatedSamples]:
        """
        All samples of a rollout once, each minibatch right after the policy has evaluated it.

        Draws no random numbers that the update would draw.

        :param buffer: the rollout; the model's own by default
        :param at_least: size of the minibatches, where the model's own are smaller
        :raises ValueError: if the rollout's buffer does not tell which samples it hands out
        """
        self.policy.set_training_mode(False)
        buffer = self.rollout_buffer if buffer is None else buffer
        size = None if self.batch_size is None else max(self.batch_size, at_least)
        with unchanged_generators(buffer):  # one of the user's own may draw from any of them, or from its own
            for rollout_data, indices in indexed_minibatches(buffer, size):
                with th.no_grad():
                    values, log_prob, _ = self._evaluate_actions(rollout_data, self._taken_actions(rollout_data))
                mask, advantages = self._valid_steps(rollout_data), rollout_data.advantages
                if self.normalize_advantage:
                    advantages = self._normalized_advantages(advantages, mask)
                yield EvaluatedSamples(rollout_data, self._known(indices), mask, values.flatten(), log_prob, advantages)
        self.policy.set_training_mode(True)

    def take_snapshot(self) -> PolicySnapshot:
        """The policy's distribution at every sample of the rollout; one forward pass."""
        snapshot = PolicySnapshot(self.rollout_buffer.buffer_size * self.rollout_buffer.n_envs)
        for samples in self.evaluate_rollout():
            snapshot.store(samples.indices, samples.mask, self.policy)
        return snapshot

    def take_ratio_bounds(self, clip_range: float, delta: float | None) -> th.Tensor:
        """Least and greatest ratio within KL ``delta`` of the policy, of every action of the rollout; one forward pass."""
        size = self.rollout_buffer.buffer_size * self.rollout_buffer.n_envs
        snapshot, drawn = PolicySnapshot(size), th.empty(0)
        for samples in self.evaluate_rollout(at_least=512):
            snapshot.store(samples.indices, samples.mask, self.policy)
            actions = self._taken_actions(samples.rollout_data)
            action_dist: Any = self.policy.action_dist
            if isinstance(action_dist, distributions.SquashedDiagGaussianDistribution):
                actions = distributions.TanhBijector.inverse(actions)
            elif getattr(action_dist, "bijector", None) is not None:  # of squashed gSDE
                actions = action_dist.bijector.inverse(actions)
            drawn = drawn if len(drawn) else actions.new_empty(size, *actions.shape[1:])
            drawn[samples.indices] = actions if samples.mask is None else actions[samples.mask]
        bounds = policy_ratio_bounds(snapshot.family, snapshot.parameters, drawn, clip_range, delta)
        return th.stack(bounds).to(snapshot.parameters[0].dtype)

    def _rollout_kl(self, snapshot: PolicySnapshot | None) -> float:
        """Mean of KL(π_old ‖ π_new) over the rollout, in closed form, or without a snapshot by k3; one forward pass."""
        total, count = 0.0, 0
        for samples in self.evaluate_rollout():
            if snapshot is None:
                kl = kl_estimate("k3", samples.log_prob, samples.rollout_data.old_log_prob)
            else:
                kl = snapshot.kl(samples.indices, samples.mask, self.policy)
            total += (kl if samples.mask is None else kl[samples.mask]).sum().item()
            count += len(samples.indices)
        return total / count

    def base_twin(self) -> Any:
        """
        A model of the class that this one is a drop-in for, about to make the same update, with a policy of its own.

        To be asked for between the rollout and its update. Nothing that the twin's ``train`` does changes this model, but for
        the random numbers that it draws.

        :return: the twin, which logs nothing
        """
        order = type(self).__mro__
        twin = copy.copy(self)
        twin.__class__ = order[order.index(Seam) + 1]
        twin.policy = policy_copy(self.policy)
        twin.rollout_buffer = rollout_copy(self.rollout_buffer)
        twin.set_logger(Logger(None, []))
        twin.verbose = 0
        # SB3 does so between the rollout and the update.
        twin._update_current_progress_remaining(twin.num_timesteps, twin._total_timesteps)
        return twin
