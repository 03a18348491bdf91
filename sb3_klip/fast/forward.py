"""The forward pass of SB3's MlpPolicy during rollouts, in fewer calls and at the same bits."""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common import distributions as sb3_distributions
from stable_baselines3.common import policies
from stable_baselines3.common.distributions import CategoricalDistribution, DiagGaussianDistribution
from stable_baselines3.common.policies import ActorCriticPolicy, BaseModel
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.torch_layers import FlattenExtractor, MlpExtractor
from torch import nn
from torch.distributions import Categorical, Distribution, Normal, normal
from torch.nn import Flatten, Linear, Sequential, Tanh

from sb3_klip.fast.observers import hooks_of, reason_in_torch
from sb3_klip.fast.standing_in import StandIn, is_patched, is_replaced

#: Methods that the short way does without, and that somebody may have replaced: of the policy, its extractor, and its
#: distribution.
_METHODS = ("extract_features", "_get_action_dist_from_latent")
_EXTRACTOR_METHODS = ("forward", "forward_actor", "forward_critic")
_DISTRIBUTION_METHODS = ("proba_distribution", "get_actions", "sample", "mode", "log_prob")
#: All that the short way does without.
_FUNCTIONS: dict[Any, tuple[str, ...]] = {
    ActorCriticPolicy: _METHODS,
    BaseModel: ("extract_features",),
    policies: ("preprocess_obs",),
    nn.Module: ("__call__", "_call_impl"),
    MlpExtractor: _EXTRACTOR_METHODS,
    **dict.fromkeys((FlattenExtractor, Flatten, Sequential, Linear, Tanh), ("__call__", "forward")),
    **dict.fromkeys((DiagGaussianDistribution, CategoricalDistribution), _DISTRIBUTION_METHODS),
    sb3_distributions: ("sum_independent_dims",),
    Distribution: ("__init__",),
    Normal: ("__init__", "rsample", "log_prob"),
    normal: ("_standard_normal", "broadcast_all"),
    Categorical: ("__init__", "sample", "log_prob"),
}
#: Distributions that are drawn from in fewer calls.
_DISTRIBUTIONS = (DiagGaussianDistribution, CategoricalDistribution)


def has_short_forward(policy: Any) -> bool:
    """
    Whether :class:`ShortForward` knows a policy: SB3's MlpPolicy, as it was made.

    :param policy: the policy
    """
    return (
        type(policy) is ActorCriticPolicy
        and type(policy.features_extractor) is FlattenExtractor
        and type(policy.mlp_extractor) is MlpExtractor
        and policy.share_features_extractor
        and isinstance(policy.observation_space, spaces.Box)
        and not is_image_space(policy.observation_space)
        and policy.device.type == "cpu"
        and "_compiled_call_impl" not in vars(policy)
        and not any(is_patched(owner, *names) for owner, names in _FUNCTIONS.items())
    )


class ShortForward(StandIn):
    """
    ``forward`` of SB3's MlpPolicy: its layers' functions one after the other, and the arithmetic of its distribution.

    What is small is calculated by NumPy, whose calls take a fifth of torch's time. Both round sums, products, differences and
    quotients as IEEE 754 says. Parameters and layers are those of the moment. Where somebody watches modules or operations, or
    has replaced some, the policy's own ``forward`` is called.

    :param policy: the policy
    """

    method = "forward"

    def __init__(self, policy: Any):
        super().__init__(policy)
        self.path: tuple[nn.Module, ...] = ()
        self.hooks: list[Any] = []
        self.attributes: list[dict[str, Any]] = []
        self.deviation = _Deviation()

    def __call__(self, obs: th.Tensor, deterministic: bool = False) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        policy = self.owner
        action_dist = policy.action_dist
        kind = type(action_dist)
        modules = policy._modules  # an attribute of a module takes ten times as long to find
        extractor, features = modules["mlp_extractor"], modules["features_extractor"]
        networks = extractor._modules
        is_known = (
            type(extractor) is MlpExtractor
            and type(features) is FlattenExtractor
            and kind in _DISTRIBUTIONS
            and type(networks["policy_net"]) is type(networks["value_net"]) is Sequential
            and type(features._modules["flatten"]) is Flatten
        )
        if not is_known or deterministic or th.is_grad_enabled():
            return type(policy).forward(policy, obs, deterministic)
        hidden = [networks[name]._modules.values() for name in ("policy_net", "value_net")]
        heads = modules["value_net"], modules["action_net"]
        inner = (*features._modules.values(), extractor, *networks.values(), *hidden[0], *hidden[1])
        watched = self._is_watched((features, *inner, *heads))
        if watched or is_replaced(extractor, *_EXTRACTOR_METHODS) or is_replaced(action_dist, *_DISTRIBUTION_METHODS):
            return type(policy).forward(policy, obs, deterministic)
        seen = obs.float().flatten(1)
        of_actor, of_critic = _through(hidden[0], seen), _through(hidden[1], seen)
        values, latent = _through(heads[:1], of_critic), _through(heads[1:], of_actor)
        if kind is DiagGaussianDistribution:
            log_std = policy._parameters.get("log_std")
            if log_std is None or log_std.dtype != latent.dtype or not latent.is_contiguous():
                actions, log_prob = action_dist.log_prob_from_params(latent, policy.log_std)
                return actions.reshape(-1, *policy.action_space.shape), values, log_prob
            std, *others = self.deviation.of(log_std, latent)
            action_dist.distribution = _unchecked(Normal, latent.shape, loc=latent, scale=std)
            drawn, log_prob = _gaussian(latent, *others)
            return th.from_numpy(drawn.reshape(-1, *policy.action_space.shape)), values, log_prob
        actions, log_prob, action_dist.distribution = _categorical(latent)
        return actions, values, log_prob

    def _is_watched(self, path: tuple[nn.Module, ...]) -> bool:
        """Whether something is called when one of these modules is, or is called in its place."""
        if path != self.path:
            self.path, self.hooks, self.attributes = path, hooks_of(path), [vars(module) for module in path]
        for attributes in self.attributes:
            if "forward" in attributes or "_compiled_call_impl" in attributes:
                return True
        # The policy's own forward is this one, and its hooks are called by who calls it.
        return any(self.hooks) or is_replaced(self.owner, *_METHODS) or bool(reason_in_torch())


def _through(layers: Iterable[nn.Module], values: th.Tensor) -> th.Tensor:
    """What layers make of values; the layers that most policies have are not asked, but done as they do it."""
    for layer in layers:
        kind = type(layer)
        if kind is Linear and "weight" in (own := layer._parameters) and "bias" in own:  # or one may be a buffer
            values = nn.functional.linear(values, own["weight"], own["bias"])  # type: ignore[arg-type]
        elif kind is Tanh:
            values = th.tanh(values)
        else:
            values = layer(values)
    return values


class _Deviation:
    """What a Gaussian's logarithm of the standard deviation gives for a batch, as long as it has the same bits."""

    def __init__(self) -> None:
        self.key: Any = None
        self.found: Any = None

    def of(self, log_std: th.Tensor, mean: th.Tensor) -> tuple[th.Tensor, np.ndarray, np.ndarray, np.ndarray]:
        """Standard deviation, as tensor and array, twice its square, and its logarithm, each of the shape of the mean."""
        key = (mean.shape, log_std.detach().numpy().tobytes())
        # Somebody may have written into the tensor, which the distribution holds.
        if key != self.key or self.found[0].is_inference() or self.found[0]._version:
            std = th.ones_like(mean) * log_std.exp()
            self.key, self.found = key, (std, std.numpy().copy(), (2 * std**2).numpy(), std.log().numpy())
        return self.found


def _unchecked(kind: type[Distribution], shape: th.Size, **attributes: Any) -> Any:
    """A distribution as its constructor makes it, without the checks and the broadcasting, which take most of the time."""
    distribution = kind.__new__(kind)
    vars(distribution).update(attributes, _batch_shape=shape, _event_shape=th.Size())
    return distribution


def _gaussian(
    mean: th.Tensor, std: np.ndarray, twice_variance: np.ndarray, log_std: np.ndarray
) -> tuple[np.ndarray, th.Tensor]:
    """Actions and their log-probabilities, as ``DiagGaussianDistribution`` draws and rounds them."""
    noise, centre = th.empty_like(mean).normal_().numpy(), mean.numpy()
    actions = centre + noise * std
    distance = actions - centre
    log_prob = -(distance * distance) / twice_variance - log_std - _LOG_SQRT_2_PI
    _check_action(np.isfinite(log_prob), "log-probability", log_prob)
    return actions, th.from_numpy(log_prob).sum(dim=1)


# As a number of Python, which takes the precision of the arrays that it is subtracted from.
_LOG_SQRT_2_PI = math.log(math.sqrt(2 * math.pi))


def _categorical(logits: th.Tensor) -> tuple[th.Tensor, th.Tensor, Categorical]:
    """Actions and their log-probabilities, as ``CategoricalDistribution`` draws and rounds them, and the distribution."""
    logits = logits - logits.logsumexp(dim=-1, keepdim=True)
    values = logits.numpy()
    _check_action(~np.isnan(values), "logits", values)  # -inf rules an action out
    probs = logits.softmax(dim=-1)
    actions = th.multinomial(probs, 1, replacement=True)
    parts = {"logits": logits, "_param": logits, "_num_events": logits.shape[-1], "probs": probs}
    return actions.flatten(), logits.gather(1, actions).flatten(), _unchecked(Categorical, logits.shape[:-1], **parts)


def _check_action(is_valid: np.ndarray, name: str, values: np.ndarray) -> None:
    """In place of the distribution's validation: no environment, least of all a robot, is to be given such an action."""
    if not is_valid.all():
        raise ValueError(
            f"the policy has no action to take: its {name} is {values.tolist()}. Is there a NaN in the observation, or in a "
            "parameter of the policy?"
        )
