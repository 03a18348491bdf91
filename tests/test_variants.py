"""The table of the algorithms, and what all of them share."""

import ast
import functools
import inspect
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import rl_zoo3.import_envs  # noqa: F401  registers the environments without velocities
import torch as th
from helpers import Counter, cartpole, state_tensors, train
from rl_zoo3.utils import ALGOS
from sb3_contrib.common.envs import InvalidActionEnvDiscrete
from stable_baselines3.common.env_util import make_vec_env

import sb3_klip
from sb3_klip import zoo
from sb3_klip.algorithm import KLipAlgorithm
from sb3_klip.coefficients import available
from sb3_klip.variants import VARIANTS
from sb3_klip.verify.training import PAIRS

FAST = {"learning_rate": 1e-2, "n_steps": 128, "batch_size": 32, "n_epochs": 4}
#: A policy for each variant, and an environment.
POLICIES = {
    "KLipPPO": {"policy": "MlpPolicy"},
    "KLipRecurrentPPO": {"policy": "MlpLstmPolicy", "policy_kwargs": {"lstm_hidden_size": 16, "net_arch": [16]}},
    "KLipMaskablePPO": {"policy": "MlpPolicy"},
}
ENVS = {
    "KLipPPO": cartpole,
    "KLipRecurrentPPO": lambda: gym.make("CartPoleNoVel-v1"),
    "KLipMaskablePPO": lambda: InvalidActionEnvDiscrete(dim=20, n_invalid_actions=10),
}
every_variant = pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
#: Those whose base class is sb3-contrib's.
contrib = pytest.mark.parametrize("variant", VARIANTS[1:], ids=lambda variant: variant.name)


# -- the table -------------------------------------------------------------------------------------------------------------


def test_whoever_has_to_know_the_algorithms_knows_those_of_the_table():
    names = {variant.name for variant in VARIANTS}
    assert names == {name for name in sb3_klip.__all__ if name.endswith("PPO")} == set(POLICIES)
    zoo.register()
    in_zoo = {variant.zoo_name: variant.zoo_base for variant in VARIANTS if variant.in_zoo}
    assert in_zoo == zoo.ALGORITHMS
    assert {name for name in ALGOS if name.startswith("klip")} == set(in_zoo)
    for name, base in in_zoo.items():
        assert ALGOS[name].__mro__[ALGOS[name].__mro__.index(KLipAlgorithm) :].count(ALGOS[base]) == 1
    assert {pair.name for pair in PAIRS.values()} == names


@every_variant
def test_a_variant_is_a_drop_in_for_its_base(variant):
    assert issubclass(variant.algorithm, KLipAlgorithm)
    assert issubclass(variant.algorithm, variant.base_algorithm)
    assert getattr(sb3_klip, variant.name) is variant.algorithm
    assert (variant.algorithm.__name__, variant.base_algorithm.__name__) == (variant.name, variant.base)


def test_type_checkers_see_all_that_the_package_exports():
    """Its names are imported on first use, which only the imports under TYPE_CHECKING tell a type checker."""
    tree = ast.parse(Path(sb3_klip.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    seen = {alias.asname or alias.name for node in block.body for alias in node.names}
    assert seen == {*sb3_klip.__all__} - {"__version__"}
    assert all(getattr(sb3_klip, name) is not None for name in sb3_klip.__all__)
    assert dir(sb3_klip) == sorted(sb3_klip.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'KLipPPOO'"):
        _ = sb3_klip.KLipPPOO


# -- what all of them share ------------------------------------------------------------------------------------------------


@every_variant
def test_constructor_is_that_of_the_base_class_and_ours(variant):
    ours, theirs = variant.algorithm, variant.base_algorithm
    shared = list(inspect.signature(theirs.__init__).parameters.values())
    mine = list(inspect.signature(ours.__init__).parameters.values())
    assert [(p.name, p.default) for p in mine[: len(shared)]] == [(p.name, p.default) for p in shared]
    compiled = ["compile"] * (variant.name == "KLipPPO")
    assert [p.name for p in mine[len(shared) :]] == ["beta", "beta_kwargs", "log_kl", *compiled, "reuse"]
    assert ours.policy_aliases == theirs.policy_aliases
    our_learn, their_learn = inspect.signature(ours.learn).parameters, inspect.signature(theirs.learn).parameters
    assert list(our_learn) == list(their_learn)
    assert our_learn["tb_log_name"].default == ours.__name__


#: Coefficients that ask for different things; the others, with the variants of sb3-contrib, are among the slow tests.
FEW = ("step", "adaptive", "trust_region_guided", "position")


@pytest.mark.parametrize(
    ("variant", "name"),
    [
        pytest.param(variant, name, marks=() if variant.name == "KLipPPO" or name in FEW else pytest.mark.slow)
        for variant in VARIANTS
        for name in available()
    ],
)
def test_every_coefficient_trains_saves_and_continues(variant, name, tmp_path):
    make_env = functools.partial(make_vec_env, ENVS[variant.name], n_envs=2)
    kwargs = {**FAST, "n_steps": 32, "n_epochs": 2, "batch_size": 25, "learning_rate": 1e-3, **POLICIES[variant.name]}
    model, logs = train(variant.algorithm, kwargs.pop("policy"), make_env, 128, **kwargs, beta=name, log_kl=True)
    assert all(np.isfinite(value) for row in logs.rows for key, value in row.items() if key.startswith("train/"))
    assert logs.column("train/kl")[-1] > 0
    model.save(tmp_path / "model")
    loaded = variant.algorithm.load(tmp_path / "model", env=make_env())
    expected = state_tensors(model)
    assert all(th.equal(tensor, expected[key]) for key, tensor in state_tensors(loaded).items())
    assert (repr(loaded.beta), loaded.beta.state_dict()) == (repr(model.beta), model.beta.state_dict())
    loaded.learn(64, reset_num_timesteps=False)


@contrib
def test_a_minibatch_of_one_sample(variant):
    """sb3-contrib's classes divide by the standard deviation of a single advantage, which is NaN; ours leave it as it is."""
    theirs = variant.base_algorithm
    make_env = ENVS[variant.name]
    kwargs = {**FAST, "n_steps": 65, **POLICIES[variant.name]}
    policy = kwargs.pop("policy")
    model, _ = train(variant.algorithm, policy, make_env, 65, **kwargs)
    assert all(tensor.isfinite().all() for tensor in state_tensors(model).values())
    with pytest.raises(ValueError, match="nan"):
        train(theirs, policy, make_env, 130, **kwargs)


@contrib
def test_ratio_deviation_ends_the_inner_loop(variant):
    """ESPO's bound is on the samples that count; with padding, the others have a ratio of their own."""
    make_env = ENVS[variant.name]
    kwargs = {**FAST, "learning_rate": 0.1, "n_epochs": 10, **POLICIES[variant.name]}
    model, _ = train(variant.algorithm, kwargs.pop("policy"), make_env, 128, **kwargs, beta="espo")
    assert model._n_updates < 10


@every_variant
def test_positions_are_those_of_the_episode(variant):
    """Also where sequences are padded, and across rollout boundaries."""
    told, shown = [], []

    def watching(ratio, advantages, clip_range, position):
        told.append(position.clone())
        return th.zeros_like(ratio)

    kwargs = {
        "n_steps": 16,
        "batch_size": 10,
        "n_epochs": 2,
        "seed": 0,
        "normalize_advantage": False,
        **POLICIES[variant.name],
    }
    model = variant.algorithm(kwargs.pop("policy"), make_vec_env(Counter, n_envs=3), beta=watching, **kwargs)
    evaluate = model._evaluate_actions

    def recording(rollout_data, actions):
        valid = getattr(rollout_data, "mask", th.ones(len(actions))) > 0
        shown.append(rollout_data.observations.flatten() * valid)
        return evaluate(rollout_data, actions)

    model._evaluate_actions = recording
    told.clear()
    model.learn(16 * 3 * 4)
    model.learn(16 * 3 * 2, reset_num_timesteps=False)
    assert len(told) == len(shown) > 40
    assert all(th.equal(a, b) for a, b in zip(told, shown, strict=True))
    assert max(tensor.max() for tensor in told) > 16  # an episode longer than a rollout was there


@every_variant
def test_divergence_is_zero_before_the_first_step(variant):
    """The snapshot and the minibatches see the same distributions, whatever the shuffling, padding and hidden states."""
    make_env = functools.partial(make_vec_env, ENVS[variant.name], n_envs=3, seed=0)
    kwargs = {**FAST, "batch_size": 50, "seed": 0, **POLICIES[variant.name]}
    model = variant.algorithm(kwargs.pop("policy"), make_env(), **kwargs, log_kl=True)
    _, callback = model._setup_learn(1)
    model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
    update = model._begin_update()
    assert model._rollout_kl(update.snapshot) == pytest.approx(0, abs=1e-6)
    with th.no_grad():
        model.policy.action_net.weight += 0.3 * th.randn_like(model.policy.action_net.weight)
    assert model._rollout_kl(update.snapshot) > 1e-3
