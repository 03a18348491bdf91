"""A graph of fewer operators, which gives the same numbers."""

from typing import Any

import pytest
import torch as th
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx

from sb3_klip.fast.simplify import simplified


def operators(graph: Any) -> list[str]:
    return [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]


def unary(function: Any, *inputs: th.Tensor) -> tuple[Any, Any]:
    """A graph before and after, of a function that gives back a tuple."""
    return make_fx(function)(*inputs), simplified(make_fx(function)(*inputs), *inputs)


ADD, SUB, MUL, RECIPROCAL = "aten.add.Tensor", "aten.sub.Tensor", "aten.mul.Tensor", "aten.reciprocal.default"
FUNCTIONS: dict[str, tuple[Any, list[str]]] = {
    "views that undo each other": (lambda x: (x.t().t() + 1,), ["aten.add.Tensor"]),
    "detached": (lambda x: (x.detach().exp().detach(),), ["aten.exp.default"]),
    "a copy of the same type": (lambda x: (th.ops.aten._to_copy(x, dtype=th.float32).exp(),), ["aten.exp.default"]),
    "another type": (lambda x: (x.double().exp(),), ["aten._to_copy.default", "aten.exp.default"]),
    "another shape": (lambda x: (x.view(-1).exp(),), ["aten.view.default", "aten.exp.default"]),
    "twice the same": (lambda x: (x.exp() + x.exp(),), ["aten.exp.default", "aten.add.Tensor"]),
    "constants": (lambda x: (x * (th.ones_like(x) / 3).exp(),), ["aten.mul.Tensor"]),
    "not needed": (lambda x: (x.exp(), x.log())[:1], ["aten.exp.default"]),
    "powers": (lambda x: (x**1 + x**2.0 + x**3,), [MUL, ADD, "aten.pow.Tensor_Scalar", ADD]),
    "a number and a tensor": (lambda x: (x + 1, x - 0.1, 1 - x, x * 3, x / 3), [ADD, SUB, SUB, MUL, "aten.div.Tensor"]),
    "the same number twice": (lambda x: (x * 0.1 + x * 0.1,), [MUL, ADD]),
    "zeros of both signs": (lambda x: ((x * 0.0).reciprocal(), (x * -0.0).reciprocal()), [MUL, RECIPROCAL] * 2),
    "a share of a sum": (lambda x: (th.add(x, 2, alpha=0.1), th.rsub(x, 2, alpha=3)), [ADD, "aten.rsub.Scalar"]),
    "a power that changes the type": (lambda x: (x.bool() ** 1,), ["aten._to_copy.default", "aten.pow.Tensor_Scalar"]),
    "comparisons": (lambda x: (x > 0.1, x <= 0.1, x == 0), ["aten.gt.Tensor", "aten.le.Tensor", "aten.eq.Tensor"]),
    "whole numbers": (lambda x: (x.long() + 1,), ["aten._to_copy.default", ADD]),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_same_numbers_from_fewer_operators(name: str) -> None:
    function, expected = FUNCTIONS[name]
    before, after = unary(function, th.rand(3, 4))
    assert operators(after) == expected
    for inputs in (th.rand(3, 4), th.randn(3, 4)):
        for ours, theirs in zip(after(inputs), before(inputs), strict=True):
            assert th.equal(ours.nan_to_num(), theirs.nan_to_num())
            assert ours.stride() == theirs.stride()


@pytest.mark.parametrize("dtype", [th.float32, th.float64])
def test_numbers_have_become_tensors(dtype: th.dtype) -> None:
    _, after = unary(lambda x: (x + 1, 2 - x, x > 0.1), th.rand(3, dtype=dtype))
    nodes = [node for node in after.graph.nodes if node.op == "call_function"]
    assert all(isinstance(argument, Node) for node in nodes for argument in node.args)
    assert [number.dtype for number in after.buffers()] == [dtype] * 3


def test_a_bound_is_converted_once_to_the_type_of_what_it_bounds() -> None:
    def function(x: th.Tensor, bound: th.Tensor) -> tuple[th.Tensor, ...]:
        return th.clamp(x, -bound, bound), x > bound, bound + 1, bound * x

    inputs = th.randn(1000), th.tensor(0.1, dtype=th.float64)
    before, after = unary(function, *inputs)
    assert operators(after).count("aten._to_copy.default") == 2
    for ours, theirs in zip(after(*inputs), before(*inputs), strict=True):
        assert ours.equal(theirs)
        assert ours.dtype == theirs.dtype


def test_outputs_share_no_memory() -> None:
    def function(x: th.Tensor) -> tuple[th.Tensor, ...]:
        y = x.exp()
        return y, y.detach(), x.exp(), y.t(), x.detach(), th.ones_like(x)

    _, after = unary(function, th.rand(3, 4))
    given = th.rand(3, 4)
    outputs = after(given)
    assert len({each.untyped_storage().data_ptr() for each in (given, *outputs)}) == 1 + len(outputs)
    outputs[-1].zero_()
    assert after(given)[-1].equal(th.ones(3, 4))


def test_what_writes_into_its_inputs_is_left_alone() -> None:
    def function(x: th.Tensor) -> tuple[th.Tensor, ...]:
        y = x.exp()
        y.add_(1)
        return y, x.exp()

    before, after = unary(function, th.rand(3))
    assert operators(after) == operators(before)
