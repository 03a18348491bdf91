"""
Every coefficient against autograd of its published objective, in float64, and what the family promises as a whole.

If an algorithm maximises E[ℓ(w, Â)], its coefficient is β = w (∂ℓ/∂w - Â).
"""

import math

import pytest
import torch as th
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.distributions import Categorical, Normal, kl_divergence

from sb3_klip.coefficients import Coefficient, available, make, register
from sb3_klip.coefficients.parameters import NonNegative
from sb3_klip.divergence import bernoulli_kl, categorical_kl, gaussian_kl
from sb3_klip.surrogate import clip_loss, per_sample_beta, per_sample_kl_loss

settings.register_profile("suite", deadline=None)
settings.load_profile("suite")


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
    gate, _ = make(case.split()[0], **parameters)(ratio.detach(), advantages, epsilon)
    beta = per_sample_beta(ratio.detach(), advantages, gate)
    th.testing.assert_close(beta, expected, rtol=1e-9, atol=1e-9 * (1 + w * abs(a)))


# Shapes that are published as a gate: values worked out by hand from g = clamp(d/δ, 0, 1), σ(d/τ) and (1-p)·1[outside],
# with ε = 0.2. Columns: w, Â, gate.
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
def test_gate_by_hand(key):
    name, value = key
    ratio, advantages, expected = th.tensor(BY_HAND[key], dtype=th.float64).T
    parameter = "width" if name == "linear_ramp" else "temperature"
    gate, _ = make(name, **{parameter: value})(ratio, advantages, 0.2)
    th.testing.assert_close(gate, expected, rtol=0, atol=1e-12)


def test_asymmetric_by_hand():
    ratio = th.tensor([1.25, 1.35, 0.79, 0.81, 1.25], dtype=th.float64)
    advantages = th.tensor([1.0, 1.0, -1.0, -1.0, -1.0], dtype=th.float64)
    gate, _ = make("asymmetric")(ratio, advantages, 0.2)
    th.testing.assert_close(gate, th.tensor([0.5, 1.0, 1.0, 0.0, 0.0], dtype=th.float64))
    gate, _ = make("asymmetric", width_up=0.0, width_down=0.02)(ratio, advantages, 0.2)
    th.testing.assert_close(gate, th.tensor([1.0, 1.0, 0.5, 0.0, 0.0], dtype=th.float64))


@pytest.mark.parametrize(
    ("limit", "parameters", "reference"),
    [
        ("linear_ramp", {"width": 0}, "step"),
        ("asymmetric", {"width_up": 0, "width_down": 0}, "step"),
        ("rollback", {"slope": 0}, "step"),
        ("clip_higher", {"low": 0.2, "high": 0.2}, "step"),
        ("position", {"start": 1.0, "end": 1.0}, "step"),
        ("smoothing", {"alpha": 0}, "none"),
    ],
)
def test_limits_are_the_same_bits(limit, parameters, reference):
    generator = th.Generator().manual_seed(0)
    ratio = th.cat([th.exp(th.randn(1000, generator=generator) * 0.3), th.tensor([1.2, 0.8, 1.0])])
    advantages = th.randn(1003, generator=generator)
    position = th.zeros_like(ratio)
    gate, _ = make(limit, **parameters)(ratio, advantages, 0.2, position=position)
    assert th.equal(gate, make(reference)(ratio, advantages, 0.2)[0])


def test_limits_that_are_approached():
    ratio = th.tensor([1.3, 0.6, 1.1, 1.3], dtype=th.float64)
    advantages = th.tensor([1.0, -1.0, 1.0, -1.0], dtype=th.float64)
    step, none = make("step")(ratio, advantages, 0.2)[0], make("none")(ratio, advantages, 0.2)[0]
    th.testing.assert_close(make("linear_ramp", width=1e9)(ratio, advantages, 0.2)[0], none, atol=1e-8, rtol=0)
    for name in ("sigmoid", "soft_min"):
        th.testing.assert_close(make(name, temperature=1e-3)(ratio, advantages, 0.2)[0], step, atol=1e-12, rtol=0)


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
    gate, weight = coefficient(ratio, advantages, 0.2)
    beta = per_sample_beta(ratio, advantages, gate, weight, estimator)
    th.testing.assert_close(beta, th.full_like(ratio, 1.5) if estimator == "k1" else -1.5 * (ratio - 1))
    th.testing.assert_close(th.autograd.grad(loss, log_prob)[0], -(ratio * advantages + beta) / 40)


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


@given(st.lists(st.floats(-8, 8), min_size=2, max_size=2), st.lists(st.floats(-8, 8), min_size=2, max_size=2))
def test_bernoulli_divergence(old, new):
    old, new = th.tensor([old], dtype=th.float64), th.tensor([new], dtype=th.float64)
    expected = kl_divergence(th.distributions.Bernoulli(logits=old), th.distributions.Bernoulli(logits=new)).sum(-1)
    th.testing.assert_close(bernoulli_kl((old,), (new,)), expected, rtol=1e-9, atol=1e-9)


def test_divergences_of_several_variables_add_up():
    generator = th.Generator().manual_seed(0)
    old, new = ([th.randn(5, k, generator=generator) for k in (2, 3)] for _ in range(2))
    parts = [kl_divergence(Categorical(logits=a), Categorical(logits=b)) for a, b in zip(old, new, strict=True)]
    th.testing.assert_close(categorical_kl(tuple(old), tuple(new)), sum(parts))


# -- hostile input ---------------------------------------------------------------------------------------------------------

HOSTILE = th.tensor([0.0, 1e-30, 0.8, 1.0, 1.2, 1e30, math.inf])


@pytest.mark.parametrize("advantage", [-1.0, 0.0, 1.0])
@pytest.mark.parametrize(
    ("name", "clip_range"),
    # Where a coefficient needs ε > 0, ε is refused, or held above 0, before it gets there.
    [(name, e) for name in available() for e in (0.2, 1e-8, 0.0, -0.1) if e > 0 or not make(name).needs_clip_range],
)
def test_gates_of_hostile_ratios(name, advantage, clip_range):
    """Finite ratios give finite gates, of which only those of `quadratic` and `rollback` exceed 1."""
    ratio = HOSTILE[:-1]
    zeros = th.zeros_like(ratio)
    gate, weight = make(name)(ratio, th.full_like(ratio, advantage), clip_range, kl=zeros, position=zeros)
    assert gate.isfinite().all()
    assert (weight is None) or weight.isfinite().all()
    if name not in ("quadratic", "rollback"):
        assert ((gate >= 0) & (gate <= 1)).all()


@pytest.mark.parametrize(
    "name", ["step", "linear_ramp", "sigmoid", "soft_min", "asymmetric", "clip_higher", "dual_clip", "soft_adaptive"]
)
def test_an_infinite_ratio_that_is_removed_leaves_finite_gradients(name):
    log_prob = th.tensor([200.0, 0.1], requires_grad=True)
    gradient = th.autograd.grad(per_sample_kl_loss(log_prob, th.zeros(2), th.ones(2), name), log_prob)[0]
    assert gradient[0] == 0
    assert gradient.isfinite().all()


@pytest.mark.parametrize("name", ["none", "quadratic", "rollback", "smoothing"])
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
            loss = per_sample_kl_loss(log_prob, zeros, th.ones(size), name, kl=log_prob.square(), position=zeros, age=zeros)
            assert th.autograd.grad(loss, log_prob)[0].isfinite().all()


# -- the registry, parameters and functions of the user's own --------------------------------------------------------------


def test_every_name_of_the_table_is_there():
    expected = """step none linear_ramp sigmoid soft_min asymmetric clip_higher dual_clip rollback trust_region truly
    quadratic smoothing soft_adaptive fixed adaptive position"""
    assert available() == sorted(expected.split())


@pytest.mark.parametrize(
    ("alias", "expected"),
    [
        ("ppo_clip", "step()"),
        ("espo", "none(ratio_deviation=0.25)"),
        ("dapo", "clip_higher(low=0.2, high=0.28)"),
        ("ppo_rb", "rollback(slope=0.3)"),
        ("tr_ppo", "trust_region(delta=0.035)"),
        ("truly_ppo", "truly(delta=0.03, alpha=5.0)"),
        ("spo", "quadratic()"),
        ("pspo", "smoothing(alpha=0.1)"),
        ("sapo", "soft_adaptive(tau_pos=1.0, tau_neg=1.05)"),
        ("ppo_kl", "fixed(value=1.0, estimator='analytic')"),
        ("ppo_adaptive_kl", "adaptive(initial=1.0, kl_target=0.02, factor=2.0, estimator='analytic')"),
    ],
)
def test_aliases_and_defaults(alias, expected):
    assert repr(make(alias)) == expected


def test_parameters_of_an_alias_can_be_changed():
    assert repr(make("espo", ratio_deviation=0.1)) == "none(ratio_deviation=0.1)"


BAD = [
    ("stpe", {}, ValueError, r"'stpe'.*Did you mean 'step'.*Available: adaptive, asymmetric"),
    ("step", {"width": 1}, TypeError, "'step' has no parameter 'width'. It takes none"),
    ("linear_ramp", {"widht": 1}, TypeError, r"no parameter 'widht'\. Did you mean 'width'\?"),
    ("linear_ramp", {"width": -0.1}, ValueError, "width=-0.1 of 'linear_ramp' is out of range: 0 <= value"),
    ("linear_ramp", {"width": math.nan}, ValueError, "width=nan"),
    ("linear_ramp", {"width": math.inf}, ValueError, "width=inf"),
    ("linear_ramp", {"width": None}, TypeError, "must be a number, a schedule such as 'lin_0.1', or a function"),
    ("linear_ramp", {"width": "wide"}, TypeError, "'wide'"),
    ("linear_ramp", {"width": "lin_x"}, TypeError, "'lin_x'"),
    ("linear_ramp", {"width": "lin_-1"}, ValueError, "starts at -1"),
    ("linear_ramp", {"width": True}, TypeError, "True"),
    ("sigmoid", {"temperature": 0}, ValueError, "0 < value"),
    ("soft_min", {"temperature": -1}, ValueError, "0 < value"),
    ("asymmetric", {"width_down": -1}, ValueError, "width_down=-1"),
    ("clip_higher", {"low": 1}, ValueError, "0 <= value < 1"),
    ("clip_higher", {"high": -0.1}, ValueError, "high=-0.1"),
    ("dual_clip", {"bound": 1}, ValueError, "1 < value"),
    ("rollback", {"slope": -1}, ValueError, "slope=-1"),
    ("trust_region", {"delta": 0}, ValueError, "delta=0"),
    ("truly", {"alpha": -1}, ValueError, "alpha=-1"),
    ("smoothing", {"alpha": 1.5}, ValueError, "0 <= value <= 1"),
    ("soft_adaptive", {"tau_pos": 0}, ValueError, "tau_pos=0"),
    ("fixed", {"value": -1}, ValueError, "value=-1"),
    ("fixed", {"estimator": "k2"}, ValueError, "must be one of 'analytic', 'k1', 'k3'"),
    ("adaptive", {"initial": 1e5}, ValueError, "0.0001 <= value <= 10000"),
    ("adaptive", {"factor": 1}, ValueError, "factor=1"),
    ("adaptive", {"kl_target": 0}, ValueError, "kl_target=0"),
    ("none", {"ratio_deviation": -1}, ValueError, "ratio_deviation=-1"),
    ("position", {"base": "stpe"}, ValueError, "Did you mean 'step'"),
    ("position", {"base": "sigmoid", "base_kwargs": {"width": 1}}, TypeError, "'sigmoid' has no parameter 'width'"),
    ("position", {"horizon": 0}, ValueError, "horizon=0"),
    (":step", {}, ValueError, "':step' is not a coefficient"),
    (3, {}, TypeError, "beta must be the name of a coefficient"),
]


@pytest.mark.parametrize(("name", "parameters", "error", "message"), BAD, ids=lambda value: str(value)[:40])
def test_bad_input_is_refused(name, parameters, error, message):
    with pytest.raises(error, match=message):
        make(name, **parameters)


def test_schedules_are_followed_and_held_at_their_bounds():
    coefficient = make("linear_ramp", width="lin_0.1")
    widths = []
    for progress_remaining in (1.0, 0.5, 0.0, -0.1):
        coefficient.set_progress(progress_remaining)
        widths.append(coefficient.values["width"])
    assert widths == [0.1, 0.05, 0.0, 0.0]
    assert repr(coefficient) == "linear_ramp(width='lin_0.1')"
    sharp = make("sigmoid", temperature=lambda progress_remaining: 0.1 * progress_remaining)
    sharp.set_progress(0.0)
    assert 0 < sharp.values["temperature"] <= 1e-6
    broken = make("sigmoid", temperature=lambda progress_remaining: math.nan if progress_remaining < 1 else 1.0)
    with pytest.raises(ValueError, match="NaN"):
        broken.set_progress(0.5)


def test_scheduled_base_of_a_composition():
    coefficient = make("position", base="smoothing", base_kwargs={"alpha": "lin_0.5"}, start=0.0, end=1.0, horizon=10)
    coefficient.set_progress(0.5)
    ones = th.ones(3)
    gate, _ = coefficient(ones, ones, 0.2, position=th.tensor([0.0, 5.0, 100.0]))
    th.testing.assert_close(gate, th.tensor([0.0, 0.125, 0.25]))


def test_composition_with_a_penalty():
    coefficient = make("position", base="adaptive", base_kwargs={"estimator": "k3"}, start=0.5, end=0.5)
    assert (coefficient.estimator, coefficient.learns, coefficient.requests) == ("k3", True, ("position",))
    coefficient.end_update(1.0)
    _, weight = coefficient(th.ones(2), th.ones(2), 0.2, position=th.zeros(2))
    assert weight.tolist() == [1.0, 1.0]
    assert coefficient.state_dict() == {"value": 2.0}
    assert make("position", base="trust_region").requests == ("position", "kl")


def test_own_function_with_parameters_and_requests():
    @register("fading")
    def fading(ratio, advantages, clip_range, progress, age, *, strength=0.5):
        return th.full_like(ratio, strength * (1 - progress)) + age

    coefficient = make("fading", strength=0.8)
    assert coefficient.requests == ("progress", "age")
    coefficient.set_progress(0.25)
    ones = th.ones(2)
    gate, weight = coefficient(ones, ones, 0.2, age=th.zeros(2))
    assert weight is None
    th.testing.assert_close(gate, th.full((2,), 0.2))
    with pytest.raises(ValueError, match="'fading' needs 'age'"):
        coefficient(ones, ones, 0.2)
    assert make(fading).name == "fading"


def test_annotations_may_be_text():
    """As in every module that has `from __future__ import annotations`."""

    def narrow(ratio, advantages, clip_range, *, width: "NonNegative" = 0.5):
        return th.zeros_like(ratio)

    with pytest.raises(ValueError, match=r"width=-1 .* is out of range: 0 <= value"):
        make(narrow, width=-1)

    def untyped(ratio: "Unknown", advantages, clip_range, *, width: "Unknown" = 0.5):  # noqa: F821
        return th.zeros_like(ratio)

    assert make(untyped, width="lin_1.0").values == {"width": 1.0}


def test_own_object_with_state():
    class Counting:
        def __init__(self):
            self.calls = 0

        def __call__(self, ratio, advantages, clip_range):
            self.calls += 1
            return th.zeros_like(ratio)

        def state_dict(self):
            return {"calls": self.calls}

        def load_state_dict(self, state):
            self.calls = state["calls"]

    coefficient = make(Counting())
    coefficient.load_state_dict({"calls": 7})
    coefficient(th.ones(1), th.ones(1), 0.2)
    assert coefficient.state_dict() == {"calls": 8}


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (
            lambda ratio, advantages, clip_range: ratio.mean(),
            ValueError,
            r"shape \(\).*expected a tensor of shape \(8,\)",
        ),
        (lambda ratio, advantages, clip_range: ratio.double(), ValueError, r"torch\.float64"),
        (lambda ratio, advantages, clip_range: ratio * math.nan, ValueError, "must be finite"),
        (lambda ratio, advantages, clip_range: ratio.clone().requires_grad_(), ValueError, "requires_grad=True"),
        (lambda ratio, advantages, clip_range: 0.0, TypeError, "is float, expected a tensor"),
        (lambda ratio, advantages, clip_range: (ratio, ratio), ValueError, "names no `estimator`"),
        (lambda ratio, advantages: ratio, TypeError, "must take"),
        (lambda ratio, advantages, clip_range, *rest: ratio, TypeError, "not take"),
        (lambda ratio, advantages, clip_range, positions: ratio, TypeError, "Did you mean 'position'"),
    ],
)
def test_functions_that_do_not_fit_are_refused(function, error, message):
    with pytest.raises(error, match=message):
        make(function)


def test_an_estimator_without_a_weight_is_refused():
    def forgetful(ratio, advantages, clip_range, *, estimator="k3"):
        return th.zeros_like(ratio)

    with pytest.raises(ValueError, match="returned no weight"):
        make(forgetful)


def test_a_name_is_taken_once():
    with pytest.raises(ValueError, match="'step' is already taken"):
        register("step")(lambda ratio, advantages, clip_range: ratio)
    with pytest.raises(ValueError, match="'spo' is already taken"):
        register("mine", "spo")(lambda ratio, advantages, clip_range: ratio)


def test_making_of_a_coefficient_again():
    coefficient = make("linear_ramp", width=0.3)
    assert make(coefficient) is coefficient
    assert isinstance(coefficient, Coefficient)
    assert repr(make(coefficient, width=0.4)) == "linear_ramp(width=0.4)"


# -- tokens ----------------------------------------------------------------------------------------------------------------


def token_batch():
    generator = th.Generator().manual_seed(0)
    old = th.randn(6, 9, generator=generator, dtype=th.float64)
    log_prob = (old + 0.3 * th.randn(6, 9, generator=generator, dtype=th.float64)).requires_grad_()
    mask = th.arange(9) < th.tensor([9, 4, 1, 7, 9, 2])[:, None]
    advantages = th.randn(6, 1, generator=generator, dtype=th.float64).expand(6, 9)
    return log_prob, old, advantages, mask


def test_token_level_ppo_clip():
    """All kept tokens weigh the same."""
    log_prob, old, advantages, mask = token_batch()
    ours = th.autograd.grad(per_sample_kl_loss(log_prob, old, advantages, mask=mask), log_prob)[0]
    theirs = th.autograd.grad(clip_loss(log_prob, old, advantages, mask=mask), log_prob)[0]
    assert th.equal(ours, theirs)
    assert (ours[mask] == 0).any()  # some tokens are clipped


def test_token_level_grpo():
    """GRPO (arXiv 2402.03300, eq. 3) averages over the tokens of each sequence, then over the sequences of the group."""
    log_prob, old, advantages, mask = token_batch()
    ratio = (log_prob - old).exp()
    objective = th.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    published = -((objective * mask).sum(dim=1) / mask.sum(dim=1)).mean()
    ours = per_sample_kl_loss(log_prob, old, advantages, mask=mask, reduction="sequence_mean")
    th.testing.assert_close(
        th.autograd.grad(ours, log_prob)[0], th.autograd.grad(published, log_prob)[0], rtol=1e-12, atol=1e-15
    )


def test_a_sequence_of_which_no_token_counts_adds_nothing():
    log_prob, old, advantages, mask = token_batch()
    counted = per_sample_kl_loss(log_prob[1:], old[1:], advantages[1:], mask=mask[1:], reduction="sequence_mean")
    empty = mask.clone()
    empty[0] = False
    loss = per_sample_kl_loss(log_prob, old, advantages, mask=empty, reduction="sequence_mean")
    th.testing.assert_close(loss * len(mask), counted * (len(mask) - 1))
    assert th.autograd.grad(loss, log_prob)[0].isfinite().all()


def test_unreduced_losses():
    log_prob, old, advantages, mask = token_batch()
    losses = per_sample_kl_loss(log_prob, old, advantages, mask=mask, reduction="none")
    assert losses.shape == log_prob.shape
    assert (losses[~mask] == 0).all()
    th.testing.assert_close(losses.sum() / mask.sum(), per_sample_kl_loss(log_prob, old, advantages, mask=mask))
    with pytest.raises(ValueError, match=r"reduction='men'.*Did you mean 'mean'"):
        per_sample_kl_loss(log_prob, old, advantages, reduction="men")
    with pytest.raises(ValueError, match="sequence_mean"):
        per_sample_kl_loss(log_prob[0], old[0], advantages[0], reduction="sequence_mean")
