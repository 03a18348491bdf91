"""What the analytic KL divergence leaves of the gradient that the clip takes away."""

import copy

import gymnasium as gym
import numpy as np
import pytest
import rl_zoo3.import_envs  # noqa: F401  registers the environments without velocities
import torch as th
from helpers import assert_same_generators, cartpole, pendulum
from sb3_contrib.common.envs import InvalidActionEnvDiscrete
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import IdentityEnvMultiBinary, IdentityEnvMultiDiscrete
from stable_baselines3.common.utils import set_random_seed

from sb3_klip import KLipMaskablePPO, KLipPPO, KLipRecurrentPPO
from sb3_klip.reproducibility import read_generators
from sb3_klip.seam import policy_copy
from sb3_klip.verify.analytic import analytic_residual


class Keep(BaseCallback):
    """The last rollout, and the policy that made it."""

    def _on_step(self):
        return True

    def _on_rollout_end(self):
        self.buffer = copy.deepcopy(self.model.rollout_buffer)
        self.policy = policy_copy(self.model.policy)
        self.snapshot = self.model.take_snapshot()


def gaussian_gradients(old, new, actions):
    """Of log π(a|s) and of the KL divergence, with respect to mean and standard deviation; by hand."""
    (old_mean, old_std), (mean, std) = ((d.loc.double().numpy(), d.scale.double().numpy()) for d in (old, new))
    error = actions - mean
    score = np.hstack([error / std**2, error**2 / std**3 - 1 / std])
    moved = mean - old_mean
    divergence = np.hstack([moved / std**2, 1 / std - (old_std**2 + moved**2) / std**3])
    return score, divergence


def categorical_gradients(old, new, actions):
    """Likewise, with respect to the logits."""
    old_probs, probs = old.probs.double().numpy(), new.probs.double().numpy()
    return np.eye(probs.shape[1])[actions.astype(int).ravel()] - probs, probs - old_probs


def multi_categorical_gradients(old, new, actions):
    parts = [categorical_gradients(o, n, actions[:, i]) for i, (o, n) in enumerate(zip(old, new, strict=True))]
    return tuple(np.hstack(column) for column in zip(*parts, strict=True))


def bernoulli_gradients(old, new, actions):
    return actions - new.probs.double().numpy(), (new.probs.double() - old.probs.double()).numpy()


ANALYTIC = {
    "gaussian_of_1": (pendulum, {}, gaussian_gradients),
    "gaussian_of_3": (lambda: gym.make("Hopper-v4"), {"learning_rate": 3e-3}, gaussian_gradients),
    "gsde": (pendulum, {"use_sde": True}, gaussian_gradients),
    "squashed_gsde": (pendulum, {"use_sde": True, "policy_kwargs": {"squash_output": True}}, gaussian_gradients),
    "two_actions": (cartpole, {}, categorical_gradients),
    "three_actions": (lambda: gym.make("Acrobot-v1"), {}, categorical_gradients),
    "multi_discrete": (lambda: IdentityEnvMultiDiscrete(4), {}, multi_categorical_gradients),
    "multi_binary": (lambda: IdentityEnvMultiBinary(4), {}, bernoulli_gradients),
}


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("case", ANALYTIC)
def test_what_the_analytic_divergence_leaves(case, normalize):
    make_env, kwargs, gradients = ANALYTIC[case]
    set_random_seed(0)
    # One minibatch, so that its advantages are normalized as a whole.
    kwargs = {"learning_rate": 1e-2, "n_steps": 256, "batch_size": 256, "n_epochs": 20, **kwargs}
    keep = Keep()
    model = KLipPPO("MlpPolicy", make_env(), normalize_advantage=normalize, seed=0, device="cpu", **kwargs)
    model.learn(256, callback=keep)
    buffer = copy.deepcopy(keep.buffer)
    before = {name: tensor.clone() for name, tensor in model.policy.state_dict().items()}
    kept, generators = model.rollout_buffer, read_generators()
    shares = analytic_residual(model, keep.buffer, keep.snapshot, 0.2)
    assert model.rollout_buffer is kept
    assert_same_generators(generators, read_generators())
    assert all(th.equal(tensor, before[name]) for name, tensor in model.policy.state_dict().items())

    observations = th.as_tensor(buffer.observations[:, 0])
    actions = buffer.actions[:, 0].reshape(256, -1)
    with th.no_grad():
        old = copy.copy(keep.policy.get_distribution(observations))
        new = copy.copy(model.policy.get_distribution(observations))
        taken = th.as_tensor(actions).float()
        log_prob = new.log_prob(taken.flatten() if gradients is categorical_gradients else taken).numpy()
    if case == "squashed_gsde":
        actions = np.arctanh(actions.astype(np.float64).clip(-1 + 1e-7, 1 - 1e-7))
    advantages = buffer.advantages[:, 0]
    if normalize:
        advantages = (advantages - advantages.mean()) / advantages.std()
    ratio = np.exp(log_prob - buffer.log_probs[:, 0])
    kill = ((ratio > 1.2) & (advantages > 0)) | ((ratio < 0.8) & (advantages < 0))
    pair = (getattr(each, "distributions", None) or each.distribution for each in (old, new))
    score, divergence = gradients(*pair, actions.astype(np.float64))
    expected = []
    for goal, direction in zip(score[kill], divergence[kill], strict=True):
        best, *_ = np.linalg.lstsq(direction[:, None], goal, rcond=None)
        expected.append(np.linalg.norm(goal - direction * best) / np.linalg.norm(goal))
    assert len(expected) > 5
    assert len(shares) == len(expected)
    np.testing.assert_allclose(np.sort(shares), np.sort(expected), atol=2e-4)
    if case == "two_actions":
        assert max(shares) < 1e-6
    else:
        assert np.median(shares) > 0.01


LSTM = {"policy": "MlpLstmPolicy", "policy_kwargs": {"lstm_hidden_size": 8, "net_arch": [8]}}
OTHERS = {
    "recurrent": (KLipRecurrentPPO, lambda: gym.make("PendulumNoVel-v1"), {**LSTM, "n_steps": 64, "learning_rate": 0.03}),
    "recurrent_discrete": (
        KLipRecurrentPPO,
        lambda: make_vec_env("CartPoleNoVel-v1", 2, seed=0),
        {**LSTM, "n_steps": 32, "learning_rate": 0.01},
    ),
    "maskable": (
        KLipMaskablePPO,
        lambda: InvalidActionEnvDiscrete(dim=20, n_invalid_actions=10),
        {"policy": "MlpPolicy", "n_steps": 128, "learning_rate": 0.01},
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_the_other_algorithms_have_a_residual_too(case):
    algorithm, make_env, kwargs = OTHERS[case]
    set_random_seed(0)
    model, keep = algorithm(env=make_env(), batch_size=50, n_epochs=10, seed=0, device="cpu", **kwargs), Keep()
    model.learn(192, callback=keep)
    shares = analytic_residual(model, keep.buffer, keep.snapshot, 0.2)
    assert len(shares) > 0
    assert shares.min() >= 0
    assert shares.max() <= 1
    if case == "recurrent_discrete":  # of two actions
        assert shares.max() < 1e-6
    else:
        assert shares.max() > 0.01
