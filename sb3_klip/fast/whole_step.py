"""
``compile=True``: one compiled graph computes a minibatch, from its samples to Adam's step, with another rounding than eager.

It needs what tracing needs (:func:`sb3_klip.fast.graph.reason_against`) and plain Adam (:func:`can_be_one_step`). Otherwise,
the loss alone is compiled (:mod:`sb3_klip.fast.compiling`).
"""

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch as th
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.weak import WeakIdKeyDictionary

from sb3_klip.diagnostics import Minibatch
from sb3_klip.fast.graph import MOST_GRAPHS, reason_against, structure_of
from sb3_klip.fast.optimizer import can_be_one_tensor
from sb3_klip.fast.pure import constants_of, logged, pure_loss, rows_of
from sb3_klip.fast.validation import unvalidated_distributions
from sb3_klip.rollout import has_columns

# By model, so that a copy of a model, or one that is pickled, does not carry the other's.
_STEPS: MutableMapping[Any, dict[Any, Callable[..., Any]]] = WeakIdKeyDictionary()


def can_be_one_step(model: Any, coefficient: Any) -> bool:
    """
    Whether minibatches can be computed and stepped on in one go.

    :param model: an algorithm of this package
    :param coefficient: its coefficient
    :return: False, too, where somebody decides, or waits, between the loss and the step
    """
    parameters = list(model.policy.parameters())
    decides = model.target_kl is not None or hasattr(coefficient.function, "stop")
    waits = any(parameter._post_accumulate_grad_hooks for parameter in parameters)
    return (
        coefficient.is_constant
        and not decides
        and not waits
        and has_columns(model.rollout_buffer)
        and can_be_one_tensor(model.policy.optimizer, parameters)
        and len(_STEPS.get(model, ())) < MOST_GRAPHS
        and not reason_against(model)
    )


@contextmanager
def whole_step(model: Any, update: Any) -> Iterator[Callable[..., tuple[th.Tensor, Minibatch]]]:
    """
    What computes a minibatch of an update, and steps.

    :param model: an algorithm of this package, of which :func:`can_be_one_step` is True
    :param update: what does not change during the update
    :return: a function of the whole rollout's samples, the places of those of the minibatch, and the update, which returns the
        gradient's norm before clipping, and what is logged
    """
    optimizer = model.policy.optimizer
    group, parameters = optimizer.param_groups[0], list(model.policy.parameters())
    settings = {key: value for key, value in group.items() if key not in ("params", "lr")}
    steps_made = _STEPS.setdefault(model, {})
    constants = constants_of(update)
    numbers = (model.normalize_advantage, model.max_grad_norm, repr(update.coefficient))
    structure = (
        *structure_of(model.policy),
        update.replayed is None,
        *settings.items(),
        th.get_num_threads(),
    )
    for parameter in parameters:
        if not optimizer.state[parameter]:
            averages = {name: th.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": th.tensor(0.0), **averages}
    states = [optimizer.state[parameter] for parameter in parameters]
    # In double precision: Adam's corrections are differences of numbers near 1.
    count, rate = states[0]["step"].double(), th.tensor(float(group["lr"]), dtype=th.float64)
    changed = [*parameters, *(state[name] for name in ("exp_avg", "exp_avg_sq") for state in states), count, rate]
    own = [tensor.detach() for tensor in changed]
    gradients: Sequence[th.Tensor] = ()
    ready: dict[int, Callable[..., Any]] = {}  # within one update, all else is the same for minibatches of one size

    @th.no_grad()
    def compute(samples: Any, indices: th.Tensor, update: Any) -> tuple[th.Tensor, Minibatch]:
        nonlocal gradients
        if len(indices) not in ready:
            ready[len(indices)] = make_ready(samples, indices, update)
        # torch also switches the validation off for good when it first compiles anything.
        with unvalidated_distributions():
            norm, *outputs = ready[len(indices)](indices)
        gradients = outputs[: len(parameters)]
        return norm, logged(outputs[len(parameters) :])

    def make_ready(samples: Any, indices: th.Tensor, update: Any) -> Callable[..., Any]:
        """The step as a function of the places of the samples."""
        others = (*rows_of(samples, None), *constants)
        key = (numbers, structure, *((tensor.shape, tensor.dtype) for tensor in (*own, indices, *others)))
        if key not in steps_made:
            step = _step(model, samples, indices, update, settings)
            tensors = [tensor.clone() for tensor in (*own, indices, *others)]  # it is run, and changes what it is given
            with unvalidated_distributions():
                with th.enable_grad():
                    traced = make_fx(step)(*tensors)
                steps_made[key] = _compiled(traced, tensors, {} if model.compile is True else dict(model.compile))
        run = steps_made[key]
        return lambda indices: run(*own, indices, *others)

    try:
        yield compute
    finally:
        for state in states:
            state["step"].copy_(count)
        for parameter, gradient in zip(parameters, gradients, strict=False):
            parameter.grad = gradient


def _step(model: Any, samples: Any, indices: th.Tensor, update: Any, settings: dict[str, Any]) -> Callable[..., Any]:
    """The gradient of a minibatch, its clipping, and Adam's step, as a function of tensors, of which it changes the first."""
    columns = rows_of(samples, None)
    example = type(samples)(*(_taken(value, indices) for value in samples))
    pure = pure_loss(model, example, update, rows_of(example, indices))
    number = len(pure.parameters)
    (beta1, beta2), eps, weight_decay = settings["betas"], settings["eps"], settings["weight_decay"]

    def step(*tensors: th.Tensor) -> tuple[th.Tensor, ...]:
        parts = iter(tensors)
        parameters, means, squares = ([next(parts) for _ in range(number)] for _ in range(3))
        count, rate, indices = (next(parts) for _ in range(3))
        rows = [next(parts).index_select(0, indices) for _ in columns]
        outputs = pure.gradients(*parameters, *rows, indices, *parts)
        norm = th.stack([gradient.square().sum() for gradient in outputs[:number]]).sum().sqrt()
        share = (model.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        gradients = [gradient * share for gradient in outputs[:number]]
        count.add_(1)
        # D. P. Kingma and J. Ba, "Adam", arXiv 1412.6980, algorithm 1; AdamW's decay as in arXiv 1711.05101.
        size = (rate / (1 - beta1**count)).float()
        scale = (1 - beta2**count).rsqrt().float()
        for parameter, mean, square, own in zip(parameters, means, squares, gradients, strict=True):
            gradient = -own if settings["maximize"] else own
            if weight_decay and settings.get("decoupled_weight_decay"):
                parameter.mul_(1 - rate.float() * weight_decay)
            elif weight_decay:
                gradient = gradient + weight_decay * parameter
            mean.copy_(mean + (gradient - mean) * (1 - beta1))
            square.copy_(beta2 * square + (1 - beta2) * gradient * gradient)
            parameter.sub_(size * mean / (square.sqrt() * scale + eps))
        return (norm, *gradients, *outputs[number:])

    return step


def _compiled(traced: Any, tensors: Sequence[th.Tensor], options: dict[str, Any]) -> Callable[..., Any]:
    """A graph as a compiled function; without the guards of ``torch.compile``, which the key has in their place."""
    if options.keys() <= {"options"}:
        from torch import _inductor  # takes time and memory

        return _inductor.compile(traced, list(tensors), options.get("options"))
    return th.compile(traced, **options)


def _taken(value: Any, indices: th.Tensor) -> Any:
    """The samples of a minibatch, of an observation in parts as well."""
    if isinstance(value, dict):
        return {key: part.index_select(0, indices) for key, part in value.items()}
    return value.index_select(0, indices)
