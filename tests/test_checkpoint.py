"""Checkpoints of any age and origin: what loads, what is refused and with which words, and what a stranger's file can do."""

import ast
import base64
import builtins
import collections
import contextlib
import functools
import importlib.util
import io
import json
import os
import pathlib
import pickle
import re
import shutil
import sys
import types
import warnings
import zipfile

import cloudpickle
import gymnasium
import numpy as np
import pytest
import torch as th
import yaml
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from identity_helpers import assert_identical, state_tensors
from sb3_contrib import ARS, QRDQN, TQC, TRPO, CrossQ, MaskablePPO, RecurrentPPO
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from stable_baselines3 import A2C, DQN, PPO, SAC, TD3
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import CSVOutputFormat
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_klip import KLipMaskablePPO, KLipPPO, KLipRecurrentPPO
from sb3_klip.checkpoint import Checkpoint, load_vecnormalize, statistics_file
from sb3_klip.unpickling import loads

settings.register_profile("suite", deadline=None)
settings.load_profile("suite")

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


@contextlib.contextmanager
def collected():
    """The messages of all warnings."""
    messages = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield messages
    messages.extend(str(warning.message) for warning in caught)


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


@pytest.mark.parametrize("trusted", [True, False])
@pytest.mark.parametrize("era", ERAS)
@pytest.mark.parametrize(
    "space",
    [
        VECTOR,
        spaces.Box(0, 255, (2, 3), np.uint8),
        spaces.Discrete(5),
        spaces.MultiDiscrete([2, 3]),
        spaces.MultiDiscrete([[2, 3], [4, 5]]),
        spaces.MultiBinary(3),
        spaces.Dict({"b": spaces.Discrete(2), "a": spaces.Dict({"c": spaces.MultiBinary(2)})}),
        spaces.Tuple((spaces.Discrete(2), VECTOR)),
    ],
    ids=str,
)
def test_spaces_of_gym_become_those_of_gymnasium(space, era, trusted):
    data = gym_pickle(lambda convert: convert(space), era)
    assert b"gym.spaces" in data
    assert importlib.util.find_spec("gym") is None
    with collected() as messages:
        assert_genuine(loads(data, trusted=trusted), space)
    assert messages == []  # numpy warns of names of numpy 1


def test_start_of_a_discrete_space_of_gym():
    data = gym_pickle(lambda convert: convert(spaces.Discrete(3, start=2)), "0.23")
    assert loads(data) == spaces.Discrete(3, start=2)


@pytest.mark.parametrize("era", ERAS)
@pytest.mark.parametrize(("ours", "name"), [*VARIANTS, *((KLipPPO, name) for name in without(TASKS, "box"))])
def test_checkpoints_from_the_days_of_gym(ours, name, era):
    model, checkpoint = trained(BASES[ours], name)
    old = gym_era(checkpoint, era)
    with pytest.raises(ModuleNotFoundError, match="gym"), collected():
        load(old, BASES[ours])
    with pytest.warns(UserWarning, match="cannot be restored"):
        loaded = load(old, ours)
    assert type(loaded) is ours
    assert_genuine(loaded.observation_space, model.observation_space)
    assert_genuine(loaded.action_space, model.action_space)
    assert_identical(loaded, model)
    assert_predicts_alike(loaded, model)
    with pytest.warns(UserWarning, match="cannot be restored"):
        load(old, ours, env=task(name)).learn(32)


def test_our_own_checkpoint_with_the_coefficient_and_old_spaces():
    model = small(KLipPPO, task("box"), beta="linear_ramp", beta_kwargs={"width": 0.3})
    with pytest.warns(UserWarning, match="cannot be restored"):
        loaded = load(gym_era(content(model), "0.19"))
    assert repr(loaded.beta) == "linear_ramp(width=0.3)"


def test_bytecode_of_another_python_is_not_run(tmp_path):
    """The same function from this Python is run, so the test could fail."""
    marker = tmp_path / "called"
    _, checkpoint = trained(PPO, "discrete")
    schedule = entry(cloudpickle.dumps(lambda _, path=marker: path.touch() or 0.125))
    for version, value, called in (("3.7.10", 0.2, False), ("4.0.1", 0.2, False), (sys.version.split()[0], 0.125, True)):
        file = edited(checkpoint, {"clip_range": schedule}, {"system_info.txt": f"Python: {version}\n".encode()})
        with collected() as messages:
            assert load(file).clip_range(1.0) == value
        assert marker.exists() is called
        assert [f"Python {version.rsplit('.', 1)[0]}" in message for message in messages] == ([] if called else [True])


def test_a_function_that_is_broken_and_of_an_unknown_python():
    """Files from before SB3 1.2 do not tell their Python."""
    _, checkpoint = trained(PPO, "discrete")
    old = gym_era(checkpoint, "0.17", schedules=("clip_range",))
    with pytest.warns(UserWarning, match=r"clip_range is now 0\.2"):
        assert load(edited(old, files={"system_info.txt": None})).clip_range(0.5) == 0.2


# -- schedules that cannot be restored -------------------------------------------------------------------------------------


@pytest.fixture
def zoo(tmp_path):
    """RL Zoo's layout, with a checkpoint whose schedules are lost; writes config.yml."""
    (tmp_path / "Env").mkdir()
    _, checkpoint = trained(PPO, "discrete")
    (tmp_path / "Env.zip").write_bytes(gym_era(checkpoint, "0.19"))

    def write(config):
        (tmp_path / "Env" / "config.yml").write_text(config if isinstance(config, str) else yaml.dump(config))
        return tmp_path / "Env.zip"

    return write


CONFIG = collections.OrderedDict(
    batch_size=256, clip_range=0.1, learning_rate="lin_0.001", policy="MlpPolicy", policy_kwargs="dict(net_arch=[8])"
)


def about_schedules(messages):
    return [message for message in messages if "learning_rate" in message or "clip_range" in message]


@pytest.mark.parametrize("trusted", [True, False])
def test_lost_schedules_come_from_the_zoo(zoo, trusted):
    path = zoo(CONFIG)
    other = path.with_name("Other") / "config.yml"  # of another agent
    other.parent.mkdir()
    other.write_text("learning_rate: 0.5\n")
    assert "!!python/object/apply:collections.OrderedDict" in (path.with_suffix("") / "config.yml").read_text()
    with collected() as messages:
        model = KLipPPO.load(path, trusted=trusted)
    assert [model.learning_rate(progress) for progress in (1.0, 0.5, 0.0)] == [0.001, 0.0005, 0.0]
    assert model.lr_schedule(0.5) == 0.0005
    assert [model.clip_range(progress) for progress in (1.0, 0.5)] == [0.1, 0.1]
    (message,) = about_schedules(messages)
    source = str(path.with_suffix("") / "config.yml")
    assert f"learning_rate is now 0.001 at the start (from {source})" in message
    assert f"clip_range is now 0.1 at the start (from {source})" in message
    assert ("Python 3.7" if trusted else "untrusted") in message


def test_the_best_model_of_the_zoo(zoo):
    """It lies beside the last one, and has no folder of its own."""
    path = zoo(CONFIG)
    with pytest.warns(UserWarning, match=r"clip_range is now 0\.1 at the start \(from .*config\.yml\)"):
        assert KLipPPO.load(path.rename(path.with_name("best_model.zip"))).learning_rate(1.0) == 0.001


@pytest.mark.parametrize(("ours", "name"), VARIANTS)
def test_lost_schedules_without_the_zoo(ours, name, tmp_path):
    (tmp_path / "model.zip").write_bytes(gym_era(trained(BASES[ours], name)[1], "0.19"))
    with collected() as messages:
        model = ours.load(tmp_path / "model")
    assert (model.learning_rate, model.lr_schedule(0.5), model.clip_range(0.5)) == (3e-4, 3e-4, 0.2)
    (message,) = about_schedules(messages)
    assert "learning_rate is now 0.0003" in message
    assert "clip_range is now 0.2" in message
    assert "config.yml" not in message


@pytest.mark.parametrize("config", [CONFIG, None])
@pytest.mark.parametrize("how", ["keywords", "custom_objects"])
def test_schedules_that_are_given_are_not_lost(zoo, how, config):
    path = zoo(config or {})
    values = {"learning_rate": 1e-4, "clip_range": 0.05}
    with collected() as messages:
        model = KLipPPO.load(path, **(values if how == "keywords" else {"custom_objects": values}))
    assert (model.learning_rate, model.lr_schedule(0.5), model.clip_range(0.5)) == (1e-4, 1e-4, 0.05)
    assert messages == []


def test_only_what_is_not_given_is_lost(zoo):
    path = zoo({})
    with collected() as messages:
        KLipPPO.load(path, learning_rate=1e-4)
    (message,) = messages
    assert "clip_range is now 0.2" in message
    assert "learning_rate" not in message


@pytest.mark.parametrize("place", ["learning_rate: ", "other: ", ""])
@pytest.mark.parametrize("function", ["apply:os.system", "new:os.system", "apply:pathlib.Path.touch"])
def test_a_config_runs_nothing(zoo, tmp_path, place, function):
    marker = tmp_path / "run"
    path = zoo(f"{place}!!python/object/{function} ['touch {marker}']\n")
    with collected() as messages:
        model = KLipPPO.load(path)
    assert not marker.exists()
    assert model.learning_rate == 3e-4
    assert any("config.yml could not be read" in message for message in messages)
    assert sum("learning_rate is now 0.0003" in message for message in messages) == 1


@pytest.mark.parametrize("config", ["", "[1, 2]", "learning_rate: [", "learning_rate: lin_x", "learning_rate: {}", "\x00"])
def test_a_config_without_a_schedule(zoo, config):
    path = zoo(config)
    with collected() as messages:
        assert KLipPPO.load(path).learning_rate == 3e-4
    assert sum("learning_rate is now 0.0003" in message for message in messages) == 1


# -- paths -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder_beside", [False, True])
@pytest.mark.parametrize("suffix", ["", ".zip"])
@pytest.mark.parametrize("kind", [str, pathlib.Path])
def test_paths(tmp_path, kind, suffix, folder_beside):
    model, checkpoint = trained(KLipPPO, "box")
    (tmp_path / "Env-v3.zip").write_bytes(checkpoint)
    if folder_beside:
        (tmp_path / "Env-v3").mkdir()
    path = kind(tmp_path / f"Env-v3{suffix}")
    assert_predicts_alike(KLipPPO.load(path), model)
    assert KLipPPO.load(path, trusted=False).gamma == 0.97
    other = small(KLipPPO, task("box"))
    other.set_parameters(path)
    assert_predicts_alike(other, model)


def test_a_relative_path(tmp_path, monkeypatch):
    model, checkpoint = trained(KLipPPO, "box")
    (tmp_path / "model.zip").write_bytes(checkpoint)
    monkeypatch.chdir(tmp_path)
    assert_predicts_alike(KLipPPO.load("model"), model)


def test_open_files(tmp_path):
    model, checkpoint = trained(KLipPPO, "box")
    path = tmp_path / "a file of any name"
    path.write_bytes(checkpoint)
    buffer = io.BytesIO(checkpoint)
    with path.open("rb") as file:
        for opened in (buffer, buffer, file, file):  # each twice, as it is left at its end
            assert_predicts_alike(KLipPPO.load(opened), model)
            assert_predicts_alike(KLipPPO.load(opened, trusted=False), model)
            small(KLipPPO, task("box")).set_parameters(opened)
            assert not opened.closed


def test_an_open_file_is_what_it_holds_and_not_its_name(tmp_path):
    """What was checked is what is loaded, although a file of that name is gone, or is another."""
    model, checkpoint = trained(KLipPPO, "box")
    path = tmp_path / "model.zip"
    path.write_bytes(checkpoint)
    with path.open("rb") as file:
        path.rename(tmp_path / "renamed.zip")
        assert_predicts_alike(KLipPPO.load(file), model)
        path.write_bytes(content(small(KLipPPO, task("box"), gamma=0.5)))
        assert KLipPPO.load(file, trusted=False).gamma == 0.97
    buffer = io.BytesIO(checkpoint)
    buffer.name = str(path)  # uploads have names
    assert KLipPPO.load(buffer).gamma == 0.97


@pytest.mark.parametrize("name", ["missing", "missing.zip", "no_folder/missing", "folder", "folder/"])
def test_a_missing_file(tmp_path, name):
    (tmp_path / "folder").mkdir()
    for path in (f"{tmp_path}/{name}", tmp_path / name):
        with pytest.raises(FileNotFoundError, match=r"missing|folder"):
            KLipPPO.load(path)
        with pytest.raises(FileNotFoundError):
            trained(KLipPPO, "box")[0].set_parameters(path)


def test_print_system_info(tmp_path, capsys):
    (tmp_path / "model.zip").write_bytes(gym_era(trained(PPO, "discrete")[1], "0.19", schedules=()))
    KLipPPO.load(tmp_path / "model", print_system_info=True)
    printed = capsys.readouterr().out
    assert "Gym: 0.19.0" in printed
    assert f"Gymnasium: {gymnasium.__version__}" in printed


# -- bad input -------------------------------------------------------------------------------------------------------------


def test_a_file_that_was_cut_off(tmp_path):
    checkpoint = trained(KLipPPO, "box")[1]
    path = tmp_path / "cut.zip"
    for length in (0, 1, 4, 30, *range(100, len(checkpoint), 500), len(checkpoint) - 22, len(checkpoint) - 1):
        path.write_bytes(checkpoint[:length])
        # Where the weights were the last that was written, what is left ends with a whole zip file: theirs.
        with pytest.raises(ValueError, match=r"cut\.zip' is no(t a checkpoint, or was cut off| checkpoint)"):
            KLipPPO.load(path)
    with pytest.raises(ValueError, match=r"cut\.zip' is not a checkpoint, or was cut off"):
        trained(KLipPPO, "box")[0].set_parameters(path)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("member", ["data", "policy.pth", "policy.optimizer.pth", "pytorch_variables.pth", "system_info.txt"])
def test_a_flipped_byte(member, compression):
    """In a file as SB3 writes it, and in one that was unpacked and zipped again."""
    checkpoint = bytearray(zipped(members(trained(KLipPPO, "box")[1]), compression))
    info = zipfile.ZipFile(io.BytesIO(checkpoint)).getinfo(member)
    start = info.header_offset + 30 + len(member)
    if compression == zipfile.ZIP_STORED:
        checkpoint[start + info.compress_size // 2] ^= 0xFF
    else:
        checkpoint[start] |= 0b110  # a kind of block that there is not
    with pytest.raises(ValueError, match=r"damaged|cut off"):
        load(bytes(checkpoint))


def test_no_flipped_bit_goes_unseen():
    """Every bit of a file, its directory included: it is refused, or changes nothing that matters."""
    data = {"clip_range": 0.2, "policy_class": {"__module__": "stable_baselines3.common.policies"}}
    files = {"data": json.dumps(data), "policy.pth": b"weights", "policy.optimizer.pth": b"moments"}
    checkpoint = zipped(files)
    refused = 0
    for place in range(8 * len(checkpoint)):
        damaged = bytearray(checkpoint)
        damaged[place // 8] ^= 1 << place % 8
        try:
            found = Checkpoint.read(io.BytesIO(damaged))
        except ValueError:
            refused += 1
            continue
        assert found.data == data
    assert refused > 1000


DAMAGE = {
    "policy": ({}, {"policy.pth": None}, "no policy.pth"),
    "optimizer": ({}, {"policy.optimizer.pth": None}, r"no policy\.optimizer\.pth"),
    "data": ({}, {"data": None}, "no data"),
    "no JSON": ({}, {"data": b"{'policy_class'"}, "not a checkpoint, or was cut off"),
    "no text": ({}, {"data": b"\xff\xfe"}, "not a checkpoint, or was cut off"),
    "a list": ({}, {"data": b"[1, 2]"}, "data in it is a list"),
    "nothing": ({}, {"data": b"{}"}, "an unknown algorithm"),
    **{name: ({name: None}, {}, name) for name in ("policy_class", "observation_space", "action_space", "policy_kwargs")},
    "garbled space": ({"observation_space": entry(b"garbled")}, {}, "its observation_space cannot be restored"),
    "garbled base64": ({"action_space": {":serialized:": "?"}}, {}, "its action_space cannot be restored"),
    "newer": ({"klip_format": 2}, {}, r"klip_format 2.*[Uu]pgrade"),
    "much newer": ({"klip_format": "2027.1"}, {}, r"klip_format.*2027\.1.*[Uu]pgrade"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_file_that_is_not_whole(damage, tmp_path):
    entries, files, message = DAMAGE[damage]
    path = tmp_path / "model.zip"
    path.write_bytes(edited(trained(KLipPPO, "box")[1], entries, files))
    for kwargs in ({}, {"env": task("box")}, {"trusted": False}):
        with pytest.raises(ValueError, match=rf"model\.zip.*{message}"):
            KLipPPO.load(path, **kwargs)


@pytest.mark.parametrize(
    "data", [b"", b"not a zip file\n" * 100, pickle.dumps({"policy": 1}), zipped({}), zipped({"folder/": b""})]
)
def test_another_kind_of_file(data, tmp_path):
    path = tmp_path / "model.zip"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"model\.zip' is no"):
        KLipPPO.load(path)


def test_a_file_of_torch(tmp_path):
    """It is a zip file, too."""
    th.save({"policy": th.zeros(3)}, tmp_path / "model.zip")
    with pytest.raises(ValueError, match=r"no checkpoint of Stable-Baselines3.*no data"):
        KLipPPO.load(tmp_path / "model.zip")


MEMORY = {"buffer_size": 100}
OTHERS = [
    *[(algorithm, "Pendulum-v1", MEMORY) for algorithm in (SAC, TD3, TQC, CrossQ)],
    *[(algorithm, "CartPole-v1", MEMORY) for algorithm in (DQN, QRDQN)],
    *[(algorithm, "CartPole-v1", {}) for algorithm in (A2C, TRPO, ARS)],
]


@pytest.mark.parametrize(("algorithm", "env", "kwargs"), OTHERS)
def test_another_algorithm_is_named(algorithm, env, kwargs):
    checkpoint = content(algorithm("MlpPolicy", env, policy_kwargs={"net_arch": [8]}, device="cpu", **kwargs))
    for ours, base in BASES.items():
        with pytest.raises(
            ValueError, match=rf"checkpoint of {algorithm.__name__}\b.*{ours.__name__} loads those of {base.__name__}"
        ):
            load(checkpoint, ours)


@pytest.mark.parametrize(
    ("ours", "theirs"), [(ours, base) for ours in BASES for base in BASES.values() if base is not BASES[ours]]
)
def test_another_variant_is_named(ours, theirs):
    """With the class to use."""
    model, _ = trained(ours, "discrete")
    before = {name: tensor.clone() for name, tensor in state_tensors(model).items()}
    checkpoint = trained(theirs, "discrete")[1]
    expected = rf"{ours.__name__} loads those of {BASES[ours].__name__}; KLip{theirs.__name__} does"
    message = rf"checkpoint of {theirs.__name__}, .*{expected}"
    with pytest.raises(ValueError, match=message):
        load(checkpoint, ours)
    with pytest.raises(ValueError, match=message):
        model.set_parameters(io.BytesIO(checkpoint))
    assert all(th.equal(tensor, before[name]) for name, tensor in state_tensors(model).items())


class OwnPolicy(ActorCriticPolicy):
    pass


class OwnMaskablePolicy(MaskableActorCriticPolicy):
    pass


class OwnRecurrentPolicy(RecurrentActorCriticPolicy):
    pass


OWN = {KLipPPO: OwnPolicy, KLipMaskablePPO: OwnMaskablePolicy, KLipRecurrentPPO: OwnRecurrentPolicy}


@pytest.mark.parametrize("ours", BASES)
def test_a_policy_of_the_users_own(ours):
    """Its module does not tell the algorithm."""
    for algorithm in (ours, BASES[ours]):
        model = small(algorithm, task("discrete"), policy=OWN[ours])
        loaded = load(content(model), ours)
        assert type(loaded.policy) is OWN[ours]
        assert_predicts_alike(loaded, model)


def assert_parameters_are_refused(model, parameters, message, **kwargs):
    before = {name: tensor.clone() for name, tensor in state_tensors(model).items()}
    with pytest.raises(ValueError, match=message):
        model.set_parameters(parameters, **kwargs)
    assert state_tensors(model).keys() == before.keys()
    assert all(th.equal(tensor, before[name]) for name, tensor in state_tensors(model).items())


@pytest.mark.parametrize("exact_match", [True, False])
def test_parameters_of_another_architecture(tmp_path, exact_match):
    model, other = (small(KLipPPO, task("box"), policy_kwargs={"net_arch": [size]}).learn(32) for size in (8, 12))
    other.save(tmp_path / "other")
    message = r"mlp_extractor\.policy_net\.0\.weight is \(12, 3\) there and \(8, 3\) here"
    for parameters, name in ((other.get_parameters(), "load_path_or_dict"), (str(tmp_path / "other"), r"other\.zip")):
        assert_parameters_are_refused(model, parameters, rf"{name}.*{message}", exact_match=exact_match)


def test_parameters_that_are_too_many_or_too_few():
    shallow, deep = (small(KLipPPO, task("box"), policy_kwargs={"net_arch": arch}) for arch in ([], [8]))
    assert_parameters_are_refused(shallow, deep.get_parameters(), r"mlp_extractor\.policy_net\.0\.weight is not known here")
    assert_parameters_are_refused(deep, shallow.get_parameters(), r"mlp_extractor\.policy_net\.0\.weight is not there")


def test_moments_of_another_architecture():
    """The weights fit, but the optimizer's state does not: nothing is changed."""
    model, other = (small(KLipPPO, task("box"), policy_kwargs={"net_arch": arch}).learn(32) for arch in ([8], [8, 8]))
    weights = {name: tensor + 1 for name, tensor in model.policy.state_dict().items()}
    parameters = {**other.get_parameters(), "policy": weights}
    assert_parameters_are_refused(model, parameters, "optimizer|parameter group")


# -- files of strangers ----------------------------------------------------------------------------------------------------

PLAIN = {
    "box": (KLipPPO, "box", {}),
    "discrete_tanh": (PPO, "discrete", {"policy_kwargs": {"activation_fn": th.nn.Tanh}}),
    "multi_discrete_relu": (KLipPPO, "multi_discrete", {"policy_kwargs": {"activation_fn": th.nn.ReLU, "net_arch": [4]}}),
    "dictionary": (KLipPPO, "dictionary", {}),
    "optimizer": (KLipPPO, "box", {"policy_kwargs": {"optimizer_class": th.optim.AdamW, "optimizer_kwargs": {"eps": 1e-4}}}),
    "gsde": (KLipPPO, "box", {"use_sde": True, "policy_kwargs": {"squash_output": True}}),
    "schedule": (KLipPPO, "box", {"clip_range": LinearSchedule(0.15, 0.1, 1.0), "clip_range_vf": 0.3}),
    "maskable": (KLipMaskablePPO, "multi_binary", {}),
    "recurrent": (KLipRecurrentPPO, "box", {}),
    "recurrent_dictionary": (RecurrentPPO, "dictionary", {}),
}  # fmt: skip


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("name", PLAIN)
def test_untrusted_files_restore_plain_data(name, old):
    algorithm, kind, kwargs = PLAIN[name]
    ours = next(ours for ours, base in BASES.items() if issubclass(algorithm, base))
    kwargs = {"clip_range": 0.15, **kwargs}
    model = small(algorithm, task(kind), gamma=0.97, ent_coef=0.01, **kwargs).learn(64)
    checkpoint = gym_era(content(model), "0.23") if old else content(model)
    with collected() as messages:
        loaded = load(checkpoint, ours, env=task(kind), trusted=False, learning_rate=1e-3)
    assert_identical(loaded, model)
    assert_predicts_alike(loaded, model)
    assert_genuine(loaded.observation_space, model.observation_space)
    assert_genuine(loaded.action_space, model.action_space)
    for attribute in ("gamma", "ent_coef", "n_steps", "batch_size", "n_epochs", "policy_kwargs", "use_sde", "policy_class"):
        assert getattr(loaded, attribute) == getattr(model, attribute), attribute
    assert list(loaded.ep_info_buffer) == list(model.ep_info_buffer) != []
    assert loaded.clip_range(0.5) == (0.2 if old else model.clip_range(0.5))
    assert [("clip_range is now 0.2" in message) for message in messages] == [True] * old
    loaded.learn(32, reset_num_timesteps=False)
    assert loaded.num_timesteps == 96
    assert loaded.policy.optimizer.param_groups[0]["lr"] == 1e-3


def test_a_trained_coefficient_in_an_untrusted_file():
    model = small(KLipPPO, task("box"), beta="adaptive", beta_kwargs={"kl_target": 0.5}).learn(64)
    loaded = load(content(model), trusted=False)
    assert repr(loaded.beta) == repr(model.beta)
    assert loaded.beta.state_dict() == model.beta.state_dict() != {}


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
#: What is restored of a checkpoint, and something that is not known.
ENTRIES = ["clip_range", "observation_space", "policy_class", "policy_kwargs", "ep_info_buffer", "learning_rate", "surprise"]


@pytest.fixture
def marker(tmp_path, monkeypatch):
    """A file that is not to be written; a module that writes it can be imported."""
    # A name of its own for each test, as a module is imported once.
    folder = tmp_path / tmp_path.name
    folder.mkdir()
    path = folder / "marker"
    (tmp_path / f"module_{folder.name}.py").write_text(f"open({str(path)!r}, 'w')\n\ndef anything(*args):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    return path


def written(marker):
    return [*marker.parent.iterdir()] != []


@pytest.mark.parametrize("name", ENTRIES)
@pytest.mark.parametrize("payload", MALICIOUS)
def test_untrusted_files_run_nothing(payload, name, marker):
    checkpoint = edited(trained(PPO, "box")[1], {name: entry(MALICIOUS[payload](marker))})
    with pytest.raises(ValueError, match=rf"refused, as it is not trusted: its {name} names "):
        load(checkpoint, trusted=False)
    assert not written(marker)


@pytest.mark.parametrize("payload", without(MALICIOUS, "gym's function"))
def test_trusted_files_may_run_anything(payload, marker):
    """So the files of the test before would do harm. (One names a module that gymnasium lacks.)"""
    checkpoint = edited(trained(PPO, "box")[1], {"surprise": entry(MALICIOUS[payload](marker))})
    with collected():
        load(checkpoint, trusted=True)
    assert written(marker)


def test_what_is_replaced_is_not_unpickled(marker):
    """Trusted or not."""
    checkpoint = edited(trained(PPO, "box")[1], {"clip_range": entry(MALICIOUS["os.system"](marker))})
    for trusted in (True, False):
        assert load(checkpoint, trusted=trusted, clip_range=0.05).clip_range(1.0) == 0.05
        assert load(checkpoint, trusted=trusted, custom_objects={"clip_range": 0.05}).clip_range(1.0) == 0.05
    assert not written(marker)


def test_what_is_made_anew_is_not_unpickled(marker):
    checkpoint = edited(trained(PPO, "box")[1], {"lr_schedule": entry(MALICIOUS["os.system"](marker))})
    assert load(checkpoint, trusted=False).lr_schedule(1.0) == 3e-4
    assert not written(marker)


def test_weights_run_nothing(marker):
    """Torch's own unpickler sees to that, whether the file is trusted or not."""
    harmful = io.BytesIO()
    th.save({"weight": Call(os.system, f"touch {marker}")}, harmful)
    for trusted in (True, False):
        for member in ("policy.pth", "policy.optimizer.pth", "pytorch_variables.pth"):
            with pytest.raises((ValueError, pickle.UnpicklingError)):
                load(edited(trained(PPO, "box")[1], files={member: harmful.getvalue()}), trusted=trusted)
    assert not written(marker)


def test_functions_of_strangers_are_replaced(marker):
    schedule = entry(cloudpickle.dumps(lambda _, path=marker: path.touch() or 0.05))
    checkpoint = edited(trained(PPO, "box")[1], {"clip_range": schedule})
    with pytest.warns(UserWarning, match=r"clip_range is now 0\.2"):
        assert load(checkpoint, trusted=False).clip_range(1.0) == 0.2
    assert not written(marker)
    load(checkpoint).clip_range(1.0)
    assert written(marker)


def test_a_function_that_the_policy_needs():
    policy_kwargs = entry(cloudpickle.dumps({"net_arch": [8], "activation_fn": lambda: th.nn.Tanh()}))
    checkpoint = edited(trained(PPO, "box")[1], {"policy_kwargs": policy_kwargs})
    with pytest.raises(ValueError, match=r"its policy_kwargs cannot be restored.*function.*custom_objects"):
        load(checkpoint, trusted=False)
    policy_kwargs = {"net_arch": [8], "activation_fn": th.nn.Tanh}
    assert_identical(load(checkpoint, trusted=False, custom_objects={"policy_kwargs": policy_kwargs}), trained(PPO, "box")[0])


@pytest.mark.parametrize(
    "owner",
    [
        ActorCriticPolicy,
        MaskableActorCriticPolicy,
        th.nn.Tanh,
        th.optim.Adam,
        VecNormalize,
        LinearSchedule,
        spaces.Box,
        collections.deque,
    ],
)
@pytest.mark.parametrize("state", [(None, {"predict": "gone"}), {"predict": "gone"}])
def test_untrusted_files_change_no_class(owner, state):
    before = dict(vars(owner))
    pickled = b"\x80\x04" + named(owner.__module__, owner.__name__) + plain(state) + b"b."
    for name in ("surprise", "policy_kwargs"):
        with pytest.raises(ValueError, match=f"refused, as it is not trusted: its {name} names"):
            load(edited(trained(PPO, "box")[1], {name: entry(pickled)}), trusted=False)
    assert dict(vars(owner)) == before


def test_untrusted_tensors_change_no_class():
    """SB3 sets tensors of the file as attributes of what the file names."""
    variables = io.BytesIO()
    th.save({"policy.action_net.weight.__class__": th.zeros(3)}, variables)
    checkpoint = edited(trained(PPO, "box")[1], files={"pytorch_variables.pth": variables.getvalue()})
    try:
        with pytest.raises(ValueError, match="pytorch_variables"):
            load(checkpoint, trusted=False)
        assert "data" not in vars(th.nn.Parameter)
    finally:
        if "data" in vars(th.nn.Parameter):
            del th.nn.Parameter.data  # all tests after this one would see it


def array_of_pointers(kind):
    """A numpy array of objects, made of plain bytes: to read it follows pointers that are in the file."""
    if kind == "buffer":
        return calling("numpy", "ndarray", (1,), "O", bytearray(8 * b"A"))
    # A dtype may be told that its objects are plain bytes.
    objects = named("numpy", "dtype") + plain(("O", False, True)) + b"R"
    if kind == "field":
        dtype = named("numpy", "dtype") + plain(("V8", False, True)) + b"R"
        fields, size = plain(("a",)) + b"}" + plain("a") + objects + plain(0) + b"\x86s", 8
    else:
        dtype, fields, size = objects, plain(None) * 2, -1
    forged = dtype + b"(" + plain(3) + plain("|") + plain(None) + fields + plain(size) + plain(1) + plain(0) + b"tb"
    array = named("numpy._core.multiarray", "_reconstruct")
    array += b"(" + named("numpy", "ndarray") + plain((0,)) + plain(b"b") + b"tR"
    return b"\x80\x04" + array + b"(" + plain(1) + plain((1,)) + forged + plain(False) + b"C\x08" + 8 * b"A" + b"tb."


@pytest.mark.parametrize("kind", ["buffer", "field", "dtype"])
def test_untrusted_files_forge_no_pointers(kind):
    """The array is where nothing reads it: in a space, loading it would crash the interpreter."""
    checkpoint = edited(trained(PPO, "box")[1], {"ep_info_buffer": entry(array_of_pointers(kind))})
    with pytest.raises(ValueError, match="ep_info_buffer"):
        load(checkpoint, trusted=False)


@pytest.mark.parametrize("pickled", [False, True])
def test_a_coefficient_that_is_code(marker, pickled):
    beta = f"module_{marker.parent.name}:anything"
    for name in (beta, "os:system"):
        checkpoint = edited(trained(KLipPPO, "box")[1], {"beta": entry(pickle.dumps(name)) if pickled else name})
        with pytest.raises(ValueError, match=r"refused, as it is not trusted: its (coefficient|beta)"):
            load(checkpoint, trusted=False)
    assert not written(marker)
    checkpoint = edited(trained(KLipPPO, "box")[1], {"beta": beta})
    assert repr(load(checkpoint, trusted=False, beta="sigmoid").beta) == "sigmoid(temperature=0.05)"
    assert not written(marker)
    with pytest.warns(UserWarning, match="cannot be made"):
        load(checkpoint)
    assert written(marker)


def test_an_environment_that_is_code(marker):
    """SB3 makes the environment that a file names, and gymnasium imports the module before the colon."""
    env = f"module_{marker.parent.name}:Env-v0"
    for item in (env, entry(pickle.dumps(env))):
        checkpoint = edited(trained(PPO, "box")[1], {"env": item})
        with contextlib.suppress(ValueError, gymnasium.error.Error):
            assert load(checkpoint, trusted=False).get_env() is None
        assert not written(marker)


def test_a_folder_in_an_untrusted_file(tmp_path):
    folder = tmp_path / "logs"
    model = small(PPO, task("box"))
    for item in (str(folder), entry(pickle.dumps(str(folder)))):
        checkpoint = edited(content(model), {"tensorboard_log": item})
        loaded = load(checkpoint, env=task("box"), trusted=False)
        assert loaded.tensorboard_log is None
        loaded.learn(32)
        assert not folder.exists()
    assert load(checkpoint).tensorboard_log == str(folder)
    assert load(checkpoint, trusted=False, tensorboard_log="mine").tensorboard_log == "mine"


def test_the_state_to_resume_from_is_code(marker):
    checkpoint = edited(trained(KLipPPO, "box")[1], files={"klip_resume.pkl": MALICIOUS["os.system"](marker)})
    with pytest.raises(ValueError, match="resume=True needs trusted=True"):
        load(checkpoint, env=task("box"), trusted=False, resume=True)
    load(checkpoint, env=task("box"))
    assert not written(marker)


# -- statistics of VecNormalize --------------------------------------------------------------------------------------------


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


def assert_same_statistics(env, reference):
    for name in ("mean", "var", "count"):
        assert np.array_equal(getattr(env.obs_rms, name), getattr(reference.obs_rms, name))
        assert getattr(env.ret_rms, name) == getattr(reference.ret_rms, name)
    for name in ("gamma", "clip_obs", "clip_reward", "epsilon", "norm_obs", "norm_reward"):
        assert getattr(env, name) == getattr(reference, name)
    assert env.obs_rms.count > 20
    env.reset()
    assert env.step(np.array([env.action_space.sample()]))[0].shape == (1, *env.observation_space.shape)


@pytest.mark.parametrize("trusted", [True, False])
@pytest.mark.parametrize("era", [None, *ERAS])
def test_statistics(tmp_path, era, trusted):
    env = normalized()
    path = saved_statistics(env, tmp_path / "vecnormalize.pkl", era)
    assert (b"gym.spaces" in path.read_bytes()) is (era is not None)
    for file in (path, str(path)):
        loaded = load_vecnormalize(file, DummyVecEnv([lambda: task("box")]), trusted=trusted)
        assert_same_statistics(loaded, env)
        assert_genuine(loaded.observation_space, env.observation_space)


def test_statistics_of_gym_in_the_protocol_of_python_3_7(tmp_path):
    """pickle.dump's default there was protocol 3, which looks the generator's constructor up with getattr."""
    env = normalized()
    path = saved_statistics(env, tmp_path / "vecnormalize.pkl", "0.23", protocol=3)
    assert b"getattr" in path.read_bytes()
    assert_same_statistics(load_vecnormalize(path, DummyVecEnv([lambda: task("box")])), env)


@pytest.mark.parametrize("payload", MALICIOUS)
def test_untrusted_statistics_run_nothing(tmp_path, marker, payload):
    for data in (MALICIOUS[payload](marker), MALICIOUS[payload](marker)[:-1] + b"0" + pickle.dumps(normalized(), 4)):
        (tmp_path / "vecnormalize.pkl").write_bytes(data)
        with pytest.raises(ValueError, match=r"vecnormalize\.pkl' is refused, as it is not trusted: it names "):
            load_vecnormalize(tmp_path / "vecnormalize.pkl", DummyVecEnv([lambda: task("box")]), trusted=False)
    assert not written(marker)


def test_trusted_statistics_may_run_anything(tmp_path, marker):
    (tmp_path / "vecnormalize.pkl").write_bytes(MALICIOUS["os.system"](marker))
    with pytest.raises(ValueError, match="holds a int"):
        load_vecnormalize(tmp_path / "vecnormalize.pkl", DummyVecEnv([lambda: task("box")]))
    assert written(marker)


def test_a_function_in_untrusted_statistics(tmp_path):
    env = normalized()
    env.extra = lambda: None
    (tmp_path / "vecnormalize.pkl").write_bytes(cloudpickle.dumps(env))
    with pytest.raises(ValueError, match=r"refused.*function"):
        load_vecnormalize(tmp_path / "vecnormalize.pkl", DummyVecEnv([lambda: task("box")]), trusted=False)


def test_statistics_of_other_spaces(tmp_path):
    path = saved_statistics(normalized(), tmp_path / "vecnormalize.pkl")
    other = spaces.Box(-np.inf, np.inf, (4,), np.float64)
    with pytest.raises(ValueError, match=r"vecnormalize\.pkl' does not fit") as error:
        load_vecnormalize(path, DummyVecEnv([lambda: Task(other, TASKS["box"][1])]))
    assert str(VECTOR) in str(error.value)
    assert str(other) in str(error.value)


def test_other_content_for_statistics(tmp_path):
    venv = DummyVecEnv([lambda: task("box")])
    for value, kind in (({"mean": 0}, "dict"), ([1], "list"), (None, "NoneType"), (normalized().obs_rms, "RunningMeanStd")):
        (tmp_path / "vecnormalize.pkl").write_bytes(pickle.dumps(value))
        for trusted in (True, False):
            with pytest.raises(ValueError, match=rf"vecnormalize\.pkl' holds a {kind}, and not VecNormalize"):
                load_vecnormalize(tmp_path / "vecnormalize.pkl", venv, trusted=trusted)
    with pytest.raises(FileNotFoundError):
        load_vecnormalize(tmp_path / "missing.pkl", venv)


@pytest.mark.parametrize("trusted", [True, False])
def test_statistics_that_were_cut_off(tmp_path, trusted):
    path, venv = saved_statistics(normalized(), tmp_path / "vecnormalize.pkl"), DummyVecEnv([lambda: task("box")])
    data = path.read_bytes()
    for length in range(0, len(data), 3):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"vecnormalize\.pkl"):
            load_vecnormalize(path, venv, trusted=trusted)


@pytest.mark.parametrize("trusted", [True, False])
@pytest.mark.parametrize(
    "text", ["I am text\n", "copyright (c)\nby me\n", "Total: 3\n", "Kind", "{}", "builtins", "\n", "[mean]"]
)
def test_text_for_statistics(tmp_path, text, trusted):
    """The first letters are instructions of pickle's own language."""
    (tmp_path / "text.pkl").write_text(text)
    with pytest.raises(ValueError, match=r"text\.pkl"):
        load_vecnormalize(tmp_path / "text.pkl", DummyVecEnv([lambda: task("box")]), trusted=trusted)


ANY_VENV = DummyVecEnv([lambda: task("box")])


@given(data=st.binary(max_size=20) | st.text(max_size=20).map(str.encode))
def test_any_bytes_for_statistics(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "any.pkl"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"any\.pkl"):
        load_vecnormalize(path, ANY_VENV, trusted=False)


# -- environments at loading -----------------------------------------------------------------------------------------------

ACTIONS = spaces.Box(-1, 1, (2,))


def box(low, high, shape, dtype=np.float32):
    return spaces.Box(low, high, shape, dtype)


IMAGE, NO_IMAGE = (
    box(0, 255, (1, 36, 36), np.uint8),
    box(0, 1, (1, 36, 36)),
)  # the channel comes first already, so no wrapper turns it


@pytest.mark.parametrize("trusted", [True, False])
@pytest.mark.parametrize(
    ("saved", "actual"),
    [
        (box(-1, 1, (3,)), box(-1, 1, (3,), np.float64)),
        (box(-1, 1, (3,)), box(-2, 3, (3,))),
        (spaces.Dict({"a": box(-1, 1, (3,))}), spaces.Dict({"a": box(-np.inf, np.inf, (3,), np.float64)})),
    ],
    ids=["dtype", "bounds", "in a dictionary"],
)
def test_other_dtype_or_bounds(saved, actual, trusted):
    model = small(PPO, Task(saved, ACTIONS)).learn(32)
    with collected() as messages:
        loaded = load(content(model), env=Task(actual, ACTIONS), trusted=trusted)
    (message,) = messages
    assert str(saved) in message
    assert str(actual) in message
    assert loaded.observation_space == loaded.get_env().observation_space == actual
    assert_identical(loaded, model)
    loaded.learn(32, reset_num_timesteps=False)
    assert loaded.num_timesteps == 64
    with collected() as messages:
        load(content(loaded), env=Task(actual, ACTIONS))
    assert messages == []


@pytest.mark.parametrize(
    ("saved", "actual"),
    [
        ((box(-1, 1, (3,)), ACTIONS), (box(-1, 1, (4,)), ACTIONS)),
        ((box(-1, 1, (3,)), ACTIONS), (spaces.Discrete(3), ACTIONS)),
        ((spaces.Discrete(3), ACTIONS), (spaces.Discrete(4), ACTIONS)),
        ((IMAGE, ACTIONS), (NO_IMAGE, ACTIONS)),
        ((NO_IMAGE, ACTIONS), (IMAGE, ACTIONS)),
        ((spaces.Dict({"a": VECTOR}), ACTIONS), (spaces.Dict({"b": VECTOR}), ACTIONS)),
        ((spaces.Dict({"a": VECTOR, "i": IMAGE}), ACTIONS), (spaces.Dict({"a": VECTOR, "i": NO_IMAGE}), ACTIONS)),
        ((VECTOR, ACTIONS), (VECTOR, spaces.Box(-2, 2, (2,)))),
        ((VECTOR, ACTIONS), (VECTOR, spaces.Box(-1, 1, (3,)))),
        ((VECTOR, ACTIONS), (VECTOR, spaces.Discrete(2))),
        ((VECTOR, spaces.Discrete(2)), (VECTOR, spaces.Discrete(3))),
    ],
    ids=[
        "shape", "kind", "number", "image", "no image", "keys", "image in a dictionary", "action bounds", "action shape",
        "action kind", "actions",
    ],
)  # fmt: skip
def test_other_spaces_are_refused(saved, actual):
    checkpoint = content(small(PPO, Task(*saved)))
    for trusted in (True, False):
        with pytest.raises(ValueError, match="does not fit env") as error:
            load(checkpoint, env=Task(*actual), trusted=trusted)
        different = 0 if saved[0] != actual[0] else 1
        assert ("observation_space", "action_space")[different] in str(error.value)
        assert str(saved[different]) in str(error.value)
        assert str(actual[different]) in str(error.value)


# -- to the base classes and back ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ours", "name"), VARIANTS)
def test_to_the_base_class_and_back(ours, name):
    """The coefficient and what it has learned wait in the base class's file, even if that trains in between."""
    base = BASES[ours]
    schedules = {"learning_rate": LinearSchedule(1e-2, 1e-3, 1.0), "clip_range": LinearSchedule(0.3, 0.1, 1.0)}
    parameters = {"beta": "adaptive", "beta_kwargs": {"kl_target": 0.5}, "log_kl": True}
    model = small(ours, task(name), **schedules, **parameters).learn(96)
    assert model.beta.state_dict() != small(ours, task(name), **parameters).beta.state_dict()
    theirs = load(content(model), base, env=task(name))
    assert_identical(theirs, model)
    assert type(theirs) is base
    for progress in (1.0, 0.4):
        assert theirs.lr_schedule(progress) == model.lr_schedule(progress)
        assert theirs.clip_range(progress) == model.clip_range(progress)
    theirs.learn(32, reset_num_timesteps=False)
    again = load(content(theirs), ours, env=task(name))
    assert_identical(again, theirs)
    assert (again.num_timesteps, again.lr_schedule(0.4), again.clip_range(0.4)) == (
        128,
        model.lr_schedule(0.4),
        model.clip_range(0.4),
    )
    assert repr(again.beta) == repr(model.beta)
    assert again.beta.state_dict() == model.beta.state_dict()
    assert again.log_kl is True
    again.learn(32, reset_num_timesteps=False)
    assert again.beta.state_dict() != model.beta.state_dict()


@pytest.mark.parametrize(("ours", "name"), VARIANTS)
def test_a_model_of_the_base_class(ours, name):
    model, checkpoint = trained(BASES[ours], name)
    with collected() as messages:
        loaded = load(checkpoint, ours, env=task(name))
    assert messages == []
    assert_identical(loaded, model)
    assert (loaded.gamma, loaded.clip_range(0.5), repr(loaded.beta)) == (0.97, 0.15, "step()")
    assert repr(load(checkpoint, ours, beta="sigmoid").beta) == "sigmoid(temperature=0.05)"
    loaded.learn(32, reset_num_timesteps=False)
    assert_predicts_alike(load(content(loaded), BASES[ours]), loaded)


@pytest.mark.parametrize(("ours", "name"), VARIANTS)
def test_parameters_in_both_directions(ours, name, tmp_path):
    for source, target in ((ours, BASES[ours]), (BASES[ours], ours)):
        model, checkpoint = trained(source, name)
        (tmp_path / "model.zip").write_bytes(checkpoint)
        for parameters in (model.get_parameters(), str(tmp_path / "model"), io.BytesIO(checkpoint)):
            other = small(target, task(name)).learn(32)
            before = {key: tensor.clone() for key, tensor in state_tensors(other).items()}
            other.set_parameters(parameters)
            assert_identical(other, model)
            assert any(not th.equal(tensor, before[key]) for key, tensor in state_tensors(other).items())


# -- policies that were compiled -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("source", "ours", "name"), [*((v[0], *v) for v in VARIANTS), *((BASES[v[0]], *v) for v in VARIANTS)])
def test_parameters_of_a_policy_that_was_compiled(source, ours, name, tmp_path):
    """Older versions of SB3 saved the names that torch.compile gives to parameters."""
    model, checkpoint = trained(source, name)
    state = th.load(io.BytesIO(members(checkpoint)["policy.pth"]), weights_only=True)
    renamed = io.BytesIO()
    th.save({f"_orig_mod.{key}": tensor for key, tensor in state.items()}, renamed)
    old = edited(checkpoint, files={"policy.pth": renamed.getvalue()})
    (tmp_path / "model.zip").write_bytes(old)

    with collected() as messages:
        loaded = load(old, ours, env=task(name))
    assert messages == []
    assert_identical(loaded, model)
    assert not any(key.startswith("_orig_mod.") for key in loaded.policy.state_dict())
    loaded.learn(32)
    assert_predicts_alike(load(content(loaded), ours), loaded)

    parameters = model.get_parameters()
    parameters["policy"] = {f"_orig_mod.{key}": tensor for key, tensor in parameters["policy"].items()}
    for source_of in (str(tmp_path / "model"), parameters):
        other = small(ours, task(name)).learn(32)
        before = {key: tensor.clone() for key, tensor in state_tensors(other).items()}
        other.set_parameters(source_of)
        assert_identical(other, model)
        assert any(not th.equal(tensor, before[key]) for key, tensor in state_tensors(other).items())
    assert all(key.startswith("_orig_mod.") for key in parameters["policy"])  # the caller's own is as it was


def test_parameters_of_a_policy_that_was_compiled_and_is_another():
    """The names that are compared are those without what torch.compile adds."""
    model = small(KLipPPO, task("box"))
    parameters = small(KLipPPO, task("box"), policy_kwargs={"net_arch": [9]}).get_parameters()
    parameters["policy"] = {f"_orig_mod.{key}": tensor for key, tensor in parameters["policy"].items()}
    before = {key: tensor.clone() for key, tensor in state_tensors(model).items()}
    with pytest.raises(ValueError, match=r"mlp_extractor\.policy_net\.0\.weight") as caught:
        model.set_parameters(parameters)
    assert "_orig_mod" not in str(caught.value)
    assert all(th.equal(tensor, before[key]) for key, tensor in state_tensors(model).items())


# -- statistics beside a checkpoint ----------------------------------------------------------------------------------------


def vectorized():
    return DummyVecEnv([lambda: task("box")])


@pytest.mark.parametrize(
    ("checkpoint", "statistics"),
    [
        ("rl_model_32_steps.zip", "rl_model_vecnormalize_32_steps.pkl"),  # SB3's CheckpointCallback
        ("ppo_Task_1000_steps.zip", "ppo_Task_vecnormalize_1000_steps.pkl"),
        ("Task-v0.zip", "Task-v0/vecnormalize.pkl"),  # RL Zoo
        ("best_model.zip", "Task-v0/vecnormalize.pkl"),
        ("rl_model_32_steps.zip", "Task-v0/vecnormalize.pkl"),
        ("model.zip", "vec_normalize.pkl"),
    ],
)
@pytest.mark.parametrize("algorithm", [KLipPPO, PPO])
def test_statistics_that_env_does_not_have(tmp_path, checkpoint, statistics, algorithm):
    path, file = tmp_path / checkpoint, tmp_path / statistics
    path.write_bytes(trained(algorithm, "box")[1])
    file.parent.mkdir(exist_ok=True)
    if file.parent != tmp_path:
        (file.parent / "config.yml").write_text(yaml.dump({"policy": "MlpPolicy", "normalize": True}))
    for env in (task("box"), vectorized()):
        with collected() as messages:
            KLipPPO.load(path, env=env, device="cpu")
        assert messages == []  # there is nothing beside it yet

    saved_statistics(normalized(), file)
    for place in (path, str(path), path.with_suffix("")):
        for env in (task("box"), vectorized()):
            with collected() as messages:
                model = KLipPPO.load(place, env=env, device="cpu")
            (message,) = messages
            assert "learned from normalized observations or rewards" in message
            (wrap,) = re.findall(r"env = sb3_klip\.load_vecnormalize\((.*), env\)$", message)
            assert pathlib.Path(ast.literal_eval(wrap)) == file
            assert model.get_vec_normalize_env() is None

    # The advice is good, and whoever follows it is left in peace; so is who does not train.
    for env in (VecNormalize(vectorized()), load_vecnormalize(ast.literal_eval(wrap), vectorized())):
        with collected() as messages:
            model = KLipPPO.load(path, env=env, device="cpu")
        assert messages == []
        assert model.get_vec_normalize_env() is env
    with collected() as messages:
        KLipPPO.load(path, device="cpu")
        KLipPPO.load(io.BytesIO(path.read_bytes()), env=task("box"), device="cpu")
    assert messages == []


@pytest.mark.parametrize(
    "name", ["rl_model_vecnormalize_64_steps.pkl", "other_vecnormalize_32_steps.pkl", "Other/vecnormalize.pkl"]
)
def test_statistics_of_another_checkpoint(tmp_path, name):
    path = tmp_path / "rl_model_32_steps.zip"
    path.write_bytes(trained(KLipPPO, "box")[1])
    (tmp_path / name).parent.mkdir(exist_ok=True)
    saved_statistics(normalized(), tmp_path / name)
    with collected() as messages:
        KLipPPO.load(path, env=task("box"), device="cpu")
    assert messages == []


# -- saving ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize("owner", [(os, "fsync"), (pathlib.Path, "replace")])
def test_saving_that_fails_leaves_the_old_file(tmp_path, monkeypatch, owner, error):
    model = small(KLipPPO, task("box"))
    path = tmp_path / "model.zip"
    model.save(path)
    old, attributes = path.read_bytes(), set(vars(model))
    model.learn(32)

    def failing(*args):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(*owner, failing)
        with pytest.raises(type(error)):
            model.save(path)
    assert path.read_bytes() == old
    assert KLipPPO.load(path).num_timesteps == 0
    assert [file.name for file in tmp_path.iterdir()] == ["model.zip"]
    assert attributes <= set(vars(model))
    assert "klip_format" not in vars(model)
    model.save(path)
    assert KLipPPO.load(path).num_timesteps == 32
    assert [file.name for file in tmp_path.iterdir()] == ["model.zip"]


def test_at_any_moment_of_saving_there_is_a_whole_file(tmp_path, monkeypatch):
    model = small(KLipPPO, task("box"))
    path = tmp_path / "model.zip"
    model.save(path)
    model.learn(32)
    seen = []

    def watching(function):
        def watch(*args):
            seen.append(KLipPPO.load(path).num_timesteps)
            result = function(*args)
            seen.append(KLipPPO.load(path).num_timesteps)
            return result

        return watch

    monkeypatch.setattr(os, "fsync", watching(os.fsync))
    monkeypatch.setattr(pathlib.Path, "replace", watching(pathlib.Path.replace))
    model.save(path)
    assert seen[:4] == [0, 0, 0, 32]  # on the disk first, and only then in place of the old one
    assert set(seen[4:]) <= {32}


@pytest.mark.parametrize("kind", [str, pathlib.Path])
@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("model", "model.zip"),
        ("model.zip", "model.zip"),
        ("model.backup", "model.backup"),
        ("new/folder/model", "new/folder/model.zip"),
        ("old", "old.zip"),
        ("taken.zip", "taken.zip_2"),
    ],
)
def test_where_models_are_saved(tmp_path, kind, name, file):
    """As SB3 does."""
    (tmp_path / "old").mkdir()
    (tmp_path / "taken.zip").mkdir()
    model = trained(KLipPPO, "box")[0]
    with collected():
        model.save(kind(tmp_path / name))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files == [tmp_path / file]
    assert_predicts_alike(KLipPPO.load(files[0]), model)
    files[0].unlink()
    with collected():
        PPO.save(model, kind(tmp_path / name))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == files


def test_saving_to_open_files(tmp_path):
    model = trained(KLipPPO, "box")[0]
    assert_predicts_alike(load(content(model)), model)
    with (tmp_path / "model").open("wb") as file:
        model.save(file)
        assert not file.closed
    assert_predicts_alike(KLipPPO.load(tmp_path / "model"), model)
    with pytest.raises(ValueError, match="writable"), (tmp_path / "model").open("rb") as file:
        model.save(file)


# -- the zoo's published agents, where there are any -----------------------------------------------------------------------

ZOO = os.environ.get("ZOO_CHECKPOINTS")  # a folder with, for example, ppo/Hopper-v3_1/Hopper-v3.zip
AGENTS = sorted(pathlib.Path(ZOO).rglob("*.zip")) if ZOO else []

if AGENTS:  # an empty list of parameters would be a skipped test

    @pytest.fixture(params=AGENTS, ids=lambda path: str(path.relative_to(ZOO)))
    def agent(request):
        return request.param

    @pytest.mark.parametrize("trusted", [True, False])
    def test_published_agents(agent, trusted):
        with collected() as messages:
            model = KLipPPO.load(agent, trusted=trusted, device="cpu")
        assert all("config.yml" in message for message in about_schedules(messages))
        model.predict(model.observation_space.sample())
        if (file := statistics_file(agent)) is not None:
            env = DummyVecEnv([lambda: Task(model.observation_space, model.action_space)])
            assert load_vecnormalize(file, env, trusted=trusted).obs_rms.count > 1000
        if agent.stem == "CartPole-v1":
            with collected():
                returns, _ = evaluate_policy(model, Monitor(gymnasium.make(agent.stem)), 3, return_episode_rewards=True)
            assert returns == [500, 500, 500]

    def test_published_agents_are_trained_further(agent, tmp_path):
        """Without the configuration beside it, too."""
        shutil.copy(agent, tmp_path / agent.name)
        for path in (agent, tmp_path / agent.name):
            with collected():
                model = KLipPPO.load(path, device="cpu")
                env = Task(model.observation_space, model.action_space)
                model = KLipPPO.load(path, env=env, device="cpu", n_steps=32, batch_size=16, n_epochs=1)
            before = {name: tensor.clone() for name, tensor in state_tensors(model).items()}
            model.learn(32)
            assert any(not th.equal(tensor, before[name]) for name, tensor in state_tensors(model).items())
