"""The files of RL Zoo beside a checkpoint: hyperparameters, arguments and ``VecNormalize`` statistics."""

import pathlib
import re
import warnings
from typing import Any

import gymnasium as gym
import yaml
from stable_baselines3.common.utils import ConstantSchedule
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from sb3_klip.checkpoints.spaces import fit_space
from sb3_klip.checkpoints.unpickling import NotRestorableError, RefusedError, loads
from sb3_klip.errors import check_flag


def zoo_schedule(value: Any) -> Any:
    """A schedule as RL Zoo's YAML writes it, a number or "lin_x"; None if it is neither."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    if not isinstance(value, str):
        return ConstantSchedule(float(value))
    # Only here: RL Zoo takes seconds to import.
    from rl_zoo3.utils import SimpleLinearSchedule

    try:
        return SimpleLinearSchedule(value.removeprefix("lin_")) if value.startswith("lin_") else None
    except ValueError:
        return None


#: The tag of what is found by its name.
_NAME = "tag:yaml.org,2002:python/name:"


class _ZooYaml(yaml.SafeLoader):
    """RL Zoo writes an OrderedDict, which is plain data, but with a tag that the safe loader does not know."""


def _ordered_dict(loader: yaml.SafeLoader, node: yaml.Node) -> dict[str, Any]:
    (pairs,) = loader.construct_sequence(node, deep=True)  # type: ignore[arg-type]
    return dict(pairs)


_ZooYaml.add_constructor("tag:yaml.org,2002:python/object/apply:collections.OrderedDict", _ordered_dict)
_ZooYaml.add_constructor("tag:yaml.org,2002:python/tuple", lambda loader, node: tuple(loader.construct_sequence(node)))  # type: ignore[arg-type]


# The name of a class, such as an activation function, is not looked up.
_ZooYaml.add_multi_constructor(_NAME, lambda loader, suffix, node: None)


class _TrustedYaml(yaml.UnsafeLoader):
    """What RL Zoo's own scripts read such a file with, but for names that lead nowhere, as that of a lambda."""


def _found_or_none(loader: yaml.UnsafeLoader, name: str, node: yaml.Node) -> Any:
    try:
        return loader.construct_python_name(name, node)  # type: ignore[attr-defined]
    except yaml.constructor.ConstructorError:
        return None


_TrustedYaml.add_multi_constructor(_NAME, _found_or_none)


def read_zoo_yaml(file: pathlib.Path, trusted: bool = False) -> dict[str, Any]:
    """
    Read a ``config.yml`` or ``args.yml`` of RL Zoo.

    :param file: the file
    :param trusted: whether it may import and run what it names, as RL Zoo's own scripts do; otherwise, None stands for a class
    :return: what it holds; empty if it cannot be read, with a warning
    """
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), Loader=_TrustedYaml if trusted else _ZooYaml)
    except (OSError, yaml.YAMLError, TypeError, ValueError) as error:
        warnings.warn(f"{file} could not be read, and is ignored: {error}", stacklevel=3)
        return {}
    return content if isinstance(content, dict) else {}


def run_folder(checkpoint: pathlib.Path | None) -> pathlib.Path | None:
    """
    The folder in which RL Zoo keeps what belongs to a checkpoint: hyperparameters and statistics.

    :param checkpoint: for example ``logs/ppo/Hopper-v3_1/Hopper-v3.zip``; also ``best_model.zip`` or a checkpoint beside it
    :return: here ``logs/ppo/Hopper-v3_1/Hopper-v3``; the file's own folder if it has a ``config.yml`` (as on the hub); or None
    """
    if checkpoint is None:
        return None
    # A folder of that name on the hub is the zip file, unpacked.
    if (own := checkpoint.with_suffix("")).is_dir() and not (own / "policy.pth").exists():
        return own
    configs = list(checkpoint.parent.glob("*/config.yml"))
    if len(configs) == 1:
        return configs[0].parent
    return checkpoint.parent if (checkpoint.parent / "config.yml").is_file() else None


def statistics_file(checkpoint: pathlib.Path) -> pathlib.Path | None:
    """
    The ``VecNormalize`` statistics that belong to a checkpoint, wherever SB3, RL Zoo and the hub put them.

    :param checkpoint: path of the checkpoint
    :return: path of the statistics, if there are any
    """
    # SB3's CheckpointCallback: rl_model_1000_steps.zip, rl_model_vecnormalize_1000_steps.pkl
    steps = re.fullmatch(r"(.*)_(\d+_steps)\.zip", checkpoint.name)
    candidates = [checkpoint.with_name(f"{steps[1]}_vecnormalize_{steps[2]}.pkl")] if steps else []
    if (folder := run_folder(checkpoint)) is not None:
        candidates.append(folder / "vecnormalize.pkl")
    candidates.append(checkpoint.with_name("vec_normalize.pkl"))
    return next((file for file in candidates if file.is_file()), None)


def load_vecnormalize(path: str | pathlib.Path, venv: VecEnv, trusted: bool = True) -> VecNormalize:
    """
    Load ``VecNormalize`` statistics, as ``VecNormalize.load`` does, also from old files with ``gym``.

    :param path: path of the file
    :param venv: environments to normalize
    :param trusted: Whether the file may run code. With False, a file with anything but plain data is refused.
    :return: the environments with the statistics
    :raises ValueError: if the file contains no ``VecNormalize``, does not fit the environments, or is refused
    :raises TypeError: if ``venv`` is no ``VecEnv``, or ``trusted`` no bool
    """
    check_flag("trusted", trusted)
    if isinstance(venv, gym.Env) or not hasattr(venv, "observation_space"):
        raise TypeError(f"venv={venv!r} must be a VecEnv, as make_vec_env returns")
    content = pathlib.Path(path).read_bytes()
    try:
        statistics = loads(content, trusted=trusted)
    except (RefusedError, NotRestorableError) as error:
        raise ValueError(f"{str(path)!r} is refused, as it is not trusted: it names {error}") from error
    except Exception as error:  # whatever the letters of a text mean to pickle
        raise ValueError(f"{str(path)!r} is not a pickle, or was cut off: {error}") from error
    if not isinstance(statistics, VecNormalize):
        raise ValueError(f"{str(path)!r} holds a {type(statistics).__name__}, and not VecNormalize")
    if not fit_space(statistics.observation_space, venv.observation_space):
        raise ValueError(
            f"{str(path)!r} does not fit the environments: its observation_space is {statistics.observation_space}, "
            f"and theirs is {venv.observation_space}"
        )
    statistics.set_venv(venv)
    return statistics
