"""Hooks, profilers and modes of torch, which would notice a skipped call or a replaced operation."""

from collections.abc import Iterable
from typing import Any

import torch as th
from torch import nn


def hooks_of(modules: Iterable[nn.Module]) -> list[Any]:
    """
    The hooks of modules, forward and backward, in dicts that are empty where there is none.

    :param modules: the modules
    """
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [getattr(module, name) for module in modules for name in names]


def reason_in_torch() -> str:
    """What a user has switched on in torch that looks at each operation, or changes it; empty if there is nothing."""
    if nn.modules.module._has_any_global_hook():
        return "a hook of all modules is at work"
    if th.is_autocast_enabled("cpu"):
        return "autocast is at work"
    if th.is_anomaly_enabled():
        return "anomaly detection is at work"
    if th.autograd.profiler._is_profiler_enabled:
        return "a profiler is at work"
    if th._C._len_torch_function_stack() + th._C._len_torch_dispatch_stack():
        return "a mode of torch's functions is at work"
    if th._C._get_tracing_state() is not None:
        return "torch.jit is tracing"
    return ""
