"""Sample reuse in training: which rollouts an update learns from, and what it makes of them."""

import copy
import itertools
import math

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium.wrappers import TimeLimit
from helpers import FAST, Counter, assert_identical, cartpole, pendulum, train
from sb3_contrib.common.envs import InvalidActionEnvDiscrete
from scipy.optimize import brentq
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.envs import SimpleMultiObsEnv
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from torch.utils._python_dispatch import TorchDispatchMode

from sb3_klip import KLipMaskablePPO, KLipPPO, KLipRecurrentPPO
from sb3_klip.fast.optimizer import _number
from sb3_klip.replay import optimal_weights
from sb3_klip.reuse import SampleReuse

REUSE = {**FAST, "reuse": 3}


class Operations(TorchDispatchMode):
    """Names of all operations that torch is asked for."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("reuse", [1, [1.0]])
def test_one_rollout_is_ppo_with_no_operation_more(reuse, monkeypatch):
    def operations(algorithm, **kwargs):
        _number.cache_clear()  # or the first training would make more tensors
        with Operations() as seen:
            model, _ = train(algorithm, "MlpPolicy", pendulum, 192, **FAST, **kwargs)
        return model, seen.names

    ours, seen = operations(KLipPPO, reuse=reuse)
    assert_identical(ours, train(PPO, "MlpPolicy", pendulum, 192, **FAST)[0])
    # The same without anything of this module.
    for name in (
        *("collect_rollouts", "_update_info_buffer", "train", "_begin_update", "_positions", "_ages", "_present_clip_range"),
        *("_update_learning_rate", "_rollout_kl", "_end_update"),
    ):
        monkeypatch.delattr(SampleReuse, name)
    assert seen == operations(KLipPPO)[1]


def small_steps(make_env, algorithm=KLipPPO, policy="MlpPolicy", n_envs=2, **kwargs):
    """A model that has kept rollouts, and whose policy has not changed since; what it had computed for each."""
    env = DummyVecEnv([make_env] * n_envs)
    model = algorithm(policy, env, **{**REUSE, **kwargs, "learning_rate": 0.0}, seed=0)
    pools, pooled = [], model._pooled
    model._pooled = lambda: pools.append(pooled()) or pools[-1]
    fresh, collect = [], model.collect_rollouts

    def collecting(*args, **kwargs):
        result = collect(*args, **kwargs)
        fresh.append(copy.copy(model.rollout_buffer))
        return result

    model.collect_rollouts = collecting
    model.learn(64 * n_envs * 5)
    return model, pools, fresh


@pytest.mark.parametrize(
    ("make_env", "kwargs"),
    [
        (lambda: TimeLimit(gym.make("Pendulum-v1").unwrapped, 16), {}),  # a time limit at the end of each rollout, too
        (lambda: TimeLimit(gym.make("Pendulum-v1").unwrapped, 23), {}),
        (Counter, {}),
        (lambda: TimeLimit(Counter(), 8), {"algorithm": KLipMaskablePPO}),
        (lambda: SimpleMultiObsEnv(random_start=False), {"policy": "MultiInputPolicy", "n_envs": 1}),
    ],
)
def test_older_rollouts_have_the_advantages_of_the_present_policy(make_env, kwargs):
    """With a learning rate of 0, those that they had when they were collected: also at time limits and at the end."""
    _, pools, fresh = small_steps(make_env, **kwargs)
    assert [len(pool.buffer.rewards) // 64 for pool in pools] == [1, 2, 3, 3, 3]
    for update, pool in enumerate(pools):
        n_envs = pool.buffer.n_envs
        th.testing.assert_close(pool.replayed.centre, th.ones(len(pool.replayed.centre)), atol=1e-5, rtol=0)
        for name in ("advantages", "returns", "values"):
            column = getattr(pool.buffer, name).reshape(n_envs, -1, 64).swapaxes(0, 1)
            for age, values in enumerate(column):
                expected = getattr(fresh[update - age], name).T
                np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-4)


def test_they_change_with_the_policy():
    model = KLipPPO("MlpPolicy", DummyVecEnv([pendulum] * 2), **REUSE, seed=0).learn(64 * 2 * 3)
    model.collect_rollouts(model.env, model._init_callback(None), model.rollout_buffer, 64)
    pool, (_, older, _) = model._pooled(), model._kept_rollouts
    values = pool.buffer.values.reshape(3, 64, 2)[1]
    obs = th.as_tensor(older.arrays["observations"][7])
    with th.no_grad():
        np.testing.assert_allclose(values[7], model.policy.predict_values(obs).flatten(), rtol=1e-4)
        actions = th.as_tensor(older.arrays["actions"][7])
        _, log_prob, _ = model.policy.evaluate_actions(obs, actions)
    centre = pool.replayed.centre.reshape(2, 3, 64)[:, 1, 7]
    th.testing.assert_close(centre, (log_prob - th.as_tensor(older.arrays["log_probs"][7])).exp(), rtol=1e-4, atol=1e-4)
    assert (centre - 1).abs().min() > 1e-3
    assert not np.allclose(values, older.arrays["values"], rtol=1e-2)


def test_what_coefficients_are_told():
    seen = []

    def watching(ratio, advantages, clip_range, age, position, kl):
        seen.append((ratio, clip_range, age, position, kl))
        return th.zeros_like(ratio)

    model = KLipPPO("MlpPolicy", DummyVecEnv([Counter] * 2), **{**REUSE, "n_epochs": 1}, seed=0, beta=watching)
    positions = []
    collect = model.collect_rollouts

    def collecting(*args, **kwargs):
        result = collect(*args, **kwargs)
        positions.append(sorted(model.rollout_buffer.observations.flatten().tolist()))  # it observes its own step
        return result

    model.collect_rollouts = collecting
    seen.clear()
    model.learn(64 * 2 * 4)
    per_update = [4, 8, 12, 12]
    starts = [0, *itertools.accumulate(per_update)]
    for update, (start, length) in enumerate(itertools.pairwise(starts)):
        ratio, clip_range, age, position, kl = zip(*seen[start:length], strict=True)
        ages, at = th.cat(age), th.cat(position)
        for number in range(min(update + 1, 3)):
            assert sorted(at[ages == number].tolist()) == positions[update - number]
        assert clip_range[0] == pytest.approx(2 * 0.2 / (min(update + 1, 3) + 1))
        # Before the first step, the policy is π_k: for samples of any age, the coefficient sees a ratio of 1.
        th.testing.assert_close(ratio[0], th.ones(32), atol=1e-5, rtol=0)
        th.testing.assert_close(kl[0], th.zeros(32), atol=1e-6, rtol=0)
        assert th.cat(kl).max() > 0


def test_the_gradient_is_that_of_the_published_loss():
    """GePPO's clip, the value loss and the entropy, all weighted by ω, with its normalised advantages (arXiv 2111.00072)."""
    kwargs = {**FAST, "reuse": [0.5, 0.3, 0.2], "n_epochs": 2, "ent_coef": 0.01, "vf_coef": 0.7, "learning_rate": 3e-3}
    model = KLipPPO("MlpPolicy", pendulum(), seed=0, **kwargs)
    compute, compared = model._minibatch_loss, []

    def comparing(rollout_data, indices, update):
        loss, minibatch = compute(rollout_data, indices, update)
        omega, centre = update.replayed.at(indices)
        values, log_prob, entropy = model.policy.evaluate_actions(rollout_data.observations, rollout_data.actions)
        advantages, weighted = rollout_data.advantages, centre * omega * rollout_data.advantages
        advantages = (advantages - weighted.mean() / (centre * omega).mean()) / weighted.std()
        ratio, epsilon = (log_prob - rollout_data.old_log_prob).exp(), update.clip_range
        policy = th.max(-ratio * advantages, -ratio.clamp(centre - epsilon, centre + epsilon) * advantages)
        value = (values.flatten() - rollout_data.returns) ** 2
        published = (omega * (policy + 0.7 * value - 0.01 * entropy)).mean()
        parameters = list(model.policy.parameters())
        pairs = zip(
            *(th.autograd.grad(each, parameters, retain_graph=True) for each in (loss, published)),
            strict=True,
        )
        for ours, expected in pairs:
            th.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)
        compared.append(omega.std().item() > 0.1 and centre.std().item() > 1e-4)
        return loss, minibatch

    model._minibatch_loss = comparing
    model.learn(64 * 4)
    assert sum(compared) > 10


def categorical_bounds(log_q, clip_range):
    """Where the divergence of q from r q, the other actions keeping their proportions, is that of q = 1/2 and r = 1 + ε."""
    q, delta = math.exp(log_q), -0.5 * math.log(1 - clip_range**2)

    def excess(r):
        return (1 - q) * math.log((1 - q) / (1 - q * r)) - q * math.log(r) - delta

    return brentq(excess, 1e-12, 1), brentq(excess, 1, (1 - 1e-12) / q)


def gaussian_bounds(log_q, clip_range, std):
    """The same of an action in one dimension, the best of many Gaussians as far from N(0, 1) as the mean's fit to 1 + ε."""
    z = math.sqrt(max(0.0, -2 * (log_q + math.log(std * math.sqrt(2 * math.pi)))))
    delta = 0.5 * ((1 + clip_range) ** 2 - 1) - math.log1p(clip_range)
    new_std = np.linspace(0.5, 2, 200_001)
    square = 2 * new_std**2 * (delta + 0.5 - np.log(new_std)) - 1
    new_std, mean = new_std[square >= 0], np.sqrt(square[square >= 0])
    ratios = [np.exp(z**2 / 2 - ((z - m) / new_std) ** 2 / 2) / new_std for m in (mean, -mean)]
    return np.min(ratios), np.max(ratios)


@pytest.mark.parametrize("make_env", [cartpole, pendulum])
def test_probabilities_and_ratio_bounds_are_those_at_the_start_of_the_update(make_env):
    """And the bounds those of the reduced clip range, not of PPO's."""
    seen = []

    def watching(ratio, advantages, clip_range, old_log_prob, least_ratio, greatest_ratio, *, delta=None):
        seen.append(th.stack([old_log_prob, least_ratio, greatest_ratio]))
        return th.zeros_like(ratio)

    model = KLipPPO("MlpPolicy", make_env(), **{**REUSE, "n_epochs": 1}, seed=0, beta=watching)
    pooled, started = model._pooled, []

    def pooling():
        pool, policy = pooled(), model.policy
        observations, actions = (th.as_tensor(getattr(pool.buffer, name)[:, 0]) for name in ("observations", "actions"))
        with th.no_grad():
            log_prob = policy.evaluate_actions(observations, actions if make_env is pendulum else actions.flatten())[1]
        started.append((log_prob, policy.log_std.exp().item() if make_env is pendulum else 0.0))
        return pool

    model._pooled = pooling
    seen.clear()
    model.learn(64 * 3)
    for number, (log_prob, std) in enumerate(started, start=1):
        minibatches, seen = seen[: 2 * number], seen[2 * number :]
        log_q, least, greatest = th.cat(minibatches, dim=1)
        th.testing.assert_close(log_q.sort().values, log_prob.sort().values, atol=1e-4, rtol=0)
        for sample in range(0, len(log_q), 16):
            arguments = (log_q[sample].item(), 0.2 * 2 / (number + 1))
            bounds = categorical_bounds(*arguments) if make_env is cartpole else gaussian_bounds(*arguments, std)
            assert (least[sample].item(), greatest[sample].item()) == pytest.approx(bounds, rel=2e-3)


def test_age_is_zero_without_reuse():
    seen = []

    def watching(ratio, advantages, clip_range, age):
        seen.append(age)
        return th.zeros_like(ratio)

    train(KLipPPO, "MlpPolicy", cartpole, 128, **FAST, beta=watching)
    assert set(th.cat(seen).tolist()) == {0.0}
    seen.clear()
    KLipRecurrentPPO("MlpLstmPolicy", cartpole(), **FAST, beta=watching).learn(64)
    assert set(th.cat(seen).tolist()) == {0.0}


@pytest.mark.parametrize("beta", ["step", "trust_region", "fixed", "adaptive", "quadratic", "position", "espo", "topr"])
@pytest.mark.parametrize("kwargs", [{}, {"clip_range_vf": 0.2, "ent_coef": 0.01, "target_kl": 0.1, "log_kl": True}])
def test_every_kind_of_coefficient_trains(beta, kwargs):
    model, logs = train(KLipPPO, "MlpPolicy", pendulum, 64 * 5, **REUSE, beta=beta, **kwargs)
    assert all(parameter.isfinite().all() for parameter in model.policy.parameters())
    for name in ("total_variation", "clip_centre_std", "effective_sample_size", "learning_rate", "approx_kl", "loss"):
        assert np.isfinite(logs.column(f"train/{name}")).all()
    assert logs.column("train/clip_centre_std")[0] == 0
    assert logs.column("train/clip_centre_std")[-1] > 0
    assert 128 < logs.column("train/effective_sample_size")[-1] < 192


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_sampled_penalties_train(estimator):
    beta = {"beta": "adaptive", "beta_kwargs": {"estimator": estimator}}
    _, logs = train(KLipPPO, "MlpPolicy", pendulum, 64 * 4, **REUSE, **beta)
    assert all(0 <= kl < 1 for kl in logs.column("train/kl"))


def test_the_learning_rate_follows_the_total_variation():
    """Down by 3 % after an update that went too far, up after one that did not go half as far."""
    for rate, factor in ((3e-2, 1 / 1.03), (1e-6, 1.03)):
        kwargs = {**REUSE, "learning_rate": rate, "n_epochs": 10}
        model, logs = train(KLipPPO, "MlpPolicy", pendulum, 64 * 6, **kwargs)
        rates, variation, clip_range = (
            np.array(logs.column(f"train/{name}")) for name in ("learning_rate", "total_variation", "clip_range")
        )
        far = np.where(variation > clip_range / 2, 1 / 1.03, np.where(variation < clip_range / 4, 1.03, 1.0))
        assert far[-2] == factor
        np.testing.assert_allclose(rates, rate * np.cumprod([1, *far[:-1]]), rtol=1e-6)
        assert model.policy.optimizer.param_groups[0]["lr"] == pytest.approx(rates[-1])


def test_optimal_weights_weigh_samples_by_age():
    weights = optimal_weights(2)
    model = KLipPPO("MlpPolicy", DummyVecEnv([pendulum] * 2), **FAST, reuse=weights, seed=0).learn(64 * 2 * 5)
    model.collect_rollouts(model.env, model._init_callback(None), model.rollout_buffer, 64)
    pool = model._pooled()
    assert pool.replayed.weights.mean().item() == pytest.approx(1)
    for age, weight in enumerate(weights):
        np.testing.assert_allclose(pool.replayed.weights[pool.ages == age], [4 * weight] * 128, rtol=1e-6)


# -- what is kept, and for how long ----------------------------------------------------------------------------------------


def test_rollouts_are_kept_for_as_long_as_they_are_needed():
    model = KLipPPO("MlpPolicy", pendulum(), **REUSE, seed=0).learn(64)
    assert len(model._kept_rollouts) == 1
    model.learn(64 * 4, reset_num_timesteps=False)
    assert len(model._kept_rollouts) == 2
    assert model._learning_rate_scale != 1
    model.set_env(model.get_env())
    assert model._kept_rollouts == ()
    model.learn(64 * 3, reset_num_timesteps=False)
    assert len(model._kept_rollouts) == 2

    begun = []
    model._pooled = lambda pooled=model._pooled: begun.append(len(model._kept_rollouts)) or pooled()
    model.learn(64)
    assert begun == [1]


def test_what_is_kept_is_not_the_rollout_that_follows():
    model = KLipPPO("MlpPolicy", pendulum(), **REUSE, seed=0).learn(64 * 2)
    newest = model._kept_rollouts[0]
    before = copy.deepcopy(newest)
    model.learn(64, reset_num_timesteps=False)
    assert model._kept_rollouts[1] is newest
    for name, array in newest.arrays.items():
        np.testing.assert_array_equal(array, before.arrays[name])


def test_kept_observations_are_those_that_the_policy_saw():
    """With VecNormalize, they stay normalized as they were."""
    model = KLipPPO("MlpPolicy", VecNormalize(DummyVecEnv([pendulum])), **REUSE, seed=0)
    collected = []
    collect = model.collect_rollouts

    def collecting(*args, **kwargs):
        result = collect(*args, **kwargs)
        collected.append(model.rollout_buffer.observations.copy())
        return result

    model.collect_rollouts = collecting
    model.learn(64 * 4)
    for kept, observations in zip(model._kept_rollouts, reversed(collected), strict=False):
        np.testing.assert_array_equal(kept.arrays["observations"], observations)


def test_a_plain_checkpoint_holds_no_rollouts(tmp_path):
    model = KLipPPO("MlpPolicy", pendulum(), **FAST, reuse=[0.5, 0.5], seed=0).learn(64 * 3)
    model.save(tmp_path / "plain")
    model.save(tmp_path / "resumable", resumable=True)
    loaded = KLipPPO.load(tmp_path / "plain", env=pendulum())
    assert loaded.reuse == [0.5, 0.5]
    assert loaded._kept_rollouts == ()
    assert loaded._learning_rate_scale == model._learning_rate_scale
    resumed = KLipPPO.load(tmp_path / "resumable", env=pendulum(), resume=True)
    assert len(resumed._kept_rollouts) == 1
    loaded = KLipPPO.load(tmp_path / "resumable", env=DummyVecEnv([pendulum] * 2))
    assert loaded._kept_rollouts == ()
    loaded.learn(128)
    with pytest.raises(ValueError, match="reuse=0 must be a whole number from 1 to 1000000"):
        KLipPPO.load(tmp_path / "plain", reuse=0, env=pendulum())


def test_a_copy_goes_on_as_the_model_does():
    model = KLipPPO("MlpPolicy", InvalidActionEnvDiscrete(dim=4, n_invalid_actions=1), **REUSE, seed=0).learn(64 * 3)
    twin = copy.deepcopy(model)
    state = th.get_rng_state(), np.random.get_state()
    model.learn(64 * 2, reset_num_timesteps=False)
    th.set_rng_state(state[0]), np.random.set_state(state[1])
    twin.learn(64 * 2, reset_num_timesteps=False)
    assert_identical(twin, model)


# -- what is refused -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", [KLipPPO, KLipMaskablePPO])
def test_a_mistake_is_refused_before_anything_is_made(algorithm):
    with pytest.raises(ValueError, match="reuse=0 must be a whole number from 1 to 1000000"):
        algorithm("MlpPolicy", "no such environment", reuse=0)


def test_an_lstm_cannot_reuse():
    with pytest.raises(ValueError, match="reuse=2 must be 1 for KLipRecurrentPPO: an older rollout holds the LSTM's states"):
        KLipRecurrentPPO("MlpLstmPolicy", cartpole(), reuse=2)


@pytest.mark.parametrize("needs_policy_ratio", [False, True])
def test_a_coefficient_stops_on_the_ratio_that_it_is_evaluated_at(needs_policy_ratio):
    class Watching:
        def __init__(self):
            self.seen, self.asked = [], []

        def __call__(self, ratio, advantages, clip_range):
            self.seen.append(ratio.clone())
            return th.zeros_like(ratio)

        def stop(self, ratio):
            self.asked.append(ratio.clone())
            return False

    coefficient = Watching()
    coefficient.needs_policy_ratio = needs_policy_ratio
    model = KLipPPO("MlpPolicy", cartpole(), **FAST, seed=0, device="cpu", beta=coefficient, reuse=2).learn(192)
    function = model.beta.function
    pairs = list(zip(function.seen[-len(function.asked) :], function.asked, strict=True))
    assert len(pairs) >= 6
    for seen, asked in pairs:
        th.testing.assert_close(seen, asked, rtol=1e-5, atol=1e-6)
    assert any((seen - 1).abs().max() > 0.01 for seen, _ in pairs)


def test_a_buffer_that_is_not_known_is_refused():
    class Own(RolloutBuffer):
        pass

    with pytest.raises(ValueError, match=r"reuse=2 works with the rollout buffers of SB3 and sb3-contrib only, not with Own"):
        KLipPPO("MlpPolicy", cartpole(), rollout_buffer_class=Own, reuse=2)


def test_more_than_fits_into_memory_is_refused(monkeypatch):
    monkeypatch.setattr("sb3_klip.reuse._memory", lambda: 300_000)
    message = r"reuse=4 with n_steps=2048 needs .* 4 rollouts.* n_steps=\d+ or reuse=1 would fit"
    with pytest.raises(ValueError, match=message) as error:
        KLipPPO("MlpPolicy", cartpole(), reuse=4)
    fits = int(str(error.value).split("n_steps=")[2].split()[0])
    KLipPPO("MlpPolicy", cartpole(), reuse=4, n_steps=fits)
    with pytest.raises(ValueError, match="would fit"):
        KLipPPO("MlpPolicy", cartpole(), reuse=4, n_steps=fits + 10)
    with pytest.raises(ValueError, match=r"needs .* for 1000000 rollouts.*: reuse=\d+ would fit"):
        KLipPPO("MlpPolicy", cartpole(), reuse=10**6, n_steps=8)


def test_what_is_kept_is_said(capsys):
    KLipPPO("MlpPolicy", pendulum(), verbose=1, reuse=3)
    assert "Learning from the last 3 rollouts, which take up to " in capsys.readouterr().out
    KLipPPO("MlpPolicy", pendulum(), verbose=1)
    assert "Learning from" not in capsys.readouterr().out


def test_weights_that_grow_with_age_are_a_warning():
    with pytest.warns(UserWarning, match=r"reuse=\[0.4, 0.6\] weighs older rollouts more"):
        KLipPPO("MlpPolicy", pendulum(), reuse=[0.4, 0.6])


@pytest.mark.parametrize("how", ["set", "loaded", "resumed"])
def test_without_reuse_it_is_ppo_again(how, tmp_path):
    """Neither rollouts that were kept nor the learning rate that was adapted outlive the reuse."""
    kwargs = {**FAST, "seed": 0, "device": "cpu"}
    model = KLipPPO("MlpPolicy", pendulum(), **kwargs, reuse=3).learn(64 * 6)
    assert model._learning_rate_scale != 1
    model.save(tmp_path / "model", resumable=how == "resumed")
    if how == "set":
        model.reuse = 1
    else:
        model = KLipPPO.load(tmp_path / "model", env=pendulum(), reuse=1, resume=how == "resumed")
    learned_from, begin_update = [], model._begin_update

    def begin():
        learned_from.append((model.rollout_buffer.buffer_size, model.rollout_buffer.log_probs.sum()))
        return begin_update()

    class Sums(BaseCallback):
        def _on_step(self):
            return True

        def _on_rollout_end(self):
            sums.append((64, self.model.rollout_buffer.log_probs.sum()))

    sums = []
    model._begin_update = begin
    if how == "resumed":
        model.learn(64 * 8, callback=Sums())
    else:
        model.learn(64 * 2, callback=Sums(), reset_num_timesteps=False)
    assert learned_from == sums
    assert len(sums) == 2
    assert model.policy.optimizer.param_groups[0]["lr"] == FAST["learning_rate"]


def test_rollouts_of_two_lengths(tmp_path):
    """Resumed with another ``n_steps``, a rollout counts by its weight, whatever its number of samples."""
    model = KLipPPO("MlpPolicy", pendulum(), **{**FAST, "reuse": 2}, seed=0).learn(64 * 2)
    model.save(tmp_path / "model", resumable=True)
    loaded = KLipPPO.load(tmp_path / "model", env=pendulum(), resume=True, n_steps=128)
    seen = []

    def pooled(original=loaded._pooled):
        seen.append(original())
        return seen[-1]

    loaded._pooled = pooled
    loaded.learn(64 * 2 + 128)
    weights = seen[0].replayed.weights
    assert weights.shape == (192,)
    assert weights.mean().item() == pytest.approx(1)
    assert weights[:128].sum().item() == pytest.approx(weights[128:].sum().item())
