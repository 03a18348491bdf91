"""KLipPPO as a user meets it: constructor, logger, files, errors, and what coefficients are told."""

import inspect
import io
import json
import math
import warnings
import zipfile

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from identity_helpers import state_tensors, train
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import IdentityEnvMultiBinary, IdentityEnvMultiDiscrete
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.utils import LinearSchedule

from sb3_klip import KLipPPO
from sb3_klip.coefficients import available, register
from sb3_klip.diagnostics import PERCENTILES
from sb3_klip.rollout import episode_positions

FAST = {"learning_rate": 3e-3, "n_steps": 64, "batch_size": 32, "n_epochs": 3}


def pendulum():
    return gym.make("Pendulum-v1")


def cartpole():
    return gym.make("CartPole-v1")


def sinking(ratio, advantages, clip_range, *, depth=0.5):
    """A coefficient of a user's own that lives in an importable module."""
    return th.full_like(ratio, depth)


# -- a drop-in for PPO -----------------------------------------------------------------------------------------------------


def test_constructor_is_that_of_ppo_and_four_arguments():
    ours = list(inspect.signature(KLipPPO.__init__).parameters.values())
    theirs = list(inspect.signature(PPO.__init__).parameters.values())
    shared = ours[: len(theirs)]
    assert [(p.name, p.default) for p in shared] == [(p.name, p.default) for p in theirs]
    added = {p.name: p.default for p in ours[len(theirs) :]}
    assert added == {"beta": "step", "beta_kwargs": None, "log_kl": False, "compile": False}
    assert KLipPPO.policy_aliases == PPO.policy_aliases
    assert inspect.signature(KLipPPO.learn).parameters["tb_log_name"].default == "KLipPPO"


def test_every_argument_is_documented():
    for name in list(inspect.signature(KLipPPO.__init__).parameters)[1:]:
        assert f":param {name}:" in KLipPPO.__doc__


def test_logger_keys_of_ppo_keep_their_meaning():
    kwargs = {**FAST, "batch_size": 60, "clip_range_vf": 0.3, "ent_coef": 0.01, "n_epochs": 8, "learning_rate": 1e-2}
    (_, ours), (_, theirs) = (train(algorithm, "MlpPolicy", pendulum, 256, **kwargs) for algorithm in (KLipPPO, PPO))
    assert len(ours.rows) == len(theirs.rows)
    for our_row, their_row in zip(ours.rows, theirs.rows, strict=True):
        for key in (key for key in their_row if key.startswith("train/")):
            # The sums are taken in another order, so the last digits may differ.
            assert our_row[key] == pytest.approx(their_row[key], rel=1e-4, abs=1e-7), key
    row = ours.rows[-1]
    added = {key.removeprefix("train/") for key in row if key.startswith("train/") and key not in theirs.rows[-1]}
    percentiles = {f"beta_p{level:02}" for level in PERCENTILES}
    assert added == {"kill_fraction", "pass_fraction", "beta_mean", "beta_abs_max", "kl_penalty", "klip_loss", *percentiles}
    assert 0 < row["train/kill_fraction"] < row["train/kill_fraction"] + row["train/pass_fraction"]
    assert row["train/kill_fraction"] + row["train/pass_fraction"] == pytest.approx(row["train/clip_fraction"])
    assert row["train/kl_penalty"] > 0
    assert row["train/beta_abs_max"] > abs(row["train/beta_mean"])


@pytest.mark.slow
def test_learning():
    """CartPole, solved by the zoo's standard: the mean return of the last 100 episodes."""
    model = KLipPPO("MlpPolicy", make_vec_env("CartPole-v1", 8, seed=0), n_steps=32, batch_size=256, n_epochs=20,
                    gae_lambda=0.8, gamma=0.98, learning_rate=LinearSchedule(1e-3, 0, 1), clip_range=0.2, seed=0)  # fmt: skip
    model.learn(40_000)
    assert np.mean([episode["r"] for episode in model.ep_info_buffer]) > 300


# -- files -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", available())
def test_every_coefficient_is_saved_loaded_and_trained_further(name, tmp_path):
    model, _ = train(KLipPPO, "MlpPolicy", cartpole, 128, **FAST, beta=name)
    model.save(tmp_path / "model")
    loaded = KLipPPO.load(tmp_path / "model", env=cartpole())
    assert repr(loaded.beta) == repr(model.beta)
    assert loaded.beta.state_dict() == model.beta.state_dict()
    ours, theirs = state_tensors(loaded), state_tensors(model)
    assert all(th.equal(ours[key], theirs[key]) for key in theirs)
    loaded.learn(128, reset_num_timesteps=False)
    assert loaded.num_timesteps == 256


def test_saving_does_not_change_the_model(tmp_path):
    model, _ = train(KLipPPO, "MlpPolicy", cartpole, 64, **FAST, beta="adaptive", beta_kwargs={"initial": 2.0})
    before, attributes = repr(model.beta), set(vars(model))
    model.save(tmp_path / "model")
    assert repr(model.beta) == before
    assert set(vars(model)) == attributes


def test_the_coefficient_is_plain_json_in_the_file(tmp_path):
    model, _ = train(KLipPPO, "MlpPolicy", cartpole, 64, **FAST, beta="adaptive", beta_kwargs={"kl_target": 0.01})
    model.save(tmp_path / "model")
    data = json.loads(zipfile.ZipFile(tmp_path / "model.zip").read("data"))
    assert data["beta"] == "adaptive"
    assert data["beta_kwargs"] == {"initial": 1.0, "kl_target": 0.01, "factor": 2.0, "estimator": "analytic"}
    assert data["beta_state"] == {"adaptive": model.beta.state_dict()}
    assert model.beta.state_dict() != {}


def test_files_pass_between_ppo_and_klip_ppo():
    for source, target in ((PPO, KLipPPO), (KLipPPO, PPO)):
        model, _ = train(source, "MlpPolicy", pendulum, 128, **FAST)
        file = io.BytesIO()
        model.save(file)
        file.seek(0)
        loaded = target.load(file, env=pendulum())
        observation = pendulum().observation_space.sample()
        assert np.array_equal(
            loaded.predict(observation, deterministic=True)[0], model.predict(observation, deterministic=True)[0]
        )
        ours, theirs = state_tensors(loaded), state_tensors(model)
        assert all(th.equal(ours[key], theirs[key]) for key in theirs)
        loaded.learn(64, reset_num_timesteps=False)
        fresh = target("MlpPolicy", pendulum(), **FAST)
        fresh.set_parameters(model.get_parameters())
        assert all(th.equal(state_tensors(fresh)[key], theirs[key]) for key in theirs)


def test_a_new_coefficient_at_loading_does_not_inherit_parameters(tmp_path):
    model, _ = train(KLipPPO, "MlpPolicy", cartpole, 64, **FAST, beta="linear_ramp", beta_kwargs={"width": 0.3})
    model.save(tmp_path / "model")
    assert repr(KLipPPO.load(tmp_path / "model", beta="sigmoid").beta) == "sigmoid(temperature=0.05)"
    assert repr(KLipPPO.load(tmp_path / "model", beta="linear_ramp").beta) == "linear_ramp(width=0.05)"
    changed = KLipPPO.load(tmp_path / "model", beta_kwargs={"width": 0.1})
    assert repr(changed.beta) == "linear_ramp(width=0.1)"
    with pytest.raises(ValueError, match="Did you mean 'sigmoid'"):
        KLipPPO.load(tmp_path / "model", beta="sigmod")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of the file's coefficient there is nothing to warn of
        with pytest.raises(TypeError, match="no parameter 'widht'"):
            KLipPPO.load(tmp_path / "model", beta_kwargs={"widht": 0.1})


def test_state_survives_when_the_same_coefficient_is_named_again(tmp_path):
    """RL Zoo passes every hyperparameter to load()."""
    model, _ = train(KLipPPO, "MlpPolicy", cartpole, 192, **FAST, beta="adaptive")
    model.save(tmp_path / "model")
    again = KLipPPO.load(tmp_path / "model", beta="adaptive", beta_kwargs={"kl_target": 0.5})
    assert again.beta.state_dict() == model.beta.state_dict() != {}
    assert KLipPPO.load(tmp_path / "model", beta="step").beta.state_dict() == {}


def test_own_function_is_found_again_by_its_module(tmp_path):
    model, _ = train(KLipPPO, "MlpPolicy", cartpole, 64, **FAST, beta=sinking, beta_kwargs={"depth": 0.25})
    model.save(tmp_path / "model")
    loaded = KLipPPO.load(tmp_path / "model", env=cartpole())
    assert loaded.beta.function is sinking
    assert loaded.beta.parameters == {"depth": 0.25}


def test_unknown_coefficient_predicts_but_does_not_train(tmp_path):
    model, _ = train(
        KLipPPO, "MlpPolicy", cartpole, 64, **FAST, beta=lambda ratio, advantages, clip_range: th.zeros_like(ratio)
    )
    model.save(tmp_path / "model")
    with pytest.warns(UserWarning, match="cannot be made here"):
        loaded = KLipPPO.load(tmp_path / "model", env=cartpole())
    loaded.predict(np.zeros(4, dtype=np.float32))
    with pytest.raises(ValueError, match=r"KLipPPO\.load\(\.\.\., beta='step'\)"):
        loaded.learn(64)
    loaded.save(tmp_path / "again")
    with pytest.warns(UserWarning, match="cannot be made here"):
        KLipPPO.load(tmp_path / "again")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        KLipPPO.load(tmp_path / "again", env=cartpole(), beta="step").learn(64)


# -- errors ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"beta": "stpe"}, ValueError, "Did you mean 'step'"),
        ({"beta": "linear_ramp", "beta_kwargs": {"widht": 1}}, TypeError, "Did you mean 'width'"),
        ({"beta": "linear_ramp", "beta_kwargs": {"width": -1}}, ValueError, "0 <= value"),
        ({"beta_kwargs": {"width": 1}}, TypeError, "'step' has no parameter 'width'"),
        ({"beta_kwargs": "width"}, TypeError, "beta_kwargs must be a dict"),
        ({"beta": None}, TypeError, "beta must be the name"),
        ({"beta": "quadratic", "clip_range": 0.0}, ValueError, "clip_range=0 must be positive"),
        ({"beta": "quadratic", "clip_range": lambda progress: -progress}, ValueError, "clip_range=-1 must be positive"),
    ],
)
def test_constructor_refuses(kwargs, error, message):
    with pytest.raises(error, match=message):
        KLipPPO("MlpPolicy", cartpole(), **kwargs)


def test_bad_coefficient_is_refused_before_the_environment_is_made():
    with pytest.raises(ValueError, match="Did you mean 'step'"):
        KLipPPO("MlpPolicy", "NoSuchEnvironment-v0", beta="stpe")


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
    with pytest.raises(ValueError, match=r"failing.*the gate of the coefficient is nan"):
        model.learn(640)
    assert all(parameter.isfinite().all() for parameter in model.policy.parameters())


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


class Counter(gym.Env):
    """Observes the step of its episode; episodes last 5, 7, 9, … steps."""

    observation_space = spaces.Box(0, 100, (1,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self):
        self.length = 3

    def reset(self, *, seed=None, options=None):
        self.step_count, self.length = 0, self.length + 2
        return np.array([0.0], np.float32), {}

    def step(self, action):
        self.step_count += 1
        return np.array([self.step_count], np.float32), float(action), self.step_count >= self.length, False, {}


def test_positions_are_those_of_the_episode():
    """Across rollout boundaries and for several environments, a coefficient is told the step that the environment shows."""
    told, shown = [], []

    def watching(ratio, advantages, clip_range, position):
        told.append(position.clone())
        return th.zeros_like(ratio)

    class WatchedPolicy(ActorCriticPolicy):
        def evaluate_actions(self, obs, actions):
            shown.append(obs.flatten().clone())
            return super().evaluate_actions(obs, actions)

    env = make_vec_env(Counter, n_envs=3)
    model = KLipPPO(WatchedPolicy, env, n_steps=16, batch_size=10, n_epochs=2, seed=0, beta=watching)
    told.clear()
    model.learn(16 * 3 * 4)
    model.learn(16 * 3 * 2, reset_num_timesteps=False)
    assert len(told) == len(shown) > 40
    assert all(th.equal(a, b) for a, b in zip(told, shown, strict=True))
    assert max(tensor.max() for tensor in told) > 16  # an episode longer than a rollout was there


def test_positions_by_hand():
    starts = np.array([[1, 0], [0, 0], [0, 1], [1, 0]])
    positions, carried = episode_positions(starts, np.array([9, 4]))
    assert positions.T.tolist() == [[0, 1, 2, 0], [4, 5, 0, 1]]
    assert carried.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("make_env", "kwargs"),
    [
        (pendulum, {}),
        (pendulum, {"use_sde": True, "sde_sample_freq": 1}),
        (pendulum, {"use_sde": True, "sde_sample_freq": 1, "policy_kwargs": {"squash_output": True}}),
        (cartpole, {}),
        (lambda: IdentityEnvMultiDiscrete(3), {}),
        (lambda: IdentityEnvMultiBinary(3), {}),
    ],
)
def test_divergence_is_that_of_the_two_policies(make_env, kwargs):
    """Against the estimate from actions drawn from the rollout policy, which needs no closed form."""
    model, logs = train(
        KLipPPO, "MlpPolicy", make_env, 4096, **{**FAST, "n_steps": 4096, "batch_size": 512}, log_kl=True, **kwargs
    )
    with th.no_grad():
        data = next(model.rollout_buffer.get())
        _, log_prob, _ = model.policy.evaluate_actions(data.observations, model._actions(data))
    log_ratio = log_prob - data.old_log_prob
    sampled = log_ratio.expm1() - log_ratio
    error = sampled.std() / len(sampled) ** 0.5
    assert logs.column("train/kl")[-1] > 0
    assert abs(logs.column("train/kl")[-1] - sampled.mean()) < 4 * error


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
    for beta in ("fixed", "trust_region"):
        with pytest.raises(ValueError, match=r"OtherDistribution.*'estimator': 'k3'"):
            KLipPPO(OtherPolicy, pendulum(), **FAST, beta=beta)
    with pytest.raises(ValueError, match="log_kl=True needs the closed form"):
        KLipPPO(OtherPolicy, pendulum(), **FAST, log_kl=True)
    for estimator in ("k1", "k3"):
        kwargs = {"beta": "adaptive", "beta_kwargs": {"estimator": estimator}}
        model, logs = train(KLipPPO, OtherPolicy, pendulum, 128, **FAST, **kwargs)
        assert model.beta.state_dict() != {}
        assert logs.column("train/kl")[0] >= 0


def test_a_policy_that_does_not_refresh_its_distribution_is_refused():
    class SecretivePolicy(ActorCriticPolicy):
        def evaluate_actions(self, obs, actions):
            held = self.action_dist.distribution
            result = super().evaluate_actions(obs, actions)
            self.action_dist.distribution = held
            return result

    model = KLipPPO(SecretivePolicy, pendulum(), **FAST, beta="fixed")
    with pytest.raises(ValueError, match="evaluate_actions"):
        model.learn(64)


def test_a_buffer_that_keeps_its_indices_to_itself():
    class OwnSamples(RolloutBuffer):
        def get(self, batch_size=None):
            for samples in list(super().get(batch_size)):
                yield samples._replace()

    class OwnGet(RolloutBuffer):
        def get(self, batch_size=None):
            other = RolloutBuffer(self.buffer_size, self.observation_space, self.action_space, self.device)
            vars(other).update({key: value for key, value in vars(self).items() if key != "_get_samples"})
            yield from other.get(batch_size)

    for beta in ("step", "position", "trust_region"):
        KLipPPO("MlpPolicy", pendulum(), **FAST, rollout_buffer_class=OwnSamples, beta=beta).learn(64)
    KLipPPO("MlpPolicy", pendulum(), **FAST, rollout_buffer_class=OwnGet).learn(64)
    for beta in ("position", "trust_region"):
        with pytest.raises(ValueError, match=r"OwnGet\.get does not take its samples from _get_samples"):
            KLipPPO("MlpPolicy", pendulum(), **FAST, rollout_buffer_class=OwnGet, beta=beta).learn(64)


def test_positions_after_loading_with_other_environments(tmp_path):
    model = KLipPPO("MlpPolicy", make_vec_env("CartPole-v1", 3), **FAST, beta="position").learn(192)
    model.save(tmp_path / "model")
    KLipPPO.load(tmp_path / "model", env=make_vec_env("CartPole-v1", 2)).learn(128)


def test_registered_coefficient_of_a_users_own():
    @register("half")
    def half(ratio, advantages, clip_range):
        return th.full_like(ratio, 0.5)

    model, _ = train(KLipPPO, "MlpPolicy", pendulum, 64, **FAST, beta="half")
    reference, _ = train(KLipPPO, "MlpPolicy", pendulum, 64, **FAST, beta="smoothing", beta_kwargs={"alpha": 0.5})
    ours, theirs = state_tensors(model), state_tensors(reference)
    assert all(th.equal(ours[key], theirs[key]) for key in theirs)
