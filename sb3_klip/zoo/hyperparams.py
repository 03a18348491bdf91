"""Hyperparameters in RL Zoo: their names, and RL Zoo's own values with our overrides."""

import ast
import builtins
import importlib
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import rl_zoo3
import yaml
from rl_zoo3.exp_manager import ExperimentManager
from stable_baselines3.common.base_class import BaseAlgorithm

#: Hyperparameters that RL Zoo uses itself, and arguments of algorithms that RL Zoo sets.
ZOO_TAKES = (
    *("n_timesteps", "n_envs", "normalize", "frame_stack", "env_wrapper", "vec_env_wrapper", "env_kwargs", "monitor_kwargs"),
    *("callback", "noise_type", "noise_std"),
)
ZOO_GIVES = {"env", "seed", "verbose", "tensorboard_log", "device", "_init_setup_model"}


def hyperparameters(algorithm: type[BaseAlgorithm]) -> set[str]:
    """Names of the hyperparameters of an algorithm in RL Zoo."""
    return {*ZOO_TAKES, *inspect.signature(algorithm).parameters} - ZOO_GIVES


def zoo_hyperparams() -> Path:
    """Where RL Zoo keeps its YAML files: in its package or, in a git checkout, beside it."""
    package = Path(rl_zoo3.__file__).parent
    inside = package / "hyperparams"
    return inside if inside.is_dir() else package.parent / "hyperparams"


def protocol(module_file: str, base: str | None = None) -> Callable[[str], Any]:
    """
    The ``__getattr__`` of a module for ``-conf``, whose ``hyperparams`` are read from the YAML file beside it.

    RL Zoo changes this dictionary, so each access returns a new one.

    :param module_file: ``__file__`` of the module
    :param base: RL Zoo's algorithm whose hyperparameters the file overrides, see :func:`overlaid_hyperparams`
    """
    path = Path(module_file).with_suffix(".yml")

    def read(name: str) -> Any:
        if name == "hyperparams":
            if base is not None:
                return overlaid_hyperparams(base, path.stem)
            return yaml.safe_load(path.read_text(encoding="utf-8"))
        raise AttributeError(f"module 'sb3_klip.hyperparams.{path.stem}' has no attribute {name!r}")

    return read


def overlaid_hyperparams(base: str, name: str) -> dict[str, Any]:
    """
    The hyperparameters of the installed RL Zoo, overridden by ours for each environment and key.

    :param base: RL Zoo's algorithm, whose ``<base>.yml`` is read
    :param name: our algorithm, whose ``<name>.yml`` overrides it
    :return: a new dictionary: hyperparameters by environment
    """
    hyperparams = yaml.safe_load((zoo_hyperparams() / f"{base}.yml").read_text(encoding="utf-8"))
    # Not through importlib.resources: in a clone, the package is a folder elsewhere.
    folder = Path(importlib.import_module("sb3_klip.hyperparams").__path__[0])
    ours = yaml.safe_load((folder / f"{name}.yml").read_text(encoding="utf-8")) or {}
    for env_id, entry in ours.items():
        is_atari = env_id in gym.envs.registry and ExperimentManager.is_atari(env_id)
        hyperparams[env_id] = {**hyperparams.get(env_id, hyperparams["atari" if is_atari else "default"]), **entry}
    return hyperparams


def names_as_text(argument: str) -> str:
    """
    Add missing quotes to names in ``beta``, ``beta_kwargs`` and ``reuse``: RL Zoo evaluates values of ``-params`` as Python.

    :param argument: argument of ``-params``, such as ``beta:linear_ramp``, ``beta:my_module:my_ramp`` or
        ``beta_kwargs:dict(estimator=k3)``
    """
    key, _, value = argument.partition(":")
    return f"{key}:{_quoted(value)}" if key in ("beta", "beta_kwargs", "reuse") else argument


def _quoted(code: str) -> str:
    """Python code in which unknown names are replaced by strings."""
    if re.fullmatch(r"[A-Za-z_][\w.]*:\w+", code):
        return repr(code)
    try:
        return ast.unparse(_Quoting().visit(ast.parse(code.strip(), mode="eval")))
    except SyntaxError:
        return code


class _Quoting(ast.NodeTransformer):
    """Replaces names by strings, except names that are called, and names in code that defines its own."""

    def visit(self, node: ast.AST) -> Any:
        own = (ast.Attribute, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
        return node if isinstance(node, own) else super().visit(node)

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return node if hasattr(builtins, node.id) else ast.Constant(node.id)

    def visit_Call(self, node: ast.Call) -> ast.expr:
        node.args = [self.visit(argument) for argument in node.args]
        node.keywords = [self.visit(keyword) for keyword in node.keywords]
        return node


def evaluate_beta_kwargs(hyperparams: dict[str, Any]) -> None:
    """Evaluate a string such as "dict(width=0.1)", as RL Zoo does with policy_kwargs."""
    if isinstance(text := hyperparams.get("beta_kwargs"), str):
        try:
            hyperparams["beta_kwargs"] = eval(_quoted(text), {"__builtins__": {}, "dict": dict})
        except Exception as error:
            raise ValueError(f"beta_kwargs must be a dict, or one written in Python, not {text!r}") from error
