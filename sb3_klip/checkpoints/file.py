"""
Reading a checkpoint: a zip file of Stable-Baselines3, of any age and origin.

Stable-Baselines3 reads the weights. :class:`Checkpoint` does the rest: it finds out what a file is before anything in it is
unpickled, and why it cannot be loaded.
"""

import base64
import contextlib
import copy
import io
import json
import pathlib
import pickle
import re
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.save_util import open_path

from sb3_klip.checkpoints.spaces import fit_action_space, fit_space
from sb3_klip.checkpoints.unpickling import NotRestorableError, RefusedError, load_tensor, loads
from sb3_klip.checkpoints.zoo_run import read_zoo_yaml, run_folder
from sb3_klip.errors import ArchitectureError
from sb3_klip.variants import VARIANTS

File = str | pathlib.Path | io.BufferedIOBase

#: Version of what this package adds to a checkpoint: the coefficient and, in some, the state to resume from.
FORMAT = 1

#: Name of the file in a checkpoint that holds the state to resume from.
RESUME = "klip_resume.pkl"

#: How to tell the algorithm of a checkpoint, which names none: by attributes of which no other has one. Those of PPO come
#: first, as a user's own attribute may have the name of another's; and there are several, as not all need be saved.
_SIGNATURES = {
    "PPO": ("clip_range", "n_epochs", "klip_format"),
    "TRPO": ("cg_max_steps",),
    "ARS": ("n_delta",),
    "TQC": ("top_quantiles_to_drop_per_net",),
    "SAC": ("target_entropy",),
    "DQN": ("exploration_initial_eps",),
    "TD3": ("target_policy_noise",),
    "A2C": ("gae_lambda",),
}
#: Algorithms that share those of another, told by the module of their policy in sb3-contrib.
_MODULES = {"recurrent": "RecurrentPPO", "maskable": "MaskablePPO", "qrdqn": "QRDQN", "crossq": "CrossQ"}

_UNKNOWN = "an unknown algorithm"

#: What reading a broken zip file may raise; the last two, where bits say that it is encrypted, or packed in an unknown way.
_UNREADABLE: tuple[type[Exception], ...] = (zipfile.BadZipFile, zlib.error, EOFError, OSError, UnicodeDecodeError)
_UNREADABLE += (json.JSONDecodeError, NotImplementedError, RuntimeError)

#: Without these there is no model; everything else has a default, also the arguments of the policy if there are none.
_NEEDED = ("policy_class", "observation_space", "action_space")
_NOT_LOST = (*_NEEDED, "policy_kwargs")
#: Made anew from something else when a model is loaded.
_DERIVED = ("lr_schedule",)


class Checkpoint(NamedTuple):
    """
    What a checkpoint says of itself before any of it is unpickled.

    :param name: what to call it in messages
    :param path: where it lies, if it is a file
    :param data: attributes of the model; pickled ones are dictionaries with the key ":serialized:"
    :param python: version of Python that saved it, such as "3.7", if it says so
    :param algorithm: name of the algorithm's class, or "an unknown algorithm"
    :param resume: what :mod:`sb3_klip.checkpoints.resuming` added, if anything
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
            file = pathlib.Path(f"{pathlib.Path(file)}.zip")
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
                if missing and _algorithm(data) in (_UNKNOWN, *(variant.base for variant in VARIANTS)):
                    raise ValueError(
                        f"{name} is no checkpoint of Stable-Baselines3 with an actor-critic policy: "
                        f"it has no {' and no '.join(missing)}, but only {', '.join(sorted(members)) or 'nothing'}"
                    )
                info = archive.read("system_info.txt").decode() if "system_info.txt" in members else ""
                resume = archive.read(RESUME) if RESUME in members else None
                tensors = [archive.read(m) for m in ("pytorch_variables.pth", "tensors.pth") if m in members]
        except _UNREADABLE as error:
            # In the words of Stable-Baselines3.
            reason = "it wasn't a zip-file" if "not a zip file" in str(error) else error
            raise ValueError(f"{name} is not a checkpoint, or was cut off: {reason}") from error
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
            advice = next((f"; {variant.name} does" for variant in VARIANTS if variant.base == self.algorithm), "")
            raise ValueError(
                f"{self.name} is a checkpoint of {self.algorithm}, by the hyperparameters and the policy in it. "
                f"{model_class.__name__} loads those of {expected}{advice}."
            )

    @property
    def own_policy(self) -> bool:
        """Whether the policy is the user's own, which does not tell the variant of PPO."""
        return _policy_module(self.data).split(".")[0] not in ("stable_baselines3", "sb3_contrib")

    @contextlib.contextmanager
    def refused_weights(self) -> Iterator[None]:
        """
        Names the file where the weights in it are refused.

        :raises ValueError: if they hold more than tensors, or cannot be read
        :raises ArchitectureError: if they are of another architecture
        """
        try:
            yield
        except ArchitectureError as error:
            raise ArchitectureError(str(error).replace("load_path_or_dict", self.name, 1)) from error
        except pickle.UnpicklingError as error:
            raise ValueError(f"{self.name} is refused: its weights hold more than tensors ({error})") from error
        except (RuntimeError, EOFError, KeyError) as error:
            if (member := self._unreadable_weights()) is None:
                raise
            raise ValueError(f"{self.name} is damaged: {member} in it cannot be read ({error!r})") from error

    def _unreadable_weights(self) -> str | None:
        """The first file of tensors in it that torch cannot read, if any."""
        with zipfile.ZipFile(self.file) as archive:
            for member in archive.namelist():
                if member.endswith(".pth"):
                    try:
                        load_tensor(archive.read(member))
                    except Exception:  # whatever its letters mean to torch
                        return member
        return None

    def restore(self, replaced: Iterable[str], trusted: bool) -> tuple[dict[str, Any], dict[str, str]]:
        """
        Unpickle the attributes.

        :param replaced: names of attributes that the user gives, which are left alone
        :param trusted: whether the file may run code
        :return: for ``custom_objects``, the attributes that were pickled; and of those that could not be restored, why
        :raises ValueError: if one without which there is no model cannot be restored, or if the file is not trusted and
            holds anything but plain data
        """
        # What stands there as plain data is no class and no space.
        if missing := [name for name in _NEEDED if not isinstance(self.data.get(name), dict) and name not in replaced]:
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
                if name in _NOT_LOST:
                    raise ValueError(
                        f"{self.name} cannot be loaded: its {name} cannot be restored ({problem}). Make what it names "
                        f"importable, or give another with custom_objects={{{name!r}: …}}."
                    ) from error
                lost[name] = problem
                # SB3 would try again. A placeholder, which the model's own default replaces.
                objects[name] = None
        if not trusted:
            # SB3 sets these as attributes of whatever the file names; PPO has none.
            with self.refused_weights():
                if any(map(load_tensor, self.tensors)):
                    raise ValueError(f"{self.name} is refused, as it is not trusted: its pytorch_variables.pth is not empty")
            # Text in the file must not name a module to import, a folder to write to or a program to compile with.
            given = [objects.get(name, self.data.get(name)) for name in ("beta", "beta_kwargs")]
            if imported := next((text for text in _texts(given) if ":" in text), None):
                raise ValueError(
                    f"{self.name} is refused, as it is not trusted: its coefficient is {imported!r}, which is code to import. "
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
        :return: spaces equal to the environment's
        :raises ValueError: if they do not fit, with both
        """
        actual, chosen = {"observation_space": observation_space, "action_space": action_space}, {}
        for (name, space), fit in zip(actual.items(), (fit_space, fit_action_space), strict=True):
            if not fit(saved := objects[name], space):
                raise ValueError(f"{self.name} does not fit env: its {name} is {saved}, and that of env is {space}")
            if saved != space:
                warnings.warn(
                    f"The {name} of env, {space}, differs from that of {self.name}, {saved}, in dtype or bounds only; "
                    "training goes on with that of env.",
                    stacklevel=3,
                )
            # A copy, as SB3 seeds the model's spaces, and the environment may draw from its own.
            chosen[name] = saved if saved == space else copy.deepcopy(space)
        return chosen

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

    def config(self, trusted: bool = False) -> tuple[pathlib.Path, dict[str, Any]] | None:
        """
        RL Zoo's ``config.yml`` that belongs to this checkpoint, and the hyperparameters in it.

        :param trusted: whether it may import what it names
        """
        folder = run_folder(self.path)
        if folder is None or not (file := folder / "config.yml").is_file():
            return None
        return file, read_zoo_yaml(file, trusted)


def _texts(value: Any) -> Iterator[str]:
    """All texts in a value of plain data, the keys of dictionaries included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _texts([*value.keys(), *value.values()])
    elif isinstance(value, Iterable):
        for each in value:
            yield from _texts(each)


def base_algorithm(model_class: type[BaseAlgorithm]) -> type[BaseAlgorithm]:
    """The algorithm of Stable-Baselines3 or sb3-contrib that a class of ours derives from."""
    return next(c for c in model_class.__mro__ if c.__module__.split(".")[0] in ("stable_baselines3", "sb3_contrib"))


def _policy_module(data: Mapping[str, Any]) -> str:
    """Name of the module of the policy; empty if it is not known."""
    policy = data.get("policy_class")
    return policy.get("__module__", "") if isinstance(policy, dict) else ""


def _algorithm(data: Mapping[str, Any]) -> str:
    """Name of the algorithm that saved these attributes."""
    module = _policy_module(data)
    for part, name in _MODULES.items():
        if module.startswith("sb3_contrib.") and f".{part}." in module:
            return name
    found = next((name for name, keys in _SIGNATURES.items() if not data.keys().isdisjoint(keys)), _UNKNOWN)
    # A policy of the user's own, which derives from a recurrent one, shows in the state of its rollouts.
    return "RecurrentPPO" if found == "PPO" and "_last_lstm_states" in data else found
