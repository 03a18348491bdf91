"""
RL Zoo: registration of the algorithms, their hyperparameters, and a way to call its scripts explicitly.

``register()`` runs by itself when a script of RL Zoo starts (see :mod:`sb3_klip._autoload`). Where torch's autoloading
is switched off, call it before RL Zoo builds its argument parser, or use
``python -m sb3_klip.zoo train --algo klip_ppo …``.
"""

import functools
import importlib.resources
import inspect
import runpy
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import rl_zoo3
import yaml
from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER
from rl_zoo3.utils import ALGOS
from stable_baselines3.common.base_class import BaseAlgorithm

from sb3_klip._autoload import SCRIPTS
from sb3_klip.checkpoint import Checkpoint
from sb3_klip.errors import did_you_mean
from sb3_klip.klip_ppo import KLipPPO
from sb3_klip.klip_recurrent_ppo import KLipRecurrentPPO
from sb3_klip.search import SEARCH, converting, searching
from sb3_klip.speed import check_compile
from sb3_klip.training import make_beta
from sb3_klip.zoo_agents import keep_statistics, patch, read_resumed

#: Our algorithms in RL Zoo, each with the zoo's algorithm whose hyperparameters and sampler it takes.
ALGORITHMS: dict[str, tuple[type[BaseAlgorithm], str]] = {
    "klip_ppo": (KLipPPO, "ppo"),
    "klip_ppo_lstm": (KLipRecurrentPPO, "ppo_lstm"),
}
#: Hyperparameters that RL Zoo takes for itself, and arguments of algorithms that it gives.
ZOO_TAKES = (
    *("n_timesteps", "n_envs", "normalize", "frame_stack", "env_wrapper", "vec_env_wrapper", "env_kwargs", "monitor_kwargs"),
    *("callback", "noise_type", "noise_std"),
)
ZOO_GIVES = {"env", "seed", "verbose", "tensorboard_log", "device", "_init_setup_model"}


def register() -> None:
    """Make RL Zoo's scripts know our algorithms; a second call changes nothing."""
    for name, (algorithm, base) in ALGORITHMS.items():
        ALGOS[name] = algorithm
        HYPERPARAMS_SAMPLER[name] = HYPERPARAMS_SAMPLER[base]
        HYPERPARAMS_CONVERTER[name] = converting(HYPERPARAMS_CONVERTER[base])  # type: ignore[assignment]
    if not hasattr(ExperimentManager.read_hyperparameters, "__wrapped__"):
        ExperimentManager.read_hyperparameters = _reading_beta(ExperimentManager.read_hyperparameters)  # type: ignore[method-assign]
    patch({name: base for name, (_, base) in ALGORITHMS.items()})


def _reading_beta(read_hyperparameters: Any) -> Any:
    """Let ExperimentManager find our default hyperparameters, and refuse a bad coefficient before anything is made."""

    @functools.wraps(read_hyperparameters)
    def wrapper(self: ExperimentManager) -> tuple[dict[str, Any], dict[str, Any]]:
        if self.algo not in ALGORITHMS:
            return read_hyperparameters(self)
        # Without --conf-file, the zoo looks for a file of the algorithm's name in its own folder.
        if Path(self.config) == zoo_hyperparams() / f"{self.algo}.yml":
            self.config = f"sb3_klip.hyperparams.{self.algo}"
        hyperparams, saved_hyperparams = read_hyperparameters(self)
        default = "step"
        if self.continue_training:
            checkpoint = Checkpoint.read(self.trained_agent)
            checkpoint.check_algorithm(ALGORITHMS[self.algo][0])
            default = checkpoint.data.get("beta", default)
            keep_statistics(self, hyperparams, saved_hyperparams)
        if (resumed := read_resumed(self, hyperparams)) is not None:
            return dict(resumed), resumed
        check_compile(hyperparams.get("compile", False))
        if not _searches_beta(self, hyperparams):
            _evaluate_beta_kwargs(hyperparams)
            # A checkpoint that is trained further keeps its own coefficient, unless another one is asked for.
            if not self.continue_training or "beta" in hyperparams or "beta_kwargs" in hyperparams:
                coefficient = make_beta(hyperparams.get("beta", default), hyperparams.get("beta_kwargs"))
                saved_hyperparams["beta"], saved_hyperparams["beta_kwargs"] = coefficient.name, dict(coefficient.parameters)
        return hyperparams, saved_hyperparams

    return wrapper


def _searches_beta(manager: ExperimentManager, hyperparams: dict[str, Any]) -> bool:
    """Whether the tuner is to choose the coefficient; if so, it takes its place among the samplers."""
    # Samplers are told nothing of the hyperparameters, so the one that searches takes the place of the other.
    sampler = HYPERPARAMS_SAMPLER[ALGORITHMS[manager.algo][1]]
    search = hyperparams.get("beta") == SEARCH
    HYPERPARAMS_SAMPLER[manager.algo] = searching(sampler) if search else sampler  # type: ignore[assignment]
    if search:
        if not manager.optimize_hyperparameters:
            raise ValueError("beta='search' is for --optimize-hyperparameters; to train, name a coefficient")
        if "beta_kwargs" in hyperparams:
            raise ValueError("beta='search' chooses beta_kwargs itself, so they must not be given")
        del hyperparams["beta"]
    return search


def _evaluate_beta_kwargs(hyperparams: dict[str, Any]) -> None:
    """As the zoo does with policy_kwargs: "dict(width=0.1)"."""
    if isinstance(text := hyperparams.get("beta_kwargs"), str):
        try:
            hyperparams["beta_kwargs"] = eval(text, {"__builtins__": {}, "dict": dict})
        except Exception as error:
            raise ValueError(f"beta_kwargs must be a dict, or one written in Python, not {text!r}") from error


def hyperparameters(algorithm: type[BaseAlgorithm]) -> set[str]:
    """Names of the hyperparameters that an algorithm may have in RL Zoo."""
    return {*ZOO_TAKES, *inspect.signature(algorithm).parameters} - ZOO_GIVES


def zoo_hyperparams() -> Path:
    """Where RL Zoo keeps its YAML files: in its package or, in a git checkout, beside it."""
    package = Path(rl_zoo3.__file__).parent
    inside = package / "hyperparams"
    return inside if inside.is_dir() else package.parent / "hyperparams"


def overlaid_hyperparams(base: str, name: str) -> dict[str, Any]:
    """
    The installed zoo's hyperparameters with ours laid over them, environment by environment and key by key.

    :param base: the zoo's algorithm, whose ``<base>.yml`` is read
    :param name: our algorithm, whose ``<name>.yml`` is laid over it
    :return: a new dictionary: hyperparameters by environment
    """
    hyperparams = yaml.safe_load((zoo_hyperparams() / f"{base}.yml").read_text(encoding="utf-8"))
    ours = (
        yaml.safe_load(importlib.resources.files("sb3_klip.hyperparams").joinpath(f"{name}.yml").read_text(encoding="utf-8"))
        or {}
    )
    for env_id, entry in ours.items():
        is_atari = env_id in gym.envs.registry and ExperimentManager.is_atari(env_id)
        hyperparams[env_id] = {**hyperparams.get(env_id, hyperparams["atari" if is_atari else "default"]), **entry}
    return hyperparams


def main() -> None:
    """
    Run a script of RL Zoo with our algorithms registered.

    :raises SystemExit: if the script is unknown
    """
    if len(sys.argv) < 2 or sys.argv[1] not in SCRIPTS:
        given = sys.argv[1] if len(sys.argv) > 1 else ""
        usage = f"usage: python -m sb3_klip.zoo {{{','.join(SCRIPTS)}}} ...\n"
        if given in ("-h", "--help"):
            print(f"{usage}\nRuns a script of RL Zoo that knows this package's algorithms; the rest is for the script.")
            return
        sys.exit(f"{usage}unknown script {given!r}.{did_you_mean(given, SCRIPTS)}" if given else usage)
    script = sys.argv.pop(1)
    register()
    runpy.run_module(f"rl_zoo3.{script}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
