"""A graph of fewer operators, which gives the same numbers."""

from typing import Any

import pytest
import torch as th
from torch.fx.experimental.proxy_tensor import make_fx

from sb3_klip.fast.simplify import simplified


def operators(graph: Any) -> list[str]:
    return [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]


def unary(function: Any, *inputs: th.Tensor) -> tuple[Any, Any]:
    """A graph before and after, of a function that gives back a tuple."""
    return make_fx(function)(*inputs), simplified(make_fx(function)(*inputs), *inputs)


FUNCTIONS: dict[str, tuple[Any, list[str]]] = {
    "views that undo each other": (lambda x: (x.t().t() + 1,), ["aten.add.Tensor"]),
    "detached": (lambda x: (x.detach().exp().detach(),), ["aten.exp.default"]),
    "a copy of the same type": (lambda x: (th.ops.aten._to_copy(x, dtype=th.float32).exp(),), ["aten.exp.default"]),
    "another type": (lambda x: (x.double().exp(),), ["aten._to_copy.default", "aten.exp.default"]),
    "another shape": (lambda x: (x.view(-1).exp(),), ["aten.view.default", "aten.exp.default"]),
    "twice the same": (lambda x: (x.exp() + x.exp(),), ["aten.exp.default", "aten.add.Tensor"]),
    "constants": (lambda x: (x * (th.ones_like(x) / 3).exp(),), ["aten.mul.Tensor"]),
    "not needed": (lambda x: (x.exp(), x.log())[:1], ["aten.exp.default"]),
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
