"""
Checkpoints: zip files of Stable-Baselines3, of any age and origin, and the files that RL Zoo puts beside them.

Stable-Baselines3 reads the weights; here is what it cannot: telling what a file is before anything in it is unpickled,
spaces and statistics from the days of ``gym``, and functions that a newer Python cannot restore.
"""

import base64
import contextlib
import io
import json
import os
import pathlib
import re
import time
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch as th
import yaml
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.save_util import open_path
from stable_baselines3.common.utils import ConstantSchedule
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from sb3_klip.unpickling import NotRestorableError, RefusedError, loads

File = str | pathlib.Path | io.BufferedIOBase

#: Version of what this package adds to a checkpoint: the coefficient and, in some, the state to resume from.
FORMAT = 1

#: Name of the file in a checkpoint that holds the state to resume from.
RESUME = "klip_resume.pkl"

#: How to tell the algorithm of a checkpoint, which names none: by hyperparameters that only this one has.
_SIGNATURES = {
    "TRPO": "cg_max_steps",
    "ARS": "n_delta",
    "TQC": "top_quantiles_to_drop_per_net",
    "SAC": "target_entropy",
    "DQN": "exploration_initial_eps",
    "TD3": "target_policy_noise",
    "PPO": "clip_range",
    "A2C": "gae_lambda",
}
#: Algorithms that share those of another, told by the module of their policy.
_MODULES = {"recurrent": "RecurrentPPO", "maskable": "MaskablePPO", "qrdqn": "QRDQN", "crossq": "CrossQ"}

_UNKNOWN = "an unknown algorithm"

#: What reading a broken zip file may raise; the last two, where bits say that it is encrypted, or packed in an unknown way.
_UNREADABLE: tuple[type[Exception], ...] = (zipfile.BadZipFile, zlib.error, EOFError, OSError, UnicodeDecodeError)
_UNREADABLE += (json.JSONDecodeError, NotImplementedError, RuntimeError)

#: Without these there is no model; everything else has a default.
_NEEDED = ("policy_class", "observation_space", "action_space", "policy_kwargs")
#: Made anew from something else when a model is loaded.
_DERIVED = ("lr_schedule",)
#: Hyperparameters that may be functions, which RL Zoo writes as a number or as "lin_x".
_SCHEDULES = ("learning_rate", "clip_range", "clip_range_vf")


class Checkpoint(NamedTuple):
    """
    What a checkpoint says of itself before any of it is unpickled.

    :param name: what to call it in messages
    :param path: where it lies, if it is a file
    :param data: attributes of the model; pickled ones are dictionaries with the key ":serialized:"
    :param python: version of Python that saved it, such as "3.7", if it says so
    :param algorithm: name of the algorithm's class, or "an unknown algorithm"
    :param resume: what :mod:`sb3_klip.resume` added, if anything
    :param tensors: tensors of the model that are no parameters, which only other algorithms have
    :param file: what to read the rest from: the path, or the open file
    """

    name: str
    path: pathlib.Path | None
    data: dict[str, Any]
    python: str | None
    algorithm: str
    resume: bytes | None
    tensors: list[bytes]
    file: Any

    @classmethod
    def read(cls, file: File) -> "Checkpoint":
        """
        Read a checkpoint.

        :param file: as for ``PPO.load``: a path, with or without ".zip", or an open file
        :raises FileNotFoundError: if there is none
        :raises ValueError: if it is not a whole checkpoint, or one of a newer version of this package
        """
        # RL Zoo puts a folder of the same name, but for ".zip", beside a checkpoint.
        if isinstance(file, (str, pathlib.Path)) and pathlib.Path(file).is_dir():
            file = pathlib.Path(f"{file}.zip")
        opened = open_path(file, "r", suffix="zip")
        named = getattr(opened, "name", None)
        path = pathlib.Path(named) if isinstance(named, str) else None
        name = repr(str(path)) if path else f"the {type(file).__name__}"
        try:
            with zipfile.ZipFile(opened) as archive:
                members = archive.namelist()
                # The weights are zip files themselves, of which the last one is found if the end is missing.
                if archive.infolist() and min(member.header_offset for member in archive.infolist()) > 0:
                    raise zipfile.BadZipFile("its beginning belongs to another file than its end")
                if (broken := archive.testzip()) is not None:
                    raise ValueError(f"{name} is damaged: the checksum of {broken} in it is wrong")
                data = json.loads(archive.read("data")) if "data" in members else {}
                if not isinstance(data, dict):
                    raise ValueError(f"{name} is no checkpoint of Stable-Baselines3: data in it is a {type(data).__name__}")
                missing = [member for member in ("data", "policy.pth", "policy.optimizer.pth") if member not in members]
                # Others, such as SAC, have files of their own, and are told by their hyperparameters.
                if missing and _algorithm(data) in (_UNKNOWN, "PPO", "RecurrentPPO", "MaskablePPO"):
                    raise ValueError(
                        f"{name} is no checkpoint of Stable-Baselines3 with an actor-critic policy: "
                        f"it has no {' and no '.join(missing)}, but only {', '.join(sorted(members)) or 'nothing'}"
                    )
                info = archive.read("system_info.txt").decode() if "system_info.txt" in members else ""
                resume = archive.read(RESUME) if RESUME in members else None
                tensors = [archive.read(m) for m in ("pytorch_variables.pth", "tensors.pth") if m in members]
        except _UNREADABLE as error:
            raise ValueError(f"{name} is not a checkpoint, or was cut off: {error}") from error
        finally:
            if opened is not file:
                opened.close()
        if (saved_format := data.get("klip_format", FORMAT)) not in range(FORMAT + 1):
            raise ValueError(
                f"{name} was saved by a newer sb3-klip (klip_format {saved_format}; this one reads up to {FORMAT}). "
                "Upgrade sb3-klip to load it."
            )
        python = re.search(r"Python: (\d+\.\d+)", info)
        return cls(
            name,
            path,
            data,
            python[1] if python else None,
            _algorithm(data),
            resume,
            tensors,
            path if opened is not file else file,
        )

    def check_algorithm(self, model_class: type[BaseAlgorithm]) -> None:
        """
        Refuse a checkpoint of another algorithm.

        :param model_class: class that is to load it: a subclass of an algorithm of Stable-Baselines3 or sb3-contrib
        :raises ValueError: naming what the file is, and what was expected
        """
        expected = base_algorithm(model_class).__name__
        if self.algorithm != expected and not (self.algorithm == "PPO" and self.own_policy):
            ours = {"RecurrentPPO": "KLipRecurrentPPO", "MaskablePPO": "KLipMaskablePPO", "PPO": "KLipPPO"}.get(self.algorithm)
            advice = f"; {ours} does" if ours else ""
            raise ValueError(
                f"{self.name} is a checkpoint of {self.algorithm}, by the hyperparameters and the policy in it. "
                f"{model_class.__name__} loads those of {expected}{advice}."
            )

    @property
    def own_policy(self) -> bool:
        """Whether the policy is the user's own, which does not tell the variant of PPO."""
        module = self.data.get("policy_class", {}).get("__module__", "")
        return module.split(".")[0] not in ("stable_baselines3", "sb3_contrib")

    def restore(self, replaced: Iterable[str], trusted: bool) -> tuple[dict[str, Any], dict[str, str]]:
        """
        Unpickle the attributes.

        :param replaced: names of attributes that the user gives, which are left alone
        :param trusted: whether the file may run code
        :return: for ``custom_objects``, the attributes that were pickled; and of those that could not be restored, why
        :raises ValueError: if one without which there is no model cannot be restored, or if the file is not trusted and
            holds anything but plain data
        """
        if missing := [name for name in _NEEDED if name not in self.data and name not in replaced]:
            raise ValueError(f"{self.name} is not a whole checkpoint: its data has no {' and no '.join(missing)}")
        objects: dict[str, Any] = {name: None for name in (*_DERIVED, *replaced) if name in self.data}
        lost = {}
        for name, item in self.data.items():
            if name in objects or not (isinstance(item, dict) and ":serialized:" in item):
                continue
            try:
                objects[name] = loads(base64.b64decode(item[":serialized:"]), self.python, trusted)
            except RefusedError as error:
                raise ValueError(
                    f"{self.name} is refused, as it is not trusted: its {name} names {error}. If you trust it, load it with "
                    f"trusted=True; or replace that, with custom_objects={{{name!r}: …}}."
                ) from error
            except Exception as error:  # whatever a pickle of another time may raise
                problem = str(error) if isinstance(error, NotRestorableError) else f"{type(error).__name__}: {error}"
                if name in _NEEDED:
                    raise ValueError(
                        f"{self.name} cannot be loaded: its {name} cannot be restored ({problem}). Make what it names "
                        f"importable, or give another with custom_objects={{{name!r}: …}}."
                    ) from error
                lost[name] = problem
                # SB3 would try again. A placeholder, which the model's own default replaces.
                objects[name] = None
        if not trusted:
            # SB3 sets these as attributes of whatever the file names; PPO has none.
            if any(th.load(io.BytesIO(tensors), map_location="cpu", weights_only=True) for tensors in self.tensors):
                raise ValueError(f"{self.name} is refused, as it is not trusted: its pytorch_variables.pth is not empty")
            # Text in the file must not name a module to import, a folder to write to or a program to compile with.
            if isinstance(beta := objects.get("beta", self.data.get("beta")), str) and ":" in beta:
                raise ValueError(
                    f"{self.name} is refused, as it is not trusted: its coefficient is {beta!r}, which is code to import. "
                    "Give another with beta=…, or load it with trusted=True."
                )
            objects.update({name: None for name in ("tensorboard_log", "env", "compile") if name in self.data})
        return objects, lost

    def fit_spaces(
        self, objects: Mapping[str, Any], observation_space: spaces.Space, action_space: spaces.Space
    ) -> dict[str, spaces.Space]:
        """
        Spaces for the model, if the environment's do for what the policy was made for.

        :param objects: the attributes, restored
        :param observation_space: the environment's
        :param action_space: the environment's
        :return: the environment's spaces
        :raises ValueError: if they do not fit, with both
        """
        actual = {"observation_space": observation_space, "action_space": action_space}
        for (name, space), fit in zip(actual.items(), (fit_space, fit_action_space), strict=True):
            if not fit(saved := objects[name], space):
                raise ValueError(f"{self.name} does not fit env: its {name} is {saved}, and that of env is {space}")
            if saved != space:
                warnings.warn(
                    f"The {name} of env, {space}, differs from that of {self.name}, {saved}, in dtype or bounds only; "
                    "training goes on with that of env.",
                    stacklevel=3,
                )
        return actual

    def resume_state(self, trusted: bool) -> bytes:
        """
        What ``save(..., resumable=True)`` added to the checkpoint.

        :param trusted: whether the file may run code
        :raises ValueError: if it may not, or has nothing to resume from
        """
        if not trusted:
            raise ValueError("resume=True needs trusted=True: the state of environments is restored by running code")
        if self.resume is None:
            raise ValueError(
                f"{self.name} has nothing to resume from: it was not saved with resumable=True, nor by "
                "ResumableCheckpointCallback. Load it without resume=True to train the model further."
            )
        return self.resume

    def warn_of_lost(self, lost: Mapping[str, str], schedules: Mapping[str, Any], source: str, model: Any) -> None:
        """
        Say in one warning what could not be restored, and what there is in its place.

        :param lost: attributes that could not be restored, with the reason
        :param schedules: those that were restored from elsewhere
        :param source: where from
        :param model: the loaded model
        """

        def value(name: str) -> str:
            found = getattr(model, name, None)
            shown = f"{found(1.0):g} at the start" if callable(found) else repr(found)
            return f"{shown} (from {source})" if name in schedules else shown

        reasons = ", ".join(dict.fromkeys(lost.values()))
        values = "; ".join(f"{name} is now {value(name)}" for name in lost)
        warnings.warn(
            f"{self.name} holds what cannot be restored here ({reasons}): {values}. Keyword arguments of load() set others.",
            stacklevel=3,
        )

    def config(self) -> tuple[pathlib.Path, dict[str, Any]] | None:
        """RL Zoo's ``config.yml`` that belongs to this checkpoint, and the hyperparameters in it."""
        folder = run_folder(self.path)
        if folder is None or not (file := folder / "config.yml").is_file():
            return None
        return file, read_zoo_yaml(file)


def base_algorithm(model_class: type[BaseAlgorithm]) -> type[BaseAlgorithm]:
    """The algorithm of Stable-Baselines3 or sb3-contrib that a class of ours derives from."""
    return next(c for c in model_class.__mro__ if c.__module__.split(".")[0] in ("stable_baselines3", "sb3_contrib"))


def _algorithm(data: Mapping[str, Any]) -> str:
    """Name of the algorithm that saved these attributes."""
    policy = data.get("policy_class")
    module = policy.get("__module__", "") if isinstance(policy, dict) else ""
    for part, name in _MODULES.items():
        if f".{part}." in module:
            return name
    found = next((name for name, key in _SIGNATURES.items() if key in data), _UNKNOWN)
    # A policy of the user's own, which derives from a recurrent one, shows in the state of its rollouts.
    return "RecurrentPPO" if found == "PPO" and "_last_lstm_states" in data else found


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


def restore_schedules(checkpoint: Checkpoint, lost: Iterable[str]) -> tuple[dict[str, Any], str]:
    """
    The schedules that cannot be restored from a checkpoint, from the ``config.yml`` beside it.

    :param checkpoint: the checkpoint
    :param lost: names of the attributes that could not be restored
    :return: those that the file has, and where they are from
    """
    config = checkpoint.config() if set(lost) & set(_SCHEDULES) else None
    if config is None:
        return {}, ""
    file, hyperparams = config
    found = {name: zoo_schedule(hyperparams.get(name)) for name in _SCHEDULES if name in lost}
    return {name: schedule for name, schedule in found.items() if schedule is not None}, str(file)


class _ZooYaml(yaml.SafeLoader):
    """RL Zoo writes an OrderedDict, which is plain data, but with a tag that the safe loader does not know."""


def _ordered_dict(loader: yaml.SafeLoader, node: yaml.Node) -> dict[str, Any]:
    (pairs,) = loader.construct_sequence(node, deep=True)  # type: ignore[arg-type]
    return dict(pairs)


_ZooYaml.add_constructor("tag:yaml.org,2002:python/object/apply:collections.OrderedDict", _ordered_dict)
_ZooYaml.add_constructor("tag:yaml.org,2002:python/tuple", lambda loader, node: tuple(loader.construct_sequence(node)))  # type: ignore[arg-type]


def read_zoo_yaml(file: pathlib.Path) -> dict[str, Any]:
    """
    Read a ``config.yml`` or ``args.yml`` of RL Zoo, running nothing in it.

    :param file: the file
    :return: what it holds; empty if that is anything but plain data
    """
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), Loader=_ZooYaml)
    except (yaml.YAMLError, TypeError, ValueError) as error:
        warnings.warn(f"{file} could not be read, and was left out of account: {error}", stacklevel=3)
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
    Load statistics that ``VecNormalize.save`` wrote, as ``VecNormalize.load`` does; also those from the days of ``gym``.

    :param path: path of the file
    :param venv: environments to normalize
    :param trusted: whether the file may run code; with False, anything in it but plain data is refused
    :return: the environments with the statistics
    :raises ValueError: if the file holds anything else, or is refused
    """
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


def fit_space(saved: spaces.Space, actual: spaces.Space) -> bool:
    """
    Whether a policy made for one observation space sees the same in another, which differs in dtype or bounds only.

    :param saved: the space that the policy was made for
    :param actual: the space of the environment
    """
    if isinstance(saved, spaces.Dict) and isinstance(actual, spaces.Dict):
        return saved.keys() == actual.keys() and all(fit_space(saved[key], actual[key]) for key in saved.spaces)
    if isinstance(saved, spaces.Box) and isinstance(actual, spaces.Box):
        # Images are divided by 255 before the policy sees them, and other observations are not.
        return saved.shape == actual.shape and is_image_space(saved) == is_image_space(actual)
    return saved == actual


def fit_action_space(saved: spaces.Space, actual: spaces.Space) -> bool:
    """Whether actions for one space are actions for another; bounds matter here, as actions are clipped and scaled to them."""
    if isinstance(saved, spaces.Box) and isinstance(actual, spaces.Box):
        close = saved.shape == actual.shape and np.allclose(saved.low, actual.low) and np.allclose(saved.high, actual.high)
        return bool(close)
    return saved == actual


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
    :raises ValueError: naming the parameters that do not fit, with both shapes
    """
    given, own = parameters.get("policy", {}), policy.state_dict()
    problems = [
        f"{key} is {tuple(given[key].shape)} there and {tuple(own[key].shape)} here"
        for key in given
        if key in own and hasattr(given[key], "shape") and given[key].shape != own[key].shape
    ]
    if exact:
        problems += [f"{key} is not known here" for key in given if key not in own]
        if given:
            # Policies from before SB3 1.7 lack the names of the extractor that they share, which SB3 sees to.
            shared = ("pi_features_extractor.", "vf_features_extractor.")
            problems += [f"{key} is not there" for key in own if key not in given and not key.startswith(shared)]
    problems += _moments_that_do_not_fit(parameters.get("policy.optimizer"), policy)
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise ValueError(
            f"{name} holds the parameters of a policy of another architecture than this {type(policy).__name__}: "
            f"{'; '.join(problems[:4])}{more}. Make the model with the policy and policy_kwargs that the file's had."
        )


def _moments_that_do_not_fit(state: Any, policy: Any) -> list[str]:
    """Problems with the state of an optimizer, whose ``load_state_dict`` looks at none of the shapes."""
    if not state:
        return []
    own = [parameter for group in policy.optimizer.param_groups for parameter in group["params"]]
    given = [index for group in state["param_groups"] for index in group["params"]]
    if len(given) != len(own):
        return [f"the optimizer has {len(given)} tensors there and {len(own)} here"]
    return [
        f"the optimizer's {key} of tensor {index} is {tuple(value.shape)} there and {tuple(parameter.shape)} here"
        for index, parameter in zip(given, own, strict=True)
        for key, value in state["state"].get(index, {}).items()
        if getattr(value, "ndim", 0) and value.shape != parameter.shape
    ]


def write_atomically(path: pathlib.Path, content: bytes) -> None:
    """
    Write a file so that at any moment, a kill or a power cut included, there is the old one or the new one, and whole.

    :param path: file to write; a file that is there is replaced
    :param content: what to write
    """
    path = pathlib.Path(os.path.realpath(path))  # what a link points to
    # In the same folder: a rename from another file system would be a copy.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        for pause in (0.1, 1.0, 5.0):
            try:
                temporary.replace(path)
                break
            except PermissionError:  # Windows replaces no file that a program has open, such as a virus scanner
                if os.name == "posix":
                    raise
                time.sleep(pause)
        else:
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":  # the new name must reach the disk, too; Windows cannot open a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):  # some file systems cannot
                os.fsync(folder)
        finally:
            os.close(folder)
