"""Files of checkpoints, to be loaded: of tiny models, changed, from the days of ``gym``, and such as do harm."""

import base64
import builtins
import collections
import contextlib
import functools
import io
import json
import os
import pathlib
import pickle
import sys
import types
import zipfile

import cloudpickle
import gymnasium
import numpy as np
import pytest
import yaml
from gymnasium import spaces
from sb3_contrib import MaskablePPO, RecurrentPPO
from stable_baselines3 import PPO
from stable_baselines3.common.logger import CSVOutputFormat
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_klip import KLipMaskablePPO, KLipPPO, KLipRecurrentPPO

BASES = {KLipPPO: PPO, KLipMaskablePPO: MaskablePPO, KLipRecurrentPPO: RecurrentPPO}
VARIANTS = [(KLipPPO, "box"), (KLipMaskablePPO, "discrete"), (KLipRecurrentPPO, "box")]
SMALL = {"n_steps": 32, "batch_size": 16, "n_epochs": 1}
#: Spaces of observations and actions.
VECTOR = spaces.Box(-np.inf, np.inf, (3,), np.float64)
TASKS = {
    "discrete": (VECTOR, spaces.Discrete(3)),
    "box": (VECTOR, spaces.Box(np.float32([-1, -2]), np.float32([1, 2]))),
    "multi_discrete": (spaces.MultiDiscrete([3, 4]), spaces.MultiDiscrete([2, 3])),
    "multi_binary": (spaces.MultiBinary(4), spaces.MultiBinary(2)),
    "dictionary": (spaces.Dict({"b": VECTOR, "a": spaces.Discrete(3)}), spaces.Discrete(2)),
}


class Task(gymnasium.Env):
    """Any spaces; episodes of 7 steps. Every action is allowed to a maskable policy."""

    def __init__(self, observation_space, action_space):
        self.observation_space, self.action_space = observation_space, action_space

    def reset(self, *, seed=None, options=None):
        self.steps = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        self.steps += 1
        return self.observation_space.sample(), float(np.sum(action)), self.steps == 7, False, {}

    def action_masks(self):
        size = {
            spaces.Discrete: lambda s: s.n,
            spaces.MultiDiscrete: lambda s: s.nvec.sum(),
            spaces.MultiBinary: lambda s: 2 * s.n,
        }
        return np.ones(size[type(self.action_space)](self.action_space), dtype=bool)


def task(name):
    # Copies, as training seeds them.
    return Task(*(cloudpickle.loads(cloudpickle.dumps(space)) for space in TASKS[name]))


def small(algorithm, env, policy=None, **kwargs):
    """A tiny model."""
    recurrent = issubclass(algorithm, RecurrentPPO)
    dictionary = isinstance(env.observation_space, spaces.Dict)
    policy = policy or ("MultiInput" if dictionary else "Mlp") + ("LstmPolicy" if recurrent else "Policy")
    policy_kwargs = {"net_arch": [8], **({"lstm_hidden_size": 8} if recurrent else {}), **kwargs.pop("policy_kwargs", {})}
    return algorithm(policy, env, seed=0, device="cpu", policy_kwargs=policy_kwargs, **{**SMALL, **kwargs})


def content(model):
    """The bytes of the file that a model is saved to."""
    file = io.BytesIO()
    model.save(file)
    return file.getvalue()


@functools.cache
def trained(algorithm, name):
    """A model after one rollout, and its file; for all tests that do not change it."""
    model = small(algorithm, task(name), clip_range=0.15, gamma=0.97).learn(32)
    return model, content(model)


def load(checkpoint, algorithm=KLipPPO, **kwargs):
    return algorithm.load(io.BytesIO(checkpoint), device="cpu", **kwargs)


def assert_predicts_alike(model, reference):
    for _ in range(5):
        observation = reference.observation_space.sample()
        ours, theirs = (m.predict(observation, deterministic=True)[0] for m in (model, reference))
        assert np.array_equal(ours, theirs)


# -- changing files --------------------------------------------------------------------------------------------------------


def members(checkpoint):
    with zipfile.ZipFile(io.BytesIO(checkpoint)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(files, compression=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return file.getvalue()


def without(mapping, *names):
    return {key: value for key, value in mapping.items() if key not in names}


def edited(checkpoint, entries=None, files=None):
    """A checkpoint with other entries in its data, or other members; None takes one away."""
    found = members(checkpoint)
    changed = {**json.loads(found["data"]), **(entries or {})}
    removed = [name for name, value in (entries or {}).items() if value is None]
    found = {**found, "data": json.dumps(without(changed, *removed)).encode(), **(files or {})}
    return zipped({name: data for name, data in found.items() if data is not None})


def entry(data, kind="function"):
    """A pickle as it stands in the data of a checkpoint."""
    return {":type:": f"<class {kind!r}>", ":serialized:": base64.b64encode(data).decode()}


# -- what gym wrote --------------------------------------------------------------------------------------------------------


GYM_SPACES = {
    spaces.Box: "gym.spaces.box",
    spaces.Discrete: "gym.spaces.discrete",
    spaces.MultiDiscrete: "gym.spaces.multi_discrete",
    spaces.MultiBinary: "gym.spaces.multi_binary",
    spaces.Dict: "gym.spaces.dict",
    spaces.Tuple: "gym.spaces.tuple",
}


class RandomNumberGenerator(np.random.Generator):
    """That of gym 0.22 and later."""

    @staticmethod
    def _generator_ctor(bit_generator):
        return RandomNumberGenerator(getattr(np.random, bit_generator)())

    def __reduce__(self):
        state = self.bit_generator.state
        return self._generator_ctor, (state["bit_generator"],), state


#: Versions of gym: how each names the shape and the random generator of a space, a generator, and the pickle protocol.
#: numpy's generators in the first were those of numpy 1.
ERAS = {
    "0.17": ("shape", "np_random", lambda: np.random.RandomState(0), 3),
    "0.19": ("shape", "_np_random", lambda: None, 3),
    "0.23": ("_shape", "_np_random", lambda: RandomNumberGenerator(np.random.PCG64(0)), 4),
}


@contextlib.contextmanager
def gym_installed():
    """Modules with classes of gym, to pickle; gone when files are loaded."""
    classes = {space: type(space.__name__, (), {"__module__": module}) for space, module in GYM_SPACES.items()}
    contents = {module: {space.__name__: classes[space]} for space, module in GYM_SPACES.items()}
    contents["gym.utils.seeding"] = {"RandomNumberGenerator": RandomNumberGenerator}
    with pytest.MonkeyPatch.context() as patch:
        for name in ("gym", "gym.spaces", "gym.utils", *contents):
            module = types.ModuleType(name)
            vars(module).update(contents.get(name, {}))
            patch.setitem(sys.modules, name, module)
        patch.setattr(RandomNumberGenerator, "__module__", "gym.utils.seeding")
        patch.setattr(RandomNumberGenerator._generator_ctor, "__module__", "gym.utils.seeding")
        yield classes


def gym_space(space, era, classes):
    """A space of gym that is like one of gymnasium."""
    shape, generator, make_generator, _ = ERAS[era]
    old = classes[type(space)]()
    state = {"dtype": space.dtype, shape: space.shape, generator: make_generator()}
    names = {
        spaces.Box: ("low", "high", "bounded_below", "bounded_above"),
        spaces.Discrete: ("n", "start") if era == "0.23" else ("n",),
        spaces.MultiDiscrete: ("nvec",),
        spaces.MultiBinary: ("n",),
    }
    state.update({name: getattr(space, name) for name in names.get(type(space), ())})
    if isinstance(space, spaces.Dict):
        state["spaces"] = collections.OrderedDict((key, gym_space(part, era, classes)) for key, part in space.spaces.items())
    if isinstance(space, spaces.Tuple):
        state["spaces"] = [gym_space(part, era, classes) for part in space.spaces]
    vars(old).update(state)
    return old


def gym_pickle(make, era, protocol=None):
    """What an old version of gym and numpy pickled: ``make`` turns spaces into those of gym."""
    protocol = protocol or ERAS[era][3]
    with gym_installed() as classes:
        data = pickle.dumps(make(lambda space: gym_space(space, era, classes)), protocol)
    # Up to protocol 3 names are text that ends with the line, so a name of another length fits.
    return data.replace(b"cnumpy._core.", b"cnumpy.core.") if protocol <= 3 else data


class Call:
    """Pickles as a call."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call

    def __call__(self):
        """Python pickles no call of what cannot be called."""


def function_of_python_3_7(constant):
    """The pickle of a schedule in RL Zoo's published agents: bytecode, whose arguments are those of Python 3.7."""
    builtin = cloudpickle.cloudpickle._builtin_type
    bytecode = b"|\x00\x88\x00\x14\x00S\x00"
    arguments = (
        1,
        0,
        1,
        2,
        19,
        bytecode,
        (None,),
        (),
        ("progress_remaining",),
        "utils.py",
        "func",
        254,
        b"\x00\x06",
        ("x",),
        (),
    )
    code = Call(Call(builtin, "CodeType"), *arguments)
    cell = Call(cloudpickle.cloudpickle._make_empty_cell)
    return pickle.dumps(Call(Call(builtin, "LambdaType"), code, {"constant": constant}, None, None, (cell,)), 4)


def gym_era(checkpoint, era, schedules=("learning_rate", "clip_range"), **entries):
    """A checkpoint as it would have been saved with Python 3.7 and gym."""
    data = json.loads(members(checkpoint)["data"])
    old = {}
    for name in ("observation_space", "action_space"):
        space = cloudpickle.loads(base64.b64decode(data[name][":serialized:"]))
        pickled = gym_pickle(lambda convert, space=space: convert(space), era)
        old[name] = entry(pickled, f"{GYM_SPACES[type(space)]}.{type(space).__name__}")
    for name in (*schedules, "lr_schedule"):
        old[name] = entry(function_of_python_3_7(0.001))
    info = "OS: Linux-4.12.14\nPython: 3.7.10\nStable-Baselines3: 1.3.1a2\nPyTorch: 1.10.0\nGym: 0.19.0\n"
    return edited(checkpoint, {**old, **entries}, {"system_info.txt": info.encode()})


def assert_genuine(space, original):
    """It is a space of gymnasium that is like the original, and can draw samples."""
    assert type(space) is type(original)
    assert type(space).__module__.startswith("gymnasium.spaces.")
    assert space == original
    assert (space.shape, space.dtype) == (original.shape, original.dtype)
    assert space.contains(space.sample())
    if isinstance(space, (spaces.Dict, spaces.Tuple)):
        inner = (space.spaces.values(), original.spaces.values()) if isinstance(space, spaces.Dict) else (space, original)
        for part, original_part in zip(*inner, strict=True):
            assert_genuine(part, original_part)


def zoo_agent(folder, config):
    """RL Zoo's layout, with a checkpoint whose schedules are lost and a ``config.yml``; returns the checkpoint."""
    (folder / "Env").mkdir()
    (folder / "Env.zip").write_bytes(gym_era(trained(PPO, "discrete")[1], "0.19"))
    (folder / "Env" / "config.yml").write_text(config if isinstance(config, str) else yaml.dump(config))
    return folder / "Env.zip"


CONFIG = collections.OrderedDict(
    batch_size=256, clip_range=0.1, learning_rate="lin_0.001", policy="MlpPolicy", policy_kwargs="dict(net_arch=[8])"
)


# -- statistics of VecNormalize --------------------------------------------------------------------------------------------


def vectorized():
    return DummyVecEnv([lambda: task("box")])


def normalized(name="box"):
    """Environments with statistics."""
    env = VecNormalize(DummyVecEnv([lambda: task(name)]), gamma=0.97, clip_obs=5.0)
    env.action_space.seed(0)
    env.reset()
    for _ in range(20):
        env.step(np.array([env.action_space.sample()]))
    return env


def saved_statistics(env, path, era=None, protocol=None):
    """Save statistics, as gym would have if a version of it is given."""
    if era is None:
        env.save(str(path))
        return path

    def make(convert):
        old = VecNormalize.__new__(VecNormalize)
        vars(old).update(vars(env))
        old.observation_space, old.action_space = convert(env.observation_space), convert(env.action_space)
        return old

    path.write_bytes(gym_pickle(make, era, protocol))
    return path


# -- files that do harm ----------------------------------------------------------------------------------------------------


def named(module, name):
    """The pickle opcodes that look up a name, without asking whether there is one."""
    return b"".join(b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name)) + b"\x93"


def plain(value):
    """The pickle opcodes for a value, to go into a larger pickle."""
    return pickle.dumps(value, 3)[2:-1]


def calling(module, name, *args):
    """The pickle of a call."""
    return b"\x80\x04" + named(module, name) + plain(args) + b"R."


#: Pickles that write a file, each made from its path.
MALICIOUS = {
    "os.system": lambda path: calling("os", "system", f"touch {path}"),
    "posix.system": lambda path: pickle.dumps(Call(os.system, f"touch {path}")),
    "protocol 0": lambda path: f"cos\nsystem\n(S'touch {path}'\ntR.".encode(),
    "INST": lambda path: f"(S'touch {path}'\nios\nsystem\n.".encode(),
    "exec": lambda path: pickle.dumps(Call(builtins.exec, f"open({str(path)!r}, 'w')")),
    "open": lambda path: calling("io", "open", str(path), "w"),
    "Path.write_text": lambda path: pickle.dumps(Call(pathlib.Path.write_text, path, "x"), 4),
    "logger": lambda path: pickle.dumps(Call(CSVOutputFormat, str(path))),
    "dotted in policies": lambda path: calling("stable_baselines3.common.policies", "th.save", [1], str(path)),
    "dotted class": lambda path: calling("stable_baselines3.common.buffers", "np.memmap", str(path), "u1", "w+", 0, (1,)),
    "dotted module": lambda path: calling("torch.optim.adam", "torch.save", [1], str(path)),
    "numpy function": lambda path: calling("numpy", "save", f"{path}.npy", [1]),
    "numpy class": lambda path: calling("numpy", "memmap", str(path), "u1", "w+", 0, (1,)),
    "gym's function": lambda path: calling("gym.utils.play.os", "system", f"touch {path}"),
    "space's module": lambda path: calling("gymnasium.spaces.box", "np.save", f"{path}.npy", [1]),
    "import": lambda path: calling(f"module_{path.parent.name}", "anything"),
    "in a list": lambda path: b"\x80\x04]" + calling("os", "system", f"touch {path}")[2:-1] + b"a.",
}


def written(marker):
    return [*marker.parent.iterdir()] != []
