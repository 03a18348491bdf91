"""What the algorithms share beside the update: their arguments, and what they refuse before anything is built."""

import re

import numpy as np
import pytest
import torch as th
from helpers import FAST, assert_identical, cartpole, pendulum, train
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import ConvertCallback, ProgressBarCallback
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_klip import KLipMaskablePPO, KLipPPO, KLipRecurrentPPO
from sb3_klip.coefficients import make


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"beta": "stpe"}, ValueError, "Did you mean 'step'"),
        ({"beta": "linear_ramp", "beta_kwargs": {"widht": 1}}, TypeError, "Did you mean 'width'"),
        ({"beta": "linear_ramp", "beta_kwargs": {"width": -1}}, ValueError, "0 <= value"),
        ({"beta_kwargs": {"width": 1}}, TypeError, "'step' has no parameter 'width'"),
        ({"beta_kwargs": "width"}, TypeError, "beta_kwargs must be a dict"),
        ({"beta_kwargs": {1: 2}}, TypeError, r"beta_kwargs=\{1: 2\} must have names of parameters as its keys"),
        ({"beta": None}, TypeError, "beta must be the name"),
        ({"log_kl": "False"}, TypeError, "log_kl='False' must be True or False"),
        ({"n_epochs": 0}, ValueError, "n_epochs=0 must be a whole number, at least 1"),
        ({"n_epochs": np.array([1, 2])}, ValueError, r"n_epochs=array\(\[1, 2\]\) must be a whole number, at least 1"),
        ({"beta": "linear_ramp", "beta_kwargs": {"width": 10**400}}, ValueError, "is out of range: 0 <= value"),
        ({"beta": "linear_ramp", "beta_kwargs": {"width": lambda p: 1 / (p - 1)}}, TypeError, "fails at 1: .* by zero"),
        ({"n_epochs": 2.5}, ValueError, "n_epochs=2.5 must"),
        ({"beta": "quadratic", "clip_range": 0.0}, ValueError, "clip_range=0 must be positive"),
        ({"beta": "trgppo", "clip_range": 1.0}, ValueError, "clip_range=1 must be less than 1, unless delta is given"),
        ({"beta": "quadratic", "clip_range": lambda progress: -progress}, ValueError, "clip_range=-1 must be positive"),
    ],
)
def test_constructor_refuses(kwargs, error, message):
    with pytest.raises(error, match=message):
        KLipPPO("MlpPolicy", cartpole(), **kwargs)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"clip_range": -0.2}, "clip_range=-0.2 is negative, so the least ratio .* 1.2, is above the greatest, 0.8"),
        pytest.param(
            {"device": "cuda:0"},
            "device='cuda:0': torch finds no GPU",
            marks=pytest.mark.skipif(th.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_what_ppo_trains_with_is_no_error(kwargs, message):
    with pytest.warns(UserWarning, match=message):
        model = KLipPPO("MlpPolicy", cartpole(), **FAST, seed=0, **{"device": "cpu", **kwargs})
    assert_identical(model.learn(64), PPO("MlpPolicy", cartpole(), **FAST, seed=0, **{"device": "cpu", **kwargs}).learn(64))


def test_a_clip_range_that_falls_may_start_where_trgppo_has_no_bounds():
    assert KLipPPO("MlpPolicy", cartpole(), **FAST, beta="trgppo", clip_range=lambda progress: progress).learn(64)


def test_schedules_are_not_asked_when_a_model_is_made():
    asked = []
    model = KLipPPO("MlpPolicy", cartpole(), **FAST, clip_range=lambda progress: asked.append(progress) or 0.2, device="cpu")
    assert asked == []
    model.learn(64)
    assert asked == [0.0]


def test_bad_coefficient_is_refused_before_the_environment_is_made():
    with pytest.raises(ValueError, match="Did you mean 'step'"):
        KLipPPO("MlpPolicy", "NoSuchEnvironment-v0", beta="stpe")


@pytest.mark.parametrize(
    ("beta", "beta_kwargs"),
    [("dcpo", None), ("dppo", {"high": 0.3}), ("maspo", None), ("position", {"base": "dppo"})],
)
@pytest.mark.parametrize("algorithm", [KLipPPO, KLipRecurrentPPO])
def test_what_means_probabilities_is_refused_where_actions_have_densities(algorithm, beta, beta_kwargs, monkeypatch):
    coefficient = make(beta, **(beta_kwargs or {}))
    message = re.escape(
        f"beta={coefficient!r} needs actions that have a probability, in a Discrete, MultiDiscrete or MultiBinary"
    )
    policy = "MlpLstmPolicy" if algorithm is KLipRecurrentPPO else "MlpPolicy"
    model = algorithm(policy, pendulum(), **FAST)
    with pytest.raises(ValueError, match=message):
        model.beta = coefficient
    monkeypatch.setattr(algorithm, "policy_aliases", dict.fromkeys(algorithm.policy_aliases))  # nothing can be built of None
    with pytest.raises(ValueError, match=message):
        algorithm(policy, pendulum(), **FAST, beta=beta, beta_kwargs=beta_kwargs)
    monkeypatch.undo()
    assert repr(algorithm(policy, cartpole(), **FAST, beta=beta, beta_kwargs=beta_kwargs).beta) == repr(coefficient)


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


class OtherDistribution:
    """Behaves like a Gaussian, but is of a class of the user's own."""

    def __init__(self, inner):
        self.inner = inner

    def __getattr__(self, name):
        return getattr(self.inner, name)


class OtherPolicy(ActorCriticPolicy):
    def _get_action_dist_from_latent(self, latent_pi):
        self.action_dist.inner.proba_distribution(self.action_net(latent_pi), self.log_std)
        return self.action_dist

    def _build(self, lr_schedule):
        super()._build(lr_schedule)
        self.action_dist = OtherDistribution(self.action_dist)


def test_sampled_estimators_need_no_closed_form():
    for beta in ("fixed", "trust_region", "trust_region_guided"):
        with pytest.raises(ValueError, match=r"OtherDistribution.*'estimator': 'k3'"):
            KLipPPO(OtherPolicy, pendulum(), **FAST, beta=beta)
    for beta in ("step", "fixed"):
        kwargs = {"beta": beta, "beta_kwargs": {"estimator": "k3"} if beta == "fixed" else None}
        with pytest.raises(ValueError, match=r"log_kl=True needs the closed form.*OtherDistribution\. Leave log_kl out\.$"):
            KLipPPO(OtherPolicy, pendulum(), **FAST, log_kl=True, **kwargs)
    for estimator in ("k1", "k3"):
        kwargs = {"beta": "adaptive", "beta_kwargs": {"estimator": estimator}}
        model, logs = train(KLipPPO, OtherPolicy, pendulum, 128, **FAST, **kwargs)
        assert model.beta.state_dict() != {}
        assert logs.column("train/kl")[0] >= 0


# -- the coefficient of a model ----------------------------------------------------------------------------------------


def test_models_that_are_given_one_coefficient_learn_apart():
    coefficient = make("adaptive")
    models = [KLipPPO("MlpPolicy", cartpole(), **FAST, beta=coefficient) for _ in range(2)]
    models[0].beta.end_update(1.0)
    assert [model.beta.state_dict() for model in models] == [{"value": 2.0}, {}]
    assert coefficient.state_dict() == {}
    # One with other parameters begins with what that one has learned.
    coefficient.end_update(1.0)
    changed = KLipPPO("MlpPolicy", cartpole(), **FAST, beta=coefficient, beta_kwargs={"kl_target": 0.5})
    assert (changed.beta.state_dict(), changed.beta.settings["kl_target"]) == ({"value": 2.0}, 0.5)


def test_another_coefficient_can_be_set_on_a_model():
    model, logs = train(KLipPPO, "MlpPolicy", pendulum, 64, **FAST, beta="fixed", beta_kwargs={"value": 2.0})
    assert logs.column("train/beta_scalar") == [2.0]
    model.beta = "sigmoid"
    assert (repr(model.beta), model.beta_kwargs) == ("sigmoid(temperature=0.05)", None)
    model.set_env(pendulum())
    model.learn(64)
    model.beta = make("linear_ramp", width=0.5)
    assert repr(model.beta) == "linear_ramp(width=0.5)"


@pytest.mark.parametrize(
    ("kwargs", "value", "error", "message"),
    [
        ({}, "sigmod", ValueError, "Did you mean 'sigmoid'"),
        ({}, 3, TypeError, "beta must be the name of a coefficient"),
        ({"clip_range": -0.1}, "quadratic", ValueError, "clip_range=-0.1 must be positive"),
    ],
)
def test_a_coefficient_that_does_not_fit_is_not_set(kwargs, value, error, message):
    model = KLipPPO("MlpPolicy", cartpole(), **{**FAST, **kwargs})
    with pytest.raises(error, match=message):
        model.beta = value
    assert repr(model.beta) == "step()"


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_whatever_ends_training_closes_the_progress_bar(error):
    """An open one fails with an ImportError when Python shuts down."""

    def fail(local, world):
        raise error

    bar = ProgressBarCallback()
    with pytest.raises(error):
        KLipPPO("MlpPolicy", cartpole(), **FAST).learn(64, callback=[bar, ConvertCallback(fail)])
    assert not bar.pbar._prog.live.is_started


def test_a_subclass_may_have_names_of_policies_of_its_own():
    class Named(KLipPPO):
        def _get_policy_from_name(self, policy_name):
            return ActorCriticPolicy if policy_name == "Mine" else super()._get_policy_from_name(policy_name)

    assert type(Named("Mine", cartpole(), **FAST).policy) is ActorCriticPolicy


@pytest.mark.parametrize("reuse", [1, 2])
def test_attributes_of_a_subclass_that_others_have_too(reuse):
    names = ("_pool", "_callback", "_loss", "_value_loss", "_actions", "_boundary", "_normalize_advantages", "_env", "_policy")

    class Named(KLipPPO):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            for name in names:
                setattr(self, name, 5)

    model = Named("MlpPolicy", cartpole(), seed=0, **FAST, reuse=reuse).learn(128)
    assert {getattr(model, name) for name in names} == {5}
    assert_identical(model, KLipPPO("MlpPolicy", cartpole(), seed=0, **FAST, reuse=reuse).learn(128))
