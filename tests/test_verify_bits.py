"""How far two trainings are apart, in units in the last place."""

import copy
import math

import numpy as np
import pytest
import torch as th
from hypothesis import given
from hypothesis import strategies as st

from sb3_klip.verify.bits import Difference, compare_gradients, largest_difference, ulps

LARGEST = 2**63 - 1


def place(number: float, dtype: th.dtype) -> int:
    """How many numbers of the type lie between 0 and this one; by its exponent and mantissa, in integers of any length."""
    if number < 0:
        return -place(-number, dtype)
    info = th.finfo(dtype)
    if math.isinf(number):
        return place(info.max, dtype) + 1
    digits, lowest = -round(math.log2(info.eps)), round(math.log2(info.tiny))
    if number < info.tiny:
        return int(number / math.ldexp(1, lowest - digits))
    mantissa, exponent = math.frexp(number)
    return (exponent - lowest) * 2**digits + int((2 * mantissa - 1) * 2**digits)


def distance(a: float, b: float, dtype: th.dtype) -> int:
    if math.isnan(a) or math.isnan(b):
        return 0 if math.isnan(a) and math.isnan(b) else LARGEST
    # Between double-precision numbers of opposite signs there may be more numbers than an integer of torch has values.
    return min(abs(place(a, dtype) - place(b, dtype)), LARGEST)


WIDTHS = {32: th.float32, 64: th.float64}


@given(st.data())
@pytest.mark.parametrize("width", WIDTHS)
def test_ulps_counts_the_numbers_between(width, data):
    numbers = st.floats(width=width)
    pairs = data.draw(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=4))
    a, b = (th.tensor(column, dtype=WIDTHS[width]) for column in zip(*pairs, strict=True))
    counted = ulps(a, b)
    assert counted == ulps(b, a) == max(distance(*pair, WIDTHS[width]) for pair in pairs)
    if not a.isnan().any() and not b.isnan().any():
        assert (counted == 0) == th.equal(a, b)
    assert ulps(a, a.clone()) == 0


@given(st.data())
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_ulps_counts_the_steps_to_a_neighbour(dtype, data):
    """Also across zero, through the subnormal numbers, and to infinity."""
    info = np.finfo(dtype)
    places = [0.0, -0.0, info.smallest_subnormal, -3 * info.smallest_subnormal, info.tiny, -info.tiny, info.max, np.inf]
    number = st.sampled_from(places) | st.floats(width=info.bits, allow_nan=False)
    start = end = dtype(data.draw(number))
    towards = dtype(data.draw(st.sampled_from([-np.inf, 0.0, np.inf])))
    steps = 0
    for _ in range(data.draw(st.integers(0, 20))):
        steps += end != towards
        with np.errstate(over="ignore"):
            end = np.nextafter(end, towards)
    assert ulps(th.tensor(start), th.tensor(end)) == steps


@pytest.mark.parametrize("dtype", [th.float16, th.bfloat16])
def test_ulps_in_half_precision_against_all_numbers(dtype):
    """There are few enough of them to count."""
    every = th.arange(2**16).to(th.int16).view(dtype)
    numbers = every[~every.isnan()]
    ordered = numbers.double().unique()  # ±0 are one number
    chosen = numbers[th.randint(len(numbers), (1000, 2), generator=th.Generator().manual_seed(0))]
    for a, b in chosen:
        between = (th.searchsorted(ordered, a.double()) - th.searchsorted(ordered, b.double())).abs()
        assert ulps(a, b) == between


@pytest.mark.parametrize("dtype", WIDTHS.values())
def test_ulps_of_special_numbers(dtype):
    def of(a, b):
        return ulps(th.tensor([1.0, a], dtype=dtype), th.tensor([1.0, b], dtype=dtype))

    nan, tiny, inf = math.nan, th.finfo(dtype).smallest_normal * th.finfo(dtype).eps, math.inf
    assert of(0.0, -0.0) == 0
    assert of(tiny, -0.0) == of(0.0, -tiny) == 1
    assert of(tiny, -tiny) == 2
    assert of(inf, th.finfo(dtype).max) == of(-inf, th.finfo(dtype).min) == 1
    assert of(inf, inf) == of(nan, nan) == of(nan, -nan) == 0
    assert of(nan, 1.0) == of(0.0, nan) == of(nan, inf) == LARGEST
    assert of(inf, -inf) == min(2 * place(inf, dtype), LARGEST)
    # A NaN has many bit patterns.
    integers = {th.float32: th.int32, th.float64: th.int64}[dtype]
    other = (th.tensor([nan], dtype=dtype).view(integers) + 1).view(dtype)
    assert other.isnan().all()
    assert ulps(other, th.tensor([nan], dtype=dtype)) == 0


def test_ulps_of_any_layout():
    assert ulps(th.zeros(0), th.zeros(0)) == ulps(th.zeros(3, 0), th.zeros(3, 0)) == 0
    a = th.linspace(1, 2, 12).reshape(3, 4)
    b = a.clone()
    for _ in range(3):
        b[2, 1] = th.nextafter(b[2, 1], th.tensor(9.0))
    assert not a.T.is_contiguous()
    assert ulps(a.T, b.T.contiguous()) == ulps(a.T.contiguous(), b.T) == 3
    assert ulps(a[:, ::2], b[:, ::2]) == 0
    assert ulps(a[:, 1::2], b[:, 1::2]) == 3
    assert ulps(a[2, 1].requires_grad_(), b[2, 1]) == 3
    assert ulps(th.tensor(1.0).expand(2), th.tensor([1.0, 1.0])) == 0


def test_largest_difference_names_the_tensor():
    a = {"one": th.ones(2), "two": th.full((3,), 2.0), "empty": th.zeros(0)}
    assert largest_difference(a, {name: tensor.clone() for name, tensor in a.items()}) == Difference(0, "")
    next_to_two = th.nextafter(a["two"], th.tensor(3.0))
    assert largest_difference(a, {**a, "two": next_to_two}) == Difference(1, "two")
    assert largest_difference(a, {**a, "two": next_to_two, "one": th.tensor([1.0, 1.5])}) == Difference(2**22, "one")
    assert largest_difference(a, {**a, "two": th.full((1, 3), 2.0)}) == Difference(LARGEST, "two")
    assert largest_difference(a, {**a, "three": th.ones(1)}) == largest_difference({**a, "three": th.ones(1)}, a)
    assert largest_difference(a, {**a, "three": th.ones(1)}) == Difference(LARGEST, "three")
    assert largest_difference({}, {}) == Difference(0, "")


def test_gradients_are_compared_minibatch_by_minibatch():
    a = [{"w": th.ones(2)}, {"w": th.zeros(2)}]
    assert compare_gradients(a, copy.deepcopy(a)) == Difference(0, "")
    other = [a[0], {"w": th.tensor([0.0, 1e-45])}]
    assert compare_gradients(a, other) == Difference(1, "the gradient of w in minibatch 1")
    for less in (a[:1], []):
        found = compare_gradients(a, less)
        assert found == compare_gradients(less, a) == Difference(LARGEST, found.name)
    assert compare_gradients(a, a[:1]).name == "the gradient of w in minibatch 1"
