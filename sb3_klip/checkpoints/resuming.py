"""
Resuming exactly: what Stable-Baselines3 leaves out of a checkpoint.

A training run that was killed and resumed ends with the parameters of one that was not, if all of its state comes back:
beside the model, every random generator, the environments in the middle of their episodes, their wrappers and the last
observations. All of that has one well-defined value between two rollouts, which is when it is read and put back.
"""

import io
import pickle
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import cloudpickle
import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecEnvWrapper

from sb3_klip.checkpoints.callback_state import remembered
from sb3_klip.checkpoints.unpickling import load_tensor
from sb3_klip.reproducibility import processor, read_generators, versions

#: Attributes of environments and wrappers that are not state: files to write to, and what classes have anyhow.
_NOT_STATE = {"results_writer", "class_attributes"}

#: Attributes of the model that SB3 does not save, or discards when it loads.
_MODEL_STATE = (
    *("_last_obs", "_last_episode_starts", "_last_original_obs", "_last_lstm_states", "action_space"),
    "_kept_rollouts",
)


class Boundary(NamedTuple):
    """
    A moment between two rollouts.

    :param num_timesteps: steps that were taken until then
    :param generators: state of the random generators then; None while nothing has drawn from them since
    :param environments: what environments in this process showed last, and drew from last
    """

    num_timesteps: int
    generators: dict[str, Any] | None
    environments: dict[Any, np.ndarray]

    @classmethod
    def now(cls, model: Any, generators: dict[str, Any] | None = None) -> "Boundary":
        """
        This moment.

        :param model: the model
        :param generators: state of the random generators, if something is about to draw from them
        """
        return cls(model.num_timesteps, generators, _traces(model.env))

    def is_now(self, model: Any) -> bool:
        """
        Whether nothing has happened since.

        :param model: the model
        """
        seen = _traces(model.env)
        same = seen.keys() == self.environments.keys() and all(
            np.array_equal(seen[key], array, equal_nan=array.dtype.kind in "fc") for key, array in self.environments.items()
        )
        return self.num_timesteps == model.num_timesteps and same


def _traces(env: VecEnv | None) -> dict[Any, np.ndarray]:
    """
    What anybody changes who steps or resets environments in this process: their last observations, and, where the vectorized
    environments are passed over, the generators that a reset draws from.
    """
    base = None if env is None else env.unwrapped
    if not isinstance(base, DummyVecEnv):
        return {}
    generators = [getattr(each.unwrapped, "_np_random", None) for each in base.envs]
    drawn = {
        number: np.frombuffer(pickle.dumps(generator), dtype=np.uint8)
        for number, generator in enumerate(generators)
        if isinstance(generator, np.random.Generator)
    }
    return {**{key: array.copy() for key, array in base.buf_obs.items()}, **drawn}


def conditions(device: th.device) -> dict[str, str]:
    """What the bits of a run depend on, beside its state."""
    return {
        **versions(),
        "torch threads": str(th.get_num_threads()),
        "processor": processor(),
        "torch kernels": th.backends.cpu.get_cpu_capability(),
        "device": str(device)
        if device.type == "cpu"
        else th.cuda.get_device_name(device)
        if device.type == "cuda"
        else str(device),
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

    def find_class(self, module: str, name: str) -> Any:
        # Tensors of a GPU come to the CPU, as there may be no GPU.
        return load_tensor if (module, name) == ("torch.storage", "_load_from_bytes") else super().find_class(module, name)


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
    :raises ValueError: if the model is in the middle of a rollout or of an update, or has not begun to learn, or the
        environments have been stepped by others
    """
    boundary: Boundary | None = model._boundary
    if boundary is None or not boundary.is_now(model):
        stepped = boundary is not None and boundary.num_timesteps == model.num_timesteps
        raise ValueError(
            "resumable=True needs a moment between two rollouts: on_rollout_start of a callback, or the end of learn(). "
            "ResumableCheckpointCallback saves at such moments."
            + " The environments have been stepped or reset since the last one, for example by evaluate_policy: evaluate on "
            "separate environments." * stepped
        )
    state = {
        "versions": conditions(model.device),
        "generators": boundary.generators or read_generators(),
        "model": {name: getattr(model, name) for name in _MODEL_STATE if hasattr(model, name)},
        "env": EnvState.read(model.env)._asdict(),
        "callbacks": [] if model._callback is None else remembered(model._callback, model._fingerprints),
    }
    return cloudpickle.dumps(state)


def restore_state(model: Any, data: bytes) -> dict[str, Any]:
    """
    Put back what :func:`read_state` has read.

    :param model: the model, loaded with its environments
    :param data: the state
    :return: what is put back when learning goes on: the state of the random generators, and of callbacks
    :raises ValueError: if the environments are not like those of the state
    """
    state = _Unpickler(io.BytesIO(data), ()).load()
    earlier = state["versions"]
    different = [
        f"{name} {earlier.get(name, 'unknown')} then, {value} now"
        for name, value in conditions(model.device).items()
        if earlier.get(name) != value
    ]
    if state["generators"]["cuda"] and not th.cuda.is_available():
        different.append("the run drew random numbers on a GPU, and there is none now: they are not the same")
    if different:
        warnings.warn(f"The run goes on under other conditions, so its bits may differ: {'; '.join(different)}.", stacklevel=4)
    env = EnvState(**state["env"])
    for name, value in state["model"].items():
        setattr(model, name, _on_device(value, model.device))
    if not env.restore(model.env):
        warnings.warn(
            f"The run goes on at the start of an episode, and not exactly where it was, as {env.problem}.", stacklevel=4
        )
        model._last_obs = None  # makes learn() reset the environments
    return {"generators": state["generators"], "callbacks": state.get("callbacks", [])}


def _on_device(value: Any, device: th.device) -> Any:
    """Tensors, also those in tuples such as the states of an LSTM, on the device of the model."""
    if isinstance(value, th.Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        moved = [_on_device(each, device) for each in value]
        return type(value)(*moved) if hasattr(value, "_fields") else tuple(moved)
    return value
