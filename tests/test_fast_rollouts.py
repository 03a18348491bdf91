"""Rollouts in fewer calls: what environments, callbacks and buffers see is what they see with PPO."""

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
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecNormalize

from sb3_klip import KLipPPO
from sb3_klip.fast import rollouts

SMALL: dict[str, Any] = {"n_steps": 60, "batch_size": 32, "n_epochs": 2, "seed": 0, "device": "cpu"}


class Informative(gym.Wrapper):
    """Hands out the same objects again and again, and changes them; its episodes end in both ways."""

    def __init__(self, env_id: str = "Pendulum-v1"):
        super().__init__(gym.make(env_id, max_episode_steps=7))
        self.steps = 0
        self.shared: dict[str, Any] = {"list": [0], "array": np.zeros(2), "text": "a", "nested": {"deep": [1]}}
        self.shared["again"] = self.shared["list"]
        self.terminal = np.zeros(self.observation_space.shape, dtype=self.observation_space.dtype)

    def step(self, action: Any) -> Any:
        observation, reward, terminated, truncated, info = super().step(action)
        self.steps += 1
        self.shared["list"].append(self.steps)
        self.shared["array"] += 1
        self.shared["number"] = np.float64(self.steps)
        self.shared.update(info)
        self.terminal[:] = observation
        return self.terminal, reward, terminated or self.steps % 11 == 0, truncated, self.shared


class SameInfo(gym.Wrapper):
    """Hands out one dictionary, which other environments hand out, too."""

    def __init__(self, info: dict[str, Any]):
        super().__init__(gym.make("Pendulum-v1"))
        self.info = info

    def step(self, action: Any) -> Any:
        self.info["list"][0] += 1
        return *super().step(action)[:4], self.info


class Recorder(BaseCallback):
    """Keeps what a callback sees at each step."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[dict[str, Any]] = []

    def _on_step(self) -> bool:
        self.seen.append(copy.deepcopy({key: value for key, value in self.locals.items() if key in self.names()}))
        self.seen[-1]["all"] = sorted(self.locals)
        self.seen[-1]["shared"] = [any(a is b for b in self.locals["infos"][0].values()) for a in self.held()]
        return True

    def held(self) -> list[Any]:
        return [value for value in self.training_env.buf_infos[0].values() if isinstance(value, (list, dict, np.ndarray))]

    @staticmethod
    def names() -> set[str]:
        names = "n_steps obs_tensor actions values log_probs clipped_actions new_obs rewards dones infos idx done"
        return {*names.split(), "terminal_obs", "terminal_value"}


def assert_alike(ours: Any, theirs: Any) -> None:
    """The same types and bits, inside of lists and dictionaries, too."""
    assert type(ours) is type(theirs)
    if isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        for key in theirs:
            assert key == "t" or assert_alike(ours[key], theirs[key]) is None  # of Monitor, a time
    elif isinstance(theirs, (list, tuple)):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert_alike(a, b)
    elif isinstance(theirs, (np.ndarray, th.Tensor)):
        assert ours.dtype == theirs.dtype
        assert np.array_equal(np.asarray(ours), np.asarray(theirs))
    else:
        assert ours == theirs


def one_dictionary() -> DummyVecEnv:
    info = {"list": [0]}
    return DummyVecEnv([lambda: SameInfo(info)] * 2)


ENVS: dict[str, Callable[[], Any]] = {
    "one": lambda: make_vec_env(Informative, 1, seed=0),
    "three": lambda: make_vec_env(Informative, 3, seed=0),
    "discrete": lambda: make_vec_env(lambda: Informative("CartPole-v1"), 2, seed=0),
    "one dictionary": one_dictionary,
}


@pytest.mark.parametrize("case", ENVS)
def test_callbacks_see_the_same(case: str) -> None:
    seen = {}
    for algorithm in (PPO, KLipPPO):
        recorder = Recorder()
        model = algorithm("MlpPolicy", ENVS[case](), **SMALL).learn(240, callback=recorder)
        seen[algorithm] = (recorder.seen, {k: v for k, v in vars(model.rollout_buffer).items() if isinstance(v, np.ndarray)})
    assert len(seen[PPO][0]) > 60
    assert_alike(seen[KLipPPO], seen[PPO])


WRAPPED: dict[str, tuple[str, Callable[[], Any]]] = {
    "VecNormalize": ("MlpPolicy", lambda: VecNormalize(make_vec_env("Pendulum-v1", 2, seed=0))),
    "VecFrameStack": ("MlpPolicy", lambda: VecFrameStack(make_vec_env("Pendulum-v1", 2, seed=0), 2)),
    "discrete observations": ("MlpPolicy", lambda: make_vec_env("FrozenLake-v1", 2, seed=0)),
    "binary": ("MlpPolicy", lambda: DummyVecEnv([Binary])),
}


class Binary(gym.Env):
    """Spaces of bits."""

    observation_space = spaces.MultiBinary(3)
    action_space = spaces.MultiBinary(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        return self.np_random.integers(0, 2, 3, np.int8), {}

    def step(self, action: Any) -> Any:
        return self.np_random.integers(0, 2, 3, np.int8), float(action.sum()), self.np_random.random() < 0.1, False, {}


@pytest.mark.parametrize("case", WRAPPED)
def test_environments_of_other_kinds(case: str) -> None:
    policy, make = WRAPPED[case]
    ours, theirs = (algorithm(policy, make(), **SMALL).learn(240) for algorithm in (KLipPPO, PPO))
    assert_identical(ours, theirs)
    if case == "VecNormalize":
        assert np.array_equal(ours.env.obs_rms.var, theirs.env.obs_rms.var)


class Names(BaseCallback):
    """Which functions stand in for methods while a rollout is collected."""

    def _on_step(self) -> bool:
        env = self.training_env
        while hasattr(env, "venv"):
            env = env.venv
        owners = {"forward": self.model.policy, "step_wait": env, "add": self.model.rollout_buffer}
        self.names = {name for name, owner in owners.items() if isinstance(vars(owner).get(name), rollouts.StandIn)}
        return True


def names(env: Any, **kwargs: Any) -> set[str]:
    callback = Names()
    model = KLipPPO("MlpPolicy", env, **{**SMALL, **kwargs}).learn(60, callback=callback)
    assert not {"forward", "step_wait", "add"} & {*vars(model.policy), *vars(model.env), *vars(model.rollout_buffer)}
    return callback.names


class OwnBuffer(RolloutBuffer):
    """May do anything."""


class OwnVecEnv(DummyVecEnv):
    """Likewise."""


def test_what_is_known_has_stand_ins_and_what_is_not_has_none() -> None:
    make = [lambda: gym.make("Pendulum-v1")]
    assert names("Pendulum-v1") == {"forward", "step_wait", "add"}
    assert names(VecNormalize(DummyVecEnv(make))) == {"forward", "step_wait", "add"}
    assert names(OwnVecEnv(make)) == {"forward", "add"}
    assert names("Pendulum-v1", rollout_buffer_class=OwnBuffer) == {"forward", "step_wait"}
    assert names("FrozenLake-v1") == {"step_wait", "add"}
    patched: Any = DummyVecEnv(make)
    patched._save_obs = lambda *args: DummyVecEnv._save_obs(patched, *args)
    assert names(patched) == {"forward", "add"}


class Patches(BaseCallback):
    """Replaces a part of the environment's step when the rollout has begun."""

    def _on_rollout_start(self) -> None:
        env: Any = self.training_env
        self.calls = 0

        def save(place: int, observation: Any) -> None:
            self.calls += 1
            type(env)._save_obs(env, place, observation)

        env._save_obs = save

    def _on_step(self) -> bool:
        return True


def test_what_is_replaced_during_a_rollout_is_called() -> None:
    callback = Patches()
    KLipPPO("MlpPolicy", "Pendulum-v1", **SMALL).learn(60, callback=callback)
    assert callback.calls == 60
