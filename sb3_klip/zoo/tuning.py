"""RL Zoo's tuner: the search for coefficients, their parameters and ``reuse``, and the trials that it keeps."""

import contextlib
import shlex
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import optuna
from optuna.trial import TrialState
from rl_zoo3.exp_manager import ExperimentManager

from sb3_klip.coefficients import Entry, entries, make
from sb3_klip.coefficients.registry import find

#: The value of ``beta`` or ``reuse`` that asks for the search.
SEARCH = "search"
#: The numbers of rollouts that are tried.
REUSE = (1, 5)

Sampler = Callable[[optuna.Trial, int, int, dict[str, Any]], dict[str, Any]]
Converter = Callable[[dict[str, Any]], dict[str, Any]]


def search_space(is_continuous: bool = False) -> dict[str, Mapping[str, tuple[float, float]]]:
    """
    The coefficients that are tried, with the range of each sampled parameter, on a logarithmic scale.

    :param is_continuous: whether actions are continuous; then coefficients that need probabilities are left out
    """

    def is_left_out(entry: Entry, ranges: Mapping[str, tuple[float, float]]) -> bool:
        return is_continuous and make(entry.name, **{key: low for key, (low, _) in ranges.items()}).needs_probabilities

    tried = {entry.name: (entry, entry.search) for entry in entries() if entry.search is not None}
    return {name: ranges for name, (entry, ranges) in tried.items() if not is_left_out(entry, ranges)}


def declared_ranges(name: str) -> Mapping[str, tuple[float, float]] | None:
    """
    The ranges that a coefficient declares at its definition, by ``search`` of ``@register``; None if there are none.

    :param name: as in ``beta``
    :raises ValueError: if there is no such coefficient
    """
    entry = find(name)
    return None if entry is None else entry.search


def sampler_with_beta(sampler: Sampler, only: str | None = None) -> Sampler:
    """
    Extend a sampler of RL Zoo by the coefficient and its parameters.

    :param sampler: RL Zoo's sampler of all other hyperparameters
    :param only: a coefficient that declares ranges, to search the parameters of this coefficient only
    :return: sampler that sets ``beta`` and ``beta_kwargs`` together
    """

    def sample(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
        hyperparams = sampler(trial, n_actions, n_envs, additional_args)
        # The zoo counts the actions of Box action spaces only.
        spaces = search_space(is_continuous=n_actions > 0) if only is None else {only: declared_ranges(only) or {}}
        try:
            name = trial.suggest_categorical("beta", list(spaces))
        except ValueError as error:
            raise ValueError(
                f"--study-name={trial.study.study_name!r} has searched among other coefficients than {', '.join(spaces)}: "
                f"choose another --study-name ({error})"
            ) from error
        beta_kwargs = {
            parameter: trial.suggest_float(f"beta_{name}_{parameter}", low, high, log=True)
            for parameter, (low, high) in spaces[name].items()
        }
        return {**hyperparams, "beta": name, "beta_kwargs": beta_kwargs}

    return sample


def sampler_with_reuse(sampler: Sampler) -> Sampler:
    """
    Extend a sampler of RL Zoo by the number of rollouts to learn from; RL Zoo's converters leave it unchanged.

    :param sampler: RL Zoo's sampler of all other hyperparameters
    :return: sampler that also sets ``reuse``
    """

    def sample(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
        return {**sampler(trial, n_actions, n_envs, additional_args), "reuse": trial.suggest_int("reuse", *REUSE)}

    return sample


def converter_with_beta(converter: Converter) -> Converter:
    """
    Extend a converter of RL Zoo, which converts the parameters stored in a trial to hyperparameters.

    :param converter: RL Zoo's converter of all other hyperparameters
    :return: converter that also converts the parameters of :func:`sampler_with_beta` to ``beta`` and ``beta_kwargs``
    """

    def convert(sampled: dict[str, Any]) -> dict[str, Any]:
        if "beta" not in sampled:
            return converter(sampled)
        name, prefix = sampled["beta"], f"beta_{sampled['beta']}_"
        beta_kwargs = {key.removeprefix(prefix): value for key, value in sampled.items() if key.startswith(prefix)}
        others = {key: value for key, value in sampled.items() if key != "beta" and not key.startswith(prefix)}
        return {**converter(others), "beta": name, "beta_kwargs": beta_kwargs}

    return convert


def name_best_trial(original: Callable[[ExperimentManager], None], manager: ExperimentManager) -> None:
    """
    RL Zoo's search, extended by the number of the best trial and the command that trains with it.

    :param original: the zoo's method
    :param manager: RL Zoo's manager
    """
    with _studies("create_study") as studies:
        original(manager)
    study, number = studies[-1], studies[-1].best_trial.number
    if manager.storage is None:
        print(f"The best is trial {number}. To train with a trial by its number, search with --storage and --study-name.")
        return
    words = ["--algo", manager.algo, "--env", manager.env_name.gym_id, "--storage", manager.storage]
    command = shlex.join([*words, "--study-name", study.study_name, "--trial-id", str(number)])
    print(f"The best is trial {number}. To train with it (add the other options that you gave):")
    print(f"  python -m rl_zoo3.train {command}")


def load_trial(
    original: Callable[..., dict[str, Any]],
    manager: ExperimentManager,
    storage: str,
    study_name: str,
    trial_id: int | None = None,
    convert: bool = True,
) -> dict[str, Any]:
    """
    RL Zoo's ``load_trial``, with a warning if the trial was not completed.

    :param original: the zoo's method
    :param manager: RL Zoo's manager
    :param storage: storage of the study
    :param study_name: its name
    :param trial_id: number of the trial; None for the best
    :param convert: whether to return hyperparameters instead of the sampled parameters
    :raises ValueError: if there is no such trial
    """
    if trial_id is not None and trial_id < 0:
        raise ValueError(f"--trial-id={trial_id} must be 0 or more")
    with _studies("load_study") as studies:
        try:
            params = original(manager, storage, study_name, trial_id, convert)
        except KeyError as error:
            raise ValueError(f"--study-name={study_name!r}: the storage {storage} has no such study ({error})") from None
        except IndexError:
            number = len(studies[-1].trials)
            raise ValueError(f"--trial-id={trial_id}: the study {study_name!r} has {number} trials, from 0 on") from None
    if trial_id is not None and (trial := studies[-1].trials[trial_id]).state != TrialState.COMPLETE:
        finished = [each for each in studies[-1].trials if each.state == TrialState.COMPLETE]
        advice = f" The best is --trial-id {studies[-1].best_trial.number}." if finished else ""
        warnings.warn(f"Trial {trial.number} was not trained to its end: {trial.state.name.lower()}.{advice}", stacklevel=2)
    return params


@contextlib.contextmanager
def _studies(function_name: str) -> Iterator[list[optuna.Study]]:
    """The studies that a function of Optuna returns inside the context, as RL Zoo does not keep them."""
    function, found = getattr(optuna, function_name), []

    def kept(*args: Any, **kwargs: Any) -> optuna.Study:
        found.append(function(*args, **kwargs))
        return found[-1]

    setattr(optuna, function_name, kept)
    try:
        yield found
    finally:
        setattr(optuna, function_name, function)
