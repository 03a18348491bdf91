"""TorchScript without its optimizations, which change bits."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch as th


@contextmanager
def unoptimized_script() -> Iterator[None]:
    """
    Let TorchScript run operators as they are, in this thread, until this ends.

    Its optimizations split ``addmm`` into a product and a sum. That rounds differently where a product is summed in blocks,
    for example in layers with more than 128 inputs.
    """
    before = th._C._get_graph_executor_optimize()
    th._C._set_graph_executor_optimize(False)
    try:
        yield
    finally:
        th._C._set_graph_executor_optimize(before)
