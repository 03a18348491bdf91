"""KLipMaskablePPO and KLipRecurrentPPO: the identity with sb3-contrib's classes, every coefficient, files and bad input."""

import inspect

import gymnasium as gym
import numpy as np
import pytest
import rl_zoo3.import_envs  # noqa: F401  registers the environments without velocities
import torch as th
from gymnasium import spaces
from identity_helpers import assert_identical, state_tensors, train
from sb3_contrib import MaskablePPO, RecurrentPPO
from sb3_contrib.common.envs import (
    InvalidActionEnvDiscrete,
    InvalidActionEnvMultiBinary,
    InvalidActionEnvMultiDiscrete,
)
from sb3_contrib.common.maskable.callbacks import MaskableEvalCallback
from sb3_contrib.common.maskable.evaluation import evaluate_policy
from sb3_contrib.common.wrappers import ActionMasker
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import FakeImageEnv, SimpleMultiObsEnv
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecNormalize

from sb3_klip import KLipMaskablePPO, KLipPPO, KLipRecurrentPPO
from sb3_klip.coefficients import available

FAST = {"learning_rate": 1e-2, "n_steps": 128, "batch_size": 32, "n_epochs": 4}


def discrete():
    return InvalidActionEnvDiscrete(dim=20, n_invalid_actions=10)


def multi_discrete():
    return InvalidActionEnvMultiDiscrete(dims=[3, 4], n_invalid_actions=2)


def multi_binary():
    return InvalidActionEnvMultiBinary(dims=4, n_invalid_actions=2)


def masked_cartpole():
    """Pushing right is forbidden while the pole leans left, by a wrapper."""
    return ActionMasker(gym.make("CartPole-v1"), lambda env: np.array([True, env.unwrapped.state[2] > -0.05]))


class MaskedDict(SimpleMultiObsEnv):
    """Dictionaries of images and vectors, with masks."""

    def action_masks(self):
        return np.array([True, self.state % 2 == 0, True, self.state % 3 == 0])


def images():
    env = FakeImageEnv(screen_height=36, screen_width=36, n_channels=1)
    env.observation_space.seed(0)
    return env


def masked_images():
    return ActionMasker(images(), lambda env: np.array([True, False] * 3))


MASKED = {
    "discrete": (discrete, {}),
    "discrete_minibatch_60": (discrete, {"batch_size": 60}),
    "minibatch_33": (discrete, {"batch_size": 33, "ent_coef": 0.01}),
    "multi_discrete": (multi_discrete, {"batch_size": 60}),
    "multi_binary": (multi_binary, {"batch_size": 60}),
    "wrapper": (masked_cartpole, {"batch_size": 60}),
    "several_environments": (lambda: make_vec_env(discrete, n_envs=3, seed=0), {"batch_size": 50}),
    "dictionary": (MaskedDict, {"policy": "MultiInputPolicy", "batch_size": 60}),
    "images": (
        masked_images,
        {"policy": "CnnPolicy", "policy_kwargs": {"features_extractor_kwargs": {"features_dim": 32}, "net_arch": [16]}},
    ),
    "value_clipping": (discrete, {"clip_range_vf": 0.2, "batch_size": 60}),
    "target_kl": (discrete, {"target_kl": 0.01}),
    "advantages_as_they_are": (discrete, {"normalize_advantage": False, "batch_size": 60}),
    "schedules": (discrete, {"clip_range": LinearSchedule(0.3, -0.1, 1.0), "batch_size": 60}),
}

LSTM = {"lstm_hidden_size": 16, "net_arch": [16]}
RECURRENT = {
    "box": (lambda: gym.make("PendulumNoVel-v1"), {}),
    "box_minibatch_60": (lambda: gym.make("PendulumNoVel-v1"), {"batch_size": 60, "vf_coef": 0.7}),
    "minibatch_50": (lambda: gym.make("CartPoleNoVel-v1"), {"batch_size": 50, "vf_coef": 0.7}),
    "minibatch_33": (lambda: gym.make("CartPoleNoVel-v1"), {"batch_size": 33, "ent_coef": 0.01}),
    "several_environments": (lambda: make_vec_env("CartPoleNoVel-v1", n_envs=3), {"batch_size": 50}),
    "vec_normalize": (lambda: VecNormalize(make_vec_env("PendulumNoVel-v1", n_envs=2)), {"batch_size": 50}),
    "gsde": (lambda: gym.make("PendulumNoVel-v1"), {"use_sde": True, "batch_size": 60}),
    "shared_lstm": (
        lambda: gym.make("CartPoleNoVel-v1"),
        {"policy_kwargs": {**LSTM, "shared_lstm": True, "enable_critic_lstm": False}, "batch_size": 60},
    ),
    "critic_without_lstm": (
        lambda: gym.make("CartPoleNoVel-v1"),
        {"policy_kwargs": {**LSTM, "enable_critic_lstm": False}, "batch_size": 60, "learning_rate": 3e-2},
    ),
    "two_layers": (
        lambda: gym.make("CartPoleNoVel-v1"),
        {"policy_kwargs": {**LSTM, "n_lstm_layers": 2}, "batch_size": 60, "learning_rate": 3e-2},
    ),
    "images": (
        images,
        {"policy": "CnnLstmPolicy", "policy_kwargs": {**LSTM, "features_extractor_kwargs": {"features_dim": 16}}},
    ),
    "dictionary": (SimpleMultiObsEnv, {"policy": "MultiInputLstmPolicy", "batch_size": 60}),
    "value_clipping": (lambda: gym.make("CartPoleNoVel-v1"), {"clip_range_vf": 0.2, "batch_size": 60}),
    "target_kl": (lambda: gym.make("CartPoleNoVel-v1"), {"target_kl": 0.01}),
    "advantages_as_they_are": (lambda: gym.make("CartPoleNoVel-v1"), {"normalize_advantage": False, "batch_size": 60}),
    "schedules": (
        lambda: gym.make("CartPoleNoVel-v1"),
        {"clip_range": LinearSchedule(0.3, -0.1, 1.0), "batch_size": 60},
    ),
}

VARIANTS = {
    "maskable": (KLipMaskablePPO, MaskablePPO, MASKED, {"policy": "MlpPolicy"}),
    "recurrent": (KLipRecurrentPPO, RecurrentPPO, RECURRENT, {"policy": "MlpLstmPolicy", "policy_kwargs": LSTM}),
}


@pytest.mark.parametrize(("variant", "case"), [(v, case) for v in VARIANTS for case in VARIANTS[v][2]])
def test_state_after_training_is_that_of_the_base_class(variant, case):
    ours, theirs, cases, defaults = VARIANTS[variant]
    make_env, changes = cases[case]
    kwargs = {**FAST, **defaults, **changes}
    policy = kwargs.pop("policy")
    klip, logs = train(ours, policy, make_env, 300, **kwargs)
    base, base_logs = train(theirs, policy, make_env, 300, **kwargs)
    assert max(logs.column("train/kill_fraction")) > 0
    assert_identical(klip, base)
    for row, base_row in zip(logs.rows, base_logs.rows, strict=True):
        for key in (key for key in base_row if key.startswith("train/")):
            assert row[key] == pytest.approx(base_row[key], rel=1e-3, abs=1e-6), key


@pytest.mark.parametrize("variant", VARIANTS)
def test_constructor_is_that_of_the_base_class_and_three_arguments(variant):
    ours, theirs, *_ = VARIANTS[variant]
    shared = list(inspect.signature(theirs.__init__).parameters.values())
    mine = list(inspect.signature(ours.__init__).parameters.values())
    assert [(p.name, p.default) for p in mine[: len(shared)]] == [(p.name, p.default) for p in shared]
    assert [p.name for p in mine[len(shared) :]] == ["beta", "beta_kwargs", "log_kl"]
    assert ours.policy_aliases == theirs.policy_aliases
    our_learn, their_learn = inspect.signature(ours.learn).parameters, inspect.signature(theirs.learn).parameters
    assert list(our_learn) == list(their_learn)
    assert our_learn["tb_log_name"].default == ours.__name__


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", available())
def test_every_coefficient_trains_saves_and_continues(variant, name, tmp_path):
    ours, _, _, defaults = VARIANTS[variant]
    make_env = discrete if variant == "maskable" else lambda: make_vec_env("CartPoleNoVel-v1", n_envs=2)
    kwargs = {**FAST, "n_steps": 32, "n_epochs": 2, "batch_size": 25, "learning_rate": 1e-3, **defaults}
    model, logs = train(ours, kwargs.pop("policy"), make_env, 128, **kwargs, beta=name, log_kl=True)
    assert all(np.isfinite(value) for row in logs.rows for key, value in row.items() if key.startswith("train/"))
    assert logs.column("train/kl")[-1] > 0
    model.save(tmp_path / "model")
    loaded = ours.load(tmp_path / "model", env=make_env())
    assert (repr(loaded.beta), loaded.beta.state_dict()) == (repr(model.beta), model.beta.state_dict())
    loaded.learn(64, reset_num_timesteps=False)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_minibatch_of_one_sample(variant):
    """sb3-contrib's classes divide by the standard deviation of a single advantage, which is NaN; ours leave it as it is."""
    ours, theirs, _, defaults = VARIANTS[variant]
    make_env = discrete if variant == "maskable" else lambda: gym.make("CartPoleNoVel-v1")
    kwargs = {**FAST, "n_steps": 65, **defaults}
    policy = kwargs.pop("policy")
    model, _ = train(ours, policy, make_env, 65, **kwargs)
    assert all(tensor.isfinite().all() for tensor in state_tensors(model).values())
    with pytest.raises(ValueError, match="nan"):
        train(theirs, policy, make_env, 130, **kwargs)


@pytest.mark.parametrize("variant", VARIANTS)
def test_files_pass_to_the_base_class_and_back(variant, tmp_path):
    ours, theirs, _, defaults = VARIANTS[variant]
    make_env = discrete if variant == "maskable" else lambda: gym.make("CartPoleNoVel-v1")
    kwargs = {**FAST, **defaults}
    policy = kwargs.pop("policy")
    for source, target in ((ours, theirs), (theirs, ours)):
        model, _ = train(source, policy, make_env, 128, **kwargs)
        model.save(tmp_path / "model")
        loaded = target.load(tmp_path / "model", env=make_env())
        expected = state_tensors(model)
        assert all(th.equal(tensor, expected[key]) for key, tensor in state_tensors(loaded).items())
        loaded.learn(128, reset_num_timesteps=False)
        fresh = target(policy, make_env(), **kwargs)
        fresh.set_parameters(tmp_path / "model")
        assert all(th.equal(tensor, expected[key]) for key, tensor in state_tensors(fresh).items())


@pytest.mark.parametrize("variant", VARIANTS)
def test_ratio_deviation_ends_the_inner_loop(variant):
    """ESPO's bound is on the samples that count; with padding, the others have a ratio of their own."""
    ours, _, _, defaults = VARIANTS[variant]
    make_env = discrete if variant == "maskable" else lambda: gym.make("CartPoleNoVel-v1")
    kwargs = {**FAST, "learning_rate": 0.1, "n_epochs": 10, **defaults}
    model, _ = train(ours, kwargs.pop("policy"), make_env, 128, **kwargs, beta="espo")
    assert model._n_updates < 10


class Stepping(gym.Env):
    """Observes the step of its episode; episodes last 5, 7, 9, … steps."""

    observation_space = spaces.Box(0, 100, (1,), np.float32)
    action_space = spaces.Discrete(2)
    length = 3

    def reset(self, *, seed=None, options=None):
        self.step_count, self.length = 0, self.length + 2
        return np.array([0.0], np.float32), {}

    def step(self, action):
        self.step_count += 1
        return np.array([self.step_count], np.float32), 1.0, self.step_count >= self.length, False, {}

    def action_masks(self):
        return np.array([True, True])


@pytest.mark.parametrize("variant", VARIANTS)
def test_positions_are_those_of_the_episode(variant):
    """Also where sequences are padded, and across rollout boundaries."""
    told, shown = [], []

    def watching(ratio, advantages, clip_range, position):
        told.append(position.clone())
        return th.zeros_like(ratio)

    ours, _, _, defaults = VARIANTS[variant]
    kwargs = {"n_steps": 16, "batch_size": 10, "n_epochs": 2, "seed": 0, "normalize_advantage": False, **defaults}
    model = ours(kwargs.pop("policy"), make_vec_env(Stepping, n_envs=3), beta=watching, **kwargs)
    evaluate = model._evaluate_actions

    def recording(rollout_data, actions):
        valid = getattr(rollout_data, "mask", th.ones(len(actions))) > 0
        shown.append(rollout_data.observations.flatten() * valid)
        return evaluate(rollout_data, actions)

    model._evaluate_actions = recording
    told.clear()
    model.learn(16 * 3 * 4)
    assert len(told) == len(shown) > 30
    assert all(th.equal(a, b) for a, b in zip(told, shown, strict=True))
    assert max(tensor.max() for tensor in told) > 10


def test_divergence_is_over_allowed_actions():
    """Against a sum over the actions that the masks of the rollout allow, written out."""
    model, logs = train(KLipMaskablePPO, "MlpPolicy", discrete, 128, **FAST, log_kl=True)
    fresh = KLipMaskablePPO("MlpPolicy", discrete(), seed=0, **FAST)  # the policy that acted in the only rollout
    data = next(model.rollout_buffer.get())
    with th.no_grad():
        probabilities = []
        for policy in (fresh.policy, model.policy):
            inner = policy.get_distribution(data.observations).distribution
            allowed = inner.probs * data.action_masks
            probabilities.append(allowed / allowed.sum(dim=1, keepdim=True))
        old, new = probabilities
        expected = th.where(old > 0, old * (old / new).log(), 0.0).nan_to_num().sum(dim=1).mean()
    assert logs.column("train/kl")[-1] == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_divergence_is_zero_before_the_first_step(variant):
    """The snapshot and the minibatches see the same distributions, whatever the shuffling, padding and hidden states."""
    ours, _, _, defaults = VARIANTS[variant]
    make_env = discrete if variant == "maskable" else lambda: make_vec_env("CartPoleNoVel-v1", n_envs=3, seed=0)
    kwargs = {**FAST, "batch_size": 50, "seed": 0, **defaults}
    model = ours(kwargs.pop("policy"), make_env(), **kwargs, log_kl=True)
    _, callback = model._setup_learn(1)
    model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
    update = model._begin_update()
    assert model._rollout_kl(update.snapshot) == pytest.approx(0, abs=1e-6)
    with th.no_grad():
        model.policy.action_net.weight += 0.3 * th.randn_like(model.policy.action_net.weight)
    assert model._rollout_kl(update.snapshot) > 1e-3


# -- sb3-contrib's helpers and environments --------------------------------------------------------------------------------


def test_masked_learning_prediction_and_evaluation(tmp_path):
    """The example of sb3-contrib's documentation, with its budget and its threshold."""
    env = InvalidActionEnvDiscrete(dim=80, n_invalid_actions=60)
    callback = MaskableEvalCallback(env, eval_freq=2048, n_eval_episodes=2, best_model_save_path=str(tmp_path), verbose=0)
    model = KLipMaskablePPO("MlpPolicy", env, gamma=0.4, seed=32)
    model.learn(5_000, callback=callback)
    assert (tmp_path / "best_model.zip").exists()
    evaluate_policy(model, env, n_eval_episodes=20, reward_threshold=90, warn=False)
    observation, _ = env.reset()
    for _ in range(20):
        masks = env.action_masks()
        action, _ = model.predict(observation, action_masks=masks)
        assert masks[action]


@pytest.mark.slow
def test_recurrent_learning_and_prediction():
    """CartPole without velocities, which a policy without memory cannot balance; RecurrentPPO's own test and budget."""

    def make_env():
        return gym.wrappers.TimeLimit(gym.make("CartPoleNoVel-v1"), 100)

    architecture = {"net_arch": {"vf": [64], "pi": []}, "lstm_hidden_size": 64, "ortho_init": False}
    model = KLipRecurrentPPO(
        "MlpLstmPolicy",
        make_vec_env(make_env, n_envs=8),
        n_steps=128,
        learning_rate=0.0007,
        batch_size=256,
        seed=1,
        max_grad_norm=1,
        gae_lambda=0.98,
        policy_kwargs=architecture,
    )
    model.learn(50_000)
    env, returns = make_env(), []
    for seed in range(10):
        observation, _ = env.reset(seed=seed)
        states, start, done, total = None, np.ones(1, dtype=bool), False, 0.0
        while not done:
            action, states = model.predict(observation, state=states, episode_start=start, deterministic=True)
            observation, reward, terminated, truncated, _ = env.step(int(action))
            start, done, total = np.zeros(1, dtype=bool), terminated or truncated, total + reward
        returns.append(total)
    assert np.mean(returns) > 90


# -- bad input -------------------------------------------------------------------------------------------------------------


class Forbidding(Stepping):
    """Allows nothing from the third step on."""

    def action_masks(self):
        return np.full(2, self.step_count < 3)


class ForbiddingOneDimension(InvalidActionEnvMultiDiscrete):
    def action_masks(self):
        return np.array([True] * 3 + [False] * 4)


def test_masks_that_forbid_every_action():
    with pytest.raises(ValueError, match=r"of environment 0 forbids every action$"):
        KLipMaskablePPO("MlpPolicy", Forbidding(), **FAST).learn(64)
    env = ForbiddingOneDimension(dims=[3, 4], n_invalid_actions=2)
    with pytest.raises(ValueError, match="forbids every action in dimension 1"):
        KLipMaskablePPO("MlpPolicy", env, **FAST).learn(64)


def test_environment_without_masks():
    with pytest.raises(ValueError, match="ActionMasker"):
        KLipMaskablePPO("MlpPolicy", "CartPole-v1", **FAST).learn(64)
    KLipMaskablePPO("MlpPolicy", "CartPole-v1", **FAST).learn(64, use_masking=False)


@pytest.mark.parametrize(
    ("algorithm", "policy", "message"),
    [
        (KLipRecurrentPPO, "MlpPolicy", "Did you mean 'MlpLstmPolicy'"),
        (KLipRecurrentPPO, ActorCriticPolicy, "must derive from RecurrentActorCriticPolicy, as do MlpLstmPolicy"),
        (KLipMaskablePPO, ActorCriticPolicy, "must derive from MaskableActorCriticPolicy"),
        (KLipPPO, "MlpLstmPolicy", "must be one of MlpPolicy, CnnPolicy, MultiInputPolicy"),
    ],
)
def test_policies_that_do_not_fit(algorithm, policy, message):
    with pytest.raises(ValueError, match=message):
        algorithm(policy, "NoSuchEnvironment-v0")


@pytest.mark.parametrize("algorithm", [KLipMaskablePPO, KLipRecurrentPPO])
def test_bad_coefficient_is_refused_first(algorithm):
    with pytest.raises(ValueError, match="Did you mean 'step'"):
        algorithm("MlpPolicy", "NoSuchEnvironment-v0", beta="stpe")
