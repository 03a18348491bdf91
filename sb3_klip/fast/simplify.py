"""A traced graph without operators that change no number: a tenth less time for a small network, at the same bits."""

from typing import Any

import torch as th
from torch import fx
from torch.fx.passes.dialect.common.cse_pass import CSEPass

_ATEN = th.ops.aten
#: Operators that look at the shape of a tensor, not at its numbers.
_OF_SHAPES = {_ATEN.ones_like.default, _ATEN.zeros_like.default, _ATEN.full_like.default}


def simplified(traced: fx.GraphModule, *example: Any) -> fx.GraphModule:
    """
    The same numbers, from fewer operators.

    Left out are views that undo each other or say nothing, copies of what is there, results that are computed twice, and what
    does not depend on the inputs. No operator is put in the place of another. No output shares memory with another, with an
    input, or with the graph.

    :param traced: a graph of ATen operators
    :param example: inputs of the shapes that it was traced for
    :return: another graph, or the same one where an operator writes into what it is given, as parts could not be shared then
    """
    traced.graph.eliminate_dead_code()
    nodes = [node for node in traced.graph.nodes if node.op == "call_function"]
    if any(not isinstance(node.target, th._ops.OpOverload) or node.target._schema.is_mutable for node in nodes):
        return traced
    shapes = _Recorder(traced)
    shapes.run(*example)
    for node in nodes:
        if (source := _same_numbers(node, shapes.values)) is not None:
            node.replace_all_uses_with(source)
    traced.graph.eliminate_dead_code()
    traced.recompile()
    result: Any = CSEPass()(traced)
    shared = result.graph_module
    _fold_constants(shared, *example)
    _separate_outputs(shared, *example)
    return shared


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps the value of each of its nodes."""

    def __init__(self, graph: fx.GraphModule):
        super().__init__(graph, garbage_collect_values=False)
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.values[n] = super().run_node(n)
        return self.values[n]


def _same_numbers(node: Any, values: dict[fx.Node, Any]) -> fx.Node | None:
    """The node that has the same numbers in the same layout, if there is one."""
    if node.target is _ATEN.detach.default:
        return node.args[0]
    if node.target is _ATEN.t.default and node.args[0].target is _ATEN.t.default:
        return node.args[0].args[0]
    if node.target in (_ATEN._to_copy.default, _ATEN.view.default, _ATEN.expand.default):
        before, after = values[node.args[0]], values[node]
        if (before.dtype, before.shape, before.stride()) == (after.dtype, after.shape, after.stride()):
            return node.args[0]
    return None


def _fold_constants(graph_module: fx.GraphModule, *example: Any) -> None:
    """Put tensors in the place of what is the same for all inputs."""
    recorder = _Recorder(graph_module)
    recorder.run(*example)
    constant: set[fx.Node] = set()
    for node in graph_module.graph.nodes:
        sources = node.all_input_nodes
        of_constants = node.op == "call_function" and sources and constant.issuperset(sources)
        if of_constants or node.op == "get_attr" or node.target in _OF_SHAPES:
            constant.add(node)
    for index, node in enumerate(n for n in list(graph_module.graph.nodes) if n in constant and n.op == "call_function"):
        if not constant.issuperset(node.users):
            name = f"constant_{index}"
            graph_module.register_buffer(name, recorder.values[node].detach())
            with graph_module.graph.inserting_before(node):
                node.replace_all_uses_with(graph_module.graph.get_attr(name))
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()


def _separate_outputs(graph_module: fx.GraphModule, *example: Any) -> None:
    """Give each output memory of its own: who gets it may write into it."""
    recorder = _Recorder(graph_module)
    recorder.run(*example)
    kept = [node for node in graph_module.graph.nodes if node.op in ("placeholder", "get_attr")]
    taken = {recorder.values[node].untyped_storage().data_ptr() for node in kept}
    output: Any = graph_module.graph.output_node()
    outputs = []
    for node in output.args[0]:
        memory = recorder.values[node].untyped_storage().data_ptr()
        if memory in taken:
            with graph_module.graph.inserting_before(output):
                node = graph_module.graph.call_function(_ATEN.clone.default, (node,))
        taken.add(memory)
        outputs.append(node)
    output.args = (tuple(outputs),)
    graph_module.recompile()
