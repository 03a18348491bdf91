"""The coefficient as a hyperparameter that RL Zoo's tuner searches: ``beta: search`` with ``--optimize-hyperparameters``."""

from collections.abc import Callable
from typing import Any

import optuna

#: Coefficients that are tried, with the range of each parameter that is sampled on a logarithmic scale.
SEARCH_SPACE: dict[str, dict[str, tuple[float, float]]] = {
    "step": {},
    "linear_ramp": {"width": (0.01, 1.0)},
    "sigmoid": {"temperature": (0.01, 1.0)},
    "soft_min": {"temperature": (0.01, 1.0)},
    "asymmetric": {"width_up": (0.01, 1.0), "width_down": (0.01, 1.0)},
    "clip_higher": {"low": (0.05, 0.5), "high": (0.05, 1.0)},
    "dual_clip": {"bound": (1.5, 10.0)},
    "rollback": {"slope": (0.01, 1.0)},
    "trust_region": {"delta": (0.003, 0.1)},
    "truly": {"delta": (0.003, 0.1), "alpha": (0.5, 50.0)},
    "quadratic": {},
    "smoothing": {"alpha": (0.01, 0.5)},
    "soft_adaptive": {"tau_pos": (0.3, 10.0), "tau_neg": (0.3, 10.0)},
    "fixed": {"value": (0.03, 10.0)},
    "adaptive": {"kl_target": (0.003, 0.1)},
}

#: The value of ``beta`` that asks for the search.
SEARCH = "search"

Sampler = Callable[[optuna.Trial, int, int, dict[str, Any]], dict[str, Any]]
Converter = Callable[[dict[str, Any]], dict[str, Any]]


def searching(sampler: Sampler) -> Sampler:
    """
    Extend a sampler of RL Zoo by the coefficient and, conditional on it, its parameters.

    :param sampler: the zoo's sampler of all other hyperparameters
    :return: sampler that sets ``beta`` and ``beta_kwargs`` together
    """

    def sample(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
        hyperparams = sampler(trial, n_actions, n_envs, additional_args)
        name = trial.suggest_categorical("beta", list(SEARCH_SPACE))
        beta_kwargs = {
            parameter: trial.suggest_float(f"beta_{name}_{parameter}", low, high, log=True)
            for parameter, (low, high) in SEARCH_SPACE[name].items()
        }
        return {**hyperparams, "beta": name, "beta_kwargs": beta_kwargs}

    return sample


def converting(converter: Converter) -> Converter:
    """
    Extend a converter of RL Zoo, which makes hyperparameters of the parameters stored in a trial.

    :param converter: the zoo's converter of all other hyperparameters
    :return: converter that makes ``beta`` and ``beta_kwargs`` of what :func:`searching` sampled
    """

    def convert(sampled: dict[str, Any]) -> dict[str, Any]:
        if "beta" not in sampled:
            return converter(sampled)
        name, prefix = sampled["beta"], f"beta_{sampled['beta']}_"
        beta_kwargs = {key.removeprefix(prefix): value for key, value in sampled.items() if key.startswith(prefix)}
        others = {key: value for key, value in sampled.items() if key != "beta" and not key.startswith(prefix)}
        return {**converter(others), "beta": name, "beta_kwargs": beta_kwargs}

    return convert
