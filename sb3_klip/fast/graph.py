"""
The loss of a minibatch and its gradient as one traced graph: a third of the eager time for a small network, at the same bits.

Eager PyTorch spends three quarters of a small minibatch in Python, in the dispatcher and in autograd's bookkeeping. The graph
holds the very operators that eager PyTorch calls for ``_minibatch_loss`` of the model and its backward pass, and TorchScript
runs them without Python and without changing any (:func:`~sb3_klip.fast.script.unoptimized_script`), so that no bit changes.

A graph has fixed numbers and no Python: it cannot look at data. So only models whose parts are all known use graphs
(:func:`reason_against`). Numbers that follow a schedule are inputs of the graph, and a coefficient that may change is called
between two graphs (:mod:`sb3_klip.fast.asking`). At the first minibatch of every update, before any step, the results of the
graph and of the eager loss are compared, with ratios inside and outside the clip range. If a bit differs, the model uses the
eager loss from then on.

``torch.jit.trace`` is deprecated. What makes a graph is :func:`_traced`, and nothing else knows how.
"""

import functools
import math
import signal
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from types import BuiltinFunctionType
from typing import Any, TypeAlias

import torch as th
from sb3_contrib.common.maskable import policies as maskable_policies
from stable_baselines3.common import distributions as sb3_distributions
from stable_baselines3.common import policies, torch_layers
from stable_baselines3.common.buffers import RolloutBuffer
from torch import nn
from torch.distributions import Bernoulli, Categorical, Normal
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.weak import WeakIdKeyDictionary

from sb3_klip.diagnostics import Minibatch
from sb3_klip.fast.asking import Answering, example_answer
from sb3_klip.fast.observers import hooks_of, reason_in_torch
from sb3_klip.fast.pure import WEIGHTS, constants_of, logged, pure_loss, rows_of
from sb3_klip.fast.script import unoptimized_script
from sb3_klip.fast.simplify import simplified
from sb3_klip.fast.standing_in import is_changed, is_patched
from sb3_klip.fast.validation import unvalidated_distributions
from sb3_klip.rollout import BUFFERS
from sb3_klip.seam import DISTRIBUTIONS

#: Modules that do the same at each call; others may look at data, have a state, or draw random numbers. Convolutions are left
#: out: TorchScript has no word for an argument of their backward pass, and arithmetic is what takes their time.
KNOWN_MODULES = {
    *(policies.ActorCriticPolicy, policies.MultiInputActorCriticPolicy),
    *(maskable_policies.MaskableActorCriticPolicy, maskable_policies.MaskableMultiInputActorCriticPolicy),
    *(torch_layers.FlattenExtractor, torch_layers.CombinedExtractor, torch_layers.MlpExtractor),
    *(nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.Flatten, nn.Identity, nn.Linear),
    *(nn.Tanh, nn.ReLU, nn.ELU, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Softplus),
}
#: Methods of policy and distribution that are called for each minibatch.
_POLICY_METHODS = ("evaluate_actions", "extract_features", "_get_action_dist_from_latent")
_DISTRIBUTION_METHODS = ("proba_distribution", "log_prob", "entropy")
#: Functions that are called for each minibatch, and that a graph does without.
_FUNCTIONS: dict[Any, tuple[str, ...]] = {
    nn.Module: ("__call__", "_call_impl"),
    **dict.fromkeys(KNOWN_MODULES - {nn.ModuleList, nn.ModuleDict}, ("__call__", "forward")),
    torch_layers.MlpExtractor: ("__call__", "forward", "forward_actor", "forward_critic"),
    nn.functional: ("relu", "elu", "leaky_relu", "silu", "mse_loss"),
    policies: ("preprocess_obs",),
    policies.BaseModel: ("extract_features",),
    sb3_distributions: ("sum_independent_dims",),
    **dict.fromkeys((Normal, Categorical, Bernoulli), ("__init__", "log_prob", "entropy")),
    th.Tensor: ("backward",),
    th.autograd: ("backward", "grad"),
}
#: Minibatches of one size that are computed eagerly before a graph is traced, which takes as long as some hundreds of them: so
#: a short training does not pay for it.
WARM_UP = 300
#: Products of a parameter and a sample that take as long as a graph saves in two minibatches, roughly. In every update, two
#: more minibatches are computed to compare: with more products than this for each minibatch, it would take longer.
WORTH = 4_000_000
#: Graphs that are traced for one model at most: where numbers change again and again, eager is faster.
MOST_GRAPHS = 16

#: What minibatches are made of.
SAMPLES = set(BUFFERS.values())

_TRACING = threading.Lock()
#: What stands in the place of the weights of the loss once a callback has changed them.
_VARYING = "varying"


#: The graph of the gradients, and the one of what a coefficient is given that may change.
Traced: TypeAlias = tuple[Callable[..., Any], Callable[..., Any] | None]


class Graphs:
    """The graphs of one model, by what they depend on; how often they could have been used; and why they are not any more."""

    def __init__(self) -> None:
        self.traced: dict[Any, Traced] = {}
        self.uses: dict[Any, int] = {}
        self.given_up = ""
        #: The weights of the loss as long as they stay the same; afterwards, they are inputs of the graphs.
        self.weights: Any = None


# By model, so that a copy of a model, or one that is pickled, does not carry the other's.
_GRAPHS: MutableMapping[Any, Graphs] = WeakIdKeyDictionary()


def reason_against(model: Any) -> str:
    """
    Why an update cannot be computed by graphs.

    :param model: an algorithm of this package
    :return: the reason, for people; empty if there is none
    """
    if reason := given_up(model):
        return reason
    if model.device.type != "cpu":
        return f"the model is on {model.device}"
    if not model.has_known_loss():
        return f"a part of the loss of {type(model).__name__} was replaced"
    if any(isinstance(weight, th.Tensor) and weight.requires_grad for weight in (model.ent_coef, model.vf_coef)):
        return "a weight of the loss is learned"
    return next(_reasons_in(model.policy), "") or _reason_in_functions() or reason_in_torch()


def reason_not_worth_it(model: Any) -> str:
    """
    Why graphs would not make an update shorter.

    :param model: an algorithm of this package, with nothing against graphs
    :return: the reason, for people; empty if they would
    """
    if not isinstance(model.rollout_buffer, RolloutBuffer):
        return f"{type(model.rollout_buffer).__name__} is no RolloutBuffer"
    batch_size, minibatches = _sizes(model)
    products = sum(parameter.numel() for parameter in model.policy.parameters()) * batch_size
    return "products of matrices take nearly all of its time" if products > WORTH * minibatches else ""


def _sizes(model: Any) -> tuple[int, int]:
    """Samples of a minibatch, and minibatches of an update."""
    samples = model.rollout_buffer.buffer_size * model.rollout_buffer.n_envs
    batch_size = min(int(model.batch_size or samples), samples)  # NumPy's small integers would overflow
    return batch_size, model.n_epochs * math.ceil(samples / batch_size)


def given_up(model: Any) -> str:
    """
    Why a model uses no graph any more.

    :param model: an algorithm of this package
    :return: the reason, for people; empty if it may use graphs
    """
    return _GRAPHS[model].given_up if model in _GRAPHS else ""


def _reasons_in(policy: Any) -> Iterator[str]:
    """What is not known of a policy, or would go unnoticed if its modules were not called."""
    for module in policy.modules():
        name = type(module).__name__
        if type(module) not in KNOWN_MODULES:
            yield f"{name} is not known"
        if "_compiled_call_impl" in vars(module):
            yield f"the policy's {name} is compiled"
        if any(callable(value) and hasattr(type(module), key) for key, value in vars(module).items()):
            yield f"a method of the policy's {name} was replaced"
        if any(hooks_of([module])):
            yield f"the policy's {name} has a hook"
    action_dist = policy.action_dist
    if type(action_dist) not in DISTRIBUTIONS:
        yield f"{type(action_dist).__name__} is not known"
    elif is_changed(policy, *_POLICY_METHODS) or is_changed(action_dist, *_DISTRIBUTION_METHODS):
        yield "a method of the policy or its distribution was replaced"
    for parameter in policy.parameters():
        if type(parameter) is not nn.Parameter or not parameter.requires_grad or parameter._backward_hooks:
            yield "a parameter of the policy is frozen, has a hook, or is of a type of its own"
    stepped = {id(parameter) for group in policy.optimizer.param_groups for parameter in group["params"]}
    if stepped != {id(parameter) for parameter in policy.parameters()}:
        yield "the optimizer is not that of the policy's parameters"


def _reason_in_functions() -> str:
    """A function that modules call, and that somebody has replaced."""
    built_in = (nn.functional.linear, nn.functional.gelu, nn.functional.softplus, th.tanh, th.sigmoid)
    replaced = any(is_patched(owner, *names) for owner, names in _FUNCTIONS.items())
    if replaced or {*map(type, built_in)} != {BuiltinFunctionType}:
        return "a function of torch or Stable-Baselines3 was replaced"
    return ""


def structure_of(policy: Any) -> tuple[Any, ...]:
    """
    What a graph of a policy depends on beside the numbers in its parameters.

    :param policy: the policy
    :return: its modules and their settings, such as a negative slope, and its parameters
    """
    # The place in memory of a module that is no more may be that of a later one, of another type.
    modules = [(id(module), type(module), module.extra_repr()) for module in policy.modules()]
    return (*modules, *map(id, policy.parameters()))


def graph_loss(model: Any, update: Any) -> Callable[..., tuple[Any, Minibatch]]:
    """
    What computes the minibatches of one update.

    :param model: an algorithm of this package, with nothing against graphs
    :param update: what does not change during the update
    :return: a function of what ``model._minibatch_loss`` takes, which returns that, or the gradients of all parameters in
        place of the loss
    """
    graphs = _GRAPHS.setdefault(model, Graphs())
    parameters = list(model.policy.parameters())
    varied = _varied(update, graphs)
    coefficient, constants = update.coefficient, constants_of(varied)
    in_graph = repr(coefficient) if coefficient.is_constant else (coefficient.requests, coefficient.estimator)
    numbers = (graphs.weights, model.normalize_advantage, in_graph, update.replayed is None)
    structure = structure_of(model.policy)
    of_rollout = (update.snapshot, update.positions, update.ratio_bounds, update.ages, update.replayed)
    needs_indices = any(each is not None for each in of_rollout)
    ready: dict[int, Callable[..., Any]] = {}
    left = _sizes(model)[1]
    if len(graphs.uses) > 1000:  # numbers that change with every update
        graphs.uses.clear()

    def compute(rollout_data: Any, indices: th.Tensor | None, update: Any) -> tuple[Any, Minibatch]:
        nonlocal left
        left -= 1
        size = len(rollout_data.advantages)  # within one update, all else is the same for minibatches of one size
        # The last one is computed eagerly, so that the policy holds its distribution afterwards, as others may expect.
        run = ready.get(size) or make_ready(rollout_data, indices) if left else None
        if run is None:
            return model._minibatch_loss(rollout_data, indices, update)
        ready[size] = run
        return run(rows_of(rollout_data, indices if needs_indices else None))

    @th.random.fork_rng(devices=())  # what nobody knows of may draw random numbers
    def make_ready(rollout_data: Any, indices: th.Tensor | None) -> Callable[..., Any] | None:
        """A graph that has just given the bits of the eager loss; None if there is none, or none yet."""
        if graphs.given_up or not _are_plain(rollout_data):
            return None
        rows = rows_of(rollout_data, indices if needs_indices else None)
        of_constants = (constant.dtype for constant in constants)
        key = (numbers, structure, *((row.shape, row.dtype) for row in rows), *of_constants)
        if not _is_due(graphs, key):
            return None
        # The policy is still that of the rollout, so that no ratio is near a bound; moved, some are, on each side.
        moved = _moved(rollout_data)
        asked = (
            coefficient if coefficient.is_constant else Answering(coefficient, example_answer(coefficient, moved.advantages))
        )
        if (eager := _eager(model, moved, indices, update._replace(coefficient=asked))) is None:
            graphs.given_up = "the loss does not depend on a parameter of the policy"
            return None
        try:
            if key not in graphs.traced:
                graphs.traced[key] = _traced(model, rollout_data, varied, rows, constants)
            run = functools.partial(_run, graphs.traced[key], parameters, constants, update.clip_range)
            found = run(rows_of(moved, indices if needs_indices else None), asked)
        except Exception as error:  # whatever torch, or what it traces, may raise
            graphs.given_up = _why_not_traced(error)
            return None
        if _same((*found, getattr(asked, "given", {})), eager):
            return lambda rows: run(rows, coefficient)
        graphs.given_up = "a graph did not give the bits of the eager update"
        warnings.warn(
            f"The fast path of {type(model).__name__} does not give the bits of the eager one, so it is not used from now on, "
            f"at {model.num_timesteps} steps. The result of the training does not change.",
            stacklevel=6,
        )
        return None

    return compute


def _why_not_traced(error: Exception) -> str:
    """In the words of what was raised; but what the handler of a signal has raised, such as a time limit, goes on."""
    handlers = {getattr(signal.getsignal(number), "__code__", None) for number in signal.valid_signals()} - {None}
    if any(frame.f_code in handlers for frame, _ in traceback.walk_tb(error.__traceback__)):
        raise error
    first_line = next(iter(str(error).splitlines()), "")
    return f"it cannot be traced ({type(error).__name__}: {first_line})"


def _is_due(graphs: Graphs, key: Any) -> bool:
    """Whether enough minibatches that could use a graph have been computed without."""
    graphs.uses[key] = graphs.uses.get(key, 0) + 1
    if graphs.uses[key] <= WARM_UP:
        return False
    if key not in graphs.traced and len(graphs.traced) == MOST_GRAPHS:
        graphs.given_up = "what the loss depends on changes too often"
    return not graphs.given_up


def _are_plain(rollout_data: Any) -> bool:
    """Whether these are samples as SB3's buffers make them: those of a user's own may lead to something that learns, too."""
    return type(rollout_data) in SAMPLES and not any(row.requires_grad for row in rows_of(rollout_data, None))


def _eager(model: Any, samples: Any, indices: th.Tensor | None, update: Any) -> tuple[Any, Minibatch, dict[str, Any]] | None:
    """Gradients of all parameters, what is logged, and what the coefficient is given; None if a parameter has no gradient."""
    loss, minibatch = model._minibatch_loss(samples, indices, update)
    gradients = th.autograd.grad(loss, list(model.policy.parameters()), allow_unused=True)
    if any(gradient is None for gradient in gradients):
        return None
    return gradients, minibatch, getattr(update.coefficient, "given", {})


def _varied(update: Any, graphs: Graphs) -> Any:
    """The update, with the weights of the loss as tensors once they have changed."""
    weights = tuple(getattr(update, name) for name in WEIGHTS)
    are_numbers = not any(isinstance(weight, th.Tensor) for weight in weights)
    graphs.weights = weights if are_numbers and graphs.weights in (None, weights) else _VARYING
    if graphs.weights is not _VARYING:
        return update
    return update._replace(**{name: th.as_tensor(getattr(update, name), dtype=th.float64) for name in WEIGHTS})


def _run(
    graphs: Traced, parameters: Any, constants: Any, clip_range: Any, rows: Any, coefficient: Any
) -> tuple[Sequence[th.Tensor], Minibatch]:
    """Gradients of all parameters, and what is logged."""
    whole, of_given = graphs
    tensors = (*parameters, *rows, *constants)
    if of_given is not None:
        ratio, advantages, *quantities = _call(of_given, tensors)
        requests = [key for key in coefficient.requests if key != "progress"]
        answer = coefficient(ratio, advantages, clip_range, **dict(zip(requests, quantities, strict=True)))
        tensors = (*tensors, *(tensor for tensor in answer if tensor is not None))
    outputs = _call(whole, tensors)
    return outputs[: len(parameters)], logged(outputs[len(parameters) :])


@th.no_grad()
def _call(graph: Any, tensors: Sequence[th.Tensor]) -> Sequence[th.Tensor]:
    with unoptimized_script():
        return graph(*tensors)


def _moved(rollout_data: Any) -> Any:
    """A minibatch as if policy and values had moved since the rollout, by another factor or amount for each sample."""
    columns = {name: getattr(rollout_data, name) for name in ("old_log_prob", "old_values")}
    return rollout_data._replace(
        **{name: column + th.linspace(-1, 1, len(column), dtype=column.dtype) for name, column in columns.items()}
    )


def _traced(model: Any, example: Any, update: Any, rows: list[th.Tensor], constants: list[th.Tensor]) -> Traced:
    """
    A graph of the gradients and of what is logged, for tensors of these shapes.

    For a coefficient that may change, the graph takes what it returned as well; and there is one of what it is given.
    """
    answer: tuple[th.Tensor, ...] = ()
    if not update.coefficient.is_constant:
        answer = example_answer(update.coefficient, example.advantages)
        update = update._replace(coefficient=Answering(update.coefficient, answer))

    pure = pure_loss(model, example, update, rows)
    with _TRACING, unvalidated_distributions(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch")
        tensors = (*pure.parameters, *rows, *constants)
        return _script(pure.gradients, *tensors, *answer), _script(pure.given, *tensors) if answer else None


def _script(function: Callable[..., Any], *tensors: th.Tensor) -> Callable[..., Any]:
    return th.jit.trace(_Tupled(simplified(make_fx(function)(*tensors), *tensors)), tensors, check_trace=False)


class _Tupled(nn.Module):
    """A module whose result is a tuple, and no list, as TorchScript wants it."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *args: th.Tensor) -> tuple[th.Tensor, ...]:
        return tuple(self.module(*args))


def _same(ours: tuple[Any, Minibatch, dict[str, Any]], theirs: tuple[Any, Minibatch, dict[str, Any]]) -> bool:
    """Whether gradients, what is logged, and what the coefficient was given have the same bits, but for those of NaN."""
    left, right = ([*found, *minibatch.terms, *minibatch[1:5], *given.values()] for found, minibatch, given in (ours, theirs))
    return all(
        a is b is None or (a is not None and b is not None and bool(((a == b) | (a.isnan() & b.isnan())).all()))
        for a, b in zip(left, right, strict=True)
    )
