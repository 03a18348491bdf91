"""The update: what coefficients are told, what they do to training, and what is refused in the middle of it."""

import copy
import math

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers import FAST, assert_identical, cartpole, pendulum, state_tensors, train
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_klip import KLipPPO
from sb3_klip.coefficients import available, make, register

# -- steps that are not finite ---------------------------------------------------------------------------------------------


def overflowing_model(algorithm, advantage):
    """A filled rollout whose first sample has an importance ratio that overflows."""
    model = algorithm("MlpPolicy", pendulum(), seed=0, **FAST, normalize_advantage=False)
    model._setup_learn(64)
    model.collect_rollouts(model.env, model._init_callback(None), model.rollout_buffer, 64)
    model.rollout_buffer.log_probs[5] -= 200.0
    model.rollout_buffer.advantages[5] = advantage
    return model


def test_overflow_of_a_removed_sample():
    """PPO's parameters become NaN although the sample is clipped; ours do not."""
    theirs, ours = overflowing_model(PPO, 1.0), overflowing_model(KLipPPO, 1.0)
    with pytest.raises(ValueError, match="nan"):  # from torch's distributions, once the parameters are NaN
        theirs.train()
    ours.train()
    assert all(tensor.isfinite().all() for tensor in state_tensors(ours).values())


def test_overflow_of_a_sample_that_passes():
    model = overflowing_model(KLipPPO, -1.0)
    before = {name: tensor.clone() for name, tensor in model.policy.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"the importance ratio of a sample that the coefficient lets through is inf"
    ) as error:
        model.train()
    assert "beta=step()" in str(error.value)
    assert "epoch 0, minibatch" in str(error.value)
    assert all(th.equal(tensor, before[name]) for name, tensor in model.policy.state_dict().items())
    model.policy.optimizer.step()  # no moment is NaN
    assert all(tensor.isfinite().all() for tensor in state_tensors(model).values())


def test_a_coefficient_that_turns_nan_is_named():
    calls = []

    def failing(ratio, advantages, clip_range):
        calls.append(len(ratio))
        return th.full_like(ratio, math.nan if len(calls) > 10 else 0.0)

    model = KLipPPO("MlpPolicy", pendulum(), seed=0, **FAST, beta=failing)
    with pytest.raises(ValueError, match=r"failing.*the removal of the coefficient is nan"):
        model.learn(640)
    assert all(parameter.isfinite().all() for parameter in model.policy.parameters())


class AtRolloutEnd(BaseCallback):
    """Calls a function with the model."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def _on_step(self):
        return True

    def _on_rollout_end(self):
        self.function(self.model)


@pytest.mark.parametrize("dict_observations", [False, True])
@pytest.mark.parametrize(
    ("trouble", "at", "message"),
    [
        ("reward", 10, r"the reward is nan, at step 2 of the rollout's 8, in environment 1\."),
        ("overflow", 16, r"the reward is inf, at step 8 of the rollout's 8, in environment 1\."),
        ("end", 10, r"the reward, or the value of the observation that ended the episode, is nan, at step 2 of"),
        ("observation", 16, "the observation has an element that is NaN, so its value is nan, after the last step .* 1"),
        ("large", 14, r"rewards are too large: their sum is inf, at step \d of the rollout's 8, in environment 1"),
    ],
)
def test_what_makes_advantages_nan_is_named_before_the_update(trouble, at, message, dict_observations):
    """From the second rollout on, in the second of two environments."""

    class Env(gym.Env):
        box = spaces.Box(-1, 1, (2,), np.float32)
        observation_space = spaces.Dict({"seen": box}) if dict_observations else box
        action_space = spaces.Discrete(2)

        def __init__(self, is_broken):
            self.is_broken, self.steps = is_broken, 0

        def seen(self, value=0.0):
            array = np.full(2, value, np.float32)
            return {"seen": array} if dict_observations else array

        def reset(self, *, seed=None, options=None):
            return self.seen(), {}

        def step(self, action):
            self.steps += 1
            here = self.is_broken and self.steps == at
            reward = {"reward": np.nan, "end": np.nan, "overflow": 1e39}.get(trouble, 1.0) if here else 1.0
            if trouble == "large" and self.is_broken and self.steps >= at:
                reward = 3e38
            seen = self.seen(np.nan if here and trouble == "observation" else 0.0)
            return seen, reward, here and trouble == "end", False, {}

    env = DummyVecEnv([lambda: Env(False), lambda: Env(True)])
    policy = "MultiInputPolicy" if dict_observations else "MlpPolicy"
    model = KLipPPO(policy, env, n_steps=8, batch_size=8, n_epochs=1, seed=0, device="cpu")
    after_one_update = []
    keep = AtRolloutEnd(lambda model: after_one_update.append(copy.deepcopy(model.policy.state_dict())))
    with (
        np.errstate(all="ignore"),
        pytest.raises(ValueError, match=f"KLipPPO stopped at 32 steps, before an update: {message}"),
    ):
        model.learn(64, callback=keep)
    assert all(th.equal(tensor, after_one_update[1][name]) for name, tensor in model.policy.state_dict().items())


class Faulty(gym.Env):
    """From its tenth step on, an element of its observations is not finite."""

    action_space = spaces.Discrete(2)

    def __init__(self, value, is_dict):
        box = spaces.Box(-1, 1, (3,), np.float32)
        self.observation_space = spaces.Dict({"seen": box}) if is_dict else box
        self.value, self.is_dict, self.steps = value, is_dict, 0

    def seen(self):
        array = np.array([0.1, self.value if self.steps >= 10 else 0.2, 0.3], np.float32)
        return {"seen": array} if self.is_dict else array

    def reset(self, *, seed=None, options=None):
        return self.seen(), {}

    def step(self, action):
        self.steps += 1
        return self.seen(), 1.0, False, False, {}


@pytest.mark.parametrize("is_dict", [False, True])
def test_the_observation_with_which_a_policy_has_no_action_is_named(is_dict):
    env = DummyVecEnv([lambda: Faulty(0.0, is_dict), lambda: Faulty(np.nan, is_dict)])
    model = KLipPPO("MultiInputPolicy" if is_dict else "MlpPolicy", env, n_steps=16, batch_size=8, device="cpu")
    element = r"\['seen'\]\[1\]" if is_dict else r"\[1\]"
    with pytest.raises(ValueError, match=rf"KLipPPO stopped at 20 steps: observation{element} is nan, in environment 1\. "):
        model.learn(64)


@pytest.mark.parametrize("reuse", [1, 2])
def test_an_infinite_observation_is_named(reuse):
    """A policy with tanh has actions for it, and only its gradient is NaN."""
    env = DummyVecEnv([lambda: Faulty(0.0, False), lambda: Faulty(np.inf, False)])
    model = KLipPPO("MlpPolicy", env, n_steps=8, batch_size=8, n_epochs=2, device="cpu", reuse=reuse)
    message = r"\(observation\[1\] is inf, at step 3 of the rollout's 8, in environment 1\)\..* cannot take such observations"
    with pytest.raises(ValueError, match=rf"KLipPPO .* stopped at 32 steps .*, as the gradient is not finite: .* {message}"):
        model.learn(64)
    assert all(parameter.isfinite().all() for parameter in model.policy.parameters())


class Finite(FlattenExtractor):
    """Of a user whose environment returns infinities."""

    def forward(self, observations):
        return th.nan_to_num(super().forward(observations), posinf=1.0)


def infinite_model(**kwargs):
    env = DummyVecEnv([lambda: Faulty(0.0, False), lambda: Faulty(np.inf, False)])
    policy_kwargs = {"features_extractor_class": Finite}
    return KLipPPO("MlpPolicy", env, n_steps=16, batch_size=8, device="cpu", policy_kwargs=policy_kwargs, **kwargs)


def test_the_cause_is_named_before_an_observation_that_need_not_be_one():
    calls = []

    def failing(ratio, advantages, clip_range):
        calls.append(len(ratio))
        return th.full_like(ratio, math.nan if len(calls) > 10 else 0.0)

    with pytest.raises(ValueError, match=r"the removal of the coefficient is nan \(observation\[1\] is inf, .*Try a smaller"):
        infinite_model(beta=failing).learn(64)


class TooLongError(ValueError):
    """Of a user's own."""


@pytest.mark.parametrize("kind", [TooLongError, ValueError])
def test_errors_of_callbacks_stay_as_they_are(kind):
    error = kind("the budget is spent")

    class Budget(BaseCallback):
        def _on_step(self):
            if self.num_timesteps >= 24:
                raise error
            return True

    with pytest.raises(kind) as caught:
        infinite_model().learn(64, callback=Budget())
    assert caught.value is error


def falls_to_nan(progress_remaining):
    return math.nan if progress_remaining < 0.6 else 0.1


def test_a_learning_rate_that_is_nan_is_named():
    model = KLipPPO("MlpPolicy", cartpole(), **{**FAST, "learning_rate": falls_to_nan}, device="cpu")
    with pytest.raises(ValueError, match=r"learning_rate is nan at progress_remaining=0\.5, after 64 steps: its schedule"):
        model.learn(128)
    assert all(parameter.isfinite().all() for parameter in model.policy.parameters())


def test_a_clip_range_that_is_nan_is_as_with_ppo():
    kwargs = {**FAST, "clip_range": falls_to_nan, "seed": 0, "device": "cpu"}
    assert_identical(*(algorithm("MlpPolicy", cartpole(), **kwargs).learn(128) for algorithm in (KLipPPO, PPO)))


def test_a_reward_that_vecnormalize_spreads_is_said_to_be_of_several():
    class Unrewarding(Faulty):
        def step(self, action):
            seen, _, *rest = super().step(action)
            return seen, np.nan if self.value and self.steps == 10 else 1.0, *rest

        def seen(self):
            return np.zeros(3, np.float32)

    env = VecNormalize(DummyVecEnv([lambda: Unrewarding(0.0, False), lambda: Unrewarding(1.0, False)]), norm_obs=False)
    model = KLipPPO("MlpPolicy", env, n_steps=8, batch_size=8, device="cpu")
    with pytest.raises(ValueError, match=r"reward is nan, at step 2 .* in environment 0 and all others, as VecN"):
        model.learn(64)


def test_a_value_that_is_nan_is_named():
    model = KLipPPO("MlpPolicy", cartpole(), **FAST, seed=0, device="cpu")

    def spoil(model):
        model.rollout_buffer.values[3, 0] = model.rollout_buffer.advantages[3, 0] = np.nan

    with pytest.raises(ValueError, match=r"value of the observation is nan, at step 4 of the rollout's 64, in environment 0"):
        model.learn(64, callback=AtRolloutEnd(spoil))


def test_divergence_is_reported_by_its_cause():
    """With no trust region and a huge learning rate the policy collapses; the error is ours, and not torch's."""
    model = KLipPPO("MlpPolicy", pendulum(), seed=0, **{**FAST, "learning_rate": 100.0, "n_epochs": 20}, beta="none")
    with pytest.raises(ValueError, match=r"KLipPPO with beta=none.* stopped at \d+ steps"):
        model.learn(6400)
    assert all(parameter.isfinite().all() for parameter in model.policy.parameters())


def test_wrong_shape_in_training_is_refused():
    def shrinking(ratio, advantages, clip_range):
        return th.zeros_like(ratio) if len(ratio) == 8 else ratio[1:]

    with pytest.raises(ValueError, match=r"has shape \(31,\).*expected a tensor of shape \(32,\)"):
        KLipPPO("MlpPolicy", pendulum(), **FAST, beta=shrinking).learn(64)


# -- what coefficients do to training --------------------------------------------------------------------------------------


def test_ratio_deviation_ends_the_inner_loop(capsys):
    kwargs = {**FAST, "learning_rate": 3e-2, "n_epochs": 10, "verbose": 1}
    model, _ = train(KLipPPO, "MlpPolicy", pendulum, 64, **kwargs, beta="espo")
    assert model._n_updates < 10
    assert "Early stopping at step" in capsys.readouterr().out
    model, _ = train(KLipPPO, "MlpPolicy", pendulum, 64, **kwargs, beta="none")
    assert model._n_updates == 10


def test_quadratic_holds_the_clip_range_above_zero():
    with pytest.warns(UserWarning, match="clip_range=-0.1 is held at 0.0001 for beta=quadratic"):
        train(KLipPPO, "MlpPolicy", cartpole, 128, **FAST, beta="quadratic", clip_range=lambda progress: progress - 0.1)


def test_scheduled_parameter_follows_training():
    seen = []

    def watching(ratio, advantages, clip_range, progress, *, width=0.5):
        seen.append((round(progress, 2), width))
        return th.zeros_like(ratio)

    model = KLipPPO("MlpPolicy", cartpole(), **FAST, beta=watching, beta_kwargs={"width": "lin_1.0"})
    seen.clear()
    model.learn(256)
    assert sorted(set(seen)) == [(0.25, 0.75), (0.5, 0.5), (0.75, 0.25), (1.0, 0.0)]


@pytest.mark.parametrize("name", ["fixed", "trust_region", "truly", "adaptive"])
def test_a_tighter_penalty_keeps_the_policy_nearer(name):
    parameter, loose, tight = {
        "fixed": ("value", 0.0, 100.0),
        "adaptive": ("initial", 1e-4, 1e4),
        "trust_region": ("delta", 1.0, 1e-4),
        "truly": ("alpha", 0.0, 100.0),
    }[name]
    distances = []
    for value in (loose, tight):
        _, logs = train(
            KLipPPO, "MlpPolicy", pendulum, 64, **{**FAST, "n_epochs": 10, "learning_rate": 1e-2},
            beta=name, beta_kwargs={parameter: value}, log_kl=True,
        )  # fmt: skip
        distances.append(logs.column("train/kl")[0])
    assert distances[1] < 0.5 * distances[0]


def test_adaptive_logs_its_weight():
    model, logs = train(KLipPPO, "MlpPolicy", pendulum, 320, **FAST, beta="adaptive")
    weights, divergences = logs.column("train/beta_scalar"), logs.column("train/kl")
    assert weights[0] == 1.0
    for before, kl, after in zip(weights, divergences, [*weights[1:], model.beta.state_dict()["value"]], strict=True):
        assert after == pytest.approx(before * (2 if kl > 0.03 else 0.5 if kl < 0.02 / 1.5 else 1))
    assert len(set(weights)) > 1


def test_registered_coefficient_of_a_users_own():
    @register("half")
    def half(ratio, advantages, clip_range):
        return th.full_like(ratio, 0.5)

    model, _ = train(KLipPPO, "MlpPolicy", pendulum, 64, **FAST, beta="half")
    reference, _ = train(KLipPPO, "MlpPolicy", pendulum, 64, **FAST, beta="smoothing", beta_kwargs={"alpha": 0.5})
    ours, theirs = state_tensors(model), state_tensors(reference)
    assert all(th.equal(ours[key], theirs[key]) for key in theirs)


class Drawing(RolloutBuffer):
    """A buffer that draws with torch, and from its own generator, when it is asked for samples."""

    def __init__(self, *args, **kwargs):
        self.generator = np.random.default_rng(0)
        super().__init__(*args, **kwargs)

    def _get_samples(self, batch_inds, env=None):
        samples = super()._get_samples(batch_inds, env)
        return samples._replace(advantages=samples.advantages + th.rand(1) + self.generator.random())


def test_measuring_the_divergence_draws_nothing_of_what_a_buffer_draws():
    """Nor from any other generator."""
    models = [
        KLipPPO("MlpPolicy", pendulum(), seed=0, **FAST, rollout_buffer_class=Drawing, log_kl=log_kl).learn(192)
        for log_kl in (False, True)
    ]
    assert_identical(*models)


def test_an_update_without_minibatches_is_an_error():
    model = KLipPPO("MlpPolicy", pendulum(), **FAST)
    model.n_epochs = 0
    with pytest.raises(ValueError, match="no minibatch: the rollout buffer handed out none, or n_epochs is 0"):
        model.learn(64)


class Double(FlattenExtractor):
    """Features in double precision."""

    def forward(self, observations):
        return super().forward(observations).double()


#: Of each kind one; the others are slow because there are many.
FEW = ("step", "fixed", "position", "trust_region_guided", "probability_clip")


@pytest.mark.parametrize("reuse", [1, 2])
@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in FEW else pytest.mark.slow) for name in available()])
def test_every_coefficient_trains_a_policy_of_double_precision(name, reuse):
    kwargs = {**FAST, "policy_kwargs": {"features_extractor_class": Double}}
    env = cartpole() if make(name).needs_probabilities else pendulum()
    model = KLipPPO("MlpPolicy", env, seed=0, **kwargs, beta=name, reuse=reuse)
    model.policy.double()
    model.learn(128)
    assert all(parameter.dtype == th.float64 and parameter.isfinite().all() for parameter in model.policy.parameters())


# -- memory ----------------------------------------------------------------------------------------------------------------


def test_frozen_parameters_are_not_copied():
    """An extractor may hold a large network that does not learn."""

    class Frozen(th.nn.Parameter):
        def detach(self):
            raise AssertionError("somebody makes a copy")

    models = []
    for algorithm in (KLipPPO, PPO):
        model = algorithm("MlpPolicy", pendulum(), seed=0, **FAST)
        model.policy.features_extractor.large = Frozen(th.zeros(5), requires_grad=False)
        models.append(model.learn(64))
    weights = [[p for p in model.policy.parameters() if p.requires_grad] for model in models]
    assert all(th.equal(ours, theirs) for ours, theirs in zip(*weights, strict=True))
