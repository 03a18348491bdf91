"""
Resuming exactly: what Stable-Baselines3 leaves out of a checkpoint.

A training run that was killed and resumed ends with the parameters of one that was not, if all of its state comes back:
beside the model, every random generator, the environments in the middle of their episodes, their wrappers and the last
observations. All of that has one well-defined value between two rollouts, which is when it is read and put back.
"""

import importlib.metadata
import io
import os
import pathlib
import pickle
import platform
import random
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import cloudpickle
import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, CheckpointCallback
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecEnvWrapper, VecNormalize

from sb3_klip.checkpoint import write_atomically

#: Attributes of environments and wrappers that are not state: files to write to, and what classes have anyhow.
_NOT_STATE = {"results_writer", "class_attributes"}

#: Attributes of the model that SB3 does not save, or discards when it loads.
_MODEL_STATE = ("_last_obs", "_last_episode_starts", "_last_original_obs", "_last_lstm_states", "action_space")


class Boundary(NamedTuple):
    """
    A moment between two rollouts.

    :param num_timesteps: steps that were taken until then
    :param generators: state of the random generators then; None while nothing has drawn from them since
    """

    num_timesteps: int
    generators: dict[str, Any] | None = None


def read_generators() -> dict[str, Any]:
    """State of the random generators of Python, numpy and torch."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": th.get_rng_state(),
        "cuda": th.cuda.get_rng_state_all() if th.cuda.is_initialized() else [],
    }


def set_generators(state: dict[str, Any]) -> None:
    """
    Put the random generators back.

    :param state: as :func:`read_generators` returned it
    """
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    th.set_rng_state(state["torch"])
    if state["cuda"]:
        th.cuda.set_rng_state_all(state["cuda"])


def versions() -> dict[str, str]:
    """What the bits of a run depend on, beside its state."""
    packages = ("stable-baselines3", "torch", "numpy", "gymnasium", "mujoco")
    return {
        "Python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in packages},
        "torch threads": str(th.get_num_threads()),
        "processor": platform.machine(),
    }


def _vec_layers(env: VecEnv) -> list[VecEnv]:
    """The wrappers of vectorized environments, from the outside, and then the vectorized environments."""
    layers = [env]
    while isinstance(layers[-1], VecEnvWrapper):
        layers.append(layers[-1].venv)
    return layers


def _env_layers(env: VecEnv) -> list[gym.Env]:
    """The wrappers of each environment in this process, from the outside, and then the environment."""
    layers: list[gym.Env] = []
    for layer in getattr(env, "envs", ()):
        while isinstance(layer, gym.Wrapper):
            layers.append(layer)
            layer = layer.env
        layers.append(layer)
    return layers


class _Pickler(cloudpickle.Pickler):
    """Pickles what layers hold, but not layers."""

    def __init__(self, file: io.BytesIO, layers: Sequence[Any]) -> None:
        super().__init__(file)
        self.positions = {id(layer): position for position, layer in enumerate(layers)}

    def persistent_id(self, obj: Any) -> int | None:
        position = self.positions.get(id(obj))
        if position is None and isinstance(obj, (gym.Env, VecEnv)):
            # Its pickle may well be a recipe to make a new one.
            raise pickle.PicklingError(f"it holds another environment, a {type(obj).__name__}")
        return position


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, layers: Sequence[Any]) -> None:
        super().__init__(file)
        self.layers = layers

    def persistent_load(self, pid: Any) -> Any:
        return self.layers[pid]


def _pack(layers: Sequence[Any], all_layers: Sequence[Any]) -> bytes:
    """Everything that layers hold, in one pickle, so that what they share stays shared."""
    file = io.BytesIO()
    states = [{name: value for name, value in vars(layer).items() if name not in _NOT_STATE} for layer in layers]
    _Pickler(file, all_layers).dump(states)
    return file.getvalue()


def _try_to_pack(layers: Sequence[Any], all_layers: Sequence[Any], name: str) -> tuple[bytes | None, str]:
    """What layers hold, or else why it cannot be read."""
    try:
        return _pack(layers, all_layers), ""
    except Exception as error:  # whatever an object may raise that cannot be pickled
        return None, f"the state of {name} cannot be read ({type(error).__name__}: {error})"


def _unpack(data: bytes, layers: Sequence[Any], all_layers: Sequence[Any]) -> None:
    """Put everything back into layers."""
    for layer, state in zip(layers, _Unpickler(io.BytesIO(data), all_layers).load(), strict=True):
        vars(layer).update(state)


def _names(layers: Sequence[Any]) -> list[str]:
    return [type(layer).__name__ for layer in layers]


class EnvState(NamedTuple):
    """
    State of vectorized environments.

    :param layers: names of the wrappers and environments that it is of
    :param wrappers: what each wrapper of the vectorized environments holds; None if that cannot be read
    :param episodes: what the environments hold, in the middle of their episodes; None if that, or a wrapper, cannot be read
    :param problem: why not
    :param generators: then, the random generators of the environments in this process
    """

    layers: list[str]
    wrappers: list[bytes | None]
    episodes: bytes | None
    problem: str = ""
    generators: Sequence[np.random.Generator] = ()

    @classmethod
    def read(cls, env: VecEnv) -> "EnvState":
        """
        Read the state.

        An environment's state is taken to be in its Python attributes, which must be picklable: so it is in MuJoCo's tasks
        and classic control. One in another process, or with state in a library, cannot be read.

        :param env: the environments, between two steps
        """
        *wrappers, base = _vec_layers(env)
        inner = [base, *_env_layers(base)]
        layers = [*wrappers, *inner]
        # The environments together, as they may share things; each wrapper by itself, so that one that cannot be read does not
        # cost the statistics of another.
        read = [_try_to_pack([wrapper], layers, type(wrapper).__name__) for wrapper in wrappers]
        episodes, problem = _try_to_pack(inner, layers, str(inner[-1]))
        if not isinstance(base, DummyVecEnv):
            problem = f"the environments of a {type(base).__name__} are not in this process"
        problem = next((wrong for _, wrong in read if wrong), problem)
        state = cls(_names(layers), [packed for packed, _ in read], episodes, problem)
        if not problem:
            return state
        return state._replace(episodes=None, generators=[each.unwrapped.np_random for each in getattr(base, "envs", ())])

    def restore(self, env: VecEnv) -> bool:
        """
        Put the state back.

        :param env: environments made as those that it was read from
        :return: whether the episodes go on; if not, they must begin anew
        :raises ValueError: if the environments are not wrapped in the same way, or not as many
        """
        *wrappers, base = _vec_layers(env)
        inner = [base, *_env_layers(base)]
        layers = [*wrappers, *inner]
        if _names(layers) != self.layers:
            raise ValueError(
                "env must be made in the same way as that of the run to resume, with the same wrappers and as many "
                f"environments: it is {' > '.join(_names(layers))}, and was {' > '.join(self.layers)}"
            )
        for wrapper, state in zip(wrappers, self.wrappers, strict=True):
            if state is not None:
                _unpack(state, [wrapper], layers)
        if self.episodes is None:
            base._reset_seeds()  # or the next reset would seed the generators again
            for each, generator in zip(getattr(base, "envs", ()), self.generators, strict=False):
                each.unwrapped.np_random = generator
            return False
        _unpack(self.episodes, inner, layers)
        return True


def read_state(model: Any) -> bytes:
    """
    All that a checkpoint lacks to resume from it.

    :param model: the model, between two rollouts
    :return: the state, as :func:`restore_state` takes it
    :raises ValueError: if the model is in the middle of a rollout or of an update, or has not begun to learn
    """
    boundary: Boundary | None = model._boundary
    if boundary is None or boundary.num_timesteps != model.num_timesteps:
        raise ValueError(
            "resumable=True needs a moment between two rollouts: on_rollout_start of a callback, or the end of learn(). "
            "ResumableCheckpointCallback saves at such moments."
        )
    state = {
        "versions": versions(),
        "generators": boundary.generators or read_generators(),
        "model": {name: getattr(model, name) for name in _MODEL_STATE if hasattr(model, name)},
        "env": EnvState.read(model.env)._asdict(),
    }
    return cloudpickle.dumps(state)


def restore_state(model: Any, data: bytes) -> dict[str, Any]:
    """
    Put back what :func:`read_state` has read.

    :param model: the model, loaded with its environments
    :param data: the state
    :return: the state of the random generators, for the moment when learning goes on
    :raises ValueError: if the environments are not like those of the state
    """
    state = pickle.loads(data)
    different = {
        name: f"{name} {state['versions'].get(name)} then, {version} now"
        for name, version in versions().items()
        if state["versions"].get(name) != version
    }
    if different:
        warnings.warn(
            f"The run goes on under other conditions, so its bits may differ: {'; '.join(different.values())}.", stacklevel=4
        )
    env = EnvState(**state["env"])
    for name, value in state["model"].items():
        setattr(model, name, value)
    if not env.restore(model.env):
        warnings.warn(
            f"The run goes on at the start of an episode, and not exactly where it was, as {env.problem}.", stacklevel=4
        )
        model._last_obs = None  # makes learn() reset the environments
    return state["generators"]


def continue_counting(callback: BaseCallback, calls: int) -> None:
    """
    Let callbacks that do something every n calls go on doing it at the same steps.

    :param callback: the callback of a run that is resumed
    :param calls: how often it would have been called if it had not been interrupted
    """
    for each in callback.callbacks if isinstance(callback, CallbackList) else [callback]:
        if isinstance(each, CallbackList):
            continue_counting(each, calls)
        elif each.n_calls == 0:
            each.n_calls = calls


class ResumableCheckpointCallback(CheckpointCallback):
    """
    Save checkpoints to resume from, with ``KLipPPO.load(path, env=env, resume=True)`` or RL Zoo's ``-i``.

    Each is saved at the first start of a rollout, or end of training, after every ``save_freq`` steps of an environment. A
    kill at any moment leaves the checkpoints that are there whole.

    :param save_freq: Save after this many calls of the callback, each of which is ``n_envs`` steps
    :param save_path: Folder to save to
    :param name_prefix: Prefix of the files; ``rl_model`` is the one that RL Zoo looks for
    :param save_replay_buffer: Ignored, as there is none
    :param save_vecnormalize: Whether to write the ``VecNormalize`` statistics beside each checkpoint, too, for other programs
    :param verbose: Verbosity level: 0 for no output, 2 for indicating when a checkpoint is saved
    :raises ValueError: if ``save_freq`` is not positive
    :raises OSError: if the folder cannot be written to
    """

    def __init__(
        self,
        save_freq: int,
        save_path: str,
        name_prefix: str = "rl_model",
        save_replay_buffer: bool = False,
        save_vecnormalize: bool = False,
        verbose: int = 0,
    ):
        if save_freq <= 0:
            raise ValueError(f"save_freq={save_freq!r} must be positive")
        super().__init__(save_freq, save_path, name_prefix, save_replay_buffer, save_vecnormalize, verbose)
        self.saved = 0

    # An algorithm of sb3-klip, as _init_callback checks.
    model: Any

    def _init_callback(self) -> None:
        if not hasattr(self.model, "_boundary"):
            raise ValueError(f"{type(self).__name__} is for the algorithms of sb3-klip, not for {type(self.model).__name__}")
        super()._init_callback()
        # A folder that cannot be written to shows now, and not hours later.
        probe = pathlib.Path(self.save_path) / f".{self.name_prefix}.{os.getpid()}.probe"
        probe.write_bytes(b"")
        probe.unlink()

    def _on_training_start(self) -> None:
        # Calls that a run which is resumed has already had are not due again.
        self.saved = self.n_calls // self.save_freq
        if problem := EnvState.read(self.training_env).problem:
            warnings.warn(
                f"A run that is resumed from these checkpoints will go on at the start of an episode, as {problem}.",
                stacklevel=2,
            )

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        if self.n_calls // self.save_freq > self.saved:
            self._save()

    def _on_training_end(self) -> None:
        # RL Zoo calls this also if training has not begun; and one that was interrupted may have ended anywhere.
        boundary = getattr(getattr(self, "model", None), "_boundary", None)
        if boundary is not None and boundary.num_timesteps == self.model.num_timesteps:
            self._on_rollout_start()

    def _save(self) -> None:
        self.saved = self.n_calls // self.save_freq
        statistics: VecNormalize | None = self.model.get_vec_normalize_env()
        if self.save_vecnormalize and statistics is not None:
            path = pathlib.Path(self._checkpoint_path("vecnormalize_", extension="pkl"))
            write_atomically(path, pickle.dumps(statistics))
        path = pathlib.Path(self._checkpoint_path(extension="zip"))
        self.model.save(path, resumable=True)
        if self.verbose >= 2:
            print(f"Saving model checkpoint to {path}")
