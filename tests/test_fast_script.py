"""TorchScript without its optimizations."""

import threading

import pytest
import torch as th

from sb3_klip.fast.script import unoptimized_script


def test_operators_are_left_as_they_are() -> None:
    """A product that is added up in blocks rounds otherwise if the bias is added afterwards."""
    bias, inputs, weight = th.randn(64), th.randn(16, 256), th.randn(256, 64)
    script = th.jit.trace(lambda *args: th.addmm(*args), (bias, inputs, weight), check_trace=False)
    with unoptimized_script():
        found = [script(bias, inputs, weight) for _ in range(3)]
    assert all(each.equal(th.addmm(bias, inputs, weight)) for each in found)


@pytest.mark.parametrize("before", [True, False])
def test_the_switch_is_that_of_the_thread_and_put_back(before: bool) -> None:
    read, elsewhere = th._C._get_graph_executor_optimize, []
    thread = threading.Thread(target=lambda: elsewhere.append(read()))

    @unoptimized_script()
    def fail() -> None:
        assert not read()
        thread.start()
        thread.join()
        raise KeyError

    th._C._set_graph_executor_optimize(before)
    try:
        with pytest.raises(KeyError):
            fail()
        assert read() is before
        assert elsewhere == [True]
    finally:
        th._C._set_graph_executor_optimize(True)
