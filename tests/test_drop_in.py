"""
What "drop-in" means: a table of things that users of Stable-Baselines3 do, each done with the base class and with ours.

Each scenario is a function that takes a :class:`Case` and returns what can be compared: the models that it has trained,
numbers of calls, names of files, texts. It is run with PPO and KLipPPO, and, where it applies, with the other two pairs. Then
all of it must be the same: every bit of the models, the random generators afterwards, the exceptions by their types, and the
warnings but for the name of the class.
"""

import collections
import copy
import dataclasses
import io
import itertools
import multiprocessing
import pickle
import random
import sys
import threading
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import cloudpickle
import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from stable_baselines3.common import callbacks as sb3_callbacks
from stable_baselines3.common import policies
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.distributions import DiagGaussianDistribution
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import RolloutBufferSamples
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecCheckNan,
    VecEnv,
    VecFrameStack,
    VecNormalize,
)
from torch.nn.parameter import is_lazy
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from sb3_klip.fast import graph
from sb3_klip.variants import VARIANTS

STEPS = 24
POLICIES = {"KLipPPO": "{}Policy", "KLipRecurrentPPO": "{}LstmPolicy", "KLipMaskablePPO": "{}Policy"}


class Task(gym.Env):
    """Observations are random, rewards depend on the action; episodes end after 7 steps, by turns at a time limit."""

    def __init__(self, observed: str = "box", acted: str = "discrete"):
        self.observation_space = {
            "box": spaces.Box(-2.0, 2.0, (3,), np.float32),
            "float64": spaces.Box(-2.0, 2.0, (3,), np.float64),
            "discrete": spaces.Discrete(4),
            "multidiscrete": spaces.MultiDiscrete([3, 2]),
            "multibinary": spaces.MultiBinary(3),
            "dict": spaces.Dict({"a": spaces.Box(-2.0, 2.0, (2,), np.float32), "b": spaces.Discrete(3)}),
            "image": spaces.Box(0, 255, (36, 36, 1), np.uint8),
        }[observed]
        self.action_space = {
            "box": spaces.Box(-1.0, 1.0, (2,), np.float32),
            "discrete": spaces.Discrete(3),
            "multidiscrete": spaces.MultiDiscrete([2, 3]),
            "multibinary": spaces.MultiBinary(2),
        }[acted]
        self.episodes = 0
        self.steps = 0

    def _observation(self) -> Any:
        # The space's own generator would be another source of randomness to seed.
        def draw(space: spaces.Space) -> Any:
            if isinstance(space, spaces.Dict):
                return {key: draw(each) for key, each in space.items()}
            if isinstance(space, spaces.Discrete):
                return int(self.np_random.integers(space.n))
            if isinstance(space, spaces.MultiDiscrete):
                return self.np_random.integers(space.nvec)
            if isinstance(space, spaces.MultiBinary):
                return self.np_random.integers(2, size=space.n, dtype=np.int8)
            return self.np_random.uniform(space.low, space.high).astype(space.dtype)

        return draw(self.observation_space)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.steps = 0
        self.episodes += 1
        return self._observation(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        reward = float(np.sum(action)) + float(self.np_random.normal())
        ended = self.steps == 7
        return self._observation(), reward, ended and self.episodes % 2 == 0, ended and self.episodes % 2 == 1, {}

    def action_masks(self) -> np.ndarray:
        sizes = {
            spaces.Discrete: lambda s: s.n,
            spaces.MultiDiscrete: lambda s: s.nvec.sum(),
            spaces.MultiBinary: lambda s: 2 * s.n,
        }
        masks = np.ones(int(sizes[type(self.action_space)](self.action_space)), dtype=bool)
        masks[self.steps % 2] = self.steps % 3 != 0
        return masks


class Case(NamedTuple):
    """
    One side of a comparison.

    :param algorithm: the class
    :param ours: the name of our class of the pair
    :param folder: for files
    """

    algorithm: type[BaseAlgorithm]
    ours: str
    folder: Path

    @property
    def is_masked(self) -> bool:
        return self.ours == "KLipMaskablePPO"

    @property
    def is_recurrent(self) -> bool:
        return self.ours == "KLipRecurrentPPO"

    def envs(self, n_envs: int = 1, observed: str = "box", acted: str = "", monitor: bool = True, **kwargs: Any) -> Any:
        """Vectorized tasks; actions are continuous unless they are masked."""
        acted = acted or ("discrete" if self.is_masked else "box")
        wrap = Monitor if monitor else lambda env: env
        env = DummyVecEnv([lambda: wrap(Task(observed, acted, **kwargs)) for _ in range(n_envs)])
        env.seed(0)
        return env

    def model(self, env: Any = None, policy: Any = "Mlp", **kwargs: Any) -> Any:
        """A small model whose updates clip many samples and have a truncated last minibatch."""
        if isinstance(policy, str):
            policy = POLICIES[self.ours].format(policy)
        small: dict[str, Any] = {"net_arch": [8]}
        if self.is_recurrent:
            small["lstm_hidden_size"] = 8
        settings = {
            "n_steps": STEPS,
            "batch_size": 14,
            "n_epochs": 2 if self.is_recurrent else 3,
            "learning_rate": 0.01,
            "clip_range": 0.05,
            "seed": 0,
            "device": "cpu",
            "policy_kwargs": {**small, **kwargs.pop("policy_kwargs", {})},
        }
        return self.algorithm(policy, self.envs() if env is None else env, **{**settings, **kwargs})

    def trained(self, env: Any = None, policy: Any = "Mlp", steps: int = 2 * STEPS, **kwargs: Any) -> Any:
        """Such a model, trained."""
        return self.model(env, policy, **kwargs).learn(steps)


class Scenario(NamedTuple):
    """
    Something that users do.

    :param run: does it
    :param variants: names of our classes that it applies to
    """

    run: Callable[[Case], Any]
    variants: tuple[str, ...]


ALL = tuple(variant.name for variant in VARIANTS)
SCENARIOS: dict[str, Scenario] = {}


def scenario(*variants: str, **cases: Any) -> Callable[[Any], Any]:
    """
    Add a function to the table; with keyword arguments, once for each, whose value it is given.

    :param variants: names of our classes that it applies to; all, if none is given
    """

    def add(function: Any) -> Any:
        for name, value in cases.items() or [("", None)]:
            run = (lambda case, value=value: function(case, value)) if name else function
            SCENARIOS[f"{function.__name__}[{name}]" if name else function.__name__] = Scenario(run, variants or ALL)
        return function

    return add


# -- comparing -------------------------------------------------------------------------------------------------------------


def state(model: BaseAlgorithm) -> dict[str, Any]:
    """All that training changes: the policy's tensors, the optimizer's, counters, and gradients as they were left."""
    optimizer = model.policy.optimizer.state_dict()
    tensors = {f"policy.{name}": value for name, value in model.policy.state_dict().items()}
    for index, moments in optimizer["state"].items():
        tensors.update({f"optimizer.{index}.{name}": value for name, value in moments.items()})
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer["param_groups"]]
    counts = {"num_timesteps": model.num_timesteps, "n_updates": model._n_updates, "groups": groups}
    return {**tensors, **counts}


def comparable(value: Any) -> Any:
    """What a scenario returned, with models replaced by their states."""
    if isinstance(value, BaseAlgorithm):
        return comparable(state(value))
    if isinstance(value, th.Tensor):
        return ("tensor", str(value.dtype), tuple(value.shape), value.detach().numpy().tobytes())
    if isinstance(value, np.ndarray):
        return ("array", str(value.dtype), value.shape, value.tobytes())
    if isinstance(value, dict):
        return {key: comparable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [comparable(item) for item in value]
    return value


def outcome(run: Callable[[Case], Any], case: Case) -> dict[str, Any]:
    """Everything that somebody could notice of a scenario, but for the clock."""
    case.folder.mkdir()
    set_random_seed(0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = comparable(run(case))
        except (Exception, KeyboardInterrupt) as error:
            result = ("raised", type(error).__name__)
    said = sorted({str(w.message).replace(str(case.folder), "<folder>") for w in caught})
    said = [text.replace(case.algorithm.__name__, "<algorithm>") for text in said]
    return {
        "result": result,
        "warnings": said,
        "files": sorted(str(path.relative_to(case.folder)) for path in case.folder.rglob("*")),
        "random": (random.random(), np.random.random(), th.rand(1).item()),
        "validation": th.distributions.Distribution._validate_args,
        "threads": th.get_num_threads(),
        "deterministic": th.are_deterministic_algorithms_enabled(),
    }


# -- spaces, environments --------------------------------------------------------------------------------------------------


@scenario("KLipPPO", "KLipRecurrentPPO", box="box", discrete="discrete", multidiscrete="multidiscrete")
def actions(case: Case, acted: str) -> Any:
    return case.trained(case.envs(acted=acted))


@scenario("KLipPPO")
def binary_actions(case: Case) -> Any:
    return case.trained(case.envs(acted="multibinary"))


@scenario("KLipMaskablePPO", discrete="discrete", multidiscrete="multidiscrete", multibinary="multibinary")
def masked_actions(case: Case, acted: str) -> Any:
    return case.trained(case.envs(acted=acted))


@scenario(float64="float64", discrete="discrete", multibinary="multibinary")
def observations(case: Case, observed: str) -> Any:
    return case.trained(case.envs(observed=observed))


@scenario("KLipPPO", "KLipMaskablePPO")
def observations_of_several_numbers(case: Case) -> Any:
    return case.trained(case.envs(observed="multidiscrete"))


@scenario()
def dictionaries(case: Case) -> Any:
    return case.trained(case.envs(observed="dict"), "MultiInput")


@scenario()
def images(case: Case) -> Any:
    small = {"features_extractor_kwargs": {"features_dim": 8}}
    return case.trained(case.envs(observed="image"), "Cnn", policy_kwargs=small, n_steps=16, steps=16, n_epochs=3)


@scenario()
def several_environments(case: Case) -> Any:
    return case.trained(case.envs(3), steps=3 * 2 * STEPS)


@scenario()
def environments_without_monitor(case: Case) -> Any:
    return case.trained(case.envs(monitor=False))


@scenario("KLipPPO", "KLipRecurrentPPO")
def an_environment_by_its_name(case: Case) -> Any:
    return case.trained("Pendulum-v1", clip_range=0.01)


@scenario("KLipPPO")
def a_vectorized_environment_of_no_class_of_sb3(case: Case) -> Any:
    model, env = case.model(), case.envs()
    _, callback = model._setup_learn(STEPS)
    env.reset()
    model.collect_rollouts(types.SimpleNamespace(num_envs=1, step=env.step), callback, model.rollout_buffer, STEPS)
    model.train()
    return model


@scenario()
def an_environment_that_is_not_vectorized(case: Case) -> Any:
    return case.trained(Task(acted="discrete"))


@scenario()
def environments_in_processes(case: Case) -> Any:
    acted = "discrete"
    model = case.trained(SubprocVecEnv([lambda: Monitor(Task(acted=acted))] * 2, start_method="fork"), steps=4 * STEPS)
    model.get_env().close()
    return model


@scenario()
def normalized_environments(case: Case) -> Any:
    env = VecNormalize(case.envs(2))
    return case.trained(env, steps=4 * STEPS), env.obs_rms.mean, env.ret_rms.var


@scenario()
def stacked_frames(case: Case) -> Any:
    return case.trained(VecFrameStack(case.envs(), 3))


@scenario()
def environments_checked_for_nan(case: Case) -> Any:
    return case.trained(VecCheckNan(case.envs(), raise_exception=True))


@scenario("KLipPPO", "KLipRecurrentPPO")
def environments_in_one_batch(case: Case) -> Any:
    class Batched(DummyVecEnv):
        """Two environments in one array, which has none of what the class is otherwise made with."""

        def __init__(self) -> None:
            task = Task(acted="box")
            VecEnv.__init__(self, 2, task.observation_space, task.action_space)
            self.steps = 0

        def _observations(self) -> np.ndarray:
            return np.full((2, 3), np.sin(self.steps), dtype=np.float32)

        def reset(self) -> Any:
            return self._observations()

        def step_wait(self) -> Any:
            self.steps += 1
            return self._observations(), self.actions.sum(axis=1), np.full(2, self.steps % 7 == 0), [{}, {}]

        def get_attr(self, attr_name: str, indices: Any = None) -> Any:
            raise AttributeError(attr_name)

        def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> Any:
            return [False, False]

        def env_method(self, *args: Any, **kwargs: Any) -> Any:
            return [None, None]

        def seed(self, seed: int | None = None) -> Any:
            return [None, None]

    return case.trained(Batched(), steps=4 * STEPS)


@scenario()
def information_that_holds_itself(case: Case) -> Any:
    class Own(gym.Wrapper):
        def step(self, action: Any) -> Any:
            *others, info = self.env.step(action)
            info["itself"], info["shared"] = info, [1]
            info["again"] = info["shared"]
            return *others, info

    seen: list[bool] = []

    class Look(sb3_callbacks.BaseCallback):
        def _on_step(self) -> bool:
            (info,) = self.locals["infos"]
            seen.append(info["itself"] is info and info["shared"] is info["again"])
            return True

    acted = "discrete" if case.is_masked else "box"
    env = DummyVecEnv([lambda: Monitor(Own(Task(acted=acted)))])
    env.seed(0)
    return case.model(env).learn(STEPS, callback=Look()), seen


# -- hyperparameters -------------------------------------------------------------------------------------------------------


@scenario(
    value_clipping={"clip_range_vf": 0.1},
    entropy={"ent_coef": 0.1},
    no_normalization={"normalize_advantage": False},
    target_kl={"target_kl": 0.001},
    schedules={"learning_rate": lambda p: 0.01 * p, "clip_range": lambda p: 0.1 * p},
    one_epoch={"n_epochs": 1, "clip_range": 0.01},
    whole_rollout={"batch_size": STEPS},
    large_minibatch={"batch_size": 1000},
    printed={"verbose": 1},
)
def hyperparameters(case: Case, kwargs: dict[str, Any]) -> Any:
    return case.trained(**kwargs)


@scenario("KLipPPO", "KLipRecurrentPPO")
def gsde(case: Case) -> Any:
    return case.trained(use_sde=True, sde_sample_freq=4)


@scenario("KLipPPO", "KLipRecurrentPPO")
def squashed_gsde(case: Case) -> Any:
    return case.trained(use_sde=True, policy_kwargs={"squash_output": True}, ent_coef=0.01)


@scenario(
    policy={"policy": "MplPolicy"},
    n_steps={"n_steps": 0},
    batch_size={"batch_size": 1},
    clip_range_vf={"clip_range_vf": -1.0},
    argument={"n_step": 8},
)
def bad_arguments(case: Case, kwargs: dict[str, Any]) -> Any:
    return case.algorithm(**{"policy": POLICIES[case.ours].format("Mlp"), "env": case.envs(), **kwargs})


# -- policies --------------------------------------------------------------------------------------------------------------


class Extractor(BaseFeaturesExtractor):
    """Two features, with dropout, which draws random numbers in training mode."""

    def __init__(self, observation_space: spaces.Space):
        super().__init__(observation_space, features_dim=2)
        self.linear = th.nn.Linear(3, 2)
        self.dropout = th.nn.Dropout(0.2)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.dropout(self.linear(observations))


@scenario()
def a_custom_extractor(case: Case) -> Any:
    return case.trained(policy_kwargs={"features_extractor_class": Extractor})


@scenario()
def separate_extractors(case: Case) -> Any:
    return case.trained(policy_kwargs={"features_extractor_class": Extractor, "share_features_extractor": False})


@scenario()
def batch_normalization(case: Case) -> Any:
    class Normalized(Extractor):
        def __init__(self, observation_space: spaces.Space):
            super().__init__(observation_space)
            self.dropout = th.nn.BatchNorm1d(2)  # type: ignore[assignment]

    return case.trained(policy_kwargs={"features_extractor_class": Normalized})


@scenario()
def activation_and_initialization(case: Case) -> Any:
    return case.trained(
        policy_kwargs={"activation_fn": th.nn.ReLU, "ortho_init": False, "net_arch": {"pi": [8, 4], "vf": [5]}}
    )


@scenario("KLipPPO", clamping="clamp", counting="count")
def a_custom_policy(case: Case, what: str) -> Any:
    calls = []

    class Own(ActorCriticPolicy):
        def evaluate_actions(self, obs: Any, actions: th.Tensor) -> Any:
            calls.append(len(actions))
            if what == "clamp":  # a change of a parameter in the middle of an update
                self.log_std.data.clamp_(-0.01, 0.01)
            return super().evaluate_actions(obs, actions)

        def forward(self, obs: Any, deterministic: bool = False) -> Any:
            calls.append("forward")
            return super().forward(obs, deterministic)

    return case.trained(policy=Own), calls


@scenario("KLipPPO")
def a_method_replaced_on_the_policy(case: Case) -> Any:
    model, calls = case.model(), []
    original = model.policy.extract_features
    model.policy.extract_features = lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs)
    return model.learn(STEPS), len(calls)


@scenario()
def a_module_with_extra_state(case: Case) -> Any:
    class Counting(Extractor):
        calls = 0

        def get_extra_state(self) -> Any:
            return {"calls": self.calls}

        def set_extra_state(self, saved: Any) -> None:
            self.calls = saved["calls"]

        def forward(self, observations: th.Tensor) -> th.Tensor:
            self.calls += 1
            return super().forward(observations)

    model = case.trained(policy_kwargs={"features_extractor_class": Counting})
    return list(model.policy.parameters()), model.policy.features_extractor.calls


@scenario()
def a_subclass_that_compares_models(case: Case) -> Any:
    class Own(case.algorithm):  # type: ignore[misc,name-defined]
        def __eq__(self, other: Any) -> bool:
            return isinstance(other, Own)

    model = case._replace(algorithm=Own).model()
    return model.learn(2 * STEPS), model == model


@scenario()
def a_state_that_cannot_be_copied(case: Case) -> Any:
    class Locked(Extractor):
        def get_extra_state(self) -> Any:
            return threading.Lock()

        def set_extra_state(self, saved: Any) -> None:
            pass

    return list(case.trained(policy_kwargs={"features_extractor_class": Locked}).policy.parameters())


@scenario("KLipPPO")
def double_precision(case: Case) -> Any:
    class Double(Extractor):
        def forward(self, observations: th.Tensor) -> th.Tensor:
            return self.linear(observations.double())

    model = case.model(policy_kwargs={"features_extractor_class": Double})
    model.policy.double()
    return model.learn(2 * STEPS)


@scenario()
def frozen_parameters(case: Case) -> Any:
    model = case.model()
    next(model.policy.value_net.parameters()).requires_grad_(False)
    return model.learn(2 * STEPS)


@scenario()
def parameters_without_use(case: Case) -> Any:
    class Spare(Extractor):
        def __init__(self, observation_space: spaces.Space):
            super().__init__(observation_space)
            self.spare = th.nn.Linear(2, 2)

    return case.trained(policy_kwargs={"features_extractor_class": Spare})


@scenario()
def observations_that_an_extractor_writes_into(case: Case) -> Any:
    class Scaled(Extractor):
        def __init__(self, observation_space: spaces.Space):
            super().__init__(observation_space)
            self.scale = th.nn.Parameter(th.ones(3))

        def forward(self, observations: th.Tensor) -> th.Tensor:
            observations *= self.scale
            return super().forward(observations)

    # Minibatches of which several are taken at a time.
    return case.trained(policy_kwargs={"features_extractor_class": Scaled}, n_steps=64, batch_size=16, steps=128)


@scenario("KLipPPO")
def weights_that_are_buffers(case: Case) -> Any:
    model = case.model()
    layer = model.policy.mlp_extractor.policy_net[0]
    weight = layer.weight.detach()
    del layer.weight
    layer.register_buffer("weight", weight)
    model.policy.optimizer = th.optim.Adam(model.policy.parameters(), lr=0.01)
    return model.learn(2 * STEPS)


@scenario("KLipPPO")
def a_compiled_part_of_the_policy(case: Case) -> Any:
    calls: list[int] = []

    def backend(module: Any, inputs: Any) -> Any:
        return lambda *args: calls.append(1) or module(*args)

    model, before = case.model(), th.distributions.Distribution._validate_args
    model.policy.mlp_extractor.compile(backend=backend)
    try:
        return model.learn(2 * STEPS), len(calls)
    finally:  # torch switches it off when it compiles
        th.distributions.Distribution.set_default_validate_args(before)


@scenario("KLipPPO")
def a_distribution_of_its_own(case: Case) -> Any:
    class Noisy(DiagGaussianDistribution):
        calls = 0

        def log_prob(self, actions: th.Tensor) -> th.Tensor:
            self.calls += 1
            return super().log_prob(actions) * (1 + self.calls % 3 * 0.01)

        def entropy(self) -> Any:
            return super().entropy() + 0 * th.rand(1)

    model = case.model()
    model.policy.action_dist = Noisy(2)
    return model.learn(2 * STEPS), model.policy.action_dist.calls


@scenario("KLipPPO", once=3, always=None)
def a_distribution_that_is_written_into(case: Case, at: int | None) -> Any:
    scales: list[th.Tensor] = []

    def widen(model: Any) -> None:
        scales.append(model.policy.action_dist.distribution.scale.mul_(2).clone())

    return case.model().learn(2 * STEPS, callback=Do("step", widen, at)), scales


@scenario(
    "KLipPPO",
    preprocess_obs=(policies, "preprocess_obs"),
    extract_features=(policies.BaseModel, "extract_features"),
    evaluate_actions=(ActorCriticPolicy, "evaluate_actions"),
    linear=(th.nn.functional, "linear"),
    tanh=(th, "tanh"),
)
def functions_of_the_library_replaced(case: Case, where: tuple[Any, str]) -> Any:
    owner, name = where
    original, calls = getattr(owner, name), []

    def scaled(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        found = original(*args, **kwargs)
        return found * 0.5 if isinstance(found, th.Tensor) else found

    with mock.patch.object(owner, name, scaled):
        return case.trained(), len(calls)


@scenario("KLipPPO")
def a_trace_of_the_policy(case: Case) -> Any:
    made = []

    def trace(model: Any) -> None:
        with th.no_grad():
            made.append(th.jit.trace(model.policy, th.ones(1, 3), check_trace=False))

    model = case.model().learn(2 * STEPS, callback=Do("step", trace, at=3))
    return model, made[0](th.zeros(1, 3))


@scenario("KLipPPO")
def heads_that_draw_random_numbers(case: Case) -> Any:
    class Noisy(th.nn.Linear):
        def forward(self, values: th.Tensor) -> th.Tensor:
            found = super().forward(values)
            return found + 0.1 * th.rand_like(found)

    model = case.model()
    for name in ("action_net", "value_net"):
        setattr(model.policy, name, Noisy(8, getattr(model.policy, name).out_features))
    model.policy.optimizer = th.optim.Adam(model.policy.parameters(), lr=0.01)
    return model.learn(2 * STEPS)


@scenario("KLipPPO")
def a_head_for_each_action(case: Case) -> Any:
    """Means of actions that lie in memory one action after the other, and not one environment after the other."""

    class Heads(th.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = th.nn.ModuleList(th.nn.Linear(8, 1) for _ in range(2))

        def forward(self, values: th.Tensor) -> th.Tensor:
            return th.stack([head(values).squeeze(-1) for head in self.heads]).T

    model = case.model(case.envs(4))
    model.policy.action_net = Heads()
    model.policy.optimizer = th.optim.Adam(model.policy.parameters(), lr=0.01)
    return model.learn(4 * 2 * STEPS)


@scenario("KLipRecurrentPPO")
def the_loop_over_sequences_replaced(case: Case) -> Any:
    original = RecurrentActorCriticPolicy._process_sequence

    def halved(*args: Any) -> Any:
        output, states = original(*args)
        return output / 2, states

    with mock.patch.object(RecurrentActorCriticPolicy, "_process_sequence", staticmethod(halved)):
        return case.trained()


@scenario()
def a_learned_weight_of_the_entropy(case: Case) -> Any:
    model = case.model()
    model.ent_coef = th.nn.Parameter(th.tensor(0.01))
    model.policy.optimizer.register_step_post_hook(lambda *args: None)
    return model.learn(2 * STEPS), model.ent_coef.grad


# -- rollout buffers of one's own ------------------------------------------------------------------------------------------


#: Samples with one field more than SB3's, which is empty, and samples that are no tuple.
OneMore = collections.namedtuple("OneMore", (*RolloutBufferSamples._fields, "more"), defaults=[None])
AsDataclass = dataclasses.make_dataclass("AsDataclass", RolloutBufferSamples._fields)


class InAColumn(ActorCriticPolicy):
    """Returns log-probabilities of shape (B, 1), from which the base class makes a loss of shape (B, B)."""

    def evaluate_actions(self, obs: th.Tensor, actions: th.Tensor) -> Any:
        values, log_prob, entropy = super().evaluate_actions(obs, actions)
        return values, log_prob[:, None], entropy


@scenario("KLipPPO", whole=12, truncated=14)
def log_probabilities_in_a_column(case: Case, batch_size: int) -> Any:
    model = case.trained(policy=InAColumn, batch_size=batch_size)
    names = ("approx_kl", "clip_fraction", "policy_gradient_loss", "loss")
    return model, [f"{model.logger.name_to_value[f'train/{name}']:.4g}" for name in names]


@scenario("KLipPPO", one_more=OneMore, as_dataclass=AsDataclass)
def samples_of_its_own(case: Case, kind: Any) -> Any:
    class Own(RolloutBuffer):
        def _get_samples(self, batch_inds: Any, env: Any = None) -> Any:
            return kind(*super()._get_samples(batch_inds, env))

    return case.trained(rollout_buffer_class=Own)


@scenario("KLipPPO")
def a_buffer_that_leaves_samples_out(case: Case) -> Any:
    class Own(RolloutBuffer):
        def compute_returns_and_advantage(self, *args: Any, **kwargs: Any) -> None:
            super().compute_returns_and_advantage(*args, **kwargs)
            self.advantages[::5] = np.nan

        def get(self, batch_size: Any = None) -> Any:
            super().get().__next__()  # flattened
            yield self._get_samples(np.flatnonzero(~np.isnan(self.advantages.flatten())))

    return case.trained(rollout_buffer_class=Own)


@scenario("KLipPPO", reversed=lambda array: array[::-1], read_only=lambda array: np.broadcast_to(array.copy(), array.shape))
def advantages_that_a_callback_replaces(case: Case, change: Any) -> Any:
    def replace(model: Any) -> None:
        model.rollout_buffer.advantages = change(model.rollout_buffer.advantages)

    return case.model().learn(2 * STEPS, callback=Do("rollout_end", replace))


@scenario("KLipPPO")
def samples_that_are_repaired(case: Case) -> Any:
    class Own(RolloutBuffer):
        def compute_returns_and_advantage(self, *args: Any, **kwargs: Any) -> None:
            super().compute_returns_and_advantage(*args, **kwargs)
            self.advantages[::5] = np.nan

        def _get_samples(self, batch_inds: Any, env: Any = None) -> Any:
            samples = super()._get_samples(batch_inds, env)
            return samples._replace(advantages=samples.advantages.nan_to_num())

    return case.trained(rollout_buffer_class=Own)


# -- optimizers ------------------------------------------------------------------------------------------------------------


class SignDescent(th.optim.Optimizer):
    """An optimizer of the user's own."""

    def __init__(self, params: Any, lr: float, scale: float = 1.0):
        super().__init__(params, {"lr": lr, "scale": scale})

    @th.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter -= group["scale"] * group["lr"] * parameter.grad.sign()


@scenario(
    own={"optimizer_class": SignDescent, "optimizer_kwargs": {"scale": 0.1}},
    weight_decay={"optimizer_kwargs": {"weight_decay": 0.1}},
    amsgrad={"optimizer_kwargs": {"amsgrad": True}},
    adamw={"optimizer_class": th.optim.AdamW},
    sgd={"optimizer_class": th.optim.SGD, "optimizer_kwargs": {"momentum": 0.9}},
    rmsprop={"optimizer_class": th.optim.RMSprop},
    adafactor={"optimizer_class": th.optim.Adafactor},
)
def optimizers(case: Case, policy_kwargs: dict[str, Any]) -> Any:
    model = case.trained(policy_kwargs=policy_kwargs, clip_range=0.001)  # some take small steps
    model.save(case.folder / "model")
    loaded = case.algorithm.load(case.folder / "model", env=case.envs())
    return model, loaded.learn(STEPS)


@scenario(subclass=True, instance=False)
def gradients_of_several_minibatches(case: Case, of_a_subclass: bool) -> Any:
    """Their sum, as ``zero_grad`` and ``step`` do something every other time only, or ``zero_grad`` nothing at all."""

    class EveryOther(th.optim.Adam):
        calls = 0

        def zero_grad(self, set_to_none: bool = True) -> None:
            if self.calls % 2 == 0:
                super().zero_grad(set_to_none)

        def step(self, closure: Any = None) -> Any:
            self.calls += 1
            return super().step(closure) if self.calls % 2 == 0 else None

    if of_a_subclass:
        return case.trained(policy_kwargs={"optimizer_class": EveryOther})
    model = case.model()
    model.policy.optimizer.zero_grad = lambda *args, **kwargs: None
    return model.learn(2 * STEPS)


@scenario()
def a_hook_that_replaces_gradients(case: Case) -> Any:
    model = case.model()
    for parameter in model.policy.parameters():
        parameter.register_post_accumulate_grad_hook(lambda each: setattr(each, "grad", each.grad.sign()))
    return model.learn(2 * STEPS)


@scenario()
def gradients_in_one_memory(case: Case) -> Any:
    model = case.model()
    own = list(model.policy.parameters())
    flat = th.zeros(sum(parameter.numel() for parameter in own))
    for parameter, part in zip(own, flat.split([parameter.numel() for parameter in own]), strict=True):
        parameter.grad = part.view_as(parameter)
    optimizer = model.policy.optimizer
    optimizer.zero_grad = lambda set_to_none=True: type(optimizer).zero_grad(optimizer, set_to_none=False)
    optimizer.register_step_pre_hook(lambda *args: (flat.copy_(flat.sign()), None)[1])
    return model.learn(2 * STEPS), flat


@scenario("KLipPPO")
def parameters_in_one_memory(case: Case) -> Any:
    model = case.model()
    extractor = model.policy.mlp_extractor
    extractor.value_net[0].weight.data = extractor.policy_net[0].weight.data
    return model.learn(2 * STEPS)


@scenario()
def a_learning_rate_that_is_a_tensor(case: Case) -> Any:
    class Own(case.algorithm):  # type: ignore[misc,name-defined]
        def _update_learning_rate(self, optimizers: Any) -> None:
            pass

    model = case._replace(algorithm=Own).model()
    model.policy.optimizer.param_groups[0]["lr"] = th.tensor(0.01)
    model.policy.optimizer.register_step_post_hook(lambda *args: None)
    return model.learn(2 * STEPS)


@scenario()
def what_a_hook_of_the_optimizer_sees(case: Case) -> Any:
    model, seen = case.model(), []
    model.policy.optimizer.register_step_post_hook(lambda optimizer, *args: seen.append(optimizer.param_groups[0]["foreach"]))
    return model.learn(STEPS), seen


@scenario("KLipPPO")
def a_step_replaced_in_the_class_of_the_optimizer(case: Case) -> Any:
    """Before the model is made: torch then wraps it, as it wraps its own."""
    original, calls = th.optim.Adam.step, []

    def of_signs(optimizer: Any, closure: Any = None) -> Any:
        calls.append(1)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad.sign_()
        return original(optimizer, closure)

    with mock.patch.object(th.optim.Adam, "step", of_signs):
        return case.trained(), len(calls)


@scenario()
def a_scheduler_on_the_optimizer(case: Case) -> Any:
    model = case.model(learning_rate=0.01)
    scheduler = th.optim.lr_scheduler.ExponentialLR(model.policy.optimizer, 0.5)
    model.learn(2 * STEPS)
    scheduler.step()
    return model, scheduler.get_last_lr()


@scenario()
def parameter_groups(case: Case) -> Any:
    model = case.model()
    first, *others = model.policy.parameters()
    model.policy.optimizer = th.optim.Adam([{"params": [first], "eps": 0.1}, {"params": others}], lr=0.01)
    return model.learn(2 * STEPS)


@scenario()
def another_optimizer_between_two_calls(case: Case) -> Any:
    model = case.trained()
    model.policy.optimizer = th.optim.Adam(model.policy.parameters(), lr=0.1)
    return model.learn(STEPS, reset_num_timesteps=False)


# -- callbacks -------------------------------------------------------------------------------------------------------------


@scenario()
def evaluation(case: Case) -> Any:
    if case.is_masked:
        from sb3_contrib.common.maskable.callbacks import MaskableEvalCallback as Evaluation
    else:
        from stable_baselines3.common.callbacks import EvalCallback as Evaluation
    callback = Evaluation(
        case.envs(),
        callback_on_new_best=sb3_callbacks.StopTrainingOnRewardThreshold(1e9),
        callback_after_eval=sb3_callbacks.StopTrainingOnNoModelImprovement(2),
        eval_freq=16,
        n_eval_episodes=2,
        log_path=str(case.folder),
        best_model_save_path=str(case.folder),
        verbose=0,
    )
    model = case.model().learn(6 * STEPS, callback=callback)
    with np.load(case.folder / "evaluations.npz") as saved:
        return model, callback.best_mean_reward, {name: saved[name] for name in saved}


@scenario(
    checkpoint=lambda folder: sb3_callbacks.CheckpointCallback(10, str(folder), save_vecnormalize=True),
    every=lambda folder: sb3_callbacks.EveryNTimesteps(20, sb3_callbacks.CheckpointCallback(1, str(folder))),
    episodes=lambda folder: sb3_callbacks.StopTrainingOnMaxEpisodes(6),
    logs=lambda folder: sb3_callbacks.LogEveryNTimesteps(16),
    lists=lambda folder: [sb3_callbacks.StopTrainingOnMaxEpisodes(99), sb3_callbacks.EveryNTimesteps(9, Stop(40))],
    function=lambda folder: lambda local, world: local["self"].num_timesteps < 40,
    stop=lambda folder: Stop(40),
    stop_at_once=lambda folder: Stop(1),
)
def callback(case: Case, make: Any) -> Any:
    return case.model(VecNormalize(case.envs())).learn(3 * STEPS, callback=make(case.folder))


class Stop(sb3_callbacks.BaseCallback):
    """Ends training after so many steps."""

    def __init__(self, steps: int):
        super().__init__()
        self.steps = steps

    def _on_step(self) -> bool:
        return self.num_timesteps < self.steps


class Do(sb3_callbacks.BaseCallback):
    """Calls a function with the model at one event, or whenever there is one."""

    def __init__(self, event: str, function: Callable[[Any], Any], at: int | None = 1):
        super().__init__()
        self.event, self.function, self.at, self.seen = event, function, at, 0

    def _do(self, event: str) -> None:
        if event == self.event:
            self.seen += 1
            if self.at in (None, self.seen):
                self.function(self.model)

    def _on_training_start(self) -> None:
        self._do("training_start")

    def _on_rollout_start(self) -> None:
        self._do("rollout_start")

    def _on_step(self) -> bool:
        self._do("step")
        return True

    def _on_rollout_end(self) -> None:
        self._do("rollout_end")

    def _on_training_end(self) -> None:
        self._do("training_end")


def change_learning_rate(model: Any) -> None:
    model.learning_rate = 0.05
    model._setup_lr_schedule()


def change_clip_range(model: Any) -> None:
    model.clip_range = lambda progress: 0.5


def change_epochs(model: Any) -> None:
    model.n_epochs, model.batch_size, model.target_kl = 2, 16, 0.5


def change_parameters(model: Any) -> None:
    with th.no_grad():
        for parameter in model.policy.parameters():
            parameter.add_(0.01)


@scenario(
    learning_rate=("rollout_end", change_learning_rate),
    clip_range=("rollout_start", change_clip_range),
    epochs=("rollout_end", change_epochs),
    parameters=("rollout_end", change_parameters),
    parameters_in_a_rollout=("step", change_parameters),
    half_frozen=("rollout_end", lambda model: model.policy.value_net.requires_grad_(False)),
    an_action_net=("step", lambda model: setattr(model.policy, "action_net", copy.deepcopy(model.policy.action_net))),
    another_action_net=(
        "step",
        lambda model: setattr(model.policy, "action_net", th.nn.Linear(8, model.policy.action_net.out_features)),
    ),
    training_mode=("rollout_end", lambda model: model.policy.set_training_mode(False)),
)
def a_callback_that_changes_the_model(case: Case, change: Any) -> Any:
    return case.model().learn(3 * STEPS, callback=Do(*change, at=2))


@scenario()
def a_callback_that_swaps_the_environment(case: Case) -> Any:
    def swap(model: Any) -> None:
        model.set_env(case.envs(), force_reset=False)
        model._last_obs = model.get_env().reset()

    return case.model().learn(3 * STEPS, callback=Do("rollout_end", swap))


@scenario()
def a_callback_that_saves(case: Case) -> Any:
    save = [Do(event, lambda model, event=event: model.save(case.folder / event)) for event in ("step", "rollout_end")]
    model = case.model().learn(2 * STEPS, callback=save)
    return model, [case.algorithm.load(case.folder / event) for event in ("step", "rollout_end")]


@scenario()
def a_callback_whose_data_holds_itself(case: Case) -> Any:
    callback = Stop(99)
    callback.tree = {"children": []}  # type: ignore[attr-defined]
    callback.tree["children"].append({"parent": callback.tree})  # type: ignore[attr-defined]
    for _ in range(3000):
        callback.list = (vars(callback).get("list"),)  # type: ignore[attr-defined]
    return case.model().learn(2 * STEPS, callback=callback)


@scenario()
def a_progress_bar(case: Case) -> Any:
    return case.model().learn(STEPS, progress_bar=True)


@scenario()
def what_callbacks_see(case: Case) -> Any:
    """The names in ``self.locals`` at each event, and the arrays of the last step."""
    seen: list[Any] = []

    class Look(sb3_callbacks.BaseCallback):
        def _on_rollout_end(self) -> None:
            seen.append(sorted(self.locals))

        def _on_step(self) -> bool:
            seen.append(sorted(self.locals))
            seen.extend(np.array(self.locals[name]) for name in ("actions", "rewards", "dones", "new_obs"))
            return True

    return case.model().learn(STEPS, callback=Look()), seen


# -- learn, again and again ------------------------------------------------------------------------------------------------


@scenario(reset=True, go_on=False)
def learning_twice(case: Case, reset: bool) -> Any:
    model = case.trained()
    return model.learn(3 * STEPS, reset_num_timesteps=reset), model._total_timesteps


@scenario()
def learning_in_another_environment(case: Case) -> Any:
    model = case.trained()
    model.set_env(case.envs())
    return model.learn(STEPS, reset_num_timesteps=False)


@scenario()
def another_number_of_environments(case: Case) -> Any:
    case.trained().set_env(case.envs(2))


@scenario()
def loading_with_another_number_of_environments(case: Case) -> Any:
    case.trained().save(case.folder / "model")
    return case.algorithm.load(case.folder / "model", env=case.envs(3)).learn(3 * STEPS)


@scenario()
def learning_no_steps(case: Case) -> Any:
    return case.model().learn(0)


@scenario()
def training_on_the_same_rollout_again(case: Case) -> Any:
    model = case.trained()
    model.train()
    return model


@scenario()
def evaluating_between_two_calls(case: Case) -> Any:
    if case.is_masked:
        from sb3_contrib.common.maskable.evaluation import evaluate_policy as evaluate
    else:
        evaluate = evaluate_policy
    model = case.trained()
    played = evaluate(model, case.envs(), n_eval_episodes=3)
    on_its_own = evaluate(model, model.get_env(), n_eval_episodes=3)
    return played, on_its_own, model.learn(STEPS, reset_num_timesteps=False)


@scenario()
def predicting(case: Case) -> Any:
    model = case.trained()
    observation = np.full((1, 3), 0.5, np.float32)
    return model.predict(observation, deterministic=True)[0], model.predict(observation)[0]


# -- exceptions and Ctrl-C -------------------------------------------------------------------------------------------------


class BreakError(Exception):
    """Something that a user's code raises."""


def breaking(error: type[BaseException], calls: int) -> Callable[..., None]:
    """A function that raises when it is called for so many times."""
    counter = itertools.count(1)

    def function(*args: Any, **kwargs: Any) -> None:
        if next(counter) == calls:
            raise error

    return function


PLACES = ("step", "reset", "callback", "rollout_start", "update", "optimizer", "log")


def break_at(case: Case, place: str, error: type[BaseException]) -> Any:
    """A call of learn that is broken off somewhere, and another one after it."""
    model, stop = case.model(), breaking(error, 5 if place in ("step", "callback", "update", "optimizer") else 2)
    callback = None
    if place in ("step", "reset"):
        env = model.get_env().envs[0].unwrapped
        original = getattr(env, place)
        setattr(env, place, lambda *args, **kwargs: (stop(), original(*args, **kwargs))[1])
    elif place in ("callback", "rollout_start"):
        callback = Do("step" if place == "callback" else "rollout_start", lambda model: stop(), at=2)
        stop = breaking(error, 1)
        callback.function = stop
    elif place == "update":
        evaluate = model.policy.evaluate_actions
        model.policy.evaluate_actions = lambda *args, **kwargs: (stop(), evaluate(*args, **kwargs))[1]
    elif place == "optimizer":
        model.policy.optimizer.register_step_post_hook(stop)
    else:
        model.dump_logs = stop
    try:
        model.learn(3 * STEPS, callback=callback)
        raised = None
    except (BreakError, KeyboardInterrupt) as stopped:
        raised = type(stopped).__name__
    broken = copy.deepcopy(comparable(model))
    return raised, broken, model.learn(2 * STEPS, reset_num_timesteps=False)


@scenario(**{place: place for place in PLACES})
def an_exception(case: Case, place: str) -> Any:
    return break_at(case, place, BreakError)


@scenario(**{place: place for place in PLACES})
def ctrl_c(case: Case, place: str) -> Any:
    return break_at(case, place, KeyboardInterrupt)


# -- files and copies ------------------------------------------------------------------------------------------------------


@scenario(
    text=lambda folder: str(folder / "model"),
    path=lambda folder: folder / "model.zip",
    folders=lambda folder: folder / "a" / "b" / "model",
    dotted=lambda folder: folder / "model.v2",
)
def save_and_load(case: Case, where: Any) -> Any:
    model = case.trained()
    model.save(where(case.folder))
    loaded = case.algorithm.load(where(case.folder), env=case.envs())
    return model, copy.deepcopy(comparable(loaded)), loaded.learn(STEPS)


@scenario()
def save_and_load_streams(case: Case) -> Any:
    model, stream = case.trained(), io.BytesIO()
    model.save(stream)
    stream.seek(0)
    with (case.folder / "model.zip").open("wb") as file:
        model.save(file)
    with (case.folder / "model.zip").open("rb") as file:
        return case.algorithm.load(stream), case.algorithm.load(file, env=case.envs()).learn(STEPS)


@scenario()
def load_with_what_other_algorithms_have(case: Case) -> Any:
    """As code for several algorithms does; a keyword becomes an attribute."""
    case.trained().save(case.folder / "model")
    others = {"exploration_schedule": 0.1, "replay_buffer_class": None, "optimizer_class": None, "batch": 1}
    model = case.algorithm.load(case.folder / "model", custom_objects=others, total_timesteps=3, rnd_coef=0.5)
    return model, model.total_timesteps, model.rnd_coef


@scenario()
def loading_leaves_the_generators_of_the_environment_alone(case: Case) -> Any:
    """Of a model with a seed, which SB3 gives to the spaces of the model."""
    case.model().save(case.folder / "model")
    env = case.envs()
    env.action_space.seed(7)
    case.algorithm.load(case.folder / "model", env=env)
    return env.action_space.sample()


@scenario()
def save_without_and_with_attributes(case: Case) -> Any:
    model = case.trained()
    model.note = "kept"
    model.save(case.folder / "model", exclude=["gamma"], include=["env_id"])
    loaded = case.algorithm.load(case.folder / "model", gamma=0.5)
    return loaded.gamma, loaded.note


@scenario(
    clip_range=["clip_range"], policy_kwargs=["policy_kwargs"], some=["clip_range", "n_epochs", "learning_rate", "lr_schedule"]
)
def save_without_hyperparameters(case: Case, left_out: list[str]) -> Any:
    model = case.model(policy_kwargs={"net_arch": [64, 64], **({"lstm_hidden_size": 256} if case.is_recurrent else {})})
    model.save(case.folder / "model", exclude=left_out)
    loaded = case.algorithm.load(case.folder / "model", env=case.envs(), clip_range=0.05)
    model.set_parameters(str(case.folder / "model"))
    return loaded.n_epochs, loaded.learn(STEPS)


@scenario()
def attributes_with_the_names_of_other_algorithms(case: Case) -> Any:
    model = case.model()
    names = ("target_entropy", "exploration_initial_eps", "n_delta", "cg_max_steps", "target_policy_noise")
    vars(model).update(dict.fromkeys(names, 0.5))
    model.save(case.folder / "model")
    return case.algorithm.load(case.folder / "model").target_entropy


@scenario("KLipPPO")
def a_policy_in_a_module_with_the_name_of_another_algorithm(case: Case) -> Any:
    module = types.ModuleType("own.recurrent.policies")
    module.Own = type("Own", (ActorCriticPolicy,), {"__module__": module.__name__})  # type: ignore[attr-defined]
    with mock.patch.dict(sys.modules, {"own": module, "own.recurrent": module, module.__name__: module}):
        case.model(policy=module.Own).save(case.folder / "model")  # type: ignore[attr-defined]
        return case.algorithm.load(case.folder / "model", env=case.envs()).learn(STEPS)


@scenario()
def load_what_is_not_there(case: Case) -> Any:
    return case.algorithm.load(case.folder / "nothing")


@scenario()
def load_into_an_environment_that_does_not_fit(case: Case) -> Any:
    case.trained().save(case.folder / "model")
    return case.algorithm.load(case.folder / "model", env=case.envs(observed="discrete"))


@scenario()
def get_and_set_parameters(case: Case) -> Any:
    model, other = case.trained(), case.model(seed=1)
    other.set_parameters(model.get_parameters())
    part = {"policy": model.get_parameters()["policy"]}
    case.model().set_parameters(part, exact_match=False)
    return other.learn(STEPS)


@scenario("KLipPPO")
def parameters_under_older_names(case: Case) -> Any:
    class Own(ActorCriticPolicy):
        def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
            state_dict["log_std"] = state_dict.pop("old_log_std")
            super()._load_from_state_dict(state_dict, prefix, *args)

    model = case.model(policy=Own)
    parameters = model.get_parameters()
    parameters["policy"]["old_log_std"] = parameters["policy"].pop("log_std") + 1
    model.set_parameters(parameters)
    return model.learn(STEPS)


@scenario("KLipPPO", used=True, unused=False)
def a_lazy_module(case: Case, used: bool) -> Any:
    class Lazy(BaseFeaturesExtractor):
        def __init__(self, observation_space: spaces.Space):
            super().__init__(observation_space, 4)
            self.linear = th.nn.LazyLinear(4)

        def forward(self, observations: th.Tensor) -> th.Tensor:
            return self.linear(observations) if used else observations.repeat(1, 2)[:, :4]

    model = case.trained(policy_kwargs={"features_extractor_class": Lazy, "ortho_init": False})
    if used:  # SB3 cannot load what has no shape
        model.save(case.folder / "model")
        return case.algorithm.load(case.folder / "model", env=case.envs()).learn(STEPS)
    return [parameter for parameter in model.policy.parameters() if not is_lazy(parameter)]


@scenario(
    missing=lambda parameters: {"policy": parameters["policy"]},
    unknown=lambda parameters: {**parameters, "critic": {}},
    other_names=lambda parameters: {**parameters, "policy": {"weight": th.zeros(1)}},
    no_optimizer_state=lambda parameters: {**parameters, "policy.optimizer": {"junk": 1}},
    a_list_for_an_optimizer_state=lambda parameters: {**parameters, "policy.optimizer": [1]},
    nothing_for_a_policy=lambda parameters: {**parameters, "policy": None},
)
def parameters_that_do_not_fit(case: Case, change: Any) -> Any:
    model = case.trained(steps=STEPS)
    try:
        model.set_parameters(change(model.get_parameters()))
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        # Ours may say more than torch's RuntimeError, but who catches that one catches ours.
        return "RuntimeError" if isinstance(error, RuntimeError) else type(error).__name__
    return None


@scenario("KLipPPO", "KLipMaskablePPO")
def save_and_load_of_the_policy(case: Case) -> Any:
    model = case.trained()
    model.policy.save(case.folder / "policy.pth")
    loaded = type(model.policy).load(case.folder / "policy.pth")
    return model, loaded.state_dict(), loaded.predict(np.full((1, 3), 0.5, np.float32), deterministic=True)[0]


@scenario(pickle=pickle, cloudpickle=cloudpickle)
def pickles(case: Case, how: Any) -> Any:
    model = case.trained()
    policy = how.loads(how.dumps(model.policy))
    model.set_logger(configure(None, []))
    again = how.loads(cloudpickle.dumps(model))
    return policy.state_dict(), again.learn(STEPS, reset_num_timesteps=False), model.learn(STEPS, reset_num_timesteps=False)


@scenario()
def a_pickle_after_a_callback_that_has_none(case: Case) -> Any:
    stop = Stop(2 * STEPS)
    stop.lock = threading.Lock()  # type: ignore[attr-defined]
    model = case.model().learn(STEPS, callback=stop)
    model.set_logger(configure(None, []))
    return cloudpickle.loads(cloudpickle.dumps(model)).learn(STEPS, reset_num_timesteps=False)


@scenario()
def deep_copies(case: Case) -> Any:
    model = case.model()
    twin = copy.deepcopy(model)
    twin.learn(2 * STEPS)
    return copy.deepcopy(comparable(state(model))), twin, model.learn(STEPS)


@scenario()
def a_deep_copy_in_a_rollout(case: Case) -> Any:
    copies: list[Any] = []
    model = case.model().learn(STEPS, callback=Do("step", lambda model: copies.append(copy.deepcopy(model.policy)), at=3))
    return model, copies[0].state_dict()


@scenario("KLipPPO")
def a_deep_copy_of_the_policy_in_a_rollout(case: Case) -> Any:
    copies: list[Any] = []
    model = case.model().learn(STEPS, callback=Do("step", lambda model: copies.append(copy.deepcopy(model.policy)), at=3))
    (twin,) = copies
    observation = th.full((1, 3), 0.5)
    before = twin(observation, deterministic=True)
    twin.action_net = th.nn.Linear(8, 2)
    return model, before, twin(observation), sorted(twin.state_dict())


@scenario()
def shared_memory(case: Case) -> Any:
    """Whoever holds a parameter's memory sees it change with every step."""
    model = case.model()
    model.policy.share_memory()
    held = [parameter.data for parameter in model.policy.parameters()]
    seen: list[Any] = []
    watch = Do("rollout_start", lambda model: seen.extend(tensor.clone() for tensor in held), at=2)
    model.learn(2 * STEPS, callback=watch)
    same = [a.data_ptr() == p.data_ptr() for a, p in zip(held, model.policy.parameters(), strict=True)]
    return model, held, seen, same, [p.is_shared() for p in model.policy.parameters()]


@scenario()
def gradients_afterwards(case: Case) -> Any:
    model = case.trained()
    return [parameter.grad for parameter in model.policy.parameters()]


# -- hooks -----------------------------------------------------------------------------------------------------------------


def calls_of(case: Case, attach: Callable[[Any, Callable[..., None]], Any], event: str | None = None) -> Any:
    """How often a hook is called that is attached before learning, or at an event."""
    calls: list[int] = []

    def count(*args: Any, **kwargs: Any) -> None:
        calls.append(1)

    handles: list[Any] = []
    model = case.model()
    callback = None
    if event is None:
        handles.append(attach(model, count))
    else:
        callback = Do(event, lambda model: handles.append(attach(model, count)))
    try:
        model.learn(2 * STEPS, callback=callback)
    finally:
        for handle in handles:
            handle.remove()
    assert calls
    return model, len(calls)


HOOKS: dict[str, Callable[[Any, Any], Any]] = {
    "policy_forward": lambda model, count: model.policy.register_forward_hook(count),
    "layer_forward": lambda model, count: model.policy.value_net.register_forward_hook(count),
    "layer_forward_pre": lambda model, count: model.policy.action_net.register_forward_pre_hook(count),
    "features_forward": lambda model, count: model.policy.features_extractor.register_forward_hook(count),
    "layer_backward": lambda model, count: model.policy.value_net.register_full_backward_hook(count),
    "gradient": lambda model, count: next(model.policy.parameters()).register_hook(count),
    "accumulated": lambda model, count: next(model.policy.parameters()).register_post_accumulate_grad_hook(count),
    "step_pre": lambda model, count: model.policy.optimizer.register_step_pre_hook(count),
    "step_post": lambda model, count: model.policy.optimizer.register_step_post_hook(count),
    "any_step_pre": lambda model, count: register_optimizer_step_pre_hook(count),
    "any_step_post": lambda model, count: register_optimizer_step_post_hook(count),
    "any_module": lambda model, count: th.nn.modules.module.register_module_forward_hook(count),
}


@scenario(**HOOKS)
def hooks(case: Case, attach: Any) -> Any:
    return calls_of(case, attach)


@scenario(**{name: HOOKS[name] for name in ("policy_forward", "layer_forward", "any_module")})
def hooks_from_the_start_of_a_rollout(case: Case, attach: Any) -> Any:
    return calls_of(case, attach, "rollout_start")


@scenario(**{name: HOOKS[name] for name in ("layer_forward", "accumulated", "step_post", "any_step_post")})
def hooks_from_the_end_of_a_rollout(case: Case, attach: Any) -> Any:
    return calls_of(case, attach, "rollout_end")


@scenario("KLipPPO", "KLipMaskablePPO", before=None, in_a_rollout="rollout_start")
def hooks_of_the_extractor(case: Case, event: str | None) -> Any:
    return calls_of(case, lambda model, count: model.policy.mlp_extractor.register_forward_hook(count), event)


# -- buffers ---------------------------------------------------------------------------------------------------------------


class Halved(RolloutBuffer):
    """A buffer of the user's own, which draws with torch."""

    def get(self, batch_size: int | None = None) -> Any:
        samples = list(super().get(batch_size))
        yield from samples[: 1 + int(th.randint(len(samples), (1,)))]


class Sparse(RolloutBuffer):
    """Another one, which draws from its own generator, and hands out nothing in some epochs."""

    def __init__(self, *args: Any, **kwargs: Any):
        self.generator = np.random.default_rng(0)
        super().__init__(*args, **kwargs)

    def get(self, batch_size: int | None = None) -> Any:
        if self.generator.random() < 0.5:
            yield from super().get(batch_size)


@scenario("KLipPPO", draws_with_torch=Halved, leaves_epochs_out=Sparse)
def a_buffer_class(case: Case, kind: type[RolloutBuffer]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # SB3 takes the mean of an epoch's minibatches also if there are none
        return case.trained(rollout_buffer_class=kind, n_epochs=6)


@scenario()
def samples_replaced_on_the_buffer(case: Case) -> Any:
    model, calls = case.model(), []
    original = model.rollout_buffer._get_samples
    model.rollout_buffer._get_samples = lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs)
    model.learn(2 * STEPS)
    return model, len(calls), "_get_samples" in vars(model.rollout_buffer)


@scenario("KLipPPO")
def advantages_changed_by_a_callback(case: Case) -> Any:
    def double(model: Any) -> None:
        model.rollout_buffer.advantages *= 2

    return case.model(normalize_advantage=False).learn(2 * STEPS, callback=Do("rollout_end", double))


@scenario()
def what_the_buffer_holds_afterwards(case: Case) -> Any:
    buffer = case.trained().rollout_buffer
    return {name: value for name, value in vars(buffer).items() if isinstance(value, (np.ndarray, bool, int))}


# -- subclasses ------------------------------------------------------------------------------------------------------------


@scenario()
def a_subclass_that_passes_its_arguments_on(case: Case) -> Any:
    class Own(case.algorithm):  # type: ignore[misc, name-defined]
        def __init__(self, *args: Any, note: str = "", **kwargs: Any):
            super().__init__(*args, **kwargs)
            self.note = note

    own = case._replace(algorithm=Own)
    model = own.trained(note="mine")
    model.save(case.folder / "model")
    loaded = Own.load(case.folder / "model", env=case.envs(), gamma=0.9)
    return loaded.note, loaded.gamma, loaded.learn(STEPS)


@scenario()
def a_subclass_that_is_not_copied(case: Case) -> Any:
    class Own(case.algorithm):  # type: ignore[misc, name-defined]
        def __getstate__(self) -> Any:
            raise TypeError("not to be pickled")

    case._replace(algorithm=Own).model().save(case.folder / "model")
    return case.algorithm.load(case.folder / "model", env=case.envs()).learn(STEPS)


@scenario()
def a_subclass_that_wraps_methods(case: Case) -> Any:
    calls: list[str] = []

    class Own(case.algorithm):  # type: ignore[misc, name-defined]
        def train(self) -> None:
            calls.append("train")
            super().train()

        def collect_rollouts(self, *args: Any, **kwargs: Any) -> bool:
            calls.append("collect")
            return super().collect_rollouts(*args, **kwargs)

        def _setup_model(self) -> None:
            calls.append("setup")
            super()._setup_model()

    return case._replace(algorithm=Own).trained(), calls


# -- threads and processes -------------------------------------------------------------------------------------------------


@scenario()
def two_models_in_two_threads(case: Case) -> Any:
    """Generators are shared, so bits are not compared, but that all goes well is."""
    models = [case.model(seed=seed) for seed in (0, 1)]
    errors: list[str] = []

    def learn(model: Any) -> None:
        try:
            model.learn(4 * STEPS)
        except Exception as error:
            errors.append(repr(error))

    threads = [threading.Thread(target=learn, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    set_random_seed(0)
    return errors, [model.num_timesteps for model in models]


@scenario()
def saving_in_another_thread(case: Case) -> Any:
    model, done, saved = case.model(), threading.Event(), []

    def autosave() -> None:
        while not done.wait(0.01):
            stream = io.BytesIO()
            model.save(stream)
            saved.append(stream)

    thread = threading.Thread(target=autosave)
    thread.start()
    try:
        model.learn(3 * STEPS)
    finally:
        done.set()
        thread.join()
    saved[-1].seek(0)
    return model, bool(saved), case.algorithm.load(saved[-1]).n_steps


def learn_and_send(case: Case, connection: Any) -> None:
    """In another process."""
    th.set_num_threads(1)
    set_random_seed(0)
    connection.send(pickle.dumps(comparable(case.trained(case.envs(monitor=False)))))


@scenario("KLipPPO", fork="fork", spawn="spawn")
def another_process(case: Case, method: str) -> Any:
    receiver, sender = multiprocessing.Pipe(duplex=False)
    case.trained()  # what this process has done must not get in the way
    process = multiprocessing.get_context(method).Process(target=learn_and_send, args=(case, sender))
    process.start()
    sender.close()  # so that a child that dies ends this wait
    received = pickle.loads(receiver.recv())
    process.join()
    return received


# -- logs, texts -----------------------------------------------------------------------------------------------------------


@scenario()
def logs(case: Case) -> Any:
    """The columns of PPO are there, with the same values."""
    model = case.model()
    model.set_logger(configure(str(case.folder), ["csv", "json", "log"]))
    model.learn(3 * STEPS)
    model.logger.close()
    rows = [line.split(",") for line in (case.folder / "progress.csv").read_text().splitlines()]
    wanted = [*LOGGED, *(["train/std"] if hasattr(model.policy, "log_std") else [])]
    columns = [rows[0].index(key) for key in wanted]
    # SB3 takes means in double precision, and ours are of the policy's.
    return model, [[f"{float(row[column]):.4g}" if row[column] else "" for column in columns] for row in rows[1:]]


LOGGED = [
    *("rollout/ep_rew_mean", "time/iterations", "time/total_timesteps", "train/approx_kl", "train/clip_fraction"),
    *("train/clip_range", "train/entropy_loss", "train/explained_variance", "train/learning_rate", "train/loss"),
    *("train/policy_gradient_loss", "train/value_loss"),
]


@scenario()
def the_log_of_a_weight_that_is_a_tensor(case: Case) -> Any:
    model = case.model(ent_coef=th.tensor(0.5), vf_coef=th.nn.Parameter(th.tensor(0.1))).learn(2 * STEPS)
    loss = model.logger.name_to_value["train/loss"]
    return type(loss).__name__, f"{loss:.4g}"


@scenario()
def what_a_profiler_sees(case: Case) -> Any:
    model = case.model()
    with th.autograd.profiler.profile() as profile:
        model.learn(STEPS)
    return [event.count for event in profile.key_averages() if event.key.startswith("Optimizer.step")]


@scenario()
def tensorboard_logs(case: Case) -> Any:
    case.model(tensorboard_log=str(case.folder)).learn(STEPS, tb_log_name="run")
    (run,) = case.folder.glob("run_1/events*")
    run.rename(case.folder / "events")
    return None


@scenario()
def printed_tables(case: Case) -> Any:
    stream = io.StringIO()
    stdout, sys.stdout = sys.stdout, stream
    try:
        case.trained(verbose=1)
    finally:
        sys.stdout = stdout
    first = stream.getvalue().splitlines()[:2]
    return first, "train/" in stream.getvalue(), "approx_kl" in stream.getvalue()


@scenario()
def texts(case: Case) -> Any:
    model = case.trained()
    name = case.algorithm.__name__
    return repr(model).partition(" at ")[0].rpartition(".")[2].replace(name, ""), repr(model.policy)


@scenario()
def attributes(case: Case) -> Any:
    """Every attribute of the base class's model is there, and of the same type."""
    model = case.trained()
    base = next(variant.base_algorithm for variant in VARIANTS if variant.name == case.ours)
    plain = case._replace(algorithm=base).trained()
    return {name: type(getattr(model, name)).__name__ for name in sorted(vars(plain))}


# -- process-wide states of torch ------------------------------------------------------------------------------------------


@scenario()
def anomaly_detection(case: Case) -> Any:
    with th.autograd.set_detect_anomaly(True):
        return case.trained(steps=STEPS)


@scenario()
def validation_switched_off(case: Case) -> Any:
    before = th.distributions.Distribution._validate_args
    th.distributions.Distribution.set_default_validate_args(False)
    try:
        return case.trained(steps=STEPS), th.distributions.Distribution._validate_args
    finally:
        th.distributions.Distribution.set_default_validate_args(before)


@scenario()
def deterministic_algorithms(case: Case) -> Any:
    th.use_deterministic_algorithms(True)
    try:
        return case.trained(steps=STEPS)
    finally:
        th.use_deterministic_algorithms(False)


@scenario()
def a_default_dtype(case: Case) -> Any:
    th.set_default_dtype(th.float64)
    try:
        return case.trained(steps=STEPS)
    finally:
        th.set_default_dtype(th.float32)


#: Scenarios in which the base class raises an exception.
RAISING = ("bad_arguments", "load_what_is_not_there", "load_into", "another_number_of_environments", "a_default_dtype")

# -- the comparison --------------------------------------------------------------------------------------------------------

CASES = [(name, variant) for name, each in SCENARIOS.items() for variant in VARIANTS if variant.name in each.variants]


def check(name: str, variant: Any, folder: Path) -> None:
    run = SCENARIOS[name].run
    theirs = outcome(run, Case(variant.base_algorithm, variant.name, folder / "theirs"))
    ours = outcome(run, Case(variant.algorithm, variant.name, folder / "ours"))
    # Or a scenario that never gets anywhere would go unnoticed.
    raised = isinstance(theirs["result"], tuple) and theirs["result"][0] == "raised"
    assert raised <= name.startswith(RAISING), theirs["result"]
    for what in theirs:
        assert ours[what] == theirs[what], f"{what} differ"


#: The first case of each scenario that has several.
FIRST = {name.partition("[")[0]: name for name in reversed(SCENARIOS)}


def is_slow(name: str, variant: Any) -> bool:
    """Processes that import everything anew take seconds, and recurrent policies are slow: one case of a scenario is fast."""
    is_another_case = name != FIRST[name.partition("[")[0]]
    return is_another_case and (variant.name == "KLipRecurrentPPO" or name == "another_process[spawn]")


def parameters(cases: list[Any]) -> list[Any]:
    marks = (pytest.mark.slow if is_slow(*case) else () for case in cases)
    return [pytest.param(*case, id=f"{case[0]}-{case[1].base}", marks=mark) for case, mark in zip(cases, marks, strict=True)]


@pytest.mark.parametrize(("name", "variant"), parameters(CASES))
def test_same_as_the_base_class(name: str, variant: Any, tmp_path: Path) -> None:
    check(name, variant, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "variant"), parameters([case for case in CASES if case[1].base != "RecurrentPPO"]))
def test_same_on_the_traced_path(name: str, variant: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainings above are too short for graphs; here these are used from the first minibatch on."""
    monkeypatch.setattr(graph, "WARM_UP", 0)
    check(name, variant, tmp_path)


def test_there_are_many_scenarios() -> None:
    assert len(SCENARIOS) >= 60
