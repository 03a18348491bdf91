"""Hyperparameters that RL Zoo's tuner searches with ``--optimize-hyperparameters``: ``beta: search`` and ``reuse: search``."""

from collections.abc import Callable, Mapping
from typing import Any

import optuna

from sb3_klip.coefficients import entries, make

#: The value of ``beta`` or ``reuse`` that asks for the search.
SEARCH = "search"
#: The numbers of rollouts that are tried.
REUSE = (1, 5)

Sampler = Callable[[optuna.Trial, int, int, dict[str, Any]], dict[str, Any]]
Converter = Callable[[dict[str, Any]], dict[str, Any]]


def search_space(is_continuous: bool = False) -> dict[str, Mapping[str, tuple[float, float]]]:
    """
    The coefficients that are tried, with the range of each parameter that is sampled, on a logarithmic scale.

    :param is_continuous: whether actions have densities; coefficients that mean probabilities are then left out
    """
    return {
        entry.name: entry.search
        for entry in entries()
        if entry.search is not None and not (is_continuous and make(entry.name).needs_probabilities)
    }


def sampler_with_beta(sampler: Sampler) -> Sampler:
    """
    Extend a sampler of RL Zoo by the coefficient and, conditional on it, its parameters.

    :param sampler: the zoo's sampler of all other hyperparameters
    :return: sampler that sets ``beta`` and ``beta_kwargs`` together
    """

    def sample(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
        hyperparams = sampler(trial, n_actions, n_envs, additional_args)
        spaces = search_space(is_continuous=n_actions > 0)  # the zoo counts those of Box action spaces only
        name = trial.suggest_categorical("beta", list(spaces))
        beta_kwargs = {
            parameter: trial.suggest_float(f"beta_{name}_{parameter}", low, high, log=True)
            for parameter, (low, high) in spaces[name].items()
        }
        return {**hyperparams, "beta": name, "beta_kwargs": beta_kwargs}

    return sample


def sampler_with_reuse(sampler: Sampler) -> Sampler:
    """
    Extend a sampler of RL Zoo by the number of rollouts that are learned from; the zoo's converters leave it as it is.

    :param sampler: the zoo's sampler of all other hyperparameters
    :return: sampler that sets ``reuse``, too
    """

    def sample(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
        return {**sampler(trial, n_actions, n_envs, additional_args), "reuse": trial.suggest_int("reuse", *REUSE)}

    return sample


def converter_with_beta(converter: Converter) -> Converter:
    """
    Extend a converter of RL Zoo, which makes hyperparameters of the parameters stored in a trial.

    :param converter: the zoo's converter of all other hyperparameters
    :return: converter that makes ``beta`` and ``beta_kwargs`` of what :func:`sampler_with_beta` sampled
    """

    def convert(sampled: dict[str, Any]) -> dict[str, Any]:
        if "beta" not in sampled:
            return converter(sampled)
        name, prefix = sampled["beta"], f"beta_{sampled['beta']}_"
        beta_kwargs = {key.removeprefix(prefix): value for key, value in sampled.items() if key.startswith(prefix)}
        others = {key: value for key, value in sampled.items() if key != "beta" and not key.startswith(prefix)}
        return {**converter(others), "beta": name, "beta_kwargs": beta_kwargs}

    return convert
