"""
The forward pass of a rollout, for SB3's MlpPolicy, in fewer calls, and later in one: twice as fast or more, at the same bits.

The first calls are eager and short. Then a graph of the same operators takes their place, which runs without Python, as in
:mod:`sb3_klip.fast.graph`; its first result in every rollout is compared. Random numbers are drawn outside, as SB3 draws them.
"""

import math
import types
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import CategoricalDistribution, DiagGaussianDistribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.torch_layers import FlattenExtractor, MlpExtractor

from sb3_klip.fast.graph import KNOWN_MODULES, reason_in_torch
from sb3_klip.fast.script import unoptimized_script

#: Methods of the policy that the short way does without, and that somebody may have replaced on the object.
_METHODS = {"extract_features", "_get_action_dist_from_latent"}
#: Distributions that are drawn from in fewer calls.
_DISTRIBUTIONS = (DiagGaussianDistribution, CategoricalDistribution)
#: Eager calls before a graph is made, which takes as long as some hundreds of them.
WARM_UP = 1000

#: The graphs of a policy, by what they depend on: before there is one, a number of calls; None where there will be none.
_GRAPHS: "weakref.WeakKeyDictionary[Any, dict[Any, Any]]" = weakref.WeakKeyDictionary()


@contextmanager
def short_forward(policy: th.nn.Module) -> Iterator[None]:
    """
    Evaluate SB3's MlpPolicy in fewer calls until this ends; another policy is left alone.

    :param policy: the policy
    """
    if not _is_plain_mlp(policy):
        yield
        return
    policy.forward = _ShortForward(policy)
    try:
        yield
    finally:
        vars(policy).pop("forward", None)


def _is_plain_mlp(policy: Any) -> bool:
    """Whether a policy is SB3's MlpPolicy, as it was made."""
    return (
        type(policy) is ActorCriticPolicy
        and type(policy.features_extractor) is FlattenExtractor
        and type(policy.mlp_extractor) is MlpExtractor
        and policy.share_features_extractor
        and isinstance(policy.observation_space, spaces.Box)
        and not is_image_space(policy.observation_space)
        and not any("forward" in vars(module) for module in policy.modules())
        and all(parameter.dtype == th.float32 for parameter in policy.parameters())
    )


class _ShortForward:
    """
    ``forward`` of SB3's MlpPolicy: its layers one after the other, and the same arithmetic as its distribution's.

    Layers are called as they are now, with their hooks. Where one of the modules around them has a hook, the policy's own
    ``forward`` is called; a copy of the policy has that one as well.

    :param policy: the policy
    """

    def __init__(self, policy: Any):
        self.policy = policy
        self.layers = _Layers(policy)
        self.compared: set[Any] = set()

    def __reduce__(self) -> Any:
        return types.MethodType, (type(self.policy).forward, self.policy)

    def __call__(self, obs: th.Tensor, deterministic: bool = False) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        policy = self.policy
        extractor = policy.mlp_extractor
        features = policy.features_extractor
        passed_over = (features, features.flatten, extractor, extractor.policy_net, extractor.value_net)
        changed = type(policy.action_dist) not in _DISTRIBUTIONS or not _METHODS.isdisjoint(vars(policy))
        if deterministic or changed or _are_watched(passed_over):
            return type(policy).forward(policy, obs, deterministic)
        if not self.layers.are_those_of(policy):
            self.layers = _Layers(policy)
        if self.layers.log_std is None:
            logits, probabilities, values, is_finite = self._compute(obs)
            _check_action(is_finite, "logits", logits)
            actions = th.multinomial(probabilities, 1, replacement=True)
            return actions.flatten(), values, logits.gather(1, actions).flatten()
        noise = th.empty(len(obs), len(self.layers.log_std)).normal_()
        actions, log_prob, values, is_finite = self._compute(obs, noise)
        _check_action(is_finite, "log-probability", log_prob)
        return actions.reshape((-1, *policy.action_space.shape)), values, log_prob

    def _compute(self, *inputs: th.Tensor) -> Any:
        """What the layers compute, by a graph if there is one, which is compared once."""
        layers = self.layers
        is_observed = th.is_grad_enabled() or _are_watched(layers.all) or reason_in_torch()
        if is_observed or (graph := self._graph(inputs)) is None:
            return layers(*inputs)
        with unoptimized_script():
            found = graph(*inputs)
        if graph not in self.compared:
            self.compared.add(graph)
            expected = layers(*inputs)
            if not all(th.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(found, expected, strict=True)):
                _GRAPHS[self.policy] = dict.fromkeys(_GRAPHS[self.policy])
                warnings.warn(
                    "The fast forward pass does not give the bits of the policy's own, so it is left from now on. The "
                    "training is as it would have been without it.",
                    stacklevel=5,
                )
                return expected
        return found

    def _graph(self, inputs: tuple[th.Tensor, ...]) -> Any:
        """A graph for such inputs, or None."""
        graphs = _GRAPHS.setdefault(self.policy, {})
        key = (inputs[0].shape, inputs[0].dtype, *self.layers.key)
        known = graphs.setdefault(key, 0)
        if isinstance(known, int):
            graphs[key] = known + 1 if known < WARM_UP else self.layers.traced(inputs)
            return None
        return known


class _Layers(th.nn.Module):
    """
    The layers of a policy with what follows them, but for the random numbers.

    :param policy: the policy, which keeps its layers
    """

    def __init__(self, policy: Any):
        super().__init__()
        self.policy_net = th.nn.Sequential(*policy.mlp_extractor.policy_net, policy.action_net)
        self.value_net = th.nn.Sequential(*policy.mlp_extractor.value_net, policy.value_net)
        self.log_std = policy.log_std if type(policy.action_dist) is DiagGaussianDistribution else None
        self.all = (*self.policy_net, *self.value_net)
        self.key = _identities(self.all, self.log_std)

    def are_those_of(self, policy: Any) -> bool:
        """Whether the policy still has these layers, with these parameters, and such a distribution."""
        extractor = policy.mlp_extractor
        layers = (*extractor.policy_net, policy.action_net, *extractor.value_net, policy.value_net)
        log_std = policy.log_std if type(policy.action_dist) is DiagGaussianDistribution else None
        return _identities(layers, log_std) == self.key

    def forward(self, obs: th.Tensor, noise: th.Tensor | None = None) -> tuple[th.Tensor, ...]:
        """
        Ends with whether there is an action to take.

        :param obs: observations, shape (N, …)
        :param noise: standard normal numbers, shape (N, d), for actions in R^d
        """
        latent = values = obs.float().flatten(1)
        for layer in self.policy_net:
            latent = layer(latent)
        for layer in self.value_net:
            values = layer(values)
        if noise is None or self.log_std is None:
            # As CategoricalDistribution rounds.
            logits = latent - latent.logsumexp(dim=-1, keepdim=True)
            return logits, logits.softmax(dim=-1), values, logits.isfinite().all()
        # As DiagGaussianDistribution rounds.
        std = th.ones_like(latent) * self.log_std.exp()
        actions = latent + noise * std
        log_prob = -((actions - latent) ** 2) / (2 * std**2) - std.log() - math.log(math.sqrt(2 * math.pi))
        return actions, log_prob.sum(dim=1), values, log_prob.isfinite().all()

    def traced(self, inputs: tuple[th.Tensor, ...]) -> Any:
        """A graph that looks at the parameters as they will be; None if a layer may do anything."""
        if not KNOWN_MODULES.issuperset(map(type, self.all)):
            return None
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch")
            return th.jit.trace(self, inputs, check_trace=False)


def _identities(layers: Sequence[Any], log_std: th.Tensor | None) -> tuple[int, ...]:
    return (*map(id, layers), *(id(p) for layer in layers for p in layer._parameters.values()), id(log_std))


def _are_watched(modules: Sequence[Any]) -> bool:
    """Whether something is called when one of these modules is, or when any module is."""
    return th.nn.modules.module._has_any_global_hook() or any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks for m in modules
    )


def _check_action(is_finite: th.Tensor, name: str, values: th.Tensor) -> None:
    """In place of the distribution's validation: no environment, least of all a robot, is to be given such an action."""
    if not is_finite:
        raise ValueError(
            f"the policy has no action to take: its {name} is {values.tolist()}. Is there a NaN in the observation, or in a "
            "parameter of the policy?"
        )
