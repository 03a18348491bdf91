"""The pure functions, against the formulas they are named for and against float64 autograd."""

import functools
import math

import pytest
import torch as th
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

from sb3_klip.coefficients import make
from sb3_klip.surrogate import (
    bounds,
    clip_loss,
    clip_objective,
    harmful_distance,
    kl_estimate,
    partition,
    per_sample_beta,
    per_sample_kl_loss,
    weight_space_loss,
    weight_space_penalty,
)
from sb3_klip.trust_region import categorical_ratio_bounds


@st.composite
def batches(draw):
    """Ratios and advantages in float64, exact boundaries and zero advantages among them, and a clip range."""
    epsilon = draw(st.floats(-0.5, 0.9))
    size = draw(st.integers(1, 20))
    ratio = st.one_of(st.floats(1e-3, 1e3), st.sampled_from([1.0, 1 - epsilon, 1 + epsilon]).filter(lambda w: w > 0))
    # Half of a subnormal number is not always exact.
    advantage = st.one_of(st.floats(-10, 10).filter(lambda a: abs(a) > 1e-100), st.just(0.0))
    w = draw(st.lists(ratio, min_size=size, max_size=size))
    a = draw(st.lists(advantage, min_size=size, max_size=size))
    return th.tensor(w, dtype=th.float64), th.tensor(a, dtype=th.float64), epsilon


def assume_no_tie(ratio, advantages, clip_range):
    """Where the two products of the minimum round to the same number, autograd splits the gradient between them."""
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    outside = (ratio < 1 - clip_range) | (ratio > 1 + clip_range)
    assume(not (outside & (advantages != 0) & (ratio * advantages == clipped * advantages)).any())


def gradient(loss, log_prob):
    return th.autograd.grad(loss, log_prob)[0]


@given(batches())
def test_partition_is_disjoint_and_covers(batch):
    kill, passed, inside = partition(*batch)
    assert ((kill.int() + passed.int() + inside.int()) == 1).all()


@given(batches())
def test_partition_says_where_the_clipped_gradient_is_zero(batch):
    """The kill set is where autograd of the clipped objective is 0, boundary and negative clip ranges included."""
    ratio, advantages, clip_range = batch
    assume_no_tie(ratio, advantages, clip_range)
    ratio = ratio.clone().requires_grad_()
    clip_objective(ratio, advantages, clip_range).sum().backward()
    kill, passed, inside = partition(ratio.detach(), advantages, clip_range)
    assert (ratio.grad[kill] == 0).all()
    assert th.equal(ratio.grad[passed], advantages[passed])
    assert th.equal(ratio.grad[inside], advantages[inside])


def test_boundary_is_inside():
    ratio = th.tensor([1.25, 0.75, 1.25, 0.75], dtype=th.float64)
    advantages = th.tensor([1.0, -1.0, -1.0, 1.0], dtype=th.float64)
    assert partition(ratio, advantages, 0.25).inside.all()


def test_upper_bound_wins_below_zero():
    assert bounds(-0.25) == (0.75, 0.75)
    assert bounds(0.25) == (0.75, 1.25)
    lower, upper = bounds(th.tensor([-0.25, 0.25]))
    assert lower.tolist() == [0.75, 0.75]
    assert upper.tolist() == [0.75, 1.25]


def test_partition_by_hand():
    ratio = th.tensor([1.5, 0.5, 1.5, 0.5, 1.1, 1.5])
    advantages = th.tensor([2.0, -2.0, -2.0, 2.0, 5.0, 0.0])
    kill, passed, inside = partition(ratio, advantages, 0.2)
    assert kill.tolist() == [True, True, False, False, False, False]
    assert passed.tolist() == [False, False, True, True, False, False]
    assert inside.tolist() == [False, False, False, False, True, True]


@given(batches())
def test_distance_is_positive_exactly_on_the_kill_set(batch):
    moving = batch[1] != 0
    assert th.equal((harmful_distance(*batch) > 0)[moving], partition(*batch).kill[moving])


def test_distance_without_an_advantage_is_that_of_a_gain():
    distance = harmful_distance(th.tensor([1.5, 0.5, 0.5]), th.tensor([0.0, 0.0, -1.0]), 0.25)
    assert distance.tolist() == [0.25, -0.75, 0.25]


@given(batches())
def test_theorem_1_equal_gradients(batch):
    """Per-sample gradients of the KL form equal the closed form and those of the clipped objective."""
    ratio, advantages, clip_range = batch
    old = th.linspace(-2, 1, len(ratio), dtype=th.float64)
    log_prob = (old + ratio.log()).requires_grad_()
    ratio = (log_prob.detach() - old).exp()
    ours = gradient(per_sample_kl_loss(log_prob, old, advantages, "step", clip_range), log_prob)
    theirs = gradient(clip_loss(log_prob, old, advantages, clip_range), log_prob)
    assert th.equal(ours, theirs)
    assume_no_tie(ratio, advantages, clip_range)
    kill = partition(ratio, advantages, clip_range).kill
    closed_form = -(ratio * advantages * ~kill) / len(ratio)
    th.testing.assert_close(ours, closed_form, rtol=1e-14, atol=0)


@given(batches())
def test_theorem_2_equal_values(batch):
    ratio, advantages, clip_range = batch
    penalty = weight_space_penalty(ratio, advantages, clip_range)
    assert (penalty >= 0).all()
    assert (penalty[~partition(ratio, advantages, clip_range).kill] == 0).all()
    old = th.linspace(-2, 1, len(ratio), dtype=th.float64)
    dual = weight_space_loss(old + ratio.log(), old, advantages, clip_range)
    scale = (ratio * advantages).abs().max().item() + 1
    assert dual.item() == pytest.approx(clip_loss(old + ratio.log(), old, advantages, clip_range).item(), abs=1e-12 * scale)


def test_the_clip_range_is_ppos_by_default():
    log_prob, old, advantages, _ = token_batch()
    for loss in (clip_loss, weight_space_loss, per_sample_kl_loss):
        assert th.equal(loss(log_prob, old, advantages), loss(log_prob, old, advantages, clip_range=0.2))
    ratio = (log_prob - old).exp()
    for function in (clip_objective, weight_space_penalty):
        assert th.equal(function(ratio, advantages), function(ratio, advantages, 0.2))


@pytest.mark.parametrize("size", [1, 3, 7, 33, 60, 64, 100])
def test_gradient_bits_in_float32(size):
    """The association of the products is autograd's own for PPO, so no batch size makes a rounding differ."""
    generator = th.Generator().manual_seed(size)
    for _ in range(50):
        old = th.randn(size, generator=generator)
        log_prob = (old + 0.5 * th.randn(size, generator=generator)).requires_grad_()
        advantages = th.randn(size, generator=generator)
        ours = gradient(per_sample_kl_loss(log_prob, old, advantages), log_prob)
        assert th.equal(ours, gradient(clip_loss(log_prob, old, advantages), log_prob))


@pytest.mark.parametrize("dtype", [th.float32, th.float64])
@pytest.mark.parametrize("clip_range", [0.1, 0.2, 0.25, -0.1])
def test_gradient_bits_at_rounding_ties(clip_range, dtype):
    """An ulp outside the band, w Â and clip(w) Â can round to one number; autograd then gives half of the gradient."""
    generator = th.Generator().manual_seed(0)
    advantages = th.randn(20_000, generator=generator, dtype=dtype)
    ties = 0
    for bound in (1 - clip_range, 1 + clip_range):
        ratio = th.full_like(advantages, bound)
        for direction in (0.0, 2.0):
            near = ratio
            for _ in range(3):
                # The ratio itself is the variable here: no log-probability gives these ratios at will.
                near = th.nextafter(near, th.full_like(near, direction)).detach()
                variable = near.clone().requires_grad_()
                slope = gradient(clip_objective(variable, advantages, clip_range).sum(), variable)
                removal, _ = make("step")(near, advantages, clip_range)
                assert th.equal(slope, advantages * (1 - removal))
                ties += int((removal == 0.5).sum())
    assert ties > 100


def test_value_is_the_template():
    """L = E[w Â + β log π], to be minimised with the opposite sign."""
    old = th.tensor([-1.0, -1.0, -1.0], dtype=th.float64)
    log_prob = old + th.tensor([1.5, 1.1, 0.5], dtype=th.float64).log()
    advantages = th.tensor([2.0, -3.0, -1.0], dtype=th.float64)
    ratio = (log_prob - old).exp()
    beta = per_sample_beta(ratio, advantages, make("step")(ratio, advantages, 0.2)[0])
    th.testing.assert_close(beta, th.tensor([-3.0, 0.0, 0.5], dtype=th.float64))
    expected = -(ratio * advantages + beta * log_prob).mean()
    th.testing.assert_close(per_sample_kl_loss(log_prob, old, advantages), expected)


def test_analytic_kl_matches_no_scalar():
    """Negative control: with the closed-form Gaussian KL, the best coefficient per sample leaves most of the gradient."""
    mean = th.tensor([[0.5, -0.3]], dtype=th.float64, requires_grad=True)
    old, new = Normal(th.zeros_like(mean), 1.0), Normal(mean, 1.0)
    action = th.tensor([[1.5, 1.0]], dtype=th.float64)
    log_ratio = (new.log_prob(action) - old.log_prob(action)).sum()
    wanted = gradient(log_ratio.exp(), mean).flatten()  # what PPO-Clip removes from a killed sample with Â = 1
    sampled = gradient((new.log_prob(action)).sum(), mean).flatten()
    analytic = gradient(kl_divergence(old, new).sum(), mean).flatten()

    def residual(direction):
        best = (wanted @ direction) / (direction @ direction)
        return ((wanted - best * direction).norm() / wanted.norm()).item()

    assert residual(sampled) < 1e-15
    assert residual(analytic) > 0.5


@pytest.mark.parametrize("dtype", [th.float16, th.bfloat16, th.float32, th.float64])
@pytest.mark.parametrize("shape", [(7,), (3, 5)])
@pytest.mark.parametrize("loss", [clip_loss, weight_space_loss, per_sample_kl_loss])
def test_shapes_and_dtypes(loss, shape, dtype):
    old = th.zeros(shape, dtype=dtype)
    log_prob = th.linspace(-0.5, 0.5, math.prod(shape)).reshape(shape).to(dtype).requires_grad_()
    clip_range = th.full(shape, 0.2, dtype=dtype)
    keywords = {"clip_range": clip_range, "mask": th.arange(math.prod(shape)).reshape(shape) % 2 == 0}
    value = loss(log_prob, old, th.ones(shape, dtype=dtype), **keywords)
    assert value.shape == ()
    assert value.dtype == dtype
    assert (gradient(value, log_prob)[~keywords["mask"]] == 0).all()


@pytest.mark.parametrize("loss", [clip_loss, weight_space_loss, per_sample_kl_loss])
def test_mask_counts_as_leaving_out(loss):
    generator = th.Generator().manual_seed(0)
    old, log_prob, advantages = (th.randn(20, generator=generator, dtype=th.float64) for _ in range(3))
    mask = th.rand(20, generator=generator) < 0.5
    whole = loss(log_prob, old, advantages, mask=mask)
    th.testing.assert_close(whole, loss(log_prob[mask], old[mask], advantages[mask]))


def test_overflowing_ratio_of_a_removed_sample():
    """Where log w > 88, PPO's gradient is NaN although the sample is clipped; ours is zero there, and the same elsewhere."""
    old = th.zeros(3)
    log_prob = th.tensor([100.0, 0.1, -0.1], requires_grad=True)
    advantages = th.tensor([1.0, 1.0, -1.0])
    assert gradient(clip_loss(log_prob, old, advantages), log_prob).isnan().any()
    loss = per_sample_kl_loss(log_prob, old, advantages)
    ours = gradient(loss, log_prob)
    assert loss.isfinite()
    assert ours[0] == 0
    th.testing.assert_close(ours[1:], th.tensor([-math.exp(0.1), math.exp(-0.1)]) / 3)


def test_overflowing_ratio_that_passes_is_not_hidden():
    log_prob = th.tensor([100.0], requires_grad=True)
    gradients = gradient(per_sample_kl_loss(log_prob, th.zeros(1), -th.ones(1)), log_prob)
    assert not gradients.isfinite().any()


@given(st.floats(-3, 3), st.floats(-3, 3))
def test_kl_estimates(log_prob, old_log_prob):
    new, old = th.tensor(log_prob, dtype=th.float64), th.tensor(old_log_prob, dtype=th.float64)
    ratio = math.exp(log_prob - old_log_prob)
    assert kl_estimate("k1", new, old).item() == pytest.approx(-math.log(ratio), abs=1e-12)
    assert kl_estimate("k3", new, old).item() == pytest.approx(ratio - 1 - math.log(ratio), abs=1e-12, rel=1e-9)
    assert kl_estimate("k3", new, old) >= 0


def test_bad_input_names_the_argument():
    ones = th.ones(4)
    with pytest.raises(ValueError, match=r"advantages has shape \(3,\), but log_prob has \(4,\)"):
        per_sample_kl_loss(ones, ones, th.ones(3))
    with pytest.raises(ValueError, match="mask has shape"):
        clip_loss(ones, ones, ones, mask=th.ones(4, 1, dtype=th.bool))
    with pytest.raises(TypeError, match=r"mask must be boolean, not torch\.float32"):
        weight_space_loss(ones, ones, ones, mask=ones)
    with pytest.raises(TypeError, match="floating"):
        per_sample_kl_loss(ones.long(), ones, ones)
    with pytest.raises(ValueError, match=r"'stpe'.*Did you mean 'step'"):
        per_sample_kl_loss(ones, ones, ones, "stpe")
    with pytest.raises(ValueError, match="estimator='k2'"):
        kl_estimate("k2", ones, ones)
    with pytest.raises(ValueError, match="kl"):
        kl_estimate("analytic", ones, ones)
    with pytest.raises(TypeError, match=r"no argument 'clip_rnge'. Did you mean 'clip_range'\?"):
        per_sample_kl_loss(ones, ones, ones, clip_rnge=0.1)
    with pytest.raises(TypeError, match=r"clip_range='0\.2' must be a number or a tensor"):
        per_sample_kl_loss(ones, ones, ones, clip_range="0.2")
    for loss in (clip_loss, weight_space_loss, per_sample_kl_loss):
        with pytest.raises(TypeError, match="old_log_prob must be a tensor, not list"):
            loss(ones, [1.0] * 4, ones)
        with pytest.raises(TypeError, match="mask must be a tensor, not list"):
            loss(ones, ones, ones, mask=[True] * 4)
        with pytest.raises(TypeError, match="clip_range=None must be a number or a tensor"):
            loss(ones, ones, ones, clip_range=None)
        for shape in ((4, 1), (3,), (1, 4)):
            with pytest.raises(ValueError, match=r"clip_range has shape .*, but log_prob has"):
                loss(ones, ones, ones, clip_range=th.full(shape, 0.2))
        per_row = loss(ones.view(2, 2), ones.view(2, 2), ones.view(2, 2), clip_range=th.full((2, 1), 0.2))
        assert per_row == loss(ones, ones, ones, clip_range=th.tensor(0.2))
    with pytest.raises(TypeError, match=r"no argument 'width'.* make\('linear_ramp', width=0.1\)"):
        per_sample_kl_loss(ones, ones, ones, "linear_ramp", width=0.1)


def test_the_progress_is_what_is_given():
    def late(ratio, advantages, clip_range, progress):
        return th.zeros_like(ratio) + progress

    log_prob = th.zeros(4, requires_grad=True)
    for progress in (0.0, 0.5, 1.0):
        loss = per_sample_kl_loss(log_prob, th.zeros(4), th.ones(4), late, progress=progress)
        assert gradient(loss, log_prob).tolist() == [-(1 - progress) / 4] * 4


@pytest.mark.parametrize("kl", [th.ones(3), th.ones(1), th.ones(3, 1), 0.1])
def test_quantities_that_would_broadcast_are_refused(kl):
    log_prob = th.zeros(3, 3)
    with pytest.raises(ValueError, match=r"kl has the .*, but must be a tensor of the shape of log_prob, \(3, 3\)"):
        per_sample_kl_loss(log_prob, log_prob, log_prob, "fixed", kl=kl)


def test_a_penalty_without_gradient_is_refused():
    log_prob, old = th.zeros(4, requires_grad=True), th.zeros(4)
    with pytest.raises(ValueError, match=r"kl must be differentiable, as fixed\(.*\) penalises it"):
        per_sample_kl_loss(log_prob, old, old, "fixed", kl=th.ones(4))
    with th.no_grad():
        assert per_sample_kl_loss(log_prob, old, old, "fixed", kl=th.ones(4)).item() == 1.0


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


def test_sequence_level_gspo():
    """GSPO (arXiv 2507.18071): one ratio per sequence, the geometric mean of its tokens', is clipped."""
    log_prob, old, advantages, mask = token_batch()
    ratio = (((log_prob - old) * mask).sum(dim=1) / mask.sum(dim=1)).exp()
    objective = th.min(ratio * advantages[:, 0], ratio.clamp(1 - 0.05, 1 + 0.05) * advantages[:, 0])
    expected = gradient(-objective.mean(), log_prob)
    assert 0 < (expected != 0).any(dim=1).sum() < len(mask)  # some sequences are clipped
    ours = per_sample_kl_loss(log_prob, old, advantages, "step", 0.05, mask=mask, reduction="sequence_mean", ratio="sequence")
    th.testing.assert_close(gradient(ours, log_prob), expected, rtol=1e-12, atol=1e-15)


def test_sequence_level_with_advantages_of_tokens():
    """GSPO-token: the ratio's value is the sequence's, its gradient that of the token's log-probability."""
    log_prob, old, advantages, mask = token_batch()
    advantages = advantages + th.linspace(-1, 1, 9, dtype=th.float64)
    mean = ((log_prob - old) * mask).sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True)
    ratio = (mean.detach() + log_prob - log_prob.detach()).exp()
    objective = th.min(ratio * advantages, ratio.clamp(1 - 0.05, 1 + 0.05) * advantages)
    expected = gradient(-objective[mask].mean(), log_prob)
    ours = per_sample_kl_loss(log_prob, old, advantages, "step", 0.05, mask=mask, ratio="sequence")
    th.testing.assert_close(gradient(ours, log_prob), expected, rtol=1e-12, atol=1e-15)


def test_sequences_of_one_token_have_the_ratio_of_that_token():
    generator = th.Generator().manual_seed(0)
    old, log_prob, advantages = (th.randn(20, 1, generator=generator) for _ in range(3))
    by_sequence = per_sample_kl_loss(log_prob, old, advantages, ratio="sequence")
    assert th.equal(by_sequence, per_sample_kl_loss(log_prob, old, advantages))
    with pytest.raises(ValueError, match=r"ratio='tokens'.*Did you mean 'token'"):
        per_sample_kl_loss(log_prob, old, advantages, ratio="tokens")
    with pytest.raises(ValueError, match=r"ratio='sequence' needs shape \(B, T\)"):
        per_sample_kl_loss(log_prob[:, 0], old[:, 0], advantages[:, 0], ratio="sequence")


@pytest.mark.parametrize("name", ["dppo", "dcpo", "maspo", "trgppo"])
def test_tokens_have_probabilities(name):
    """What the coefficients ask for is at hand, and masked tokens do not matter, whatever stands there."""
    log_prob, old, advantages, mask = token_batch()
    old = old.log_softmax(dim=1)
    bounds = categorical_ratio_bounds(old.exp(), 0.02)
    loss = functools.partial(per_sample_kl_loss, advantages=advantages, coefficient=name, mask=mask)
    quantities = dict(zip(("least_ratio", "greatest_ratio"), bounds, strict=True)) if name == "trgppo" else {}
    expected = gradient(loss(log_prob, old, **quantities), log_prob)
    removal, _ = make(name)((log_prob - old).exp().detach(), advantages, 0.2, old_log_prob=old, **quantities)
    assert removal[mask].any()
    by_hand = -(log_prob - old).exp() * advantages * (1 - removal)
    th.testing.assert_close(expected[mask], (by_hand / mask.sum())[mask].detach())
    padded = gradient(loss(log_prob, old.masked_fill(~mask, -math.inf), **quantities), log_prob)
    assert th.equal(padded, expected)


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
    whole = per_sample_kl_loss(log_prob, old, advantages, reduction="none")
    assert th.equal(whole[mask], losses[mask])
    assert (whole[~mask] != 0).all()
    th.testing.assert_close(per_sample_kl_loss(log_prob, old, advantages, reduction="sequence_mean"), whole.mean())
    with pytest.raises(ValueError, match=r"reduction='men'.*Did you mean 'mean'"):
        per_sample_kl_loss(log_prob, old, advantages, reduction="men")
    with pytest.raises(ValueError, match="sequence_mean"):
        per_sample_kl_loss(log_prob[0], old[0], advantages[0], reduction="sequence_mean")


# -- padding ---------------------------------------------------------------------------------------------------------------

ONE_NUMBER = [
    clip_loss,
    weight_space_loss,
    per_sample_kl_loss,
    functools.partial(per_sample_kl_loss, reduction="sequence_mean"),
    functools.partial(per_sample_kl_loss, reduction="sequence_mean", ratio="sequence"),
    lambda *args, **kwargs: per_sample_kl_loss(*args, **kwargs, reduction="none").sum(),
]


@pytest.mark.parametrize("loss", ONE_NUMBER)
@pytest.mark.parametrize("padding", [-math.inf, math.inf, math.nan])
@pytest.mark.parametrize("where", range(3))
def test_what_stands_in_the_padding_reaches_no_gradient(loss, padding, where):
    """An action that the policy that acted could not take has a log-probability of -inf, and 0 times that is NaN."""
    log_prob, old, advantages, mask = token_batch()
    expected = gradient(loss(log_prob, old, advantages, mask=mask), log_prob)
    tensors = [log_prob.detach(), old, advantages.clone()]
    tensors[where] = tensors[where].masked_fill(~mask, padding)
    log_prob, old, advantages = tensors
    log_prob.requires_grad_()
    value = loss(log_prob, old, advantages, mask=mask)
    assert value.isfinite()
    assert th.equal(gradient(value, log_prob), expected)


def test_padding_of_a_quantity_reaches_no_gradient():
    log_prob, old, advantages, mask = token_batch()
    kl = ((log_prob - old) ** 2).masked_fill(~mask, math.inf)
    loss = per_sample_kl_loss(log_prob, old, advantages, make("fixed", value=2.0), mask=mask, kl=kl)
    assert gradient(loss, log_prob).isfinite().all()
