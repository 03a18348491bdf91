"""Adam's step on all parameters as one tensor, at the same bits: fewer calls, which take most of a small network's time."""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch as th
from torch.optim.adam import adam
from torch.optim.optimizer import _get_scalar_dtype, _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from sb3_klip.fast.observers import reason_in_torch
from sb3_klip.fast.standing_in import is_patched

#: Takes the loss, or the gradients of all parameters.
Step = Callable[[Any], th.Tensor]

#: With more parameters than this, arithmetic takes most of the time, and not calls: one tensor would only take more memory.
_LARGE = 500_000


@contextmanager
def optimizer_step(
    optimizer: th.optim.Optimizer, parameters: Sequence[th.nn.Parameter], max_grad_norm: float, fused: bool = False
) -> Iterator[Step]:
    """
    How to take the steps of an update: a function of the loss, or of the gradients, which returns their norm before clipping.

    Adam steps on all parameters as one tensor where that has the same bits, which spares most of the calls that a small
    network's time goes into; otherwise on each, as SB3 does.

    :param optimizer: when this ends, it is as it would be after ordinary steps
    :param parameters: those whose gradient is clipped; they are so after every step
    :param max_grad_norm: what the norm is clipped to
    :param fused: let Adam step in one call, and take the norm of the gradient in one, which rounds differently
    """
    one = _OneTensor(optimizer, parameters, fused) if can_be_one_tensor(optimizer, parameters) else None

    def step(loss: th.Tensor | Sequence[th.Tensor]) -> th.Tensor:
        nonlocal one
        if isinstance(loss, th.Tensor):
            optimizer.zero_grad()
            loss.backward()
        elif one is not None and not any(parameter._post_accumulate_grad_hooks for parameter in parameters):
            return one.step(loss, max_grad_norm)
        else:
            optimizer.zero_grad()
            _accumulate(parameters, loss)
        if one is not None:
            gradients = [parameter.grad for parameter in parameters]
            if not any(gradient is None for gradient in gradients):
                return one.step(gradients, max_grad_norm)
            # Adam leaves parameters alone that the loss does not depend on.
            one.last_gradients = []
            one.leave()
            one = None
        norm = th.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
        optimizer.step()
        return norm

    def before_saving(_: Any) -> None:
        if one is not None:
            one.leave_moments()

    saving = optimizer.register_state_dict_pre_hook(before_saving)  # the handler of a signal may save the model
    with _fused(optimizer) if fused else nullcontext():
        try:
            yield step
        finally:
            saving.remove()
            if one is not None:
                one.leave()


@th.no_grad()
def _accumulate(parameters: Sequence[th.nn.Parameter], gradients: Sequence[th.Tensor]) -> None:
    """Add gradients to those that parameters have, as ``backward`` does, and call who waits for them."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if parameter.grad is None:
            parameter.grad = gradient
        else:
            parameter.grad += gradient
    for parameter in parameters:
        for hook in (parameter._post_accumulate_grad_hooks or {}).values():
            hook(parameter)


@contextmanager
def _fused(optimizer: th.optim.Optimizer) -> Iterator[None]:
    """
    Let Adam step on all tensors in one call, which rounds differently.

    Optimizers of other kinds, and those for which the user has set ``foreach``, are left alone.

    :param optimizer: its groups are as before afterwards, so that they are saved as they were
    """
    groups = optimizer.param_groups if _is_plain_adam(optimizer) else []
    groups = [group for group in groups if group["foreach"] is None and not group["fused"]]
    before = [group["fused"] for group in groups]
    for group in groups:
        group["fused"] = True
    try:
        yield
    finally:
        for group, choice in zip(groups, before, strict=True):
            group["fused"] = choice


def _is_plain_adam(optimizer: th.optim.Optimizer) -> bool:
    if type(optimizer) not in (th.optim.Adam, th.optim.AdamW):
        return False
    # With tensors in their place, or NumPy's numbers of single precision, torch calculates otherwise.
    numbers = (number for group in optimizer.param_groups for number in (group["lr"], *group["betas"]))
    return all(isinstance(number, (int, float)) for number in numbers)


def _share_memory(parameters: Sequence[th.nn.Parameter]) -> bool:
    """Whether two of the parameters, which are contiguous, share elements."""
    places = sorted((parameter.data_ptr(), parameter.nbytes) for parameter in parameters)
    return any(start + size > later for (start, size), (later, _) in itertools.pairwise(places))


def can_be_one_tensor(optimizer: th.optim.Optimizer, parameters: Sequence[th.nn.Parameter]) -> bool:
    """
    Whether Adam may take these parameters for one tensor, with nobody noticing but the clock.

    :param optimizer: any optimizer
    :param parameters: those whose gradient is clipped
    """
    if not _is_plain_adam(optimizer) or len(optimizer.param_groups) != 1:
        return False
    (group,) = optimizer.param_groups
    choices = ("foreach", "fused", "amsgrad", "capturable", "differentiable")
    own_hooks = (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)
    all_hooks = (_global_optimizer_pre_hooks, _global_optimizer_post_hooks)
    if any(group[choice] for choice in choices) or any(own_hooks) or any(all_hooks):
        return False
    # A scheduler counts the calls of step, and may have put its own in its place; gradients that are not set to zero add up.
    if vars(optimizer).keys() & {"step", "zero_grad"} or is_patched(type(optimizer), "step", "zero_grad"):
        return False
    if is_patched(th.nn.utils, "clip_grad_norm_") or reason_in_torch():
        return False
    if len(group["params"]) != len(parameters) or any(a is not b for a, b in zip(group["params"], parameters, strict=True)):
        return False
    # A parameter of another type may have no shape yet.
    if not all(type(p) is th.nn.Parameter and p.dtype == th.float32 and p.device.type == "cpu" for p in parameters):
        return False
    states = [optimizer.state.get(p, {}) for p in parameters]
    # All have taken the same number of steps, or none has taken any.
    steps = {float(state["step"]) if state else 0.0 for state in states}
    is_small = sum(p.numel() for p in parameters) <= _LARGE
    return is_small and len(steps) == 1 and all(p.is_contiguous() for p in parameters) and not _share_memory(parameters)


@functools.lru_cache
def _number(value: float) -> th.Tensor:
    """A number as a tensor, which torch would otherwise make at each call, in more time than the arithmetic takes."""
    return th.tensor(value, dtype=th.float32, device="cpu")


def _adam(
    flat: th.Tensor, gradient: th.Tensor, exp_avg: th.Tensor, exp_avg_sq: th.Tensor, steps: th.Tensor, group: dict[str, Any]
) -> None:
    """D. P. Kingma and J. Ba, arXiv 1412.6980, algorithm 1; or AdamW's, arXiv 1711.05101; in the order of torch."""
    lr, (beta1, beta2), decay = float(group["lr"]), group["betas"], group["weight_decay"]
    step = steps.add_(1).item()
    if group["maximize"]:
        gradient = -gradient
    if decay and group["decoupled_weight_decay"]:
        flat.mul_(1 - lr * decay)
    elif decay:
        gradient = gradient.add(flat, alpha=decay)
    exp_avg.lerp_(gradient, 1 - beta1)
    exp_avg_sq.mul_(_number(beta2)).addcmul_(gradient, gradient, value=1 - beta2)
    scale = exp_avg_sq.sqrt().div_((1 - beta2**step) ** 0.5).add_(_number(group["eps"]))
    flat.addcdiv_(exp_avg, scale, value=-lr / (1 - beta1**step))


def _torch_adam(
    flat: th.Tensor,
    gradient: th.Tensor,
    exp_avg: th.Tensor,
    exp_avg_sq: th.Tensor,
    steps: th.Tensor,
    group: dict[str, Any],
    fused: bool = False,
) -> None:
    """The same by torch, which takes more calls."""
    settings = {key: group[key] for key in ("weight_decay", "eps", "maximize", "decoupled_weight_decay")}
    beta1, beta2 = group["betas"]
    settings.update(beta1=beta1, beta2=beta2, lr=float(group["lr"]), amsgrad=False)
    adam([flat], [gradient], [exp_avg], [exp_avg_sq], [], [steps], foreach=False, fused=fused, **settings)


class _OneTensor:
    """
    Adam on one tensor, into which the parameters are copied before each step, and out of which after it.

    The parameters stay in the memory where they are, which others may look at, and share.

    :param optimizer: plain Adam of these parameters
    :param parameters: the parameters
    :param fused: whether to round differently, in fewer calls
    """

    def __init__(self, optimizer: th.optim.Optimizer, parameters: Sequence[th.nn.Parameter], fused: bool):
        self.optimizer = optimizer
        self.parameters: Any = list(parameters)
        self.fused = fused
        self.flat, self.views = self._empty()
        self.gradient, self.gradients = self._empty()
        self.averages = {name: self._empty() for name in ("exp_avg", "exp_avg_sq")}
        self.last_gradients: list[th.Tensor] = []
        self.steps = th.zeros((), dtype=_get_scalar_dtype(), device="cpu")
        self.adam: Callable[..., None] | None = None
        for position, state in enumerate(optimizer.state.get(parameter) for parameter in parameters):
            if state:  # not that of who has only looked into it, which adds an empty one
                self.steps = state["step"].clone()
                for name, (_, views) in self.averages.items():
                    views[position].copy_(state[name])

    def _empty(self) -> tuple[th.Tensor, list[th.Tensor]]:
        """Zeros for all parameters, and the part of each."""
        flat = th.zeros(sum(parameter.numel() for parameter in self.parameters), dtype=th.float32, device="cpu")
        parts = flat.split([parameter.numel() for parameter in self.parameters])
        return flat, [part.view(parameter.shape) for part, parameter in zip(parts, self.parameters, strict=True)]

    @th.no_grad()
    def step(self, gradients: Sequence[Any], max_grad_norm: float) -> th.Tensor:
        """Clip the gradient, as ``clip_grad_norm_`` does, and step."""
        self.last_gradients = list(gradients)
        th._foreach_copy_(self.gradients, self.last_gradients)
        th._foreach_copy_(self.views, self.parameters)
        # Rounded as the norm of the parameters' norms, if it is to have the same bits.
        norms = self.gradient if self.fused else th.stack(th._foreach_norm(self.last_gradients))
        norm = th.linalg.vector_norm(norms)
        # A number over a tensor, in clip_grad_norm_, is the number times the reciprocal.
        share = (norm + _number(1e-6)).reciprocal() * _number(float(max_grad_norm))
        self.gradient.mul_(share.clamp(max=1.0))
        self.adam = self.adam or self._checked_adam()
        self.adam(*self._state(), self.optimizer.param_groups[0])
        th._foreach_copy_(self.parameters, self.views)
        return norm

    def _state(self) -> tuple[th.Tensor, ...]:
        return self.flat, self.gradient, self.averages["exp_avg"][0], self.averages["exp_avg_sq"][0], self.steps

    def _checked_adam(self) -> Callable[..., None]:
        """The arithmetic of Adam in few calls, if this torch has the same bits for the next step."""
        if self.fused:
            return functools.partial(_torch_adam, fused=True)
        group = self.optimizer.param_groups[0]
        ours, theirs = ([tensor.clone() for tensor in self._state()] for _ in range(2))
        _adam(*ours, group)  # type: ignore[call-arg,arg-type]
        _torch_adam(*theirs, group)  # type: ignore[call-arg,arg-type]
        same = all(bool(((a == b) | (a.isnan() & b.isnan())).all()) for a, b in zip(ours, theirs, strict=True))
        return _adam if same else _torch_adam

    @th.no_grad()
    def leave(self) -> None:
        """Bring the optimizer's state and the gradients to where ordinary steps would have left them."""
        self.leave_moments()
        if self.last_gradients:
            th._foreach_copy_(self.last_gradients, self.gradients)  # clipped, as they are after clip_grad_norm_
            for parameter, gradient in zip(self.parameters, self.last_gradients, strict=True):
                parameter.grad = gradient

    @th.no_grad()
    def leave_moments(self) -> None:
        """Bring the optimizer's state to where ordinary steps would have left it."""
        if self.steps == 0:
            return
        for position, parameter in enumerate(self.parameters):
            learned = {"step": self.steps, **{name: views[position] for name, (_, views) in self.averages.items()}}
            state = self.optimizer.state[parameter]
            if state:  # in the memory where it was
                for name, value in learned.items():
                    state[name].copy_(value)
            else:
                state.update({name: value.clone() for name, value in learned.items()})
