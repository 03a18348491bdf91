"""Settings of torch under which an update is faster and has the same bits."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch as th
from torch.distributions import Distribution


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
def foreach_steps(optimizer: th.optim.Optimizer) -> Iterator[None]:
    """
    Let Adam step on all tensors at once, which torch does by itself on a GPU only; its arithmetic is the same.

    Optimizers of other kinds, and a choice that the user made, are left alone.

    :param optimizer: its groups are as before afterwards, so that they are saved as they were
    """
    kinds = (th.optim.Adam, th.optim.AdamW)
    groups = [g for g in optimizer.param_groups if type(optimizer) in kinds and g["foreach"] is None and not g["fused"]]
    for group in groups:
        group["foreach"] = True
    try:
        yield
    finally:
        for group in groups:
            group["foreach"] = None
