"""
Unpickling the contents of checkpoints: old files with ``gym``, and files that are not trusted.

A pickle is a program. :func:`loads` runs it as Python's own does, but for three things: spaces of ``gym`` become those of
``gymnasium``, tensors come to the CPU, and a function whose bytecode is that of another version of Python is refused rather
than run. With ``trusted=False`` it may name nothing but what :func:`_harmless` lists, and so runs nothing.
"""

import io
import pickle
import sys
from collections import OrderedDict
from typing import Any, ClassVar

import cloudpickle
import numpy as np
import torch as th
from gymnasium import spaces

#: The version of Python whose bytecode can be run here.
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


class NotRestorableError(Exception):
    """What a pickle holds is a function, which cannot be restored here."""


class RefusedError(pickle.UnpicklingError):
    """A pickle that is not trusted names something that could do harm."""


def loads(data: bytes, python: str | None = None, trusted: bool = True) -> Any:
    """
    Unpickle.

    :param data: the pickle
    :param python: version of Python that wrote it, such as "3.7", if known
    :param trusted: whether it may run anything
    :return: the object
    :raises NotRestorableError: if it is a function of another version of Python, or any function if not trusted
    :raises RefusedError: if it is not trusted and names anything but plain data, spaces and classes of policies and networks
    """
    return (_Unpickler if trusted else _SafeUnpickler)(io.BytesIO(data), python).load()


class _AnyAttribute(type):
    """Classes of it have every attribute: an old pickle looks a constructor of gym's generators up with getattr."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return cls


class _Discarded(metaclass=_AnyAttribute):
    """Takes the place of a random generator of a space: the environment brings its own."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _rebuilt(space: type[spaces.Space]) -> type[spaces.Space]:
    """A class to unpickle a space with, whatever attributes its state has: the space is made anew from what defines it."""

    def setstate(self: Any, state: Any) -> None:
        state = dict(state)
        self.__class__ = space
        if space is spaces.Box:
            low, high = (np.asarray(state[bound], dtype=state["dtype"]) for bound in ("low", "high"))
            self.__init__(low, high, dtype=state["dtype"])
        elif space is spaces.Discrete:
            self.__init__(int(state["n"]), start=int(state.get("start", 0)))
        elif space is spaces.MultiDiscrete:
            self.__init__(state["nvec"], dtype=state.get("dtype") or np.int64, start=state.get("start"))
        elif space is spaces.MultiBinary:
            self.__init__(state["n"])
        elif space is spaces.Dict:
            self.__init__(OrderedDict(state["spaces"]))
        else:
            self.__init__(state["spaces"])

    return type(space.__name__, (space,), {"__setstate__": setstate})


_SPACES = {
    space.__name__: _rebuilt(space)
    for space in (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary, spaces.Dict, spaces.Tuple)
}


def _array(*args: Any) -> None:
    """Stands for numpy's class of arrays, which may be named but not called: bytes and a dtype of objects make pointers."""
    raise RefusedError("a call of numpy.ndarray")


def _empty_array(kind: Any, shape: Any, dtype: Any) -> np.ndarray:
    """What numpy calls for an array, whose content comes as its state."""
    return np.empty(0, "b")


def load_tensor(data: bytes) -> Any:
    """What torch calls for the storage of a tensor, without code and on the CPU."""
    return th.load(io.BytesIO(data), map_location="cpu", weights_only=True)


# Python's own implementation: C's has no way to look at what is about to be changed (_SafeUnpickler.load_build).
class _Unpickler(pickle._Unpickler):
    def __init__(self, file: io.BytesIO, python: str | None) -> None:
        super().__init__(file)
        self.python = python

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "gym":
            if module.startswith("gym.utils.seeding"):
                return _Discarded
            return _SPACES.get(name) or super().find_class(module.replace("gym", "gymnasium", 1), name)
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return load_tensor
        if module.startswith("cloudpickle.") and name == "_builtin_type":
            return self._builtin_type
        if module.startswith("numpy.core"):  # numpy 1's name of it, which warns
            module = module.replace("numpy.core", "numpy._core", 1)
        return super().find_class(module, name)

    def _builtin_type(self, name: str) -> Any:
        # Bytecode of another version may load here, and crash the interpreter when it runs.
        if name == "CodeType" and self.python not in (None, PYTHON):
            raise NotRestorableError(f"a function of Python {self.python}")
        return cloudpickle.cloudpickle._builtin_type(name)


#: What an untrusted pickle may name, beside the classes that _harmless lets through; calling these builds plain data.
_PLAIN_DATA = {
    "_codecs.encode",
    "builtins.bytearray",
    "builtins.complex",
    "builtins.frozenset",
    "builtins.set",
    "builtins.slice",
    "collections.OrderedDict",
    "collections.deque",
    "numpy.dtype",
    "numpy._core.multiarray.scalar",
    "numpy._core.numeric._frombuffer",
    "rl_zoo3.utils.SimpleLinearSchedule",
    "sb3_contrib.common.recurrent.type_aliases.RNNStates",
    "stable_baselines3.common.running_mean_std.RunningMeanStd",
    "stable_baselines3.common.utils.ConstantSchedule",
    "stable_baselines3.common.utils.FloatSchedule",
    "stable_baselines3.common.utils.LinearSchedule",
    "stable_baselines3.common.vec_env.vec_normalize.VecNormalize",
    "torch._utils._rebuild_tensor_v2",
}

#: Modules of which an untrusted pickle may name classes that derive from the one beside it: making one only fills memory.
_CLASSES: dict[str, Any] = {
    "numpy": (np.number, np.bool_),
    "sb3_contrib.common.maskable.buffers": object,
    "sb3_contrib.common.maskable.policies": th.nn.Module,
    "sb3_contrib.common.recurrent.buffers": object,
    "sb3_contrib.common.recurrent.policies": th.nn.Module,
    "stable_baselines3.common.buffers": object,
    "stable_baselines3.common.policies": th.nn.Module,
    "stable_baselines3.common.sb2_compat.rmsprop_tf_like": th.optim.Optimizer,
    "stable_baselines3.common.torch_layers": th.nn.Module,
    "torch.nn.modules.activation": th.nn.Module,
    "torch.optim": th.optim.Optimizer,
}


def _harmless(module: str, name: str, found: Any) -> bool:
    """Whether an untrusted pickle may name this, and call it."""
    if f"{module}.{name}" in _PLAIN_DATA:
        return True
    # torch.optim.Adam stands in torch.optim.adam.
    listed = _CLASSES.get("torch.optim" if module.startswith("torch.optim.") else module)
    # Defined there, and not only imported there.
    return listed is not None and isinstance(found, type) and issubclass(found, listed) and found.__module__ == module


class _SafeUnpickler(_Unpickler):
    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)

    def load_build(self) -> None:
        # The state of an object may be set, but no attribute of a class that the whole process shares.
        changed = self.stack[-2]  # type: ignore[attr-defined]
        if isinstance(changed, type):
            raise RefusedError(f"a change of {changed.__qualname__}")
        # A dtype can be told that its objects are plain bytes, which makes pointers of the bytes in the file.
        if isinstance(changed, np.dtype) and changed.kind not in "biufcSU":
            raise RefusedError(f"numpy.dtype {changed}")
        super().load_build()  # type: ignore[misc]

    dispatch[pickle.BUILD[0]] = load_build

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] in ("gym", "gymnasium"):
            if name in _SPACES and ".spaces" in module:
                return _SPACES[name]
            if module.startswith(("gym.utils.seeding", "gymnasium.utils.seeding")):
                return _Discarded
            raise RefusedError(f"{module}.{name}")
        if module.startswith("numpy.random"):
            return _Discarded
        if module.startswith("cloudpickle"):
            raise NotRestorableError("a function, which an untrusted file may not bring along")
        if module.startswith("numpy.core"):
            module = module.replace("numpy.core", "numpy._core", 1)
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return load_tensor
        if (module, name) == ("numpy", "ndarray"):
            return _array
        if (module, name) == ("numpy._core.multiarray", "_reconstruct"):
            return _empty_array
        # Only modules that are listed are imported, and a dotted name could reach what a listed module has imported.
        known = module in _CLASSES or module.startswith("torch.optim.") or f"{module}.{name}" in _PLAIN_DATA
        if known and "." not in name:
            found = super().find_class(module, name)
            if _harmless(module, name, found):
                return found
        raise RefusedError(f"{module}.{name}")
