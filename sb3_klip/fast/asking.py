"""
Calling a coefficient that cannot be traced: between two traced graphs.

A coefficient cannot be traced if it has a state, looks at data in Python, or has parameters that follow a schedule. The first
graph computes the coefficient's arguments. Then the coefficient is called, as in the eager update. The second graph repeats
the forward pass and continues with the result.
"""

from typing import Any

import torch as th

from sb3_klip.coefficients import Coefficient


class Answering(Coefficient):
    """
    A coefficient that keeps its arguments in ``given`` and returns a fixed answer.

    :param coefficient: the coefficient whose properties it has; it is not called
    :param answer: removal and weight, or removal alone, each of the shape of a minibatch
    """

    def __init__(self, coefficient: Coefficient, answer: tuple[th.Tensor, ...]):
        vars(self).update(vars(coefficient))
        self.answer = answer
        self.given: dict[str, th.Tensor] = {}

    def __call__(self, ratio: th.Tensor, advantages: th.Tensor, clip_range: Any, **quantities: Any) -> Any:
        """The fixed answer."""
        asked = {key: quantities[key].detach() for key in self.requests if key != "progress"}
        self.given = {"ratio": ratio, "advantages": advantages, **asked}
        return self.answer if self.estimator else (*self.answer, None)


def example_answer(coefficient: Coefficient, like: th.Tensor) -> tuple[th.Tensor, ...]:
    """
    An example of what a coefficient returns, with a removal of 0, 0.5, 1 and 1.5.

    :param coefficient: the coefficient
    :param like: any tensor like the ratio of a minibatch
    """
    removal = th.arange(len(like), dtype=like.dtype, device=like.device) % 4 / 2
    return (removal, removal + 0.1) if coefficient.estimator else (removal,)
