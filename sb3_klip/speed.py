"""Ways of doing the same arithmetic in less time, with the same bits; and the compiled update, whose bits differ."""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import CategoricalDistribution, DiagGaussianDistribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.torch_layers import FlattenExtractor, MlpExtractor
from torch.distributions import Distribution
from torch.optim.adam import adam

from sb3_klip.errors import did_you_mean

Step = Callable[[th.Tensor], th.Tensor]

#: Numbers per cache line of 64 bytes. Matrix products may round differently on memory that begins elsewhere.
_LINE = 16
#: Above this many numbers, arithmetic takes the time, and not the calls: fewer of them would only cost memory.
_LARGE = 500_000


@contextmanager
def unchecked_distributions() -> Iterator[None]:
    """
    Do not look for NaN in the parameters and samples of torch's distributions.

    Whether an update is finite is checked on its gradients, once per epoch.
    """
    checked = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(checked)


@contextmanager
def stepping(
    optimizer: th.optim.Optimizer, parameters: Sequence[th.nn.Parameter], max_grad_norm: float, fused: bool = False
) -> Iterator[Step]:
    """
    How to take the steps of an update: a function of the loss, which returns the norm of the gradient before it is clipped.

    Adam steps on all parameters as one tensor where that has the same bits, which spares most of the calls that a small
    network's time goes into; otherwise on each, as SB3 does, but in fewer calls.

    :param optimizer: when this ends, it and the parameters are as they would be after ordinary steps
    :param parameters: those whose gradient is clipped
    :param max_grad_norm: what the norm is clipped to
    :param fused: let Adam step in one call, and take the norm of the gradient in one, which rounds differently
    """
    one = _OneTensor(optimizer, parameters, fused) if _can_be_one_tensor(optimizer, parameters) else None

    def step(loss: th.Tensor) -> th.Tensor:
        nonlocal one
        optimizer.zero_grad() if one is None else one.zero_grad()
        loss.backward()
        if one is not None and any(parameter.grad is None for parameter in parameters):
            # Adam leaves parameters alone that the loss does not depend on.
            one.leave()
            one = None
        if one is not None:
            return one.step(max_grad_norm)
        norm = th.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
        optimizer.step()
        return norm

    with _fewer_calls(optimizer, "fused" if fused else "foreach"):
        try:
            yield step
        finally:
            if one is not None:
                one.leave()


@contextmanager
def _fewer_calls(optimizer: th.optim.Optimizer, how: str) -> Iterator[None]:
    """
    Let Adam step on all tensors in each call, which torch does by itself on a GPU only.

    Optimizers of other kinds, and a choice that the user made, are left alone.

    :param optimizer: its groups are as before afterwards, so that they are saved as they were
    :param how: "foreach", whose arithmetic is the same, or "fused", whose arithmetic is not
    """
    if not _is_plain_adam(optimizer) or (how == "foreach" and _is_large(optimizer)):
        yield
        return
    groups = [group for group in optimizer.param_groups if group["foreach"] is None and not group["fused"]]
    before = [group[how] for group in groups]
    for group in groups:
        group[how] = True
    try:
        yield
    finally:
        for group, choice in zip(groups, before, strict=True):
            group[how] = choice


def _is_plain_adam(optimizer: th.optim.Optimizer) -> bool:
    return type(optimizer) in (th.optim.Adam, th.optim.AdamW)


def _is_large(optimizer: th.optim.Optimizer) -> bool:
    return sum(p.numel() for group in optimizer.param_groups for p in group["params"]) > _LARGE


def _can_be_one_tensor(optimizer: th.optim.Optimizer, parameters: Sequence[th.nn.Parameter]) -> bool:
    """Whether Adam may take these parameters for one tensor, with nobody noticing but the clock."""
    if not _is_plain_adam(optimizer) or len(optimizer.param_groups) != 1:
        return False
    (group,) = optimizer.param_groups
    choices = ("foreach", "fused", "amsgrad", "capturable", "differentiable")
    hooks = (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)
    # A scheduler counts the calls of step, and may have put its own in its place.
    if any(group[choice] for choice in choices) or any(hooks) or "step" in vars(optimizer):
        return False
    if len(group["params"]) != len(parameters) or any(a is not b for a, b in zip(group["params"], parameters, strict=True)):
        return False
    plain = all(p.dtype == th.float32 and p.device.type == "cpu" and p.is_contiguous() for p in parameters)
    states = [optimizer.state.get(p, {}) for p in parameters]
    # All have taken the same number of steps, or none has taken any.
    steps = {float(state["step"]) if state else 0.0 for state in states}
    return plain and not _is_large(optimizer) and len(steps) == 1


class _OneTensor:
    """
    Adam on one tensor of which the parameters are views, until :meth:`leave`.

    :param optimizer: plain Adam of these parameters
    :param parameters: the parameters
    :param fused: whether to round differently, in fewer calls
    """

    def __init__(self, optimizer: th.optim.Optimizer, parameters: Sequence[th.nn.Parameter], fused: bool):
        self.optimizer = optimizer
        self.parameters = parameters
        self.fused = fused
        # What lies between the parameters is zero, and stays zero.
        self.starts = [0]
        for parameter in parameters:
            self.starts.append(self.starts[-1] + -(-parameter.numel() // _LINE) * _LINE)

        self.flat = self._gather(parameters)
        self.gradient = th.zeros_like(self.flat)
        self.gradients = self._views(self.gradient)
        states = [optimizer.state.get(parameter) for parameter in parameters]
        self.steps = th.zeros(()) if states[0] is None else states[0]["step"].clone()
        self.averages = {
            name: self._gather(
                [th.zeros_like(p) if state is None else state[name] for p, state in zip(parameters, states, strict=True)]
            )
            for name in ("exp_avg", "exp_avg_sq")
        }
        for parameter, view in zip(parameters, self._views(self.flat), strict=True):
            parameter.data = view

    def _views(self, flat: th.Tensor) -> list[th.Tensor]:
        places = zip(self.parameters, self.starts[:-1], strict=True)
        return [flat[start : start + parameter.numel()].view(parameter.shape) for parameter, start in places]

    def _gather(self, tensors: Sequence[th.Tensor]) -> th.Tensor:
        flat = th.zeros(self.starts[-1])
        for view, tensor in zip(self._views(flat), tensors, strict=True):
            view.copy_(tensor.detach())
        return flat

    def zero_grad(self) -> None:
        """Forget the gradient."""
        for parameter in self.parameters:
            parameter.grad = None

    @th.no_grad()
    def step(self, max_grad_norm: float) -> th.Tensor:
        """Clip the gradient and step, in the arithmetic of ``clip_grad_norm_`` and of torch's Adam."""
        gradients: list[Any] = [parameter.grad for parameter in self.parameters]
        th._foreach_copy_(self.gradients, gradients)
        # Rounded as the norm of the parameters' norms, if it is to have the same bits.
        norm = th.linalg.vector_norm(self.gradient if self.fused else th.stack(th._foreach_norm(gradients)))
        self.gradient.mul_((max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
        group = self.optimizer.param_groups[0]
        # torch's function, without what its class does around it for the sake of its other uses.
        adam(
            [self.flat],
            [self.gradient],
            [self.averages["exp_avg"]],
            [self.averages["exp_avg_sq"]],
            [],
            [self.steps],
            foreach=False,
            fused=self.fused,
            decoupled_weight_decay=group["decoupled_weight_decay"],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
        )
        return norm

    def leave(self) -> None:
        """Give each parameter, and its state in the optimizer, a memory of its own again."""
        averages = {name: self._views(flat) for name, flat in self.averages.items()}
        for position, (parameter, view) in enumerate(zip(self.parameters, self._views(self.flat), strict=True)):
            parameter.data = view.clone()
            if self.steps > 0:
                own = {name: views[position].clone() for name, views in averages.items()}
                self.optimizer.state[parameter] = {"step": self.steps.clone(), **own}


@contextmanager
def plain_forward(policy: th.nn.Module) -> Iterator[None]:
    """
    Evaluate SB3's MlpPolicy in fewer calls until this ends; another policy is left alone.

    :param policy: the policy
    """
    if not _is_plain_mlp(policy):
        yield
        return
    policy.forward = _PlainForward(policy)
    try:
        yield
    finally:
        del policy.forward


def _is_plain_mlp(policy: Any) -> bool:
    """Whether a policy is SB3's MlpPolicy, as it was made."""
    return (
        type(policy) is ActorCriticPolicy
        and type(policy.features_extractor) is FlattenExtractor
        and type(policy.mlp_extractor) is MlpExtractor
        and policy.share_features_extractor
        and type(policy.action_dist) in (DiagGaussianDistribution, CategoricalDistribution)
        and isinstance(policy.observation_space, spaces.Box)
        and not is_image_space(policy.observation_space)
        and not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in policy.modules())
    )


class _PlainForward:
    """
    ``forward`` of SB3's MlpPolicy: its layers one after the other, and the same arithmetic as its distribution's.

    A copy of the policy has a copy of this, with its own layers.

    :param policy: the policy
    """

    def __init__(self, policy: Any):
        self.policy = policy
        self.actor = [*policy.mlp_extractor.policy_net, policy.action_net]
        self.critic = [*policy.mlp_extractor.value_net, policy.value_net]
        self.sample = _gaussian if isinstance(policy.action_dist, DiagGaussianDistribution) else _categorical

    def __call__(self, obs: th.Tensor, deterministic: bool = False) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        if deterministic:
            return type(self.policy).forward(self.policy, obs, deterministic=True)
        latent = values = obs.float().flatten(1)
        for layer in self.actor:
            latent = layer.forward(latent)
        for layer in self.critic:
            values = layer.forward(values)
        actions, log_prob = self.sample(latent, self.policy)
        return actions, values, log_prob


def _gaussian(mean: th.Tensor, policy: Any) -> tuple[th.Tensor, th.Tensor]:
    """Actions and their log-probabilities, as ``DiagGaussianDistribution`` draws and rounds them."""
    std = th.ones_like(mean) * policy.log_std.exp()
    actions = mean + th.empty_like(mean).normal_() * std
    log_prob = -((actions - mean) ** 2) / (2 * std**2) - std.log() - math.log(math.sqrt(2 * math.pi))
    _check_action(log_prob, "log-probability")
    return actions.reshape((-1, *policy.action_space.shape)), log_prob.sum(dim=1)


def _categorical(logits: th.Tensor, policy: Any) -> tuple[th.Tensor, th.Tensor]:
    """Actions and their log-probabilities, as ``CategoricalDistribution`` draws and rounds them."""
    logits = logits - logits.logsumexp(dim=-1, keepdim=True)
    _check_action(logits, "logits")
    actions = th.multinomial(logits.softmax(dim=-1), 1, replacement=True)
    return actions.flatten(), logits.gather(1, actions).flatten()


def _check_action(values: th.Tensor, name: str) -> None:
    """In place of the distribution's validation: no environment, least of all a robot, is to be given such an action."""
    if not values.isfinite().all():
        raise ValueError(
            f"the policy has no action to take: its {name} is {values.tolist()}. Is there a NaN in the observation, or in a "
            "parameter of the policy?"
        )


def compiled(loss: Callable[..., Any], options: bool | dict[str, Any]) -> Callable[..., Any]:
    """
    ``torch.compile`` a function.

    :param loss: the function
    :param options: arguments of ``torch.compile``, or True for none
    """
    # Its first use in a process switches the validation of distributions off for all programs in it.
    checked = Distribution._validate_args
    try:
        return th.compile(loss, **({} if options is True else dict(options)))  # type: ignore[arg-type]
    finally:
        Distribution.set_default_validate_args(checked)


def check_compile(options: bool | dict[str, Any]) -> None:
    """
    Refuse what cannot be compiled with, before anything is built.

    :param options: as for :func:`compiled`, or False
    :raises TypeError: if it is of another type, or names what is not an argument of ``torch.compile``
    :raises ValueError: if the backend is unknown
    :raises RuntimeError: if torch cannot compile here
    """
    if options is False:
        return
    if options is not True and not isinstance(options, dict):
        raise TypeError(f"compile must be True, False or a dict of arguments of torch.compile, not {options!r}")
    given = {} if options is True else options
    allowed = [name for name in inspect.signature(th.compile).parameters if name != "model"]
    for name in given:
        if name not in allowed:
            hint = did_you_mean(name, allowed)
            raise TypeError(f"compile has {name!r}, which is not an argument of torch.compile: {', '.join(allowed)}.{hint}")
    backend = given.get("backend", "inductor")
    backends = th.compiler.list_backends(exclude_tags=None)
    if isinstance(backend, str) and backend not in backends:
        raise ValueError(
            f"compile's backend={backend!r} must be one of {', '.join(backends)}.{did_you_mean(backend, backends)}"
        )
    if backend == "inductor":
        # Only here: importing torch's compiler takes time and memory.
        from torch._inductor.cpp_builder import get_cpp_compiler

        try:
            get_cpp_compiler()
        except Exception as error:
            raise RuntimeError(
                "compile=True needs a C++ compiler, and torch finds none: install g++ (or clang, or name one in the "
                "environment variable CXX), or leave compile out. The update is then slower, and bit-identical to PPO's."
            ) from error
