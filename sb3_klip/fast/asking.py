"""
A coefficient between two graphs, for what cannot be traced: a state, Python that looks at data, numbers of a schedule.

The first graph makes what the coefficient is given. The coefficient is called as in the eager update. The second graph repeats
the forward pass, and goes on with what the coefficient returned.
"""

from typing import Any

import torch as th

from sb3_klip.coefficients import Coefficient


class Answering(Coefficient):
    """
    Has the properties of a coefficient, keeps what it is given, and returns what it was made with.

    :param coefficient: the coefficient that it stands for, which is not called
    :param answer: removal and weight, or removal alone, each of the shape of a minibatch
    """

    def __init__(self, coefficient: Coefficient, answer: tuple[th.Tensor, ...]):
        vars(self).update(vars(coefficient))
        self.answer = answer
        self.given: dict[str, th.Tensor] = {}

    def __call__(self, ratio: th.Tensor, advantages: th.Tensor, clip_range: Any, **quantities: Any) -> Any:
        """What it was made with."""
        asked = {key: quantities[key].detach() for key in self.requests if key != "progress"}
        self.given = {"ratio": ratio, "advantages": advantages, **asked}
        return self.answer if self.estimator else (*self.answer, None)


def example_answer(coefficient: Coefficient, like: th.Tensor) -> tuple[th.Tensor, ...]:
    """
    What a coefficient might return: it removes samples, leaves them alone, and pushes them back.

    :param coefficient: the coefficient
    :param like: any tensor like the ratio of a minibatch
    """
    removal = th.arange(len(like), dtype=like.dtype, device=like.device) % 4 / 2
    return (removal, removal + 0.1) if coefficient.estimator else (removal,)
