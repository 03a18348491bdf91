"""The policy in fewer calls: the same bits."""

import copy
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers import assert_identical
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import MlpExtractor

from sb3_klip import KLipPPO
from sb3_klip.fast import forward
from sb3_klip.fast.standing_in import standing_in

SMALL: dict[str, Any] = {"n_steps": 100, "batch_size": 32, "n_epochs": 2, "learning_rate": 3e-3, "clip_range": 0.05}


@pytest.mark.parametrize("env_id", ["Pendulum-v1", "CartPole-v1", "MountainCarContinuous-v0"])
@pytest.mark.parametrize("activation", [th.nn.Tanh, th.nn.ELU])
def test_the_policy_in_fewer_calls_has_the_same_bits(env_id: str, activation: type) -> None:
    policy = PPO("MlpPolicy", env_id, policy_kwargs={"activation_fn": activation}, device="cpu").policy
    observations = th.randn(5, *policy.observation_space.shape, dtype=th.float64)
    th.manual_seed(0)
    expected, drawn = policy(observations), th.rand(1)
    with standing_in([forward.ShortForward(policy)]), th.no_grad():
        th.manual_seed(0)
        found, drawn_then = policy(observations), th.rand(1)
        certain = policy(observations, deterministic=True)
    assert all(th.equal(a, b) and a.dtype == b.dtype for a, b in zip(found, expected, strict=True))
    assert th.equal(drawn, drawn_then)
    assert th.equal(certain[0], policy(observations, deterministic=True)[0])
    assert "forward" not in vars(policy)


class Doubled(ActorCriticPolicy):
    def forward(self, obs: th.Tensor, deterministic: bool = False) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        actions, values, log_prob = super().forward(obs, deterministic)
        return actions, 2 * values, log_prob


def hooked(policy: ActorCriticPolicy) -> None:
    policy.value_net.register_forward_hook(lambda module, inputs, output: output + 1)


@pytest.mark.parametrize(
    ("policy", "change", "kwargs"),
    [
        (Doubled, None, {}),
        ("MlpPolicy", None, {"policy_kwargs": {"share_features_extractor": False}}),
        ("MlpPolicy", hooked, {}),
        ("MlpPolicy", None, {"use_sde": True}),
    ],
)
def test_another_policy_is_evaluated_as_it_wants(policy: Any, change: Callable[[Any], None] | None, kwargs: Any) -> None:
    def trained(algorithm: type[PPO]) -> PPO:
        model = algorithm(policy, "Pendulum-v1", seed=0, device="cpu", **SMALL, **kwargs)
        if change is not None:
            change(model.policy)
        return model.learn(200)

    assert_identical(trained(KLipPPO), trained(PPO))


def watched_module(policy: Any) -> list[int]:
    calls: list[int] = []
    policy.mlp_extractor.register_forward_hook(lambda *args: calls.append(1))
    return calls


def watched_layer(policy: Any) -> list[int]:
    calls: list[int] = []
    policy.mlp_extractor.value_net[0].register_forward_pre_hook(lambda *args: calls.append(1))
    return calls


def any_module(policy: Any) -> list[int]:
    calls: list[int] = []
    handle = th.nn.modules.module.register_module_forward_hook(
        lambda module, *args: calls.append(1) if module is policy.mlp_extractor else None
    )
    calls.clear()
    policy.handle = handle
    return calls


def own_method(policy: Any) -> list[int]:
    calls: list[int] = []
    original = policy.extract_features

    def extract_features(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    policy.extract_features = extract_features
    return calls


@pytest.mark.parametrize("watch", [watched_module, watched_layer, any_module, own_method])
def test_what_the_short_way_passes_over_is_called_where_somebody_watches(watch: Callable[[Any], list[int]]) -> None:
    policy = PPO("MlpPolicy", "CartPole-v1", device="cpu").policy
    try:
        with standing_in([forward.ShortForward(policy)]), th.no_grad():
            policy(th.zeros(1, 4))
            calls = watch(policy)
            policy(th.zeros(1, 4))
    finally:
        if hasattr(policy, "handle"):
            policy.handle.remove()
    assert len(calls) == 1


class OtherLayer(BaseCallback):
    """Gives the policy other layers, and other parameters, in the middle of a rollout."""

    def _on_step(self) -> bool:
        policy: Any = self.model.policy
        th.manual_seed(self.n_calls)
        if self.n_calls == 20:
            policy.value_net = th.nn.Linear(64, 1)
        if self.n_calls == 40:
            policy.action_net.weight = th.nn.Parameter(th.randn_like(policy.action_net.weight))
        if self.n_calls == 50:
            policy.log_std.data += 0.1
        if self.n_calls == 60:
            policy.load_state_dict({key: value / 2 for key, value in policy.state_dict().items()})
        if self.n_calls == 80:
            policy.mlp_extractor = OtherExtractor(3, [64], th.nn.ReLU)
        return True


class OtherExtractor(MlpExtractor):
    """An extractor of another type."""


def test_parameters_are_those_of_the_moment() -> None:
    theirs, ours = (
        algorithm("MlpPolicy", "Pendulum-v1", seed=0, device="cpu", **SMALL).learn(100, callback=OtherLayer())
        for algorithm in (PPO, KLipPPO)
    )
    for name in ("actions", "values", "log_probs"):
        assert np.array_equal(getattr(ours.rollout_buffer, name), getattr(theirs.rollout_buffer, name))


class CopyPolicy(BaseCallback):
    """Copies the policy in the middle of a rollout, and trains the original on."""

    def _on_step(self) -> bool:
        if self.n_calls == 50:
            self.copy = copy.deepcopy(self.model.policy)
        return True


def test_a_copy_made_during_a_rollout_is_a_copy() -> None:
    callback = CopyPolicy()
    model = KLipPPO("MlpPolicy", "CartPole-v1", seed=0, device="cpu", **SMALL).learn(100, callback=callback)
    observation = th.randn(1, 4)
    with th.no_grad():
        th.manual_seed(0)
        values = callback.copy(observation)[1]
        assert th.equal(values, callback.copy.predict_values(observation))
        assert not th.equal(values, model.policy.predict_values(observation))


class Breaks(gym.Wrapper):
    """Returns a NaN after some steps, and remembers the actions that it was given."""

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.actions: list[Any] = []

    def step(self, action: Any) -> Any:
        self.actions.append(action)
        observation, *rest = self.env.step(action)
        return observation * (np.nan if len(self.actions) == 10 else 1), *rest


@pytest.mark.parametrize("env_id", ["Pendulum-v1", "CartPole-v1"])
def test_no_environment_is_given_an_action_that_is_not_finite(env_id: str) -> None:
    for algorithm in (PPO, KLipPPO):
        env = Breaks(gym.make(env_id))
        model = algorithm("MlpPolicy", env, seed=0, device="cpu", **SMALL)
        with pytest.raises(ValueError, match="nan"):
            model.learn(100)
        assert len(env.actions) == 10
        assert np.isfinite(env.actions).all()
        assert "forward" not in vars(model.policy)


def test_spaces_that_the_fast_path_knows() -> None:
    """Should SB3's policy change its arithmetic, the identity tests show it; here, that they still meet the fast path."""
    for space in (spaces.Box(-1, 1, (3,)), spaces.Discrete(4)):

        class Env(gym.Env):
            observation_space = spaces.Box(-1, 1, (2,))
            action_space = space

        assert forward.has_short_forward(PPO("MlpPolicy", Env(), device="cpu").policy)


def test_gradients_are_those_of_the_policy() -> None:
    """Whoever asks for gradients in the middle of a rollout gets them."""
    policy = PPO("MlpPolicy", "Pendulum-v1", device="cpu").policy
    with standing_in([forward.ShortForward(policy)]):
        log_prob = policy(th.zeros(1, 3))[2]
    assert log_prob.requires_grad


class Watching(BaseCallback):
    """Keeps the distribution that each step left, and copies the policy."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def _on_step(self) -> bool:
        policy = copy.deepcopy(self.model.policy)
        own = self.model.policy.action_dist.distribution
        assert vars(policy.action_dist.distribution).keys() == vars(own).keys()
        parts = [value for value in vars(own).values() if th.is_tensor(value)]
        self.seen.append((own.batch_shape, own.event_shape, [*parts, own.entropy(), own.log_prob(own.sample())]))
        return True


@pytest.mark.parametrize("env_id", ["Pendulum-v1", "CartPole-v1"])
def test_the_distribution_of_the_step_is_there(env_id: str) -> None:
    callbacks = []
    for algorithm in (PPO, KLipPPO):
        callbacks.append(Watching())
        algorithm("MlpPolicy", env_id, seed=0, device="cpu", **SMALL).learn(200, callback=callbacks[-1])
    for theirs, ours in zip(*(callback.seen for callback in callbacks), strict=True):
        assert theirs[:2] == ours[:2]
        assert all(map(th.equal, theirs[2], ours[2]))


def test_a_policy_may_rule_an_action_out() -> None:
    def trained(algorithm: type[PPO]) -> PPO:
        model = algorithm("MlpPolicy", "CartPole-v1", seed=0, device="cpu", **SMALL)
        with th.no_grad():
            model.policy.action_net.bias[0] = -th.inf
        return model.learn(200)

    ours, theirs = trained(KLipPPO), trained(PPO)
    assert all(map(th.equal, ours.policy.parameters(), theirs.policy.parameters()))
    assert set(ours.rollout_buffer.actions.flatten()) == {1}


class Half(th.nn.Sequential):
    def forward(self, value: th.Tensor) -> th.Tensor:  # type: ignore[override]
        return 0.5 * super().forward(value)


class Residual(th.nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.inner = th.nn.Linear(width, width)

    def forward(self, value: th.Tensor) -> th.Tensor:
        return value + self.inner(value)


def own_network(policy: Any) -> None:
    policy.mlp_extractor.policy_net = Half(*policy.mlp_extractor.policy_net)


def residual_network(policy: Any) -> None:
    policy.mlp_extractor.value_net = Residual(3)
    policy.value_net = th.nn.Linear(3, 1)


def bare_layer(policy: Any) -> None:
    policy.mlp_extractor.value_net = th.nn.Linear(3, 64)


def own_flattening(policy: Any) -> None:
    policy.features_extractor.flatten = Half(th.nn.Flatten())


def own_actor(policy: Any) -> None:
    actor = policy.mlp_extractor.forward_actor
    policy.mlp_extractor.forward_actor = lambda features: 0.5 * actor(features)


def own_density(policy: Any) -> None:
    log_prob = policy.action_dist.log_prob
    policy.action_dist.log_prob = lambda actions: log_prob(actions) - 1


def fixed_deviation(policy: Any) -> None:
    log_std = policy.log_std.detach()
    del policy.log_std
    policy.register_buffer("log_std", log_std)


def precise_deviation(policy: Any) -> None:
    policy.log_std = th.nn.Parameter(policy.log_std.detach().double())


@pytest.mark.parametrize(
    "change",
    [
        *(own_network, residual_network, bare_layer, own_flattening, own_actor, own_density),
        *(fixed_deviation, precise_deviation),
    ],
)
def test_parts_of_the_policy_that_were_replaced(change: Callable[[Any], None]) -> None:
    def trained(algorithm: type[PPO]) -> PPO:
        model = algorithm("MlpPolicy", "Pendulum-v1", seed=0, device="cpu", **SMALL)
        change(model.policy)
        kind, arguments = model.policy.optimizer_class, model.policy.optimizer_kwargs
        model.policy.optimizer = kind(model.policy.parameters(), lr=3e-3, **arguments)
        return model.learn(200)

    ours, theirs = trained(KLipPPO), trained(PPO)
    assert_identical(ours, theirs)
    np.testing.assert_array_equal(ours.rollout_buffer.log_probs, theirs.rollout_buffer.log_probs)


class Double(th.nn.Module):
    def forward(self, values: th.Tensor) -> th.Tensor:
        return values.double()


def test_a_policy_in_double_precision() -> None:
    def trained(algorithm: Any) -> Any:
        model = algorithm("MlpPolicy", "Pendulum-v1", seed=0, device="cpu", **SMALL)
        extractor = model.policy.mlp_extractor
        for name in ("policy_net", "value_net"):
            setattr(extractor, name, th.nn.Sequential(Double(), *getattr(extractor, name)))
        model.policy.double()
        model.policy.optimizer = th.optim.Adam(model.policy.parameters(), lr=1e-3)
        return model.learn(200)

    assert_identical(trained(KLipPPO), trained(PPO))
