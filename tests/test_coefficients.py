"""Every coefficient against autograd of its published objective, in float64, and what the family promises as a whole.

If an algorithm maximises E[ℓ(w, Â)], its coefficient is β = w (∂ℓ/∂w - Â).
"""

import math

import numpy as np
import pytest
import torch as th
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.distributions import Categorical, Normal, kl_divergence

from sb3_klip.coefficients import Product, available, make
from sb3_klip.divergence import categorical_kl, gaussian_kl
from sb3_klip.surrogate import per_sample_beta, per_sample_kl_loss
from sb3_klip.trust_region import categorical_ratio_bounds, default_delta


def clipped(w, a, low, high):
    return th.min(w * a, w.clamp(1 - low, 1 + high) * a)


def soft_minimum(w, a, clip_range, temperature=0.05):
    x, y = w * a.sign(), w.clamp(1 - clip_range, 1 + clip_range) * a.sign()
    return -temperature * th.logsumexp(-th.stack([x, y]) / temperature, dim=0) * a.abs()


def dual_clipped(w, a, clip_range, bound=3.0):
    objective = clipped(w, a, clip_range, clip_range)
    return th.where(a < 0, th.max(objective, bound * a), objective)


def rolled_back(w, a, clip_range, slope=0.3):
    above = -slope * w + (1 + slope) * (1 + clip_range)
    below = -slope * w + (1 + slope) * (1 - clip_range)
    back = th.where(w >= 1 + clip_range, above, th.where(w <= 1 - clip_range, below, w))
    return th.min(w * a, back * a)


def soft_adapted(w, a, clip_range, tau_pos=1.0, tau_neg=1.05):
    tau = th.full_like(w, tau_neg).masked_fill(a > 0, tau_pos)
    return 4 / tau * th.sigmoid(tau * (w - 1)) * a


def redescended(w, a, clip_range, kappa_plus=10.0, nu=1.2836989988138):
    """The function G of ANO: its slope, κ₊ν(1 - E) / ((1 + E)(E + ν)) with E = e^(α(x - 1 - ε)), integrated by hand."""
    b = 1 + nu + kappa_plus * nu
    alpha = -math.log((-b + math.sqrt(b * b - 4 * (nu - kappa_plus * nu))) / 2) / clip_range
    y = alpha * (th.where(a < 0, 2 - w, w) - 1 - clip_range)
    primitive = y / nu - 2 / (nu - 1) * th.logaddexp(y, 0 * y)
    primitive = primitive + (1 + nu) / (nu * (nu - 1)) * th.logaddexp(y, 0 * y + math.log(nu))
    return kappa_plus * nu / alpha * primitive * a.abs()


def bounded(w, a, clip_range, temperature=0.001):
    best = 1 - clip_range + 2 * clip_range * th.sigmoid(a / temperature)
    return -(w - best).abs() * a.abs()


def weighted(multiplier, w, a):
    """REINFORCE with a weight that has no gradient, as token-level methods publish it; log w is log π and a constant."""
    return multiplier.detach() * w.log() * a


def gradient_preserved(w, a, clip_range, low=0.75, high=1.0):
    inner, constant = w, w.detach()
    above, below = (w > 1 + clip_range) & (a > 0), (w < 1 - clip_range) & (a < 0)
    inner = th.where(above, high * (1 + clip_range) / constant * w, inner)
    return th.where(below, low * (1 - clip_range) / constant * w, inner) * a


def decayed(w, a, clip_range, n=1.0, m=2.0):
    above, below = (w > 1 + clip_range) & (a > 0), (w < 1 - clip_range) & (a < 0)
    weight = th.where(above, ((1 + clip_range) / w) ** (1 / m), th.where(below, (w / (1 - clip_range)) ** n, 1.0))
    return weight.detach() * w * a


def gamma(w, a, k, rate):
    return weighted(w**k * th.exp(rate - rate * w), w, a)


# The objectives as published: ℓ(w, Â) with ε, and where they have kinks, at which autograd splits a gradient in half.
PUBLISHED = {
    "step": (lambda w, a, e: clipped(w, a, e, e), {}, lambda e: [1 - e, 1 + e]),
    "none": (lambda w, a, e: w * a, {}, lambda e: []),
    "soft_min": (soft_minimum, {}, lambda e: [1 - e, 1 + e]),
    "soft_min warm": (lambda w, a, e: soft_minimum(w, a, e, 0.5), {"temperature": 0.5}, lambda e: [1 - e, 1 + e]),
    "clip_higher": (lambda w, a, e: clipped(w, a, 0.2, 0.28), {}, lambda e: [0.8, 1.28]),
    "dual_clip": (dual_clipped, {}, lambda e: [1 - e, 1 + e, 3.0]),
    "rollback": (rolled_back, {}, lambda e: [1 - e, 1 + e]),
    "rollback steep": (lambda w, a, e: rolled_back(w, a, e, 2.0), {"slope": 2.0}, lambda e: [1 - e, 1 + e]),
    "quadratic": (lambda w, a, e: w * a - a.abs() * (w - 1) ** 2 / (2 * e), {}, lambda e: []),
    "smoothing": (lambda w, a, e: (0.9 * w + 0.1) * a, {}, lambda e: []),
    "smoothing more": (lambda w, a, e: (0.4 * w + 0.6) * a, {"alpha": 0.6}, lambda e: []),
    "soft_adaptive": (soft_adapted, {}, lambda e: []),
    "soft_adaptive sharp": (
        lambda w, a, e: soft_adapted(w, a, e, 3.0, 7.0),
        {"tau_pos": 3.0, "tau_neg": 7.0},
        lambda e: [],
    ),
    "redescending": (redescended, {}, lambda e: []),
    "bounded_ratio": (bounded, {}, lambda e: [1 - e, 1, 1 + e]),
    "truncated": (lambda w, a, e: weighted(w.clamp(0, 5), w, a), {}, lambda e: []),
    "truncated both": (lambda w, a, e: weighted(w.clamp(0.7, 1.1), w, a), {"low": 0.3, "high": 0.1}, lambda e: []),
    "tapered": (lambda w, a, e: weighted(th.where(a > 0, 1.0, w.clamp(0, 1)), w, a), {}, lambda e: []),
    "gamma_weighted": (lambda w, a, e: th.where(a > 0, gamma(w, a, 2, 3), gamma(w, a, 3, 2)), {}, lambda e: []),
    "gradient_preserving": (gradient_preserved, {}, lambda e: [1 - e, 1 + e]),
    "gppo": (lambda w, a, e: gradient_preserved(w, a, e, 1.0, 1.0), {}, lambda e: [1 - e, 1 + e]),
    "decoupled_decay": (decayed, {}, lambda e: [1 - e, 1 + e]),
    "decoupled_decay fast": (lambda w, a, e: decayed(w, a, e, 3.0, 0.5), {"n": 3.0, "m": 0.5}, lambda e: [1 - e, 1 + e]),
}


@pytest.mark.parametrize("case", PUBLISHED)
@given(
    w=st.floats(math.log(1e-3), math.log(1e3)).map(math.exp),
    a=st.one_of(st.floats(-10, 10).filter(lambda a: a == 0 or abs(a) > 1e-6), st.just(0.0)),
    epsilon=st.floats(0.01, 0.9),
)
def test_beta_is_that_of_the_published_objective(case, w, a, epsilon):
    objective, parameters, kinks = PUBLISHED[case]
    assume(all(abs(w - kink) > 1e-9 for kink in kinks(epsilon)))
    ratio = th.tensor([w], dtype=th.float64, requires_grad=True)
    advantages = th.tensor([a], dtype=th.float64)
    slope = th.autograd.grad(objective(ratio, advantages, epsilon).sum(), ratio)[0]
    expected = ratio.detach() * (slope - advantages)
    removal, _ = make(case.split()[0], **parameters)(ratio.detach(), advantages, epsilon)
    beta = per_sample_beta(ratio.detach(), advantages, removal)
    th.testing.assert_close(beta, expected, rtol=1e-9, atol=1e-9 * (1 + w * abs(a)))


# -- coefficients that know the probability of the action -------------------------------------------------------------------


def dynamic_bounds(q, low=0.16, high=0.2):
    return 0.5 + 0.5 * math.sqrt(max(1 - 4 * low / q, 0)), 0.5 + 0.5 * math.sqrt(1 + 4 * high / q)


def dynamically_clipped(w, a, q, **parameters):
    lower, upper = dynamic_bounds(q, **parameters)
    return th.min(w * a, w.clamp(lower, upper) * a)


def clipped_by_probability(w, a, q, low=0.2, high=0.2):
    """DPPO's mask: the policy has moved too far, and the step leads on in that direction."""
    masked = ((q * w - q > high) & (a > 0)) | ((q - q * w > low) & (a < 0))
    return th.where(masked, w.detach(), w) * a


def mass_adapted(w, a, q, sigma=1.0, sigma_max=10.0, alpha=0.3, beta_pos=0.03, beta_neg=0.03):
    """MASPO's Gaussian gate on the ratio, which has no gradient."""
    width = min(max(sigma / q**alpha, sigma), sigma_max)
    risk = th.where(a > 0, 1 + beta_pos * a, 1 / (1 - beta_neg * a.clamp(max=0))).clamp(0.1, 10)
    gate = th.exp(-((w - 1) ** 2) / (2 * (width * risk) ** 2))
    outward = ((a > 0) & (w > 1)) | ((a < 0) & (w < 1))
    return th.where(outward, gate, 1.0).detach() * w * a


#: Objective, where it has kinks, and parameters that differ from the defaults.
OF_PROBABILITIES = {
    "dynamic_clip": (dynamically_clipped, dynamic_bounds, {"low": 0.1, "high": 0.3}),
    "probability_clip": (
        *(clipped_by_probability, lambda q, low=0.2, high=0.2: (1 - low / q, 1 + high / q)),
        {"low": 0.1, "high": 0.3},
    ),
    "mass_adaptive": (
        *(mass_adapted, lambda q, **parameters: (1.0,)),
        {"sigma": 0.5, "sigma_max": 5.0, "alpha": 0.6, "beta_pos": 0.02, "beta_neg": 0.05},
    ),
}


@pytest.mark.parametrize("given_parameters", [False, True], ids=["defaults", "other parameters"])
@pytest.mark.parametrize("name", OF_PROBABILITIES)
@given(
    w=st.floats(math.log(1e-3), math.log(1e3)).map(math.exp),
    a=st.floats(-400, 400).filter(lambda a: a == 0 or abs(a) > 1e-6),
    q=st.floats(math.log(1e-6), 0).map(math.exp),
)
def test_beta_is_that_of_the_published_objective_of_probabilities(name, given_parameters, w, a, q):
    objective, kinks, others = OF_PROBABILITIES[name]
    parameters = others if given_parameters else {}
    assume(all(abs(w - kink) > 1e-9 * (1 + kink) for kink in kinks(q, **parameters)))
    ratio = th.tensor([w], dtype=th.float64, requires_grad=True)
    advantages, old_log_prob = th.tensor([a], dtype=th.float64), th.tensor([math.log(q)], dtype=th.float64)
    slope = th.autograd.grad(objective(ratio, advantages, q, **parameters).sum(), ratio)[0]
    removal, _ = make(name, **parameters)(ratio.detach(), advantages, 0.2, old_log_prob=old_log_prob)
    beta = per_sample_beta(ratio.detach(), advantages, removal)
    th.testing.assert_close(beta, ratio.detach() * (slope - advantages), rtol=1e-9, atol=1e-9 * (1 + w * abs(a)))


@given(
    w=st.floats(math.log(1e-2), math.log(1e2)).map(math.exp),
    a=st.floats(-10, 10).filter(lambda a: abs(a) > 1e-6),
    least=st.floats(0, 1),
    greatest=st.floats(1, 50),
    epsilon=st.floats(0.01, 0.9),
)
def test_beta_is_that_of_the_objective_clipped_at_the_bounds_of_a_trust_region(w, a, least, greatest, epsilon):
    """TRGPPO's clip, whose range is at least PPO-Clip's."""
    lower, upper = min(least, 1 - epsilon), max(greatest, 1 + epsilon)
    assume(abs(w - lower) > 1e-9 and abs(w - upper) > 1e-9)
    ratio, advantages, least, greatest = (th.tensor([x], dtype=th.float64) for x in (w, a, least, greatest))
    ratio.requires_grad_()
    objective = th.min(ratio * advantages, ratio.clamp(lower, upper) * advantages)
    expected = ratio.detach() * (th.autograd.grad(objective.sum(), ratio)[0] - advantages)
    removal, _ = make("trgppo")(ratio.detach(), advantages, epsilon, least_ratio=least, greatest_ratio=greatest)
    th.testing.assert_close(per_sample_beta(ratio.detach(), advantages, removal), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("kappa_plus", "kappa_minus"), [(10.0, -1.5), (3.0, -0.5), (30.0, -20.0), (1.5, -1.4)])
def test_the_slope_of_redescending_is_what_its_parameters_say(kappa_plus, kappa_minus):
    """ANO's four conditions, from which its two hidden constants follow."""
    coefficient = make("redescending", kappa_plus=kappa_plus, kappa_minus=kappa_minus)
    w = th.cat([th.tensor([1.0, 1.2, -500.0], dtype=th.float64), th.linspace(0, 30, 3_000_001, dtype=th.float64)])
    slope = 1 - coefficient(w, th.ones_like(w), 0.2)[0]
    th.testing.assert_close(slope[:3], th.tensor([1.0, 0.0, kappa_plus], dtype=th.float64), rtol=0, atol=1e-9)
    assert slope.min().item() == pytest.approx(kappa_minus, abs=1e-6)
    th.testing.assert_close(1 - coefficient(2 - w, -th.ones_like(w), 0.2)[0], slope, rtol=0, atol=1e-9)


# Shapes that are published as a removal: values worked out by hand from g = clamp(d/δ, 0, 1), σ(d/τ) and (1-p)·1[outside],
# with ε = 0.2. Columns: w, Â, removal.
SIGMOID_OF_1 = 0.7310585786300049
BY_HAND = {
    ("linear_ramp", 0.05): [
        (1.21, 1, 0.2),
        (1.3, 1, 1),
        (1.2, 1, 0),
        (0.79, -1, 0.2),
        (0.7, -2, 1),
        (1.3, -1, 0),
        (0.5, 1, 0),
    ],
    ("linear_ramp", 0.1): [(1.25, 3, 0.5), (0.75, -3, 0.5), (1.0, 1, 0.0)],
    ("sigmoid", 0.05): [(1.2, 1, 0.5), (1.25, 1, SIGMOID_OF_1), (1.15, 1, 1 - SIGMOID_OF_1), (0.75, -1, SIGMOID_OF_1)],
    ("sigmoid", 0.01): [(1.21, 1, SIGMOID_OF_1), (0.8, -4, 0.5)],
    ("soft_min", 0.05): [(1.25, 1, SIGMOID_OF_1), (1.25, -1, 1 - SIGMOID_OF_1), (0.75, -1, SIGMOID_OF_1), (1.1, 1, 0)],
}


@pytest.mark.parametrize("key", BY_HAND, ids=str)
def test_removal_by_hand(key):
    name, value = key
    ratio, advantages, expected = th.tensor(BY_HAND[key], dtype=th.float64).T
    parameter = "width" if name == "linear_ramp" else "temperature"
    removal, _ = make(name, **{parameter: value})(ratio, advantages, 0.2)
    th.testing.assert_close(removal, expected, rtol=0, atol=1e-12)


def test_asymmetric_by_hand():
    ratio = th.tensor([1.25, 1.35, 0.79, 0.81, 1.25], dtype=th.float64)
    advantages = th.tensor([1.0, 1.0, -1.0, -1.0, -1.0], dtype=th.float64)
    removal, _ = make("asymmetric")(ratio, advantages, 0.2)
    th.testing.assert_close(removal, th.tensor([0.5, 1.0, 1.0, 0.0, 0.0], dtype=th.float64))
    removal, _ = make("asymmetric", width_up=0.0, width_down=0.02)(ratio, advantages, 0.2)
    th.testing.assert_close(removal, th.tensor([1.0, 1.0, 0.5, 0.0, 0.0], dtype=th.float64))


@pytest.mark.parametrize(
    ("limit", "parameters", "reference"),
    [
        ("linear_ramp", {"width": 0}, "step"),
        ("asymmetric", {"width_up": 0, "width_down": 0}, "step"),
        ("rollback", {"slope": 0}, "step"),
        ("clip_higher", {"low": 0.2, "high": 0.2}, "step"),
        ("position", {"start": 1.0, "end": 1.0}, "step"),
        ("smoothing", {"alpha": 0}, "none"),
        ("gradient_preserving", {"low": 0, "high": 0}, "step"),
        ("bounded_ratio", {"temperature": 1e-9}, "rollback steep"),
        ("asymmetric", {"width_up": 0.05, "width_down": 0.05}, "linear_ramp"),
        ("dual_clip", {"bound": 100}, "step"),
        ("truncated", {"low": 1, "high": 100}, "none"),
        ("gamma_weighted", {"k_pos": 1, "lambda_pos": 0, "k_neg": 1, "lambda_neg": 0}, "none"),
        ("truly", {"alpha": 0}, "none"),
        ("probability_clip", {"low": 0.2, "high": 0.28}, "clip_higher"),
        ("trust_region_guided", {}, "step"),
    ],
)
def test_limits_are_the_same_bits(limit, parameters, reference):
    """For an action of probability 1, and a trust region that admits no change."""
    generator = th.Generator().manual_seed(0)
    ratio = th.cat([th.exp(th.randn(1000, generator=generator) * 0.3), th.tensor([1.2, 0.8, 1.0])])
    advantages = th.randn(1003, generator=generator)
    zeros, ones = th.zeros_like(ratio), th.ones_like(ratio)
    quantities = {"kl": ones, "position": zeros, "old_log_prob": zeros, "least_ratio": ones, "greatest_ratio": ones}
    expected = make("rollback", slope=1.0) if reference == "rollback steep" else make(reference)
    removal, _ = make(limit, **parameters)(ratio, advantages, 0.2, **quantities)
    assert th.equal(removal, expected(ratio, advantages, 0.2)[0])
    assert removal.any() == (reference != "none")


def test_limits_that_are_approached():
    ratio = th.tensor([1.3, 0.6, 1.1, 1.3], dtype=th.float64)
    advantages = th.tensor([1.0, -1.0, 1.0, -1.0], dtype=th.float64)
    step, none = make("step")(ratio, advantages, 0.2)[0], make("none")(ratio, advantages, 0.2)[0]
    th.testing.assert_close(make("linear_ramp", width=1e9)(ratio, advantages, 0.2)[0], none, atol=1e-8, rtol=0)
    for name in ("sigmoid", "soft_min"):
        th.testing.assert_close(make(name, temperature=1e-3)(ratio, advantages, 0.2)[0], step, atol=1e-12, rtol=0)
    th.testing.assert_close(make("decoupled_decay", n=300, m=1 / 300)(ratio, advantages, 0.2)[0], step, atol=1e-9, rtol=0)
    for name, parameters in (
        ("soft_adaptive", {"tau_pos": 1e-5, "tau_neg": 1e-5}),
        ("mass_adaptive", {"sigma": 1e5, "sigma_max": 1e5}),
    ):
        removal, _ = make(name, **parameters)(ratio, advantages, 0.2, old_log_prob=th.zeros_like(ratio))
        th.testing.assert_close(removal, none, atol=1e-9, rtol=0)


SOME_RATIOS = th.linspace(0.005, 1.995, 200, dtype=th.float64)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_for_one_of_two_even_actions_the_ratio_says_what_the_divergence_says(sign):
    """`trust_region` is `step` with another ε, and `trust_region_guided` has the very band of `step`."""
    advantages = th.full_like(SOME_RATIOS, sign)
    half = th.full_like(SOME_RATIOS, 0.5)
    kl = -0.5 * (SOME_RATIOS * (2 - SOME_RATIOS)).log()
    removal, _ = make("trust_region", delta=0.035)(SOME_RATIOS, advantages, 0.2, kl=kl)
    epsilon = math.sqrt(1 - math.exp(-2 * 0.035))
    assert th.equal(removal, make("step")(SOME_RATIOS, advantages, epsilon)[0])
    least, greatest = categorical_ratio_bounds(half, default_delta("categorical", 0.2, 1))
    th.testing.assert_close(least, th.full_like(half, 0.8))
    th.testing.assert_close(greatest, th.full_like(half, 1.2))


@given(q=st.floats(0.7, 1))
def test_dynamic_clip_bounds_w_times_what_probability_clip_bounds(q):
    old_log_prob = th.full_like(SOME_RATIOS, math.log(q))
    good, bad = th.ones_like(SOME_RATIOS), -th.ones_like(SOME_RATIOS)
    change = q * SOME_RATIOS * (SOME_RATIOS - 1)
    removal, _ = make("dynamic_clip")(SOME_RATIOS, good, 0.2, old_log_prob=old_log_prob)
    assert th.equal(removal == 1, change > 0.2)
    removal, _ = make("dynamic_clip")(SOME_RATIOS, bad, 0.2, old_log_prob=old_log_prob)
    assert th.equal(removal == 1, (change < -0.16) | (SOME_RATIOS < 0.5))  # q w (1 - w) falls again


def test_tapered_is_truncated_for_bad_actions_and_supervised_for_good_ones():
    bad, good = -th.ones_like(SOME_RATIOS), th.ones_like(SOME_RATIOS)
    truncated, _ = make("truncated", low=1, high=0)(SOME_RATIOS, bad, 0.2)
    assert th.equal(make("tapered")(SOME_RATIOS, bad, 0.2)[0], truncated)
    removal, _ = make("tapered")(SOME_RATIOS, good, 0.2)
    th.testing.assert_close(SOME_RATIOS * (1 - removal), good)  # log π(a) by itself


def test_redescending_and_quadratic_agree_at_one_and_at_the_harmful_bound():
    for sign in (1.0, -1.0):
        ratio = th.tensor([1.0, 1 + sign * 0.2], dtype=th.float64)
        for name in ("redescending", "quadratic"):
            removal, _ = make(name)(ratio, th.full_like(ratio, sign), 0.2)
            th.testing.assert_close(removal, th.tensor([0.0, 1.0], dtype=th.float64), rtol=0, atol=1e-9)


def test_adaptive_is_fixed_until_an_update_has_ended():
    ones = th.ones(3)
    fixed, adaptive = make("fixed", value=2.0), make("adaptive", initial=2.0)
    assert th.equal(adaptive(ones, ones, 0.2)[1], fixed(ones, ones, 0.2)[1])
    adaptive.end_update(1.0)
    assert not th.equal(adaptive(ones, ones, 0.2)[1], fixed(ones, ones, 0.2)[1])


# -- coefficients that use the KL divergence, end to end -------------------------------------------------------------------


class GaussianPolicy:
    """Mean linear in the state, one standard deviation per dimension."""

    def __init__(self, generator):
        self.states = th.randn(40, 3, generator=generator, dtype=th.float64)
        self.parameters = [
            th.randn(3, 2, generator=generator, dtype=th.float64).mul_(0.5).requires_grad_(),
            th.zeros(2, dtype=th.float64, requires_grad=True),
        ]

    def distribution(self):
        weight, log_std = self.parameters
        return Normal(self.states @ weight, log_std.exp())

    def log_prob(self, actions):
        return self.distribution().log_prob(actions).sum(-1)

    def published_kl(self, old):
        return kl_divergence(old, self.distribution()).sum(-1)

    def closed_form(self, old):
        new = self.distribution()
        return gaussian_kl((old.mean, old.stddev), (new.mean, new.stddev))


class CategoricalPolicy(GaussianPolicy):
    """Logits linear in the state."""

    def __init__(self, generator):
        super().__init__(generator)
        self.parameters = [th.randn(3, 4, generator=generator, dtype=th.float64).requires_grad_()]

    def distribution(self):
        return Categorical(logits=self.states @ self.parameters[0])

    def log_prob(self, actions):
        return self.distribution().log_prob(actions)

    def published_kl(self, old):
        return kl_divergence(old, self.distribution())

    def closed_form(self, old):
        return categorical_kl((old.logits,), (self.distribution().logits,))


def frozen_batch(kind, seed=0, shift=0.1):
    """A policy that has moved away from the one that acted."""
    generator = th.Generator().manual_seed(seed)
    policy = kind(generator)
    with th.random.fork_rng():
        th.manual_seed(seed)
        actions = policy.distribution().sample()
    old_log_prob = policy.log_prob(actions).detach()
    with th.no_grad():
        old = policy.distribution()
        for parameter in policy.parameters:
            parameter += shift * th.randn(parameter.shape, generator=generator, dtype=th.float64)
    advantages = th.randn(40, generator=generator, dtype=th.float64)
    return policy, old, actions, old_log_prob, advantages


def published_penalty(name, ratio, advantages, kl):
    """E[...] to maximise, as the papers have it."""
    leading_away = (ratio * advantages > advantages).detach()
    if name == "fixed":
        return ratio * advantages - 1.5 * kl
    if name == "trust_region":
        return th.min(ratio * advantages, th.where(kl < 0.05, ratio, 1.0) * advantages)
    return ratio * advantages - th.where(leading_away & (kl >= 0.05), 4.0 * kl, 0.05)


@pytest.mark.parametrize("kind", [GaussianPolicy, CategoricalPolicy])
@pytest.mark.parametrize(
    ("name", "parameters"),
    [("fixed", {"value": 1.5}), ("trust_region", {"delta": 0.05}), ("truly", {"delta": 0.05, "alpha": 4.0})],
)
def test_penalties_have_the_published_gradient(kind, name, parameters):
    policy, old, actions, old_log_prob, advantages = frozen_batch(kind)
    ratio = (policy.log_prob(actions) - old_log_prob).exp()
    kl = policy.published_kl(old)
    assert 0 < (kl >= 0.05).sum() < 40  # both sides of the trust region are there
    expected = th.autograd.grad(-published_penalty(name, ratio, advantages, kl).mean(), policy.parameters)
    loss = per_sample_kl_loss(
        policy.log_prob(actions), old_log_prob, advantages, make(name, **parameters), kl=policy.closed_form(old)
    )
    for ours, theirs in zip(th.autograd.grad(loss, policy.parameters), expected, strict=True):
        th.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_sampled_estimates_are_a_coefficient_of_the_score(estimator):
    """β = +b for k1 and -b (w - 1) for k3."""
    policy, _, actions, old_log_prob, advantages = frozen_batch(GaussianPolicy)
    log_prob = policy.log_prob(actions).detach().requires_grad_()
    ratio = (log_prob - old_log_prob).exp().detach()
    coefficient = make("fixed", value=1.5, estimator=estimator)
    loss = per_sample_kl_loss(log_prob, old_log_prob, advantages, coefficient)
    removal, weight = coefficient(ratio, advantages, 0.2)
    beta = per_sample_beta(ratio, advantages, removal, weight, estimator)
    th.testing.assert_close(beta, th.full_like(ratio, 1.5) if estimator == "k1" else -1.5 * (ratio - 1))
    th.testing.assert_close(th.autograd.grad(loss, log_prob)[0], -(ratio * advantages + beta) / 40)


def test_a_weight_on_the_analytic_divergence_is_no_coefficient_of_the_score():
    ratio, advantages, removal = th.tensor([0.5, 1.5]), th.tensor([1.0, 2.0]), th.tensor([0.0, 1.0])
    expected = per_sample_beta(ratio, advantages, removal)
    assert expected.tolist() == [0.0, -3.0]
    assert th.equal(per_sample_beta(ratio, advantages, removal, th.tensor(7.0), "analytic"), expected)


@pytest.mark.parametrize("kind", [GaussianPolicy, CategoricalPolicy])
def test_adaptive_follows_an_independent_ppo_kl(kind):
    """Four updates of four steps on frozen batches, β adapted after each, against PPO-KL written down plainly."""
    coefficient, b, history = make("adaptive", initial=1.0, kl_target=0.01), 1.0, []
    for update, shift in enumerate((0.3, 0.3, 0.0, 0.0)):
        policy, old, actions, old_log_prob, advantages = frozen_batch(kind, update, shift)
        twin = frozen_batch(kind, update, shift)[0]
        ours, theirs = th.optim.Adam(policy.parameters, 0.01), th.optim.Adam(twin.parameters, 0.01)
        for _ in range(4):
            ours.zero_grad()
            kl = policy.closed_form(old)
            per_sample_kl_loss(policy.log_prob(actions), old_log_prob, advantages, coefficient, kl=kl).backward()
            ours.step()
            theirs.zero_grad()
            ratio = (twin.log_prob(actions) - old_log_prob).exp()
            (-(ratio * advantages).mean() + b * twin.published_kl(old).mean()).backward()
            theirs.step()
        coefficient.end_update(policy.closed_form(old).mean().item())
        final = twin.published_kl(old).mean().item()
        b = b * 2 if final > 0.015 else b / 2 if final < 0.01 / 1.5 else b
        assert coefficient.state_dict() == {"value": b}
        history.append(b)
        for mine, other in zip(policy.parameters, twin.parameters, strict=True):
            th.testing.assert_close(mine, other, rtol=1e-8, atol=1e-10)
    assert history == [2.0, 4.0, 2.0, 1.0]


def test_adaptive_stays_within_its_bounds():
    coefficient = make("adaptive")
    for kl, bound in ((10.0, 1e4), (0.0, 1e-4)):
        for _ in range(50):
            coefficient.end_update(kl)
        assert coefficient.state_dict() == {"value": bound}
    coefficient.load_state_dict({"value": 3.0})
    coefficient.end_update(0.02)  # on target
    assert coefficient.state_dict() == {"value": 3.0}


# -- products --------------------------------------------------------------------------------------------------------------


def test_scheduled_base_of_a_composition():
    coefficient = make("position", base="smoothing", base_kwargs={"alpha": "lin_0.5"}, start=0.0, end=1.0, horizon=10)
    coefficient.set_progress(0.5)
    ones = th.ones(3)
    removal, _ = coefficient(ones, ones, 0.2, position=th.tensor([0.0, 5.0, 100.0]))
    th.testing.assert_close(removal, th.tensor([0.0, 0.125, 0.25]))


def test_composition_with_a_penalty():
    coefficient = make("position", base="adaptive", base_kwargs={"estimator": "k3"}, start=0.5, end=0.5)
    assert (coefficient.estimator, coefficient.learns, coefficient.requests) == ("k3", True, ("position",))
    coefficient.end_update(1.0)
    _, weight = coefficient(th.ones(2), th.ones(2), 0.2, position=th.zeros(2))
    assert weight.tolist() == [1.0, 1.0]
    assert coefficient.state_dict() == {"value": 2.0}
    assert repr(coefficient).endswith("horizon=1000.0), now value=2.0")
    assert make("position", base="trust_region").requests == ("position", "kl")


@pytest.mark.parametrize("factor", [make("fixed", estimator="k3"), make("adaptive"), make("espo")], ids=repr)
def test_a_factor_is_a_removal_alone(factor):
    with pytest.raises(ValueError, match="must have no weight on a KL estimate, no state and no stop"):
        Product(make("step"), factor, "mine", {})


def test_a_product_needs_what_one_of_both_needs():
    step = make("step")
    for factor in (make("soft_adaptive"), make("quadratic")):
        for product in (Product(step, factor, "mine", {}), Product(factor, step, "mine", {})):
            for need in ("needs_policy_ratio", "needs_clip_range"):
                assert getattr(product, need) == getattr(factor, need)
    wide, narrow = (make("trust_region_guided", delta=delta) for delta in (0.1, 0.01))
    with pytest.raises(ValueError, match="must have the same delta"):
        Product(wide, narrow, "mine", {})
    assert Product(wide, make("trust_region_guided", delta=0.1), "mine", {}).delta == 0.1


def test_a_product_is_the_first_coefficient_times_the_removal_of_the_second():
    base, factor = make("adaptive", initial=3.0, estimator="k3"), make("linear_ramp", width=0.1)
    product = Product(base, factor, "mine", {"a": 1})
    ratio, advantages = th.tensor([1.25, 1.3, 1.0]), th.ones(3)
    removal, weight = product(ratio, advantages, 0.2)
    assert removal.tolist() == [0.0, 0.0, 0.0]
    th.testing.assert_close(weight, th.tensor([1.5, 3.0, 0.0]))
    assert (repr(product), product.estimator, product.learns, product.requests) == ("mine(a=1)", "k3", True, ())
    product.end_update(1.0)
    assert product.state_dict() == base.state_dict() == {"value": 6.0}
    product.load_state_dict({"value": 2.0})
    assert base.state_dict() == {"value": 2.0}

    both = Product(make("trust_region"), make("smoothing", alpha="lin_0.5"), "both", {})
    assert (both.needs_kl, both.learns, both.estimator) == (True, False, None)
    both.set_progress(0.5)
    removal, weight = both(ratio, advantages, 0.2, kl=th.ones(3))
    assert weight is None
    th.testing.assert_close(removal, th.tensor([0.25, 0.25, 0.0]))
    assert not both.stop(ratio)
    assert Product(make("espo"), make("step"), "stops", {}).stop(th.full((3,), 2.0))


# -- hostile input ---------------------------------------------------------------------------------------------------------


HOSTILE = th.tensor([0.0, 1e-30, 0.8, 1.0, 1.2, 1e30, math.inf])
#: Coefficients that reverse a gradient, or make it stronger.
BEYOND_0_AND_1 = {
    *("quadratic", "rollback", "redescending", "bounded_ratio"),
    *("tapered", "gamma_weighted", "gradient_preserving"),
}


@pytest.mark.parametrize("advantage", [-1.0, 0.0, 1.0])
@pytest.mark.parametrize(
    ("name", "clip_range"),
    # Where a coefficient needs ε > 0, ε is refused, or held above 0, before it gets there.
    [(name, e) for name in available() for e in (0.2, 1e-8, 0.0, -0.1) if e > 0 or not make(name).needs_clip_range],
)
def test_removals_of_hostile_ratios(name, advantage, clip_range):
    """Finite ratios give finite removals, most of them a share of the gradient, however improbable the action was."""
    ratio = HOSTILE[:-1]
    zeros = th.zeros_like(ratio)
    for log_prob, greatest in ((0.0, 1.0), (-30.0, 1e12), (-200.0, math.inf)):
        old_log_prob, greatest_ratio = th.full_like(ratio, log_prob), th.full_like(ratio, greatest)
        quantities = {"old_log_prob": old_log_prob, "least_ratio": zeros, "greatest_ratio": greatest_ratio}
        removal, weight = make(name)(ratio, th.full_like(ratio, advantage), clip_range, kl=zeros, position=zeros, **quantities)
        assert removal.isfinite().all()
        assert (weight is None) or weight.isfinite().all()
        if name not in BEYOND_0_AND_1:
            assert ((removal >= 0) & (removal <= 1)).all()


@pytest.mark.parametrize(
    "name",
    [
        *("step", "linear_ramp", "sigmoid", "soft_min", "asymmetric", "clip_higher", "dual_clip", "soft_adaptive"),
        *("redescending", "gamma_weighted", "dynamic_clip", "probability_clip", "mass_adaptive"),
    ],
)
def test_an_infinite_ratio_that_is_removed_leaves_finite_gradients(name):
    log_prob = th.tensor([200.0, 0.1], requires_grad=True)
    gradient = th.autograd.grad(per_sample_kl_loss(log_prob, th.zeros(2), th.ones(2), name), log_prob)[0]
    assert gradient[0] == 0
    assert gradient.isfinite().all()


@pytest.mark.parametrize("name", [name for name in available() if make(name).estimator is None])
def test_an_infinite_ratio_without_an_advantage_has_no_gradient(name):
    log_prob, quantities = th.tensor([200.0, 0.1], requires_grad=True), {}
    for asked in {*make(name).requests} - {"progress", "old_log_prob"}:
        quantities[asked] = th.ones(2)
    loss = per_sample_kl_loss(log_prob, th.zeros(2), th.tensor([0.0, 1.0]), name, **quantities)
    gradient = th.autograd.grad(loss, log_prob)[0]
    assert gradient[0] == 0
    assert gradient.isfinite().all()


@pytest.mark.parametrize("name", ["none", "quadratic", "rollback", "smoothing", "bounded_ratio"])
def test_an_infinite_published_gradient_is_not_hidden(name):
    log_prob = th.tensor([200.0], requires_grad=True)
    gradient = th.autograd.grad(per_sample_kl_loss(log_prob, th.zeros(1), th.ones(1), name), log_prob)[0]
    assert not gradient.isfinite().any()


@pytest.mark.parametrize("name", available())
def test_one_sample_and_uniform_batches(name):
    for shift in (0.0, 3.0, -3.0):  # none killed, all killed or passed
        for size in (1, 5):
            log_prob = th.full((size,), shift, requires_grad=True)
            zeros = th.zeros(size)
            loss = per_sample_kl_loss(
                log_prob,
                zeros,
                th.ones(size),
                name,
                kl=log_prob.square(),
                position=zeros,
                least_ratio=zeros + 0.7,
                greatest_ratio=zeros + 1.3,
            )
            assert th.autograd.grad(loss, log_prob)[0].isfinite().all()


def test_models_with_the_same_base_share_no_state():
    base = make("adaptive")
    first, second = (make("position", base=base) for _ in range(2))
    first.end_update(10.0)
    assert first.state_dict() != second.state_dict() == base.state_dict()


def test_numbers_of_numpy_are_parameters():
    assert make("linear_ramp", width=np.float64(0.1)).parameters == {"width": 0.1}
    assert isinstance(make("linear_ramp", width=np.float32(0.1)).parameters["width"], float)


def test_a_whole_number_stays_one():
    def repeated(ratio, advantages, clip_range, *, times=2):
        return sum(ratio for _ in range(times))

    assert make(repeated, times=3)(th.ones(2), th.ones(2), 0.2)[0].tolist() == [3, 3]
