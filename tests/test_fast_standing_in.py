"""Functions in the place of methods: only while they are wanted, and never in a copy."""

import copy
import functools
import pickle
import types
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch as th
from stable_baselines3 import PPO
from stable_baselines3.common import distributions
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.distributions import DiagGaussianDistribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import FlattenExtractor, MlpExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, dummy_vec_env
from torch import nn
from torch.distributions import Normal, normal

from sb3_klip import KLipPPO
from sb3_klip.fast import graph
from sb3_klip.fast.standing_in import StandIn, is_patched, is_replaced, standing_in


class Counter:
    """Has a method."""

    def __init__(self) -> None:
        self.number = 1

    def count(self) -> int:
        """The number."""
        return self.number


class Ten(StandIn):
    """Another result, so that it shows who was called."""

    method = "count"

    def __call__(self) -> int:
        return 10 * self.owner.number


def test_it_is_called_while_it_is_wanted() -> None:
    counter = Counter()
    try:
        with standing_in([Ten(counter)]):
            assert counter.count() == 10
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert counter.count() == 1
    assert vars(counter) == {"number": 1}


def test_copies_have_the_method() -> None:
    counter = Counter()
    with standing_in([Ten(counter)]):
        copies = [copy.copy(counter), copy.deepcopy(counter), pickle.loads(pickle.dumps(counter))]
        assert counter.count() == 10
    assert vars(counter) == {"number": 1}
    for twin in copies:
        assert vars(twin) == {"number": 1}
        twin.number = 2
        assert twin.count() == 2
        assert not is_replaced(twin, "count")


def test_what_somebody_puts_in_its_place_stays() -> None:
    counter: Any = Counter()
    with standing_in([Ten(counter)]):
        counter.count = lambda: 5
    assert counter.count() == 5
    assert is_replaced(counter, "count")
    assert not is_replaced(counter, "number_of_nothing")


def test_a_function_of_a_package_whose_name_begins_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_patched(nn.Tanh, "forward")
    names: dict[str, Any] = {}
    exec(compile("def forward(self, x): return x", str(Path(th.__file__).parent) + "vision/models.py", "exec"), names)
    monkeypatch.setattr(nn.Tanh, "forward", names["forward"])
    assert is_patched(nn.Tanh, "forward")


def test_a_function_that_one_of_the_package_wraps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(th.optim.Adam, "step", lambda *args: None)
    th.optim.Adam([th.zeros(1)])
    assert th.optim.Adam.step.__code__.co_filename.startswith(str(Path(th.__file__).parent))
    assert is_patched(th.optim.Adam, "step")


def test_a_function_that_wraps_one_of_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.Tanh, "forward", functools.wraps(nn.Tanh.forward)(lambda self, x: x))
    assert is_patched(nn.Tanh, "forward")


def test_it_has_what_a_method_has() -> None:
    counter, other = Counter(), Counter()
    other.number = 3
    with standing_in([Ten(counter)]):
        assert counter.count.__self__ is counter
        assert types.MethodType(counter.count.__func__, other)() == 3
        assert is_replaced(counter, "count")


#: Functions that the fast paths do without. Each is called by PPO.
PATCHED = [
    *((ActorCriticPolicy, name) for name in ("forward", "extract_features", "_get_action_dist_from_latent")),
    *((MlpExtractor, name) for name in ("forward", "forward_actor")),
    *((DiagGaussianDistribution, name) for name in ("sample", "log_prob")),
    *((Normal, name) for name in ("rsample", "log_prob")),
    *((Normal, "entropy"), (nn.functional, "mse_loss"), (th.Tensor, "backward"), (th.autograd, "backward")),
    *((distributions, "sum_independent_dims"), (normal, "_standard_normal"), (dummy_vec_env, "deepcopy")),
    *((nn.Module, "__call__"), (nn.Linear, "__call__")),
    *((each, "forward") for each in (nn.Linear, nn.Tanh, nn.Sequential, FlattenExtractor)),
    *((DummyVecEnv, name) for name in ("step_wait", "_save_obs")),
    *((RolloutBuffer, name) for name in ("add", "get", "_get_samples")),
    *((th.optim.Adam, "step"), (nn.utils, "clip_grad_norm_")),
]


@pytest.mark.parametrize(("owner", "name"), PATCHED)
def test_what_is_patched_in_its_class_is_called_as_often_as_by_ppo(
    owner: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph, "WARM_UP", 0)
    original = getattr(owner, name)
    calls: list[int] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    numbers = []
    for algorithm in (PPO, KLipPPO):
        model = algorithm("MlpPolicy", "Pendulum-v1", n_steps=32, batch_size=16, n_epochs=1, seed=0, device="cpu")
        with mock.patch.object(owner, name, counted):
            model.learn(64)
        numbers.append(len(calls))
        calls.clear()
    assert numbers[0] > 0
    assert numbers[1] == numbers[0]
