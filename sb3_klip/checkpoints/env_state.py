"""The state of vectorized environments: in the middle of their episodes, with their wrappers and random generators."""

import io
import pickle
import sys
from collections.abc import Mapping, Sequence
from types import BuiltinFunctionType, FunctionType, MappingProxyType, MethodType, ModuleType
from typing import Any, NamedTuple, TypeAlias

import cloudpickle
import gymnasium as gym
import numpy as np
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecEnvWrapper

from sb3_klip.checkpoints.unpickling import load_tensor

#: Attributes of environments and wrappers that are not state: files to write to, and what classes have anyhow.
_NOT_STATE = {"results_writer", "class_attributes"}
#: What cannot be changed, is a layer itself, or belongs to each.
_NOT_SHARED = (
    *(type(None), bool, int, float, complex, str, bytes, tuple, frozenset, np.generic, type),
    *(FunctionType, BuiltinFunctionType, MethodType, ModuleType, gym.Space, gym.Env, VecEnv),
)
#: The position of a layer, and the name of its attribute.
Place: TypeAlias = tuple[int, str]


def _layers(env: VecEnv) -> tuple[list[Any], list[Any]]:
    """
    The wrappers of vectorized environments, from the outside; and what is in them: the vectorized environments, and of each
    environment in this process the wrappers, from the outside, and the environment.
    """
    wrappers: list[Any] = []
    while isinstance(env, VecEnvWrapper):
        wrappers.append(env)
        env = env.venv
    inner: list[Any] = [env]
    for layer in getattr(env, "envs", ()):
        while isinstance(layer, gym.Wrapper):
            inner.append(layer)
            layer = layer.env
        inner.append(layer)
    return wrappers, inner


def _attributes(layers: Sequence[Any], first: int = 0) -> dict[int, Place]:
    """Where layers from a position on hold an object that others may hold, too, and change; by its id."""
    return {
        id(value): (position, name)
        for position, layer in enumerate(layers[first:], first)
        for name, value in vars(layer).items()
        if not isinstance(value, _NOT_SHARED)
    }


def held_by(env: VecEnv) -> dict[int, Place]:
    """
    The objects that environments and their wrappers hold in attributes, and that others may hold, too, and change.

    :param env: the environments
    :return: by its id, where each is, as :func:`at` takes it
    """
    wrappers, inner = _layers(env)
    return _attributes([*wrappers, *inner])


def at(env: VecEnv, place: Place) -> Any:
    """
    What environments or their wrappers hold at a place.

    :param env: the environments
    :param place: as from :func:`held_by`
    :raises KeyError: if there is no such attribute
    """
    wrappers, inner = _layers(env)
    position, name = place
    return vars([*wrappers, *inner][position])[name]


class _Pickler(cloudpickle.Pickler):
    """Pickles what layers hold, but not layers, and not what others hold."""

    def __init__(self, file: io.BytesIO, layers: Sequence[Any], elsewhere: Mapping[int, Place]) -> None:
        super().__init__(file)
        self.positions: dict[int, Any] = {**elsewhere, **{id(layer): number for number, layer in enumerate(layers)}}

    def reducer_override(self, obj: Any) -> Any:
        # By its name, and not by value as cloudpickle would: another class of that name would be equal to nothing of it.
        if isinstance(obj, type) and getattr(sys.modules.get(obj.__module__), obj.__qualname__, None) is obj:
            return NotImplemented
        return super().reducer_override(obj)

    def persistent_id(self, obj: Any) -> int | Place | None:
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
        return self.layers[pid] if isinstance(pid, int) else vars(self.layers[pid[0]])[pid[1]]

    def find_class(self, module: str, name: str) -> Any:
        # Tensors of a GPU come to the CPU, as there may be no GPU.
        return load_tensor if (module, name) == ("torch.storage", "_load_from_bytes") else super().find_class(module, name)


def _try_to_pack(
    layers: Sequence[Any], all_layers: Sequence[Any], name: str, elsewhere: Mapping[int, Place] = MappingProxyType({})
) -> tuple[bytes | None, str]:
    """
    Everything that layers hold, in one pickle, so that what they share stays shared; or else why it cannot be read.

    What others hold, elsewhere, is named by its place.
    """
    file = io.BytesIO()
    try:
        states = [{name: value for name, value in vars(layer).items() if name not in _NOT_STATE} for layer in layers]
        _Pickler(file, all_layers, elsewhere).dump(states)
    except Exception as error:  # whatever an object may raise that cannot be pickled
        return None, f"the state of {name} cannot be read ({type(error).__name__}: {error})"
    return file.getvalue(), ""


def _unpack(data: bytes, layers: Sequence[Any], all_layers: Sequence[Any]) -> None:
    """Put everything back into layers."""
    try:
        states = unpickled(data, all_layers)
    except (AttributeError, ImportError, KeyError) as error:
        raise ValueError(
            f"the state of env cannot be restored: {error}. Define or import it, as the interrupted run did."
        ) from error
    for layer, state in zip(layers, states, strict=True):
        vars(layer).update(state)


def _names(layers: Sequence[Any]) -> list[str]:
    return [type(layer).__name__ for layer in layers]


def unpickled(data: bytes, layers: Sequence[Any] = ()) -> Any:
    """
    What a checkpoint holds as a pickle; running it, so only of a file that is trusted.

    :param data: the pickle
    :param layers: the environments and wrappers that it names by their positions
    """
    return _Unpickler(io.BytesIO(data), layers).load()


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
        wrappers, inner = _layers(env)
        base, layers = inner[0], [*wrappers, *inner]
        # The environments together, as they may share things; each wrapper by itself, so that one that cannot be read does not
        # cost the statistics of another.
        episodes, problem = _try_to_pack(inner, layers, str(inner[-1]))
        elsewhere = {} if problem else _attributes(layers, len(wrappers))
        read = [_try_to_pack([wrapper], layers, type(wrapper).__name__, elsewhere) for wrapper in wrappers]
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
        wrappers, inner = _layers(env)
        base, layers = inner[0], [*wrappers, *inner]
        if _names(layers) != self.layers:
            raise ValueError(
                "env must be made in the same way as that of the run to resume, with the same wrappers and as many "
                f"environments: it is {' > '.join(_names(layers))}, and was {' > '.join(self.layers)}"
            )
        if self.episodes is not None:
            _unpack(self.episodes, inner, layers)
        for wrapper, state in zip(wrappers, self.wrappers, strict=True):
            if state is not None:
                _unpack(state, [wrapper], layers)
        if self.episodes is None:
            base._reset_seeds()  # or the next reset would seed the generators again
            for each, generator in zip(getattr(base, "envs", ()), self.generators, strict=False):
                each.unwrapped.np_random = generator
            return False
        return True
