"""Registration with RL Zoo. RL Zoo has no plugin interface, so some of its functions are wrapped."""

import argparse
import contextlib
import functools
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from rl_zoo3 import utils
from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER
from rl_zoo3.utils import ALGOS
from stable_baselines3.common.vec_env import VecNormalize

from sb3_klip.arguments import check_arguments
from sb3_klip.checkpoints.file import Checkpoint
from sb3_klip.checkpoints.zoo_run import load_vecnormalize
from sb3_klip.coefficients.registry import make_beta
from sb3_klip.errors import did_you_mean
from sb3_klip.variants import VARIANTS
from sb3_klip.zoo import agents
from sb3_klip.zoo.hyperparams import evaluate_beta_kwargs, hyperparameters, names_as_text, zoo_hyperparams
from sb3_klip.zoo.tuning import (
    SEARCH,
    converter_with_beta,
    declared_ranges,
    load_trial,
    name_best_trial,
    sampler_with_beta,
    sampler_with_reuse,
)

#: The algorithms that RL Zoo can train, each with the RL Zoo algorithm whose hyperparameters, sampler and agents it uses.
ALGORITHMS: dict[str, str] = {variant.zoo_name: variant.zoo_base for variant in VARIANTS if variant.in_zoo}


class Patch(NamedTuple):
    """
    A function of RL Zoo that is wrapped.

    :param owner: class or module
    :param name: name of the function
    :param wrapper: function that replaces it; called with the original, followed by the original's arguments
    :param reason: why it is wrapped
    """

    owner: Any
    name: str
    wrapper: Callable[..., Any]
    reason: str


def register() -> None:
    """Register our algorithms with RL Zoo's scripts; a second call changes nothing."""
    for variant in VARIANTS:
        if variant.in_zoo:
            ALGOS[variant.zoo_name] = variant.algorithm
            HYPERPARAMS_SAMPLER[variant.zoo_name] = HYPERPARAMS_SAMPLER[variant.zoo_base]
            converter = converter_with_beta(HYPERPARAMS_CONVERTER[variant.zoo_base])
            HYPERPARAMS_CONVERTER[variant.zoo_name] = converter  # type: ignore[assignment]
    for patch in PATCHES:
        original = getattr(patch.owner, patch.name)
        # Our own mark, and not __wrapped__, which is also that of another package that was here first.
        if not hasattr(original, "sb3_klip_patch"):
            setattr(patch.owner, patch.name, _wrapped(original, patch))
    # create_test_env looks it up there, and uses nothing but load. It is not told the algorithm.
    utils.VecNormalize = _VecNormalizeOfAnyAge  # type: ignore[misc]
    # rl_zoo3.push_to_hub 2.9.2 imports a name that the integration's later versions have made private.
    hub = importlib.import_module("huggingface_sb3.push_to_hub")
    if not hasattr(hub, "generate_metadata"):
        hub.generate_metadata = lambda *args: hub._generate_metadata(*args).to_dict()  # type: ignore[attr-defined]


def _wrapped(original: Callable[..., Any], patch: Patch) -> Callable[..., Any]:
    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        # Other algorithms than ours are the zoo's own business.
        if patch.owner is ExperimentManager and args[0].algo not in ALGORITHMS:
            return original(*args, **kwargs)
        return patch.wrapper(original, *args, **kwargs)

    wrapper.sb3_klip_patch = patch  # type: ignore[attr-defined]
    return wrapper


class _VecNormalizeOfAnyAge(VecNormalize):
    load = staticmethod(load_vecnormalize)  # type: ignore[assignment]


def _read_hyperparameters(original: Any, manager: ExperimentManager) -> tuple[dict[str, Any], dict[str, Any]]:
    # Without --conf-file, the zoo looks for a file of the algorithm's name in its own folder.
    if Path(manager.config) == zoo_hyperparams() / f"{manager.algo}.yml":
        manager.config = f"sb3_klip.hyperparams.{manager.algo}"
    _take_trial(manager)
    hyperparams, saved_hyperparams = original(manager)
    default = "step"
    if manager.continue_training:
        checkpoint = Checkpoint.read(manager.trained_agent)
        checkpoint.check_algorithm(ALGOS[manager.algo])
        default = checkpoint.data.get("beta", default)
        agents.keep_statistics(manager, hyperparams, saved_hyperparams)
    if (resumed := agents.read_resumed(manager, hyperparams)) is not None:
        return dict(resumed), resumed
    if not manager.continue_training:
        _check_names(manager.algo, hyperparams)
    searches_beta = _searches(manager, hyperparams)
    check_arguments(hyperparams)
    if not searches_beta:
        evaluate_beta_kwargs(hyperparams)
        # A checkpoint that is trained further keeps its own coefficient, unless another one is asked for.
        if not manager.continue_training or "beta" in hyperparams or "beta_kwargs" in hyperparams:
            coefficient = make_beta(hyperparams.get("beta", default), hyperparams.get("beta_kwargs"))
            saved_hyperparams["beta"], saved_hyperparams["beta_kwargs"] = coefficient.name, dict(coefficient.parameters)
    return hyperparams, saved_hyperparams


def _check_names(algo: str, hyperparams: dict[str, Any]) -> None:
    """Refuse a hyperparameter that there is not, before an environment or a folder is made."""
    known = hyperparameters(ALGOS[algo])
    if unknown := next((name for name in hyperparams if name not in known), None):
        hint, parameters = did_you_mean(unknown, known), dict[str, Any]()
        with contextlib.suppress(ValueError, TypeError):  # it is another mistake, or what the tuner searches
            parameters = dict(make_beta(hyperparams.get("beta", "step"), hyperparams.get("beta_kwargs")).parameters)
        if unknown in parameters:
            hint = f' It is a parameter of the coefficient: beta_kwargs:"dict({unknown}={hyperparams[unknown]!r})"'
        raise ValueError(f"{algo} has no hyperparameter {unknown!r}.{hint}")


def _take_trial(manager: ExperimentManager) -> None:
    """Handle two cases that RL Zoo ignores: a trial without a storage, and trial 0."""
    if manager.trial_id is None:
        return
    if not (manager.storage and manager.study_name):
        raise ValueError(f"--trial-id={manager.trial_id} needs --storage and --study-name, which say where the trial is")
    if manager.trial_id == 0:
        trial = manager.load_trial(manager.storage, manager.study_name, 0)
        manager.custom_hyperparams = {**trial, **(manager.custom_hyperparams or {})}


def _searches(manager: ExperimentManager, hyperparams: dict[str, Any]) -> bool:
    """Whether the tuner searches the coefficient; also sets the sampler for what is searched."""
    # Samplers are told nothing of the hyperparameters, so the one that searches takes the place of the other.
    sampler: Any = HYPERPARAMS_SAMPLER[ALGORITHMS[manager.algo]]
    searched = [name for name in ("beta", "reuse") if hyperparams.get(name) == SEARCH]
    for name in searched:
        if not manager.optimize_hyperparameters:
            value = "name a coefficient" if name == "beta" else "give a number"
            raise ValueError(f"{name}='search' is for --optimize-hyperparameters; to train, {value}")
        if name == "beta" and "beta_kwargs" in hyperparams:
            raise ValueError("beta='search' chooses beta_kwargs itself, so they must not be given")
        sampler = (sampler_with_beta if name == "beta" else sampler_with_reuse)(sampler)
        del hyperparams[name]
    named = hyperparams.get("beta")
    if manager.optimize_hyperparameters and isinstance(named, str) and "beta_kwargs" not in hyperparams:
        if declared_ranges(named) is not None:
            sampler = sampler_with_beta(sampler, named)
        elif parameters := make_beta(named).parameters:
            print(
                f"beta={named!r} declares no ranges, so its parameters are not searched: {', '.join(parameters)}. "
                "@register(…, search={name: (low, high)}) declares them."
            )
    HYPERPARAMS_SAMPLER[manager.algo] = sampler
    return "beta" in searched


def _store_dict(original: Any, action: Any, parser: Any, namespace: Any, values: list[str], option: Any = None) -> None:
    try:
        original(action, parser, namespace, [names_as_text(value) for value in values], option)
    except SyntaxError as error:
        form = 'Write NAME:VALUE with the value in Python, as in batch_size:60 or beta_kwargs:"dict(width=0.1)"'
        wrong = error.text or next(value for value in values if not value.partition(":")[2])
        raise argparse.ArgumentError(action, f"{wrong!r} is no value in Python. {form}") from error


def _create_callbacks(original: Any, manager: ExperimentManager) -> None:
    first = len(manager.callbacks)
    original(manager)
    agents.make_checkpoints_resumable(manager, first)


def _maybe_normalize(original: Any, manager: ExperimentManager, env: Any, eval_env: bool) -> Any:
    own = agents.with_statistics_of_agent(manager, env, eval_env)
    return original(manager, env, eval_env) if own is None else own


def _load_pretrained_agent(original: Any, manager: ExperimentManager, hyperparams: dict[str, Any], env: Any) -> Any:
    if manager.resume:  # type: ignore[attr-defined]
        return agents.resume(manager, env)
    model = original(manager, hyperparams, env)
    if manager.eval_freq > 0:
        agents.report(manager, model)
    return model


def _get_model_path(original: Any, exp_id: int, folder: str, algo: str, env_name: Any, *args: Any, **kwargs: Any) -> Any:
    try:
        return original(exp_id, folder, algo, env_name, *args, **kwargs)
    except (AssertionError, ValueError) as error:
        if algo not in ALGORITHMS or not agents.may_take_over(folder, algo, env_name):
            raise
        base = ALGORITHMS[algo]
        try:
            found = original(exp_id, folder, base, env_name, *args, **kwargs)
        except (AssertionError, ValueError):
            raise agents.missing_agent(folder, algo, base, env_name, error) from error
        print(f"No agent of {algo} for {env_name} in {folder}: this is one of {base}, which {algo} plays as it is")
        return found


PATCHES = (
    Patch(
        ExperimentManager,
        "read_hyperparameters",
        _read_hyperparameters,
        "our default hyperparameters, the coefficient refused before anything is made, the tuner's search, resuming",
    ),
    Patch(utils.StoreDict, "__call__", _store_dict, "-params: a coefficient's name without its quotes"),
    Patch(
        ExperimentManager,
        "hyperparameters_optimization",
        name_best_trial,
        "-optimize: the number of the best trial, and the command that trains with it",
    ),
    Patch(ExperimentManager, "load_trial", load_trial, "--trial-id: a trial that was pruned, or is not there"),
    Patch(ExperimentManager, "create_callbacks", _create_callbacks, "checkpoints of --save-freq that can be resumed from"),
    Patch(
        ExperimentManager,
        "_maybe_normalize",
        _maybe_normalize,
        "-i: the statistics that lie with an agent, whatever version of the environment they were gathered on",
    ),
    Patch(
        ExperimentManager,
        "_load_pretrained_agent",
        _load_pretrained_agent,
        "-i: an agent first shows what it can do; a run that is resumed goes on at once",
    ),
    Patch(utils, "get_model_path", _get_model_path, "enjoy: the zoo's own agent, where there is none of ours"),
)
