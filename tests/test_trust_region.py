"""Least and greatest ratio within a trust region: against constrained optimisation, and the policies that attain them."""

import copy
import math

import numpy as np
import pytest
import torch as th
from helpers import FAST, Counter, cartpole, pendulum, train
from hypothesis import example, given
from hypothesis import strategies as st
from sb3_contrib.common.envs import InvalidActionEnvMultiBinary, InvalidActionEnvMultiDiscrete
from scipy.optimize import brentq, minimize
from stable_baselines3.common.distributions import SquashedDiagGaussianDistribution
from stable_baselines3.common.envs import IdentityEnvMultiBinary, IdentityEnvMultiDiscrete
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_klip import KLipMaskablePPO, KLipPPO, KLipRecurrentPPO
from sb3_klip.divergence import gaussian_kl
from sb3_klip.trust_region import (
    categorical_ratio_bounds,
    default_delta,
    factored_ratio_bounds,
    gaussian_ratio_bounds,
)

DELTAS = st.floats(math.log(1e-4), math.log(2)).map(math.exp)


def extreme(log_ratio, kl, delta, unchanged, sign, reach=3):
    """The ratio that constrained optimisation finds, the best of several starts, which do not all lead to it."""
    inside = {"type": "ineq", "fun": lambda x: delta - kl(x)}
    generator, best = np.random.default_rng(0), -math.inf
    for _ in range(8):
        found = minimize(
            lambda x: -sign * log_ratio(x),
            unchanged + 0.1 * math.sqrt(delta) * generator.standard_normal(len(unchanged)),
            method="SLSQP",
            constraints=[inside],
            bounds=[(value - reach, value + reach) for value in unchanged],
            options={"maxiter": 1000, "ftol": 1e-13},
        )
        if kl(found.x) <= delta * (1 + 1e-7):
            best = max(best, sign * log_ratio(found.x))
    return math.exp(sign * best)


# -- Gaussian --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("z", [[0.0], [0.7], [-2.5], [0.0, 0.0, 0.0], [0.3, -1.2, 2.0], [1.0, 1.0, -1.0]], ids=str)
@pytest.mark.parametrize("delta", [0.003, 0.03, 0.3])
def test_gaussian_bounds_are_what_constrained_optimisation_finds(z, delta):
    z, size = np.array(z), len(z)

    def log_ratio(x):
        return np.sum(-x[size:] - ((z - x[:size]) / np.exp(x[size:])) ** 2 / 2 + z**2 / 2)

    def kl(x):
        return np.sum(x[size:] + (1 + x[:size] ** 2) / (2 * np.exp(2 * x[size:])) - 0.5)

    bounds = [bound.item() for bound in gaussian_ratio_bounds(th.tensor(z), delta)]
    for bound, sign in zip(bounds, (-1, 1), strict=True):
        assert bound == pytest.approx(extreme(log_ratio, kl, delta, np.zeros(2 * size), sign), rel=1e-6)


def fitted(z, t):
    """Mean and standard deviation of the fit to N(0, 1), weight 1, and a point mass at z, weight t, by moments."""
    mean = t * z / (1 + t)
    return mean, ((1 + t * z**2) / (1 + t) - mean**2).sqrt()


def log_ratio_of(z, t):
    mean, std = fitted(z, t)
    new, old = th.distributions.Normal(mean, std), th.distributions.Normal(0.0, 1.0)
    return (new.log_prob(z) - old.log_prob(z)).sum().item()


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=6), DELTAS)
@example([0.012], 5.0)  # takes the most iterations
def test_the_gaussian_that_attains_a_bound_is_as_far_away_as_allowed(z, delta):
    z = th.tensor(z, dtype=th.float64)
    pole = 1 / (1 + z.square().max().item())
    for bound, (low, high) in zip(gaussian_ratio_bounds(z, delta), ((-pole * (1 - 1e-13), 0.0), (0.0, 1e6)), strict=True):
        target = bound.log().item()
        t = brentq(lambda t: log_ratio_of(z, t) - target, low, high, xtol=1e-15, rtol=1e-14, maxiter=500)  # noqa: B023
        old = (th.zeros_like(z), th.ones_like(z))
        assert gaussian_kl(old, fitted(z, t)).item() == pytest.approx(delta, rel=1e-6)


def test_gaussian_bounds_in_many_dimensions_and_far_from_the_mean():
    z = 3 * th.randn(500, 17, generator=th.Generator().manual_seed(0))
    for delta in (1e-3, 0.1, 2.0):
        lower, upper = gaussian_ratio_bounds(z, delta)
        assert lower.shape == upper.shape == (500,)
        assert lower.isfinite().all()
        assert (lower < 1).all()
        assert (upper > 1).all()
        smaller = gaussian_ratio_bounds(z, delta / 2)
        assert (smaller[0] > lower).all()
        assert (smaller[1] < upper).all()


# -- discrete --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delta", [0.003, 0.03, 0.3])
def test_categorical_bounds_are_what_constrained_optimisation_finds(delta):
    q = np.array([0.45, 0.3, 0.15, 0.06, 0.04])
    bounds = [bound.tolist() for bound in categorical_ratio_bounds(th.tensor(q), delta)]

    def log_policy(x):  # logits; the last is 0
        logits = np.append(x, 0.0)
        return logits - np.logaddexp.reduce(logits)

    def kl(x):
        return np.sum(q * (np.log(q) - log_policy(x)))

    start = np.log(q[:-1] / q[-1])
    for action in range(5):
        for side, sign in ((0, -1), (1, 1)):
            found = extreme(lambda x: log_policy(x)[action] - np.log(q[action]), kl, delta, start, sign, 9)  # noqa: B023
            assert bounds[side][action] == pytest.approx(found, rel=1e-5)


@given(st.floats(math.log(1e-9), math.log(1 - 1e-9)).map(math.exp), DELTAS)
def test_categorical_bounds_are_the_roots_of_their_equation(q, delta):
    for bound in categorical_ratio_bounds(th.tensor(q, dtype=th.float64), delta):
        r = bound.item()
        if 1e-15 < r < (1 - 1e-12) / q:  # as close to impossible or certain as it can get, elsewhere
            divergence = (1 - q) * (math.log1p(-q) - math.log1p(-q * r)) - q * math.log(r)
            assert divergence == pytest.approx(delta, rel=1e-4)


@pytest.mark.parametrize("q", [[0.5, 0.2], [0.9, 0.05, 0.3], [0.5, 0.5, 0.5]], ids=str)
@pytest.mark.parametrize("delta", [0.003, 0.03, 0.3])
def test_bounds_of_several_variables_are_what_constrained_optimisation_finds(q, delta):
    """Whatever the other values of a variable are, they keep their proportions: each variable is as good as two-valued."""
    q = np.array(q)

    def log_ratio(x):
        return np.sum(-np.log1p(np.exp(-x)) - np.log(q))

    def kl(x):
        return np.sum(q * (np.log(q) + np.log1p(np.exp(-x))) + (1 - q) * (np.log1p(-q) + np.log1p(np.exp(x))))

    bounds = [bound.item() for bound in factored_ratio_bounds(th.tensor(q), delta)]
    for bound, sign in zip(bounds, (-1, 1), strict=True):
        assert bound == pytest.approx(extreme(log_ratio, kl, delta, np.log(q / (1 - q)), sign, 9), rel=1e-5)


def test_one_variable_is_a_categorical_one_and_certain_variables_change_nothing():
    q = th.linspace(0.01, 0.99, 50, dtype=th.float64)
    certain = th.stack([q, th.ones_like(q)], dim=1)
    for bound, alone, beside in zip(
        categorical_ratio_bounds(q, 0.02),
        factored_ratio_bounds(q[:, None], 0.02),
        factored_ratio_bounds(certain, 0.02),
        strict=True,
    ):
        assert th.equal(bound, alone)
        th.testing.assert_close(beside, bound, rtol=1e-12, atol=0)


@pytest.mark.parametrize("solve", [categorical_ratio_bounds, lambda q, delta: gaussian_ratio_bounds(q[:, None], delta)])
def test_ends_of_the_range(solve):
    values = th.tensor([0.0, 1e-300, 1e-9, 0.5, 1 - 1e-9, 1.0], dtype=th.float64)
    for delta in (0.0, 1e-3, 1.0, 50.0):
        lower, upper = solve(values, delta)
        assert not (lower.isnan() | upper.isnan()).any()
        assert ((lower >= 0) & (lower <= 1) & (upper >= 1)).all()
        if delta == 0:
            assert (lower == 1).all()
            assert (upper == 1).all()
    lower, upper = categorical_ratio_bounds(values, 0.02)
    assert upper[-1] == lower[-1] == 1  # a policy that is certain


# -- δ from ε --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epsilon", [0.05, 0.2, 0.5])
@pytest.mark.parametrize("dimensions", [1, 3, 17])
def test_the_default_gives_a_typical_action_the_usual_bound(epsilon, dimensions):
    delta = default_delta("gaussian", epsilon, dimensions)
    assert gaussian_ratio_bounds(th.zeros(dimensions), delta)[1].item() == pytest.approx(1 + epsilon)
    for family in ("categorical", "bernoulli"):
        delta = default_delta(family, epsilon, dimensions)
        assert factored_ratio_bounds(th.full((dimensions,), 0.5), delta)[1].item() == pytest.approx(1 + epsilon)


@pytest.mark.parametrize("dimensions", [1, 2, 17])
def test_the_default_of_small_clip_ranges(dimensions):
    """It tends to ε²/d, without the loss of digits of a difference."""
    for epsilon in (1e-3, 1e-5, 1e-8):
        assert default_delta("gaussian", epsilon, dimensions) == pytest.approx(epsilon**2 / dimensions, rel=2 * epsilon)
        assert default_delta("categorical", epsilon, dimensions) == pytest.approx(epsilon**2 / dimensions / 2, rel=2 * epsilon)


def test_a_probability_that_is_rounded_to_more_than_one():
    bounds = categorical_ratio_bounds(th.tensor([1.0 + 1e-7]), 0.02)
    assert th.stack(bounds).isfinite().all()
    th.testing.assert_close(th.stack(bounds), th.stack(categorical_ratio_bounds(th.tensor([1.0]), 0.02)))


def test_the_default_as_published():
    assert default_delta("gaussian", 0.2, 3) == pytest.approx(0.01154, abs=5e-6)
    assert default_delta("categorical", 0.2, 1) == pytest.approx(-0.5 * math.log(1 - 0.2**2))
    with pytest.raises(ValueError, match="clip_range=1 must be less than 1, unless delta is given"):
        default_delta("categorical", 1, 1)


# -- policies --------------------------------------------------------------------------------------------------------------


class SquashedPolicy(ActorCriticPolicy):
    """With the distribution that SB3 has for SAC."""

    def _build(self, lr_schedule):
        self.action_dist = SquashedDiagGaussianDistribution(1)
        super()._build(lr_schedule)


SQUASHED = {"use_sde": True, "sde_sample_freq": 1, "policy_kwargs": {"squash_output": True}}
POLICIES = {
    "gaussian": (KLipPPO, "MlpPolicy", pendulum, {}),
    "gsde": (KLipPPO, "MlpPolicy", pendulum, {"use_sde": True, "sde_sample_freq": 1}),
    "squashed": (KLipPPO, "MlpPolicy", pendulum, SQUASHED),
    "squashed gaussian": (KLipPPO, SquashedPolicy, pendulum, {}),
    "discrete": (KLipPPO, "MlpPolicy", cartpole, {}),
    "multi-discrete": (KLipPPO, "MlpPolicy", lambda: IdentityEnvMultiDiscrete(3), {}),
    "multi-binary": (KLipPPO, "MlpPolicy", lambda: IdentityEnvMultiBinary(3), {}),
    "masked": (KLipMaskablePPO, "MlpPolicy", Counter, {}),
    "masked multi-discrete": (KLipMaskablePPO, "MlpPolicy", lambda: InvalidActionEnvMultiDiscrete([4, 3], 4), {}),
    "masked multi-binary": (KLipMaskablePPO, "MlpPolicy", lambda: InvalidActionEnvMultiBinary(3, 1), {}),
    "recurrent": (KLipRecurrentPPO, "MlpLstmPolicy", pendulum, {}),
}


def by_place(model, value):
    """What a function tells of each sample of the rollout under the present policy, in the order of the rollout."""
    found = th.zeros(128)
    for samples in model.evaluate_rollout():
        values = value(samples)
        found[samples.indices] = values if samples.mask is None else values[samples.mask]
    return found


@pytest.mark.parametrize("kind", POLICIES)
def test_no_policy_within_the_trust_region_has_a_ratio_outside_the_bounds(kind):
    algorithm, policy, env, kwargs = POLICIES[kind]
    model, _ = train(algorithm, policy, env, 128, **{**FAST, "n_steps": 128}, beta="trgppo", **kwargs)
    lower, upper = model.take_ratio_bounds(0.2, 0.05)
    snapshot = model.take_snapshot()
    old = by_place(model, lambda samples: samples.log_prob)
    before = copy.deepcopy(model.policy.state_dict())
    th.manual_seed(0)
    inside, room = 0, math.inf
    for step in range(30):
        model.policy.load_state_dict(before)
        with th.no_grad():
            for parameter in model.policy.parameters():
                parameter += 0.005 * (step + 1) * th.randn_like(parameter)
            ratio = (by_place(model, lambda samples: samples.log_prob) - old).exp()
            near = by_place(model, lambda samples: snapshot.kl(samples.indices, samples.mask, model.policy)) <= 0.05
        assert (ratio >= lower - 1e-4)[near].all()
        assert (ratio <= upper + 1e-4)[near].all()
        inside += near.sum().item()
        room = min([room, *(upper / ratio)[near].tolist(), *(ratio / lower)[near].tolist()])
    assert inside > 300
    assert room < 1.1  # some come close


@pytest.mark.parametrize("log_kl", [False, True])
def test_bounds_are_computed_once_per_rollout(log_kl, monkeypatch):
    calls = []
    once = KLipPPO.take_ratio_bounds
    monkeypatch.setattr(KLipPPO, "take_ratio_bounds", lambda *args: calls.append(args[1:]) or once(*args))
    _, logs = train(
        KLipPPO, "MlpPolicy", pendulum, 128, **FAST, clip_range=0.1, beta="trgppo", beta_kwargs={"delta": 0.01}, log_kl=log_kl
    )
    assert calls == [(0.1, 0.01)] * 2
    assert 0 < logs.column("train/kill_fraction")[-1] < 1
    assert ("train/kl" in logs.rows[-1]) == log_kl
    train(KLipPPO, "MlpPolicy", cartpole, 128, **FAST, beta="step")
    assert len(calls) == 2


def test_bounds_of_a_rollout_are_those_of_its_actions():
    model, _ = train(KLipPPO, "MlpPolicy", pendulum, 64, **FAST, beta="trgppo")
    bounds = model.take_ratio_bounds(0.2, None)
    for samples in model.evaluate_rollout():
        normal = model.policy.action_dist.distribution
        z = (samples.rollout_data.actions - normal.mean) / normal.stddev
        expected = gaussian_ratio_bounds(z, default_delta("gaussian", 0.2, 1))
        th.testing.assert_close(bounds[:, samples.indices].double(), th.stack(expected), rtol=1e-4, atol=1e-6)
    assert bounds.std(dim=1).min() > 0.01
    base = {"base": "trgppo", "base_kwargs": {"delta": 0.02}}
    product, _ = train(KLipPPO, "MlpPolicy", pendulum, 64, **FAST, beta="position", beta_kwargs=base)
    assert product.beta.delta == 0.02
    assert product.beta.needs_ratio_bounds
