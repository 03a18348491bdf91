"""Checking that the parameters and optimizer states of a file fit a policy, before any of them is copied."""

from collections.abc import Mapping
from typing import Any

import torch as th
from torch.nn.parameter import is_lazy

from sb3_klip.errors import ArchitectureError

#: What optimizers remember of a parameter in its own shape; some, such as Adafactor, have other shapes as well.
_LIKE_PARAMETER = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "square_avg", "grad_avg", "momentum_buffer")


def plain_names(state: Any) -> dict[str, Any]:
    """
    A policy's state dict under the names of its modules: older versions of SB3 saved those that ``torch.compile`` gave them.

    :param state: as ``policy.state_dict()``
    """
    return {key.removeprefix("_orig_mod."): value for key, value in state.items()}


def check_parameters(parameters: Mapping[str, Any], policy: th.nn.Module, name: str, exact: bool) -> None:
    """
    Refuse parameters of another architecture, before any of them is copied.

    :param parameters: state dicts by name, as ``get_parameters`` returns them
    :param policy: the policy that they are for
    :param name: what to call them in messages
    :param exact: whether all parameters must be there
    :raises ArchitectureError: naming the parameters that do not fit, with both shapes
    """
    given, own = parameters.get("policy", {}), policy.state_dict()
    if not isinstance(given, Mapping):
        return  # Stable-Baselines3 refuses what is no state
    own_way = _loaded_in_their_own_way(policy)
    given, own = ({key: value for key, value in state.items() if not key.startswith(own_way)} for state in (given, own))
    problems = [
        f"{key} is {tuple(given[key].shape)} and should be {tuple(own[key].shape)}"
        for key in given
        if key in own and hasattr(given[key], "shape") and given[key].shape != own[key].shape
    ]
    if exact:
        problems += [f"{key} is not known to the model" for key in given if key not in own]
        if given:
            # Policies from before SB3 1.7 lack the names of the extractor that they share, which SB3 sees to.
            shared = ("pi_features_extractor.", "vf_features_extractor.")
            problems += [f"{key} is missing" for key in own if key not in given and not key.startswith(shared)]
    problems += _moments_that_do_not_fit(parameters.get("policy.optimizer"), policy)
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise ArchitectureError(
            f"{name} holds the parameters of a policy of another architecture than this {type(policy).__name__}: "
            f"{'; '.join(problems[:4])}{more}. Make the model with the policy and policy_kwargs that the file's had."
        )


def _loaded_in_their_own_way(policy: th.nn.Module) -> tuple[str, ...]:
    """Beginnings of the names of what modules load that may rename or add parameters: torch says what does not fit there."""
    if type(policy).load_state_dict is not th.nn.Module.load_state_dict:
        return ("",)
    return tuple(
        f"{name}." if name else ""
        for name, module in policy.named_modules(remove_duplicate=False)  # a shared extractor has three names
        if type(module)._load_from_state_dict is not th.nn.Module._load_from_state_dict or module._load_state_dict_pre_hooks
    )


def _moments_that_do_not_fit(state: Any, policy: Any) -> list[str]:
    """Problems with the state of an optimizer, whose ``load_state_dict`` looks at none of the shapes."""
    if not isinstance(state, Mapping) or not {"state", "param_groups"} <= state.keys():
        return []  # Stable-Baselines3 refuses what is no optimizer's state
    torchs_own = type(policy.optimizer).__module__.startswith(("torch.", "stable_baselines3."))
    own = [parameter for group in policy.optimizer.param_groups for parameter in group["params"]]
    given = [index for group in state["param_groups"] for index in group["params"]]
    if len(given) != len(own):
        return [f"the optimizer has {len(given)} tensors and should have {len(own)}"]
    return [
        f"the optimizer's {key} of tensor {index} is {tuple(value.shape)} and should be {tuple(parameter.shape)}"
        for index, parameter in zip(given, own, strict=True)
        if torchs_own and not is_lazy(parameter)
        for key, value in state["state"].get(index, {}).items()
        if key in _LIKE_PARAMETER and value.shape != parameter.shape
    ]
