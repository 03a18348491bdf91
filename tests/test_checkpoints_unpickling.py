"""Unpickling: what old versions of gym wrote, and what a file of a stranger may do."""

import collections
import contextlib
import importlib.util
import io
import os
import pickle
import sys

import cloudpickle
import gymnasium
import numpy as np
import pytest
import torch as th
from checkpoint_files import (
    BASES,
    ERAS,
    MALICIOUS,
    VECTOR,
    Call,
    assert_genuine,
    assert_predicts_alike,
    calling,
    content,
    edited,
    entry,
    gym_era,
    gym_pickle,
    load,
    named,
    plain,
    small,
    task,
    trained,
    without,
    written,
)
from gymnasium import spaces
from helpers import assert_identical, collected
from sb3_contrib import RecurrentPPO
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from stable_baselines3 import PPO
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecNormalize

from sb3_klip import KLipMaskablePPO, KLipPPO, KLipRecurrentPPO
from sb3_klip.checkpoints.unpickling import loads


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


#: What is restored of a checkpoint, and something that is not known.
ENTRIES = ["clip_range", "observation_space", "policy_class", "policy_kwargs", "ep_info_buffer", "learning_rate", "surprise"]


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
            with pytest.raises(ValueError, match="is refused: its weights hold more than tensors"):
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


@pytest.mark.parametrize("place", ["beta", "base", "within"])
def test_text_that_names_code_to_import(place, tmp_path):
    """Also as the base of a coefficient, which is made by its name like any other."""
    code = {"base": "subprocess:Popen", "base_kwargs": {"args": ["touch", str(tmp_path / "written")]}}
    data = {
        "beta": {"beta": "subprocess:Popen", "beta_kwargs": code["base_kwargs"]},
        "base": {"beta": "position", "beta_kwargs": code},
        "within": {"beta": "position", "beta_kwargs": {"base": "position", "base_kwargs": code}},
    }[place]
    checkpoint = edited(content(small(KLipPPO, task("box"))), data)
    with pytest.raises(ValueError, match=r"its coefficient is '.*', which is code to import"):
        load(checkpoint, trusted=False)
    assert list(tmp_path.iterdir()) == []
