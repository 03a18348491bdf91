"""What lies beside a checkpoint: statistics of ``VecNormalize``, wherever SB3, RL Zoo and the hub put them."""

import ast
import io
import os
import pathlib
import pickle
import re
import shutil

import cloudpickle
import gymnasium
import numpy as np
import pytest
import torch as th
import yaml
from checkpoint_files import (
    ERAS,
    MALICIOUS,
    TASKS,
    VECTOR,
    Task,
    assert_genuine,
    normalized,
    saved_statistics,
    task,
    trained,
    vectorized,
    written,
)
from gymnasium import spaces
from helpers import collected, state_tensors
from hypothesis import given
from hypothesis import strategies as st
from stable_baselines3 import PPO
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_klip import KLipPPO
from sb3_klip.checkpoints.zoo_run import load_vecnormalize, statistics_file


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


def test_statistics_for_what_is_no_vec_env(tmp_path):
    path = saved_statistics(normalized(), tmp_path / "vecnormalize.pkl")
    with pytest.raises(TypeError, match=r"venv=.* must be a VecEnv, as make_vec_env returns"):
        load_vecnormalize(path, task("box"))
    with pytest.raises(TypeError, match=r"venv=None must be a VecEnv, as make_vec_env returns"):
        load_vecnormalize(path, None)
    with pytest.raises(TypeError, match="trusted='no' must be True or False"):
        load_vecnormalize(path, DummyVecEnv([lambda: task("box")]), trusted="no")


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
        path.unlink()  # to shorten a file takes longer, as some systems write it to the disk at once
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


# -- statistics beside a checkpoint ----------------------------------------------------------------------------------------


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
        assert all("config.yml" in message for message in messages)
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
