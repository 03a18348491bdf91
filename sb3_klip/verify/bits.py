"""Comparing two trainings bit for bit: differences of tensors, gradients and states."""

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch as th

_BITS = {th.float64: th.int64, th.float32: th.int32, th.float16: th.int16, th.bfloat16: th.int16}


def ulps(a: th.Tensor, b: th.Tensor) -> int:
    """
    The largest difference of two tensors in units in the last place: how many floating-point numbers further one is.

    :param a: floating-point tensor
    :param b: tensor of the same shape and dtype
    :return: 0 if and only if ``torch.equal``, or if NaN stands opposite NaN; the largest integer for NaN opposite a number
    """
    if a.numel() == 0:
        return 0
    places = []
    for tensor in (a, b):
        bits = tensor.detach().contiguous().view(_BITS[tensor.dtype]).long()
        # Negative numbers count downwards from zero, which has two signs.
        lowest = th.iinfo(_BITS[tensor.dtype]).min
        places.append(th.where(bits < 0, lowest - bits, bits))
    largest = th.iinfo(th.int64).max
    # Negative only where it is too large for an integer, between double-precision numbers of opposite signs.
    distance = th.maximum(*places) - th.minimum(*places)
    distance = distance.masked_fill((distance < 0) | (a.isnan() != b.isnan()), largest)
    return int(distance.masked_fill(a.isnan() & b.isnan(), 0).max())


class Difference(NamedTuple):
    """
    The largest difference between two sets of tensors.

    :param ulps: in units in the last place; 0 if there is none
    :param name: of the tensor where it is
    """

    ulps: int
    name: str


def largest_difference(ours: Mapping[str, th.Tensor], theirs: Mapping[str, th.Tensor]) -> Difference:
    """
    Compare tensors by name; one that only one side has, or has in another shape, differs as much as can be.

    :param ours: tensors by name
    :param theirs: likewise
    """
    worst = Difference(0, "")
    for name in dict.fromkeys([*ours, *theirs]):
        same_shape = name in ours and name in theirs and ours[name].shape == theirs[name].shape
        distance = ulps(ours[name], theirs[name]) if same_shape else th.iinfo(th.int64).max
        if distance > worst.ulps:
            worst = Difference(distance, name)
    return worst


class GradientRecorder:
    """
    Keeps the gradient of each minibatch, as it is before it is clipped.

    :param policy: whose parameters' gradients to keep, until :meth:`close`
    :param most: of so many minibatches at most; of all if None
    """

    def __init__(self, policy: th.nn.Module, most: int | None = None):
        self._most = most
        self._minibatches: list[dict[str, th.Tensor]] = []
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(functools.partial(self._keep, name))
            for name, parameter in policy.named_parameters()
            if parameter.requires_grad
        ]

    def _keep(self, name: str, parameter: th.Tensor) -> None:
        # A gradient that comes for the second time is that of the next minibatch.
        if not self._minibatches or name in self._minibatches[-1]:
            if len(self._minibatches) == self._most:
                return
            self._minibatches.append({})
        assert parameter.grad is not None
        self._minibatches[-1][name] = parameter.grad.detach().clone()

    def take(self) -> list[dict[str, th.Tensor]]:
        """The gradients since the last call: for each minibatch, tensors by parameter."""
        taken, self._minibatches = self._minibatches, []
        return taken

    def close(self) -> None:
        """Record no more."""
        for hook in self._hooks:
            hook.remove()


def state_tensors(policy: th.nn.Module) -> dict[str, th.Tensor]:
    """
    Every floating-point tensor that training changes.

    :param policy: a policy of SB3, with its optimizer
    :return: the policy's tensors and its optimizer's, by name
    """
    tensors = dict(policy.state_dict())
    for index, state in policy.optimizer.state_dict()["state"].items():  # type: ignore[union-attr]
        tensors.update({f"optimizer.{index}.{name}": value for name, value in state.items() if isinstance(value, th.Tensor)})
    return {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}


def compare_gradients(ours: Sequence[Mapping[str, th.Tensor]], theirs: Sequence[Mapping[str, th.Tensor]]) -> Difference:
    """
    Compare two updates' gradients, minibatch by minibatch.

    :param ours: gradients by parameter, for each minibatch
    :param theirs: likewise
    """
    worst = Difference(0, "")
    for i in range(max(len(ours), len(theirs))):
        pair = [dict(side[i]) if i < len(side) else {} for side in (ours, theirs)]
        ulps_, name = largest_difference(*pair)
        worst = max(worst, Difference(ulps_, f"the gradient of {name} in minibatch {i}" if ulps_ else ""))
    return worst
