"""Sample reuse as pure functions: weights, clip range, advantages, learning rate, and the loss with a shifted clip."""

import itertools
import math

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from stable_baselines3.common.buffers import RolloutBuffer

from sb3_klip.coefficients import available, make
from sb3_klip.replay import (
    Replayed,
    adapted_learning_rate,
    effective_sample_size,
    normalized_advantages,
    optimal_weights,
    reduced_clip_range,
    total_variation,
    vtrace_advantages,
    weights_by_age,
)
from sb3_klip.surrogate import per_sample_beta, per_sample_kl

# -- weights ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 2, 3, 7])
def test_uniform_weights_have_a_closed_form(number):
    weights = weights_by_age(number)
    assert weights.tolist() == [1 / number] * number
    assert reduced_clip_range(0.2, weights) == pytest.approx(2 * 0.2 / (number + 1))


def test_a_known_optimum():
    """Half of PPO's batch: four rollouts, with the reach of three uniform ones and more than their sample size."""
    weights = np.array(optimal_weights(2))
    np.testing.assert_allclose(weights, [0.4, 0.3, 0.2, 0.1], atol=1e-12)
    assert reduced_clip_range(0.2, weights) == pytest.approx(reduced_clip_range(0.2, weights_by_age(3)))
    assert 1 / (weights @ weights) > 3
    assert optimal_weights(1) == [1.0]


def objective(batches, most, tradeoff):
    """The published objective, with its normalisers from a general solver, and its constraints."""
    order = np.arange(1, most + 1)
    simplex = {"type": "eq", "fun": lambda p: p.sum() - 1}
    reach = {"type": "ineq", "fun": lambda p: batches - p @ order}
    size = {"type": "ineq", "fun": lambda p: 1 / batches - p @ p}

    def solve(function):
        start = np.linspace(2, 0, most) / most
        return minimize(function, start, bounds=[(0, 1)] * most, constraints=[simplex, reach, size], tol=1e-10).x

    p_ess, p_tv = solve(lambda p: p @ p), solve(lambda p: p @ order)
    size_gap, reach_gap = 1 / batches - p_ess @ p_ess, batches - p_tv @ order

    def value(p):
        return tradeoff * (p @ p) / size_gap + (1 - tradeoff) * (p @ order) / reach_gap

    return value, solve(value)


@pytest.mark.parametrize("tradeoff", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize(("batches", "most"), [(1.4, 6), (2, 8), (3, 20), (4, 5)])
def test_optimal_weights_are_those_of_a_general_solver(batches, most, tradeoff, monkeypatch):
    monkeypatch.setattr("sb3_klip.replay.SMALLEST_WEIGHT", 0.0)
    ours = np.array(optimal_weights(batches, most, tradeoff))
    ours = np.pad(ours, (0, most - len(ours)))
    value, theirs = objective(batches, most, tradeoff)
    assert value(ours) <= value(theirs) + 1e-6
    np.testing.assert_allclose(ours, theirs, atol=2e-3)


@settings(deadline=None)
@given(st.floats(1.05, 12), st.integers(12, 30), st.floats(0, 1))
def test_optimality_conditions(batches, most, tradeoff):
    """Feasible; and stationary: weights fall linearly as long as they are above 0, however steeply the constraints ask."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sb3_klip.replay.SMALLEST_WEIGHT", 0.0)
        weights = np.array(optimal_weights(batches, most, tradeoff))
    order = np.arange(1, most + 1)
    assert weights.sum() == pytest.approx(1)
    assert (weights >= 0).all()
    assert weights @ order <= batches + 1e-9
    assert weights @ weights <= 1 / batches + 1e-9
    positive = weights[weights > 0]
    steps = np.diff(positive)
    np.testing.assert_allclose(steps, steps[:1].repeat(len(steps)), atol=1e-9)
    # A weight of 0 is one that the same line would have below 0.
    if len(positive) < most and len(positive) > 1:
        assert positive[-1] + steps[0] <= 1e-9
    tight = pytest.approx(batches, abs=1e-6) == weights @ order
    if tradeoff == 1 and batches <= (most + 1) / 2:
        assert tight


def test_small_weights_are_dropped():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sb3_klip.replay.SMALLEST_WEIGHT", 0.0)
        whole = optimal_weights(6)
    kept = [weight for weight in whole if weight >= 0.01]
    assert len(kept) < len(whole)
    np.testing.assert_allclose(optimal_weights(6), np.array(kept) / sum(kept))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.5,), "batches=0.5 must be from 1 to most=20"),
        ((21,), "batches=21 must be from 1 to most=20"),
        ((2, 0), "most=0 must be a whole number, at least 1"),
        ((2, 2.5), "most=2.5 must be a whole number, at least 1"),
        (("2",), "batches='2' must be from 1 to most=20"),
        ((2, 20, "a"), "tradeoff='a' must be from 0 to 1"),
        ((2, 20, 1.5), "tradeoff=1.5 must be from 0 to 1"),
    ],
)
def test_optimal_weights_refuse(arguments, message):
    with pytest.raises(ValueError, match=message):
        optimal_weights(*arguments)


@pytest.mark.parametrize(
    ("reuse", "error", "message"),
    [
        (0, ValueError, "reuse=0 must be a whole number from 1 to 1000000"),
        (2.5, TypeError, r"reuse=2.5 must be a whole number from 1 to 1000000, or weights by age"),
        (10**13, ValueError, "reuse=10{13} must be a whole number from 1 to"),
        ([0.5, [0.5]], TypeError, "must be a whole number"),
        ("3", TypeError, "reuse='3' must be a whole number"),
        (True, TypeError, "reuse=True must be a whole number"),
        ([], ValueError, "must sum to 1, not 0"),
        ([0.5, "0.5"], TypeError, "must be a whole number"),
        (np.array(3), TypeError, r"reuse=array\(3\) must be a whole number"),
        ([1.5, -0.5], ValueError, "finite weights of 0 or more"),
        ([float("nan"), 1.0], ValueError, "finite weights of 0 or more"),
        ([float("inf"), 0.0], ValueError, "finite weights of 0 or more"),
        ([2, 2], ValueError, r"must sum to 1, not 4; divided by their sum, they are \[0.5, 0.5\]"),
        ([0.0, 1.0], ValueError, "weight above 0 for the newest rollout"),
    ],
)
def test_reuse_is_refused_with_what_is_allowed(reuse, error, message):
    with pytest.raises(error, match=message):
        weights_by_age(reuse)


# -- advantages ------------------------------------------------------------------------------------------------------------


def rollout(seed, n_steps=23, n_envs=3, dtype=np.float64):
    generator = np.random.default_rng(seed)
    return {
        "rewards": generator.normal(size=(n_steps, n_envs)).astype(dtype),
        "values": generator.normal(size=(n_steps, n_envs)).astype(dtype),
        "episode_starts": (generator.random((n_steps, n_envs)) < 0.2).astype(dtype),
        "last_values": generator.normal(size=n_envs).astype(dtype),
        "last_dones": np.array([False, True, False]),
        "ratios": np.exp(generator.normal(size=(n_steps, n_envs))).astype(dtype),
    }


def test_vtrace_is_the_published_double_sum():
    data, gamma, gae_lambda = rollout(0), 0.97, 0.9
    advantages, targets = vtrace_advantages(**data, gamma=gamma, gae_lambda=gae_lambda)
    n_steps, n_envs = data["rewards"].shape
    for env in range(n_envs):
        rewards, values, ratios = (data[name][:, env] for name in ("rewards", "values", "ratios"))
        ends = [*(data["episode_starts"][1:, env] == 1), data["last_dones"][env]]
        for t in range(n_steps):
            total, factor = 0.0, 1.0
            for u in range(t, n_steps):
                if u > t:
                    factor *= gamma * gae_lambda * min(ratios[u], 1.0)
                following = values[u + 1] if u + 1 < n_steps else data["last_values"][env]
                total += factor * (rewards[u] + (0 if ends[u] else gamma * following) - values[u])
                if ends[u]:
                    break
            assert advantages[t, env] == pytest.approx(total, abs=1e-12)
            assert targets[t, env] == pytest.approx(min(ratios[t], 1.0) * total + values[t], abs=1e-12)


def test_without_a_change_of_policy_it_is_gae_to_the_last_bit():
    data = rollout(1, dtype=np.float32)
    buffer = RolloutBuffer(23, spaces.Box(-1, 1, (1,)), spaces.Box(-1, 1, (1,)), "cpu", 0.9, 0.97, n_envs=3)
    for name in ("rewards", "values", "episode_starts"):
        setattr(buffer, name, data[name])
    buffer.compute_returns_and_advantage(th.as_tensor(data["last_values"]), data["last_dones"])
    advantages, targets = vtrace_advantages(**{**data, "ratios": np.ones((23, 3), np.float32)}, gamma=0.97, gae_lambda=0.9)
    np.testing.assert_array_equal(advantages, buffer.advantages)
    np.testing.assert_array_equal(targets, buffer.returns)


def test_vtrace_of_whole_rewards():
    data = rollout(0)
    whole = np.round(data["rewards"]).astype(int)
    given = {"gamma": 0.97, "gae_lambda": 0.9}
    got = vtrace_advantages(**{**data, "rewards": whole}, **given)
    expected = vtrace_advantages(**{**data, "rewards": whole.astype(float)}, **given)
    for ours, theirs in zip(got, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


# -- the loss --------------------------------------------------------------------------------------------------------------


def samples(seed=0, size=400):
    generator = th.Generator().manual_seed(seed)
    old, start, now, advantages = th.randn(4, size, generator=generator, dtype=th.float64)
    log_start = old + 0.3 * start
    return (log_start + 0.3 * now).requires_grad_(), old, advantages, (log_start - old).exp()


def test_step_is_the_generalized_clip():
    """Its gradient is that of the published objective, max(-w Â, -clamp(w, c - ε, c + ε) Â), in float64."""
    log_prob, old, advantages, centre = samples()
    ratio = (log_prob - old).exp()
    published = th.max(-ratio * advantages, -ratio.clamp(centre - 0.1, centre + 0.1) * advantages)
    (expected,) = th.autograd.grad(published.sum(), log_prob)
    terms = per_sample_kl(log_prob, old, advantages, make("step"), 0.1, centre=centre)
    (ours,) = th.autograd.grad(terms.loss.sum(), log_prob)
    assert 0 < (expected == 0).sum() < len(expected)
    th.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["linear_ramp", "rollback", "quadratic", "bounded_ratio", "dual_clip"])
def test_every_coefficient_sees_the_shifted_ratio(name):
    log_prob, old, advantages, centre = samples(1)
    coefficient = make(name)
    terms = per_sample_kl(log_prob, old, advantages, coefficient, 0.1, centre=centre)
    removal, _ = coefficient(terms.ratio - centre + 1, advantages, 0.1)
    assert th.equal(terms.removal, removal)
    (gradient,) = th.autograd.grad(terms.loss.sum(), log_prob)
    th.testing.assert_close(gradient, -(terms.ratio * advantages * (1 - removal)))


@pytest.mark.parametrize("name", [name for name in available() if make(name).needs_policy_ratio])
def test_what_needs_a_ratio_of_policies_has_the_gradient_of_its_objective_for_the_present_policy(name):
    """E_b[c L(π/π_k)] is E_π_k[L(π/π_k)]; also where c > 1 + w, so that the shifted ratio is negative."""
    log_prob, old, advantages, centre = samples(1)
    centre = centre * 2
    start = old + centre.log()
    quantities = {"least_ratio": th.full_like(old, 0.7), "greatest_ratio": th.full_like(old, 1.4)}
    terms = per_sample_kl(log_prob, old - 3, advantages, make(name), 0.1, centre=centre * math.exp(3), **quantities)
    (ours,) = th.autograd.grad(terms.loss.sum(), log_prob)
    present = per_sample_kl(log_prob, start, advantages, make(name), 0.1, **quantities)
    (expected,) = th.autograd.grad((centre * math.exp(3) * present.loss).sum(), log_prob)
    assert (terms.ratio < centre * math.exp(3) - 1).any()
    assert (expected != 0).any()
    th.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)


def test_every_coefficient_is_finite_on_samples_of_far_policies():
    log_prob, old, advantages, centre = samples(2)
    for name in available():
        coefficient = make(name, estimator="k3") if "estimator" in make(name).settings else make(name)
        quantities = {
            name: th.full_like(old, 0.5) for name in coefficient.requests if name not in ("progress", "old_log_prob")
        }
        terms = per_sample_kl(log_prob, old, advantages, coefficient, 0.1, centre=4 * centre, **quantities)
        (gradient,) = th.autograd.grad(terms.loss.sum(), log_prob)
        assert gradient.abs().max() < 1e4, name


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_sampled_estimates_are_of_the_divergence_from_the_start_of_the_update(estimator):
    """E_b[c k(π/π_k)] = KL(π_k ‖ π), over all actions of a categorical policy."""
    generator = th.Generator().manual_seed(0)
    old, start, now = th.randn(3, 5, generator=generator, dtype=th.float64).log_softmax(dim=-1)
    terms = per_sample_kl(
        now.clone().requires_grad_(),
        old,
        th.zeros_like(old),
        make("fixed", estimator=estimator),
        centre=(start - old).exp(),
    )
    divergence = (start.exp() * (start - now)).sum()
    th.testing.assert_close((old.exp() * terms.estimate).sum(), divergence)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_beta_of_older_samples_is_that_of_the_gradient(estimator):
    log_prob, old, advantages, centre = samples(3)
    coefficient = make("fixed", value=0.7, estimator=estimator)
    terms = per_sample_kl(log_prob, old, advantages, coefficient, 0.1, centre=centre)
    (gradient,) = th.autograd.grad(terms.loss.sum(), log_prob)
    beta = per_sample_beta(terms.ratio, advantages, terms.removal, terms.weight, estimator, centre)
    th.testing.assert_close(-gradient, terms.ratio * advantages + beta)


# -- what is reported ------------------------------------------------------------------------------------------------------


def test_normalization_by_hand():
    replayed = Replayed(th.tensor([1.5, 0.5, 1.0]), th.tensor([1.0, 2.0, 0.5]))
    advantages = th.tensor([1.0, -1.0, 3.0])
    weighted = th.tensor([1.5, -1.0, 1.5])
    expected = (advantages - weighted.sum() / 3.0) / weighted.std()
    th.testing.assert_close(normalized_advantages(advantages, replayed), expected)
    single = Replayed(th.ones(1), th.ones(1))
    assert normalized_advantages(th.tensor([5.0]), single).item() == 5.0


def test_total_variation_and_sample_size_by_hand():
    replayed = Replayed(th.tensor([1.5, 0.5]), th.tensor([1.0, 2.0]))
    assert total_variation(th.tensor([1.2, 1.6]), replayed).item() == pytest.approx(0.5 * (1.5 * 0.2 + 0.5 * 0.4) / 2)
    assert effective_sample_size(replayed).item() == pytest.approx(2.5**2 / (1.5**2 + 1))
    assert effective_sample_size(Replayed(th.ones(7), th.ones(7))).item() == pytest.approx(7)


@pytest.mark.parametrize(("variation", "expected"), [(0.051, 1 / 1.03), (0.05, 1.0), (0.025, 1.0), (0.024, 1.03)])
def test_the_learning_rate_follows_the_total_variation(variation, expected):
    assert adapted_learning_rate(1.0, variation, clip_range=0.1) == expected


# -- fewer samples ---------------------------------------------------------------------------------------------------------


def bandit(seed, reuse, batch, noise):
    """Samples that a softmax policy takes until it plays the best of four arms nine times of ten, learning as KLipPPO does."""
    generator = th.Generator().manual_seed(seed)
    logits = th.zeros(4, dtype=th.float64, requires_grad=True)
    optimizer = th.optim.Adam([logits], lr=0.02)
    coefficient, weights, kept = make("step"), weights_by_age(reuse), []
    for taken in itertools.count(batch, batch):
        with th.no_grad():
            start = logits.log_softmax(0)
            actions = start.exp().multinomial(batch, replacement=True, generator=generator)
            rewards = (actions == 0).double() + noise * th.randn(batch, generator=generator, dtype=th.float64)
            kept = [(actions, start[actions], rewards), *kept][: len(weights)]
        actions, old, rewards = (th.cat(column) for column in zip(*kept, strict=True))
        used = weights[: len(kept)] / weights[: len(kept)].sum()
        omega = th.as_tensor(len(kept) * used).repeat_interleave(batch)
        replayed = Replayed(omega, (start[actions] - old).exp())
        advantages, clip_range = normalized_advantages(rewards, replayed), reduced_clip_range(0.2, used)
        for _ in range(10):
            log_prob = logits.log_softmax(0)[actions]
            terms = per_sample_kl(log_prob, old, advantages, coefficient, clip_range, centre=replayed.centre)
            optimizer.zero_grad()
            (replayed.weights * terms.loss).mean().backward()
            optimizer.step()
        if logits.softmax(0)[0] >= 0.9:
            return taken


@pytest.mark.parametrize("noise", [1.0, pytest.param(3.0, marks=pytest.mark.slow)])
@pytest.mark.parametrize("reuse", [3, optimal_weights(2)])
def test_reuse_needs_fewer_samples_on_a_bandit(reuse, noise):
    """As GePPO compares: batches of half the size, of which three or four are learned from."""
    pairs = [(bandit(seed, 1, 32, noise), bandit(seed, reuse, 16, noise)) for seed in range(20)]
    ppo, ours = np.array(pairs).T
    assert ours.mean() < 0.85 * ppo.mean()
    assert (ours < ppo).sum() >= 14  # a chance of 6 % if reuse made no difference
