"""Is a training, bit for bit, that of PPO? How to find out, minibatch by minibatch."""

import copy
import functools
import warnings
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger

from sb3_klip.resume import read_generators, set_generators
from sb3_klip.rollout import copied
from sb3_klip.training import PerSampleKLTraining

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

    :param policy: whose parameters' gradients to keep, until :meth:`remove`
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

    def remove(self) -> None:
        """Stop."""
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


class IdentityCheckCallback(BaseCallback):
    """
    Do every update a second time, from the same state and on the same samples, with the PPO that the algorithm is a drop-in
    for, and compare all gradients and, in the end, all parameters and the optimizer's state.

    The training itself is not touched: it ends as it would have without this callback, but takes about as much longer as
    PPO's updates take. ``identity/minibatches`` and ``identity/ulps`` (largest difference so far, in units in the last place)
    are logged, and the first difference is a warning.

    :param verbose: Verbosity level, as for other callbacks
    :raises ValueError: at the start of training, if the algorithm is none of this package's
    """

    def __init__(self, verbose: int = 0):
        super().__init__(verbose)
        #: Minibatches compared so far.
        self.minibatches = 0
        #: The largest difference so far, and where it was.
        self.difference = Difference(0, "")
        self._recorder: GradientRecorder | None = None

    @property
    def identical(self) -> bool:
        """Whether no difference has been found, in one minibatch at least."""
        return self.minibatches > 0 and self.difference.ulps == 0

    def _on_training_start(self) -> None:
        if not isinstance(self.model, PerSampleKLTraining):
            name = type(self.model).__name__
            raise ValueError(f"IdentityCheckCallback compares this package's algorithms with PPO's, not {name}")
        self._forget()  # an earlier training may have ended with an exception

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self._expected, self._expected_state = _update_by_base(self.model)  # type: ignore[arg-type]
        # One more than there should be, to see that there are more; not all of them, if the training ends with an exception.
        self._recorder = GradientRecorder(self.model.policy, len(self._expected) + 1)

    def _on_rollout_start(self) -> None:
        self._compare()

    def _on_training_end(self) -> None:
        # RL Zoo calls this also after an interruption, which may have come in the middle of an update.
        boundary = getattr(getattr(self, "model", None), "_boundary", None)
        if boundary is not None and boundary.num_timesteps == self.model.num_timesteps:
            self._compare()
        self._forget()

    def _forget(self) -> None:
        """Do not compare the update that is being recorded, if there is one."""
        if self._recorder is not None:
            self._recorder.remove()
            self._recorder = None

    def _compare(self) -> None:
        """Compare the update that has ended, if there was one."""
        if self._recorder is None:
            return
        gradients = self._recorder.take()
        self._forget()
        worst = compare_gradients(gradients, self._expected)
        worst = max(worst, largest_difference(state_tensors(self.model.policy), self._expected_state))
        if worst.ulps > 0 and self.difference.ulps == 0:
            where = f"The update after {self.num_timesteps} steps is not PPO's"
            warnings.warn(f"{where}: {worst.name} differs by {worst.ulps} units in the last place", stacklevel=2)
        self.difference = max(self.difference, worst)
        self.minibatches += len(gradients)
        self.logger.record("identity/minibatches", self.minibatches)
        self.logger.record("identity/ulps", self.difference.ulps)


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


def _update_by_base(model: PerSampleKLTraining) -> tuple[list[dict[str, th.Tensor]], dict[str, th.Tensor]]:
    """The update that is about to be made, by the class that the model's derives from, on a copy of what it changes."""
    order = type(model).__mro__
    base = order[order.index(PerSampleKLTraining) + 1]
    twin = copy.copy(model)
    # The distribution that the policy holds may be in an autograd graph; each evaluation replaces it.
    action_dist = model.policy.action_dist
    twin.policy = copy.deepcopy(model.policy, {id(action_dist): copy.copy(action_dist)})
    twin.rollout_buffer = copied(model.rollout_buffer)
    twin._logger = Logger(None, [])
    twin.verbose = 0
    # SB3 does so between the rollout and the update.
    twin._update_current_progress_remaining(twin.num_timesteps, twin._total_timesteps)
    recorder = GradientRecorder(twin.policy)
    generators = read_generators()
    try:
        base.train(twin)  # type: ignore[attr-defined]
    finally:
        set_generators(generators)
    return recorder.take(), state_tensors(twin.policy)
