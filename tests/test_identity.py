"""Theorem 1, bit for bit: with the default coefficient, training ends in the state of the base class.

Holds for one machine, one thread count and deterministic kernels, which is what these tests run on. No tolerance here.
"""

import gymnasium as gym
import numpy as np
import pytest
import rl_zoo3.import_envs  # noqa: F401  registers the environments without velocities
import torch as th
from helpers import assert_identical, cartpole, pendulum, state_tensors, train
from sb3_contrib import MaskablePPO, RecurrentPPO
from sb3_contrib.common.envs import InvalidActionEnvDiscrete, InvalidActionEnvMultiBinary, InvalidActionEnvMultiDiscrete
from sb3_contrib.common.wrappers import ActionMasker
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import (
    FakeImageEnv,
    IdentityEnv,
    IdentityEnvBox,
    IdentityEnvMultiBinary,
    IdentityEnvMultiDiscrete,
    SimpleMultiObsEnv,
)
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecFrameStack, VecNormalize

from sb3_klip import KLipMaskablePPO, KLipPPO, KLipRecurrentPPO

# Large steps, so that clipping really happens; every case asserts that it does.
FAST = {"learning_rate": 1e-2, "n_steps": 128, "batch_size": 32, "n_epochs": 4}


def normalized_pendulums():
    return VecNormalize(make_vec_env("Pendulum-v1", n_envs=3, seed=0))


def subprocess_cartpoles():
    # Forked, as processes that import everything anew take seconds.
    kwargs = {"start_method": "fork"}
    return make_vec_env("CartPole-v1", n_envs=2, seed=0, vec_env_cls=SubprocVecEnv, vec_env_kwargs=kwargs)


def images(**kwargs):
    env = FakeImageEnv(screen_height=36, screen_width=36, **kwargs)
    env.observation_space.seed(0)  # its images are samples of the space
    return env


def stacked_images():
    return VecFrameStack(DummyVecEnv([lambda: images(n_channels=1)]), 2)


def channel_first_images():
    return images(n_channels=3, channel_first=True, discrete=False)


class DropoutPolicy(ActorCriticPolicy):
    """A custom policy with its own evaluate_actions, and with random numbers drawn during the update."""

    def evaluate_actions(self, obs, actions):
        values, log_prob, entropy = super().evaluate_actions(obs, actions)
        return th.nn.functional.dropout(values, 0.1, self.training), log_prob, entropy


class ShiftedBuffer(RolloutBuffer):
    """A user's buffer that changes what it hands out."""

    def _get_samples(self, batch_inds, env=None):
        samples = super()._get_samples(batch_inds, env)
        return samples._replace(advantages=samples.advantages + 0.5)


class OwnGetBuffer(RolloutBuffer):
    """A user's buffer that makes its minibatches itself."""

    def get(self, batch_size=None):
        if not self.generator_ready:
            for name in ("observations", "actions", "values", "log_probs", "advantages", "returns"):
                setattr(self, name, self.swap_and_flatten(getattr(self, name)))
            self.generator_ready = True
        for start in range(0, self.buffer_size, batch_size):
            yield super()._get_samples(np.arange(start, min(start + batch_size, self.buffer_size)))


def overshooting(progress_remaining):
    """A linear schedule over fewer steps than are taken: the clip range ends below zero."""
    return 0.2 * (2 * progress_remaining - 1)


SMALL_CNN = {"features_extractor_kwargs": {"features_dim": 32}, "net_arch": [16]}
CASES = {
    "box": (pendulum, {}),
    "box_minibatch_60": (pendulum, {"batch_size": 60}),
    "box_minibatch_33": (pendulum, {"batch_size": 33}),
    "box_last_minibatch_of_one": (pendulum, {"n_steps": 129}),
    "discrete": (cartpole, {"batch_size": 60}),
    "discrete_observation": (lambda: IdentityEnv(4), {}),
    "box_observation": (IdentityEnvBox, {"batch_size": 48}),
    "multi_discrete": (lambda: IdentityEnvMultiDiscrete(4), {"batch_size": 60}),
    "multi_binary": (lambda: IdentityEnvMultiBinary(4), {"batch_size": 60}),
    "dict_observation": (SimpleMultiObsEnv, {"policy": "MultiInputPolicy", "batch_size": 60, "ent_coef": 0.01}),
    "images": (stacked_images, {"policy": "CnnPolicy", "policy_kwargs": SMALL_CNN}),
    "images_channel_first": (
        channel_first_images,
        {"policy": "CnnPolicy", "policy_kwargs": SMALL_CNN, "batch_size": 48},
    ),
    "gsde": (pendulum, {"use_sde": True, "sde_sample_freq": 4, "batch_size": 60, "learning_rate": 1e-2}),
    "squashed_gsde_with_entropy_bonus": (
        pendulum,
        {
            "use_sde": True,
            "ent_coef": 0.01,
            "policy_kwargs": {"squash_output": True},
            "batch_size": 60,
            "learning_rate": 1e-2,
        },
    ),
    "value_clipping": (pendulum, {"clip_range_vf": 0.2, "batch_size": 60}),
    "value_clipping_schedule": (pendulum, {"clip_range_vf": LinearSchedule(0.3, 0.1, 1.0)}),
    "advantages_as_they_are": (pendulum, {"normalize_advantage": False, "batch_size": 60}),
    "several_environments": (lambda: make_vec_env("CartPole-v1", n_envs=3, seed=0), {"batch_size": 60}),
    "subprocesses": (subprocess_cartpoles, {"batch_size": 60}),
    "vec_normalize": (normalized_pendulums, {"batch_size": 50}),
    "schedules": (
        cartpole,
        {
            "learning_rate": LinearSchedule(5e-3, 1e-4, 1.0),
            "clip_range": LinearSchedule(0.2, 0.02, 1.0),
            "batch_size": 60,
        },
    ),
    "clip_range_below_zero": (cartpole, {"clip_range": overshooting, "batch_size": 60, "learning_rate": 1e-3}),
    "sgd": (
        pendulum,
        {
            "policy_kwargs": {
                "optimizer_class": th.optim.SGD,
                "optimizer_kwargs": {"momentum": 0.9, "weight_decay": 1e-3},
            },
            "learning_rate": 3.0,
        },
    ),
    "separate_networks": (
        cartpole,
        {"policy_kwargs": {"net_arch": {"pi": [8], "vf": [16, 16]}, "share_features_extractor": False}},
    ),
    "dropout": (pendulum, {"policy": DropoutPolicy, "batch_size": 60}),
    "own_get": (pendulum, {"rollout_buffer_class": OwnGetBuffer, "batch_size": 60}),
    "own_buffer": (pendulum, {"rollout_buffer_class": ShiftedBuffer, "batch_size": 60, "normalize_advantage": False}),
}


@pytest.mark.parametrize("case", CASES)
def test_state_after_training_is_that_of_ppo(case):
    make_env, changes = CASES[case]
    kwargs = {**FAST, **changes}
    policy = kwargs.pop("policy", "MlpPolicy")
    # Three updates, the last of which overshoots the number of steps.
    vec_env = make_env()
    steps = 3 * kwargs["n_steps"] * getattr(vec_env, "num_envs", 1) - 5
    vec_env.close()
    klip, logs = train(KLipPPO, policy, make_env, steps, **kwargs)
    ppo, _ = train(PPO, policy, make_env, steps, **kwargs)
    assert max(logs.column("train/kill_fraction")) > 0
    assert_identical(klip, ppo)


def test_early_stopping_ends_at_the_same_minibatch(capsys):
    kwargs = {**FAST, "target_kl": 0.005, "batch_size": 60, "verbose": 1}
    models, messages = [], []
    for algorithm in (KLipPPO, PPO):
        models.append(train(algorithm, "MlpPolicy", pendulum, 600, **kwargs)[0])
        messages.append([line for line in capsys.readouterr().out.splitlines() if line.startswith("Early stopping")])
    assert messages[0] == messages[1]
    assert messages[0]
    assert_identical(*models)


def test_the_comparison_sees_a_difference():
    """The other tests of this file could not fail if any two runs compared equal."""
    klip, _ = train(KLipPPO, "MlpPolicy", pendulum, 256, **FAST, beta="none")
    ppo, _ = train(PPO, "MlpPolicy", pendulum, 256, **FAST)
    ours, theirs = state_tensors(klip), state_tensors(ppo)
    assert any(not th.equal(ours[name], theirs[name]) for name in ours)


def test_training_continues_identically():
    models = []
    for algorithm in (KLipPPO, PPO):
        model, _ = train(algorithm, "MlpPolicy", cartpole, 256, **FAST)
        model.set_env(cartpole())
        model.set_random_seed(1)
        models.append(model.learn(256, reset_num_timesteps=False))
    assert_identical(*models)


@pytest.mark.parametrize(
    ("beta", "beta_kwargs"),
    [
        ("linear_ramp", {"width": 0}),
        ("asymmetric", {"width_up": 0, "width_down": 0}),
        ("rollback", {"slope": 0}),
        ("clip_higher", {"low": 0.2, "high": 0.2}),
        ("dual_clip", {"bound": 1e6}),
        ("position", {"end": 1.0}),
        ("trust_region", {"delta": 1e6}),
    ],
)
def test_limits_of_other_coefficients(beta, beta_kwargs):
    """Where a coefficient's parameters make it `step` (or `none`, which the last one is), the whole run is the same."""
    kwargs = {**FAST, "batch_size": 60}
    model, _ = train(KLipPPO, "MlpPolicy", cartpole, 400, **kwargs, beta=beta, beta_kwargs=beta_kwargs)
    reference, _ = (
        train(KLipPPO, "MlpPolicy", cartpole, 400, **kwargs, beta="none")
        if beta == "trust_region"
        else train(PPO, "MlpPolicy", cartpole, 400, **kwargs)
    )
    assert_identical(model, reference)


def test_measuring_the_kl_divergence_changes_nothing():
    """Neither the snapshot of the rollout policy nor the final measurement draws a random number."""
    kwargs = {**FAST, "batch_size": 60}
    model, logs = train(KLipPPO, DropoutPolicy, pendulum, 400, **kwargs, log_kl=True)
    assert logs.column("train/kl")
    assert_identical(model, train(PPO, DropoutPolicy, pendulum, 400, **kwargs)[0])


# -- sb3-contrib's algorithms ----------------------------------------------------------------------------------------------


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


def masked_images():
    return ActionMasker(images(n_channels=1), lambda env: np.array([True, False] * 3))


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
        lambda: images(n_channels=1),
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
CONTRIB = {
    "maskable": (KLipMaskablePPO, MaskablePPO, MASKED, {"policy": "MlpPolicy"}),
    "recurrent": (KLipRecurrentPPO, RecurrentPPO, RECURRENT, {"policy": "MlpLstmPolicy", "policy_kwargs": LSTM}),
}


#: What the drop-in scenarios of every variant do not do as well, and one of each kind of what they do.
QUICK = {
    *("discrete", "discrete_minibatch_60", "wrapper", "several_environments", "target_kl"),
    *("box", "minibatch_50"),
}


@pytest.mark.parametrize(
    ("variant", "case"),
    [
        pytest.param(variant, case, marks=() if case in QUICK else pytest.mark.slow)
        for variant in CONTRIB
        for case in CONTRIB[variant][2]
    ],
)
def test_state_after_training_is_that_of_the_class_of_sb3_contrib(variant, case):
    ours, theirs, cases, defaults = CONTRIB[variant]
    make_env, changes = cases[case]
    kwargs = {**FAST, **defaults, **changes}
    policy = kwargs.pop("policy")
    klip, logs = train(ours, policy, make_env, 300, **kwargs)
    base, base_logs = train(theirs, policy, make_env, 300, **kwargs)
    assert max(logs.column("train/kill_fraction")) > 0
    assert_identical(klip, base)
    # What is logged is not trained with: sb3-contrib averages numbers in float64, and this package tensors in float32.
    for row, base_row in zip(logs.rows, base_logs.rows, strict=True):
        for key in (key for key in base_row if key.startswith("train/")):
            assert row[key] == pytest.approx(base_row[key], rel=1e-3, abs=1e-6), key
