"""
The loss of a model as a pure function of tensors: parameters, minibatch, and whatever else changes from update to update.

What is traced and what is compiled is this function.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch as th
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from sb3_klip.diagnostics import Minibatch
from sb3_klip.fast.asking import Answering
from sb3_klip.seam import policy_copy
from sb3_klip.surrogate import PerSampleKL

#: Weights of parts of the loss: numbers, or tensors where they change.
WEIGHTS = ("ent_coef", "vf_coef")
#: What is known of each sample of the rollout, where the coefficient asks for it.
COLUMNS = ("positions", "ratio_bounds", "ages")


def rows_of(rollout_data: Any, indices: th.Tensor | None) -> list[th.Tensor]:
    """The tensors of a minibatch, in a fixed order."""
    rows: list[th.Tensor] = []
    for value in rollout_data:
        rows.extend(value.values() if isinstance(value, dict) else (value,))
    return rows if indices is None else [*rows, indices]


def constants_of(update: Any) -> list[th.Tensor]:
    """What else changes from update to update; numbers of schedules as tensors, in Python's precision, which torch rounds."""
    numbers = [th.as_tensor(n, dtype=th.float64) for n in (update.clip_range, update.clip_range_vf) if n is not None]
    numbers += [weight for name in WEIGHTS if isinstance(weight := getattr(update, name), th.Tensor)]
    snapshot = () if update.snapshot is None else update.snapshot.parameters
    columns = [column for name in COLUMNS if (column := getattr(update, name)) is not None]
    return [*numbers, *snapshot, *columns, *(update.replayed or ())]


def _rebuilt(example: Any, update: Any, rows: Sequence[th.Tensor], constants: Sequence[th.Tensor]) -> tuple[Any, Any, Any]:
    """The arguments of ``_minibatch_loss``, of what :func:`rows_of` and :func:`constants_of` have made of them."""
    row, constant = iter(rows), iter(constants)
    values = [{key: next(row) for key in value} if isinstance(value, dict) else next(row) for value in example]
    update = update._replace(clip_range=next(constant))
    if update.clip_range_vf is not None:
        update = update._replace(clip_range_vf=next(constant))
    for name in WEIGHTS:
        if isinstance(getattr(update, name), th.Tensor):
            update = update._replace(**{name: next(constant)})
    if update.snapshot is not None:
        snapshot = copy.copy(update.snapshot)
        snapshot.parameters = tuple(next(constant) for _ in snapshot.parameters)
        update = update._replace(snapshot=snapshot)
    for name in COLUMNS:
        if getattr(update, name) is not None:
            update = update._replace(**{name: next(constant)})
    if update.replayed is not None:
        update = update._replace(replayed=type(update.replayed)(*(next(constant) for _ in update.replayed)))
    if isinstance(update.coefficient, Answering):
        answer = tuple(constant) or update.coefficient.answer
        update = update._replace(coefficient=Answering(update.coefficient, answer))
    return type(example)(*values), next(row, None), update


class _Loss(nn.Module):
    """``_minibatch_loss`` of a model as a module, of which the parameters can be replaced."""

    def __init__(self, model: Any):
        super().__init__()
        self.policy = model.policy
        self.loss = model._minibatch_loss

    def forward(self, *args: Any) -> Any:
        return self.loss(*args)


class _OneHot(TorchFunctionMode):
    """``one_hot`` as a comparison: torch's looks at the numbers. They were looked at when the policy acted on them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.one_hot:
            return _one_hot(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _one_hot(classes: th.Tensor, num_classes: int) -> th.Tensor:
    return (classes.unsqueeze(-1) == th.arange(num_classes)).long()


class PureLoss(NamedTuple):
    """
    A loss as functions of tensors: parameters, rows (:func:`rows_of`) and constants (:func:`constants_of`), in this order.

    :param gradients: returns the gradients of all parameters, and what is logged (:func:`logged`)
    :param given: returns what the coefficient is given, if that is an :class:`~sb3_klip.fast.asking.Answering`
    :param parameters: the parameters that it may be tried with
    """

    gradients: Callable[..., tuple[th.Tensor, ...]]
    given: Callable[..., tuple[th.Tensor, ...]]
    parameters: list[th.Tensor]


def pure_loss(model: Any, example: Any, update: Any, rows: Sequence[th.Tensor]) -> PureLoss:
    """
    The loss of a model, for tensors of the shapes of an example.

    :param model: an algorithm of this package
    :param example: a minibatch
    :param update: what does not change during the update
    :param rows: of the minibatch
    """
    # Of a copy: while it is evaluated, the policy has no parameters that another thread could save.
    twin = copy.copy(model)
    twin.policy = policy_copy(model.policy)
    loss_module = _Loss(twin)
    names = [name for name, _ in loss_module.named_parameters()]
    leaves = [parameter.detach() for parameter in loss_module.parameters()]

    def evaluated(*tensors: th.Tensor) -> tuple[Any, ...]:
        parts = iter(tensors)
        inputs, own_rows = ([next(parts) for _ in part] for part in (leaves, rows))
        inputs = [parameter.detach().requires_grad_() for parameter in inputs]
        arguments = _rebuilt(example, update, own_rows, [*parts])
        with _OneHot():
            loss, minibatch = functional_call(loss_module, dict(zip(names, inputs, strict=True)), arguments)
        return loss, minibatch, inputs, arguments[-1]

    def gradients(*tensors: th.Tensor) -> tuple[th.Tensor, ...]:
        loss, minibatch, inputs, _ = evaluated(*tensors)
        terms = [term for term in minibatch.terms if term is not None]
        found = th.autograd.grad(loss, inputs)
        # In the layout of the parameters, as backward() leaves them: norms round by it.
        pairs = zip(found, inputs, strict=True)
        own = (g if g.stride() == p.stride() else th.empty_like(p).copy_(g) for g, p in pairs)
        return (*own, *terms, minibatch.advantages, minibatch.value_loss, minibatch.entropy_loss)

    def given(*tensors: th.Tensor) -> tuple[th.Tensor, ...]:
        return tuple(evaluated(*tensors)[-1].coefficient.given.values())

    return PureLoss(gradients, given, leaves)


def logged(outputs: Sequence[th.Tensor]) -> Minibatch:
    """
    What is logged of a minibatch.

    :param outputs: what :class:`PureLoss`'s ``gradients`` returns after the gradients
    """
    loss, log_ratio, ratio, removal, *penalty, advantages, value_loss, entropy_loss = outputs
    weight, estimate = penalty or (None, None)
    terms = PerSampleKL(loss, log_ratio, ratio, removal, weight, estimate)
    return Minibatch(terms, advantages, None, value_loss, entropy_loss)
