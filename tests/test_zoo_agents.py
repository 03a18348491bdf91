"""RL Zoo with trained agents: trained further, resumed after a kill, played, and taken to the hub and back."""

import contextlib
import importlib
import io
import json
import pickle
import random
import re
import runpy
import shutil
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import pytest
import torch as th
import yaml
from checkpoint_files import gym_era, saved_statistics
from gymnasium import spaces
from helpers import assert_identical, config, python, zoo_here, zoo_train
from huggingface_sb3 import EnvironmentName
from requests.exceptions import HTTPError
from rl_zoo3.utils import ALGOS, get_model_path
from sb3_contrib import RecurrentPPO
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecNormalize

from sb3_klip import KLipPPO, zoo
from sb3_klip.checkpoints.file import Checkpoint

# Four short rollouts and updates: these tests are about what lies around them.
RUN = ("--num-threads", 1, "--seed", 0, "-n", 256)
SMALL_UPDATE = ("n_envs:1", "n_steps:64", "batch_size:32", "n_epochs:1")
SILENT = ("--eval-freq", -1)
REPORT = "The loaded agent's deterministic return over 20 episodes: "


def train_here(*arguments: object, cwd: Path, algo: str = "klip_ppo") -> str:
    return zoo_here("train", "--algo", algo, *arguments, cwd=cwd)


def statistics(file: Path) -> VecNormalize:
    return pickle.loads(file.read_bytes())


def names(folder: Path, pattern: str) -> set[str]:
    return {path.name for path in folder.glob(pattern)}


def files(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def ppo_agent(tmp_path_factory) -> Path:
    """A folder with an agent of plain ``ppo`` for Hopper-v4, with statistics; nothing writes to it."""
    cwd = tmp_path_factory.mktemp("ppo_agent")
    params = ("-params", *SMALL_UPDATE, 'policy_kwargs:"dict(net_arch=[8])"')
    train_here("--env", "Hopper-v4", *RUN, *SILENT, *params, cwd=cwd, algo="ppo")
    assert (cwd / "logs" / "ppo" / "Hopper-v4_1" / "Hopper-v4" / "vecnormalize.pkl").is_file()
    return cwd


#: Attributes that models did not have in 2021.
NEWER = ("normalize_advantage", "rollout_buffer_class", "rollout_buffer_kwargs", "_stats_window_size")


@pytest.fixture(scope="module")
def gym_era_agent(ppo_agent, tmp_path_factory) -> Path:
    """The same agent, as if saved in the days of gym: for Hopper-v4, and for Hopper-v3, which is no more."""
    cwd = tmp_path_factory.mktemp("gym_era_agent")
    for env_id in ("Hopper-v4", "Hopper-v3"):
        folder = cwd / "old" / "ppo" / f"{env_id}_1"
        shutil.copytree(ppo_agent / "logs" / "ppo" / "Hopper-v4_1", folder)
        if env_id != "Hopper-v4":
            (folder / "Hopper-v4").rename(folder / env_id)
            (folder / "Hopper-v4.zip").rename(folder / f"{env_id}.zip")
        archive, file = folder / f"{env_id}.zip", folder / env_id / "vecnormalize.pkl"
        archive.write_bytes(gym_era(archive.read_bytes(), "0.17", **dict.fromkeys(NEWER)))
        saved_statistics(VecNormalize.load(str(file), make_vec_env("Hopper-v4")), file, "0.17")
    # Processes that start here find no gym, wherever these tests run.
    (cwd / "gym.py").write_text("raise ImportError('there is no gym here')\n")
    return cwd


class Continued(NamedTuple):
    """A run with ``-i``, and what it printed."""

    folder: Path
    output: str
    errors: str = ""

    @property
    def model(self) -> KLipPPO:
        return KLipPPO.load(self.folder / "Hopper-v5.zip", device="cpu")


def further(agent: str, *params: str, out: Path) -> tuple[object, ...]:
    return ("--env", "Hopper-v5", "-i", agent, "-f", out, *RUN, "-params", *SMALL_UPDATE, *params)


@pytest.fixture(scope="module")
def silent(ppo_agent, tmp_path_factory) -> Continued:
    """The agent of ppo, trained further on the next version of its environment without being evaluated."""
    out = tmp_path_factory.mktemp("silent")
    output = train_here(*further("logs/ppo/Hopper-v4_1/Hopper-v4.zip", out=out), *SILENT, cwd=ppo_agent)
    return Continued(out / "klip_ppo" / "Hopper-v5_1", output)


@pytest.fixture(scope="module")
def reported(ppo_agent, tmp_path_factory) -> Continued:
    """The same with RL Zoo's default evaluation."""
    out = tmp_path_factory.mktemp("reported")
    output = train_here(*further("logs/ppo/Hopper-v4_1/Hopper-v4.zip", out=out), cwd=ppo_agent)
    return Continued(out / "klip_ppo" / "Hopper-v5_1", output)


def expected_report(ppo_agent: Path) -> str:
    """What an agent and its statistics achieve without RL Zoo."""
    agent = ppo_agent / "logs" / "ppo" / "Hopper-v4_1"
    env = VecNormalize.load(str(agent / "Hopper-v4" / "vecnormalize.pkl"), make_vec_env("Hopper-v5", seed=0))
    env.training, env.norm_reward = False, False
    mean, std = evaluate_policy(PPO.load(agent / "Hopper-v4.zip", device="cpu"), env, 20, deterministic=True)
    assert std > 0
    return f"{REPORT}{mean:.2f} +/- {std:.2f}\n"


@pytest.mark.slow
def test_an_agent_of_another_version_first_shows_what_it_can_do(ppo_agent, reported):
    before, report, after = reported.output.partition(expected_report(ppo_agent))
    assert report
    assert "Loading pretrained agent" in before
    assert "total_timesteps" not in before
    assert re.search(r"total_timesteps *\| 256 ", after)


def test_no_evaluation_no_report(silent):
    assert "Loading pretrained agent" in silent.output
    assert REPORT not in silent.output


def test_statistics_of_the_checkpoints_own_environment_are_loaded(silent, reported):
    for run in (silent, reported):
        assert "Loading saved VecNormalize stats: logs/ppo/Hopper-v4_1/Hopper-v4/vecnormalize.pkl" in run.output


@pytest.mark.parametrize("normalize", [(), ("normalize:True",)], ids=["", "normalize"])
def test_statistics_go_on_and_are_saved(ppo_agent, tmp_path, normalize):
    # RL Zoo's hyperparameters for Hopper-v5 are the default ones, which do not normalize; the agent's are.
    train_here(*further("logs/ppo/Hopper-v4_1/Hopper-v4.zip", *normalize, out=tmp_path), *SILENT, cwd=ppo_agent)
    old = statistics(ppo_agent / "logs" / "ppo" / "Hopper-v4_1" / "Hopper-v4" / "vecnormalize.pkl")
    new = statistics(tmp_path / "klip_ppo" / "Hopper-v5_1" / "Hopper-v5" / "vecnormalize.pkl")
    # The observation after the reset, and one after each step.
    assert new.obs_rms.count == pytest.approx(old.obs_rms.count + 1 + 256)
    assert new.ret_rms.count == pytest.approx(old.ret_rms.count + 256)
    assert (new.training, new.norm_reward) == (True, True)
    assert not np.array_equal(new.obs_rms.mean, old.obs_rms.mean)


def test_an_agent_that_was_trained_further_can_be_played(ppo_agent, tmp_path):
    """With the statistics that it was trained with: its returns are those of KLipPPO and VecNormalize without RL Zoo."""
    train_here(*further("logs/ppo/Hopper-v4_1/Hopper-v4.zip", out=tmp_path), *SILENT, "--save-freq", 256, cwd=ppo_agent)
    played = zoo_here(
        "enjoy", "--algo", "klip_ppo", "--env", "Hopper-v5", "-f", tmp_path, "--no-render", "-n", 600, cwd=tmp_path
    )
    folder = tmp_path / "klip_ppo" / "Hopper-v5_1"
    env = VecNormalize.load(folder / "rl_model_vecnormalize_256_steps.pkl", make_vec_env("Hopper-v5", seed=0))
    env.training, env.norm_reward = False, False
    model = KLipPPO.load(folder / "Hopper-v5.zip", device="cpu")
    rewards = re.findall(r"Episode Reward: (\S+)", played)
    assert rewards
    returns, _ = evaluate_policy(model, env, len(rewards), deterministic=True, return_episode_rewards=True)
    assert rewards == [f"{value:.2f}" for value in returns]


def test_what_is_trained_further_is_the_agent(ppo_agent, silent):
    agent = PPO.load(ppo_agent / "logs" / "ppo" / "Hopper-v4_1" / "Hopper-v4.zip", device="cpu")
    model = silent.model
    assert (agent._n_updates, model._n_updates, model.num_timesteps) == (4, 8, 256)
    assert model.policy.net_arch == agent.policy.net_arch == [8]
    # What RL Zoo's hyperparameters leave open stays with the agent.
    assert (model.learning_rate(1.0), model.vf_coef, model.gamma) == (9.80828e-05, 0.835671, 0.999)
    steps = model.policy.optimizer.state_dict()["state"][0]["step"]
    assert steps == 2 * agent.policy.optimizer.state_dict()["state"][0]["step"] == 16
    distance = max(
        (ours - theirs).abs().max() for ours, theirs in zip(model.policy.parameters(), agent.policy.parameters(), strict=True)
    )
    assert 0 < distance < 0.01


def test_the_report_changes_nothing_in_training(silent, reported):
    assert_identical(reported.model, silent.model)


class _GlobalNoise(gym.Env):
    """An environment that draws from the random generators that training draws from, too."""

    observation_space = spaces.Box(-1, 1, (2,))
    action_space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.steps = 0
        return self._observation(), {}

    def step(self, action: int) -> Any:
        self.steps += 1
        return self._observation(), float(np.random.rand() < 0.5) + action, self.steps == 10, False, {}

    def _observation(self) -> np.ndarray:
        return np.array([random.uniform(-1, 1), th.rand(()).item()], dtype=np.float32)


def test_the_report_changes_nothing_even_where_playing_draws_what_training_draws(tmp_path):
    gym.register("GlobalNoise-v0", entry_point=_GlobalNoise)
    try:
        command = ("--env", "GlobalNoise-v0", *RUN, "-params", *SMALL_UPDATE)
        train_here(*command, *SILENT, cwd=tmp_path, algo="ppo")
        further = (*command, "normalize:True", "-i", "logs/ppo/GlobalNoise-v0_1/GlobalNoise-v0.zip")
        outputs = [train_here(*further, *options, cwd=tmp_path) for options in ((), SILENT)]
    finally:
        del gym.registry["GlobalNoise-v0"]
    assert [REPORT in output for output in outputs] == [True, False]
    folders = [tmp_path / "logs" / "klip_ppo" / f"GlobalNoise-v0_{number}" for number in (1, 2)]
    assert_identical(*(KLipPPO.load(folder / "GlobalNoise-v0.zip", device="cpu") for folder in folders))
    counts = [statistics(folder / "GlobalNoise-v0" / "vecnormalize.pkl").obs_rms for folder in folders]
    assert counts[0].count == counts[1].count
    assert np.array_equal(counts[0].mean, counts[1].mean)


@pytest.mark.slow
def test_an_agent_from_the_days_of_gym_is_trained_further(ppo_agent, gym_era_agent, silent, tmp_path):
    completed = zoo_train(*further("old/ppo/Hopper-v3_1/Hopper-v3.zip", out=tmp_path), cwd=gym_era_agent)
    run = Continued(tmp_path / "klip_ppo" / "Hopper-v5_1", completed.stdout, completed.stderr)
    assert "Loading saved VecNormalize stats: old/ppo/Hopper-v3_1/Hopper-v3/vecnormalize.pkl" in run.output
    assert expected_report(ppo_agent) in run.output
    # Learning rate and clip range were functions of Python 3.7, and are now those of config.yml.
    assert "a function of Python 3.7" in run.errors
    assert "Hopper-v3/config.yml" in run.errors
    assert run.model.clip_range(1.0) == 0.2
    assert_identical(run.model, silent.model)


def test_an_agent_of_another_algorithm_on_the_command_line(tmp_path):
    train_here("--env", "CartPole-v1", *RUN, *SILENT, "-params", "n_envs:1", cwd=tmp_path, algo="a2c")
    agent = "logs/a2c/CartPole-v1_1/CartPole-v1.zip"
    before = files(tmp_path)
    completed = zoo_train("--env", "CartPole-v1", *RUN, "-i", agent, cwd=tmp_path, status=1)
    message = f"ValueError: '{agent}' is a checkpoint of A2C, by .* KLipPPO loads those of PPO"
    assert re.match(message, completed.stderr.splitlines()[-1])
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [
        (A2C, "'agent.zip' is a checkpoint of A2C, .*KLipPPO loads those of PPO"),
        (DQN, "'agent.zip' (is a checkpoint of DQN|is no checkpoint of .* with an actor-critic policy)"),
        (RecurrentPPO, "'agent.zip' is a checkpoint of RecurrentPPO, .*KLipRecurrentPPO does"),
    ],
)
def test_an_agent_of_another_algorithm(tmp_path, algorithm, message):
    policy = "MlpLstmPolicy" if algorithm is RecurrentPPO else "MlpPolicy"
    algorithm(policy, "CartPole-v1", device="cpu").save(tmp_path / "agent.zip")
    with pytest.raises(ValueError, match=message):
        train_here("--env", "CartPole-v1", *RUN, "-i", "agent.zip", cwd=tmp_path)
    assert files(tmp_path) == {Path("agent.zip")}


@pytest.mark.parametrize("algo", ["klip_ppo", "klip_ppo_lstm"])
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99])
def test_a_file_that_was_cut_off(ppo_agent, tmp_path, kept, algo):
    whole = (ppo_agent / "logs" / "ppo" / "Hopper-v4_1" / "Hopper-v4.zip").read_bytes()
    (tmp_path / "agent.zip").write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(ValueError, match=r"'agent.zip' is not a checkpoint, or was cut off"):
        train_here("--env", "Hopper-v4", *RUN, "-i", "agent.zip", cwd=tmp_path, algo=algo)
    assert files(tmp_path) == {Path("agent.zip")}


def test_an_agent_with_another_observation_space(tmp_path):
    PPO("MlpPolicy", "CartPole-v1", n_steps=64, device="cpu").save(tmp_path / "agent.zip")
    with pytest.raises(ValueError, match=r"'agent.zip' does not fit env: its observation_space") as caught:
        train_here("--env", "Pendulum-v1", *RUN, *SILENT, "-i", "agent.zip", cwd=tmp_path)
    for env_id in ("CartPole-v1", "Pendulum-v1"):
        assert str(gym.make(env_id).observation_space) in str(caught.value)
    assert not list(tmp_path.rglob("*.pkl"))
    assert names(tmp_path, "**/*.zip") == {"agent.zip"}


def test_statistics_of_another_observation_space(ppo_agent, tmp_path):
    agent = ppo_agent / "logs" / "ppo" / "Hopper-v4_1" / "Hopper-v4.zip"
    with pytest.raises(ValueError, match="observation_space") as caught:
        train_here("--env", "Pendulum-v1", *RUN, *SILENT, "-i", agent, cwd=tmp_path)
    for env_id in ("Hopper-v4", "Pendulum-v1"):
        assert str(gym.make(env_id).observation_space) in str(caught.value)
    assert names(tmp_path, "**/*.zip") == set()


def test_an_agent_with_another_action_space(tmp_path):
    PPO("MlpPolicy", "CartPole-v1", n_steps=64, device="cpu").save(tmp_path / "agent.zip")

    class OtherActions(gym.Wrapper):
        def __init__(self) -> None:
            super().__init__(gym.make("CartPole-v1"))
            self.action_space = spaces.Discrete(3)

    gym.register("OtherActions-v0", entry_point=lambda: OtherActions())
    try:
        with pytest.raises(ValueError, match=r"action_space is Discrete\(2\), and that of env is Discrete\(3\)"):
            train_here("--env", "OtherActions-v0", *RUN, *SILENT, "-i", "agent.zip", cwd=tmp_path)
    finally:
        del gym.registry["OtherActions-v0"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    """A run with a checkpoint every 100 steps, which are not whole rollouts."""
    cwd = tmp_path_factory.mktemp("checkpoints")
    command = ("--env", "Hopper-v4", "--num-threads", 1, "--seed", 0, "-n", 320, "--save-freq", 100)
    train_here(*command, *SILENT, "-params", *SMALL_UPDATE, cwd=cwd)
    return cwd


def test_checkpoints_at_the_boundaries_of_rollouts(checkpoints):
    folder = checkpoints / "logs" / "klip_ppo" / "Hopper-v4_1"
    # Due after 100, 200 and 300 steps.
    boundaries = (128, 256, 320)
    assert names(folder, "rl_model_*.zip") == {f"rl_model_{steps}_steps.zip" for steps in boundaries}
    assert names(folder, "rl_model_*.pkl") == {f"rl_model_vecnormalize_{steps}_steps.pkl" for steps in boundaries}
    for steps in boundaries:
        file = folder / f"rl_model_{steps}_steps.zip"
        model = KLipPPO.load(file, device="cpu")
        assert (model.num_timesteps, model._n_updates) == (steps, steps // 64)
        assert Checkpoint.read(file).resume
        count = statistics(folder / f"rl_model_vecnormalize_{steps}_steps.pkl").obs_rms.count
        assert count == pytest.approx(1 + steps, abs=0.01)
    # Nothing else, such as what writing a file left behind.
    assert names(folder, ".*") == set()


def test_a_checkpoint_is_trained_further_with_its_own_statistics(checkpoints, tmp_path):
    folder = "logs/klip_ppo/Hopper-v4_1"
    command = ("--env", "Hopper-v4", *RUN, *SILENT, "-i", f"{folder}/rl_model_128_steps.zip", "-f", tmp_path)
    output = train_here(*command, "-params", *SMALL_UPDATE, cwd=checkpoints)
    assert f"Loading saved VecNormalize stats: {folder}/rl_model_vecnormalize_128_steps.pkl" in output
    assert "Resuming" not in output
    # A run of its own, from the checkpoint's parameters.
    model = KLipPPO.load(tmp_path / "klip_ppo" / "Hopper-v4_1" / "Hopper-v4.zip", device="cpu")
    assert (model.num_timesteps, model._n_updates) == (256, 2 + 4)
    count = statistics(tmp_path / "klip_ppo" / "Hopper-v4_1" / "Hopper-v4" / "vecnormalize.pkl").obs_rms.count
    assert count == pytest.approx(1 + 128 + 1 + 256, abs=0.01)


def test_checkpoints_of_ppo_are_those_of_sb3(tmp_path):
    train_here(*("--env", "Hopper-v4", *RUN, *SILENT, "--save-freq", 100, "-params", *SMALL_UPDATE), cwd=tmp_path, algo="ppo")
    folder = tmp_path / "logs" / "ppo" / "Hopper-v4_1"
    assert names(folder, "rl_model_*") == {"rl_model_100_steps.zip", "rl_model_200_steps.zip"}
    assert Checkpoint.read(folder / "rl_model_100_steps.zip").resume is None


# Counts the steps of the environment, and kills the process as nobody can prevent, in the middle of a rollout.
WATCHED_PY = """
import atexit
import os
import signal
from pathlib import Path

from gymnasium.envs.mujoco.hopper_v4 import HopperEnv

steps, step = 0, HopperEnv.step

def watched(self, action):
    global steps
    steps += 1
    if steps == int(os.environ.get("KILLED_AT", 0)):
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, action)

HopperEnv.step = watched
atexit.register(lambda: Path("steps.txt").write_text(str(steps)))
"""


class Resumed(NamedTuple):
    """Three runs: one to the end, one killed, and that one resumed; with what the last one printed and its steps."""

    cwd: Path
    output: str
    errors: str
    steps: int

    def folder(self, run: str) -> Path:
        return self.cwd / run / "klip_ppo" / "Hopper-v4_1"


# Checkpoints are due after 100, 200, … steps, and are saved at the ends of rollouts: 128, 256, 320, 448, 512, 640.
HOPPER = ("--env", "Hopper-v4", "--num-threads", 1, *SILENT, "--save-freq", 100)
HOPPER_UPDATE = ("-n", 640, "-params", "n_steps:64", "n_epochs:2", "learning_rate:'lin_0.001'")


@pytest.fixture(scope="module")
def resumed(tmp_path_factory) -> Resumed:
    cwd = tmp_path_factory.mktemp("resumed")
    (cwd / "watched.py").write_text(WATCHED_PY)
    train_here(*HOPPER, "--seed", 3, "-f", "reference", *HOPPER_UPDATE, cwd=cwd)
    watched = (*HOPPER, "--gym-packages", "watched")
    zoo_train(*watched, "--seed", 3, "-f", "killed", *HOPPER_UPDATE, cwd=cwd, env={"KILLED_AT": "420"}, status=-9)
    assert not (cwd / "steps.txt").exists()
    checkpoint = "killed/klip_ppo/Hopper-v4_1/rl_model_320_steps.zip"
    completed = zoo_train(*watched, "-i", checkpoint, "-f", "resumed", "-params", "resume:True", cwd=cwd)
    return Resumed(cwd, completed.stdout, completed.stderr, int((cwd / "steps.txt").read_text()))


def assert_same_end(folder: Path, reference: Path, algorithm: type[BaseAlgorithm] = KLipPPO) -> None:
    env_id = folder.name.removesuffix("_1")
    model, expected = (algorithm.load(each / f"{env_id}.zip", device="cpu") for each in (folder, reference))
    assert_identical(model, expected)
    ours, theirs = (each / env_id / "vecnormalize.pkl" for each in (folder, reference))
    assert ours.is_file() == theirs.is_file()
    if ours.is_file():
        for name in ("obs_rms", "ret_rms"):
            moments, others = (getattr(statistics(file), name) for file in (ours, theirs))
            assert moments.count == others.count > 1
            assert np.array_equal(moments.mean, others.mean)
            assert np.array_equal(moments.var, others.var)


def test_a_kill_leaves_whole_checkpoints_and_nothing_else(resumed):
    folder = resumed.folder("killed")
    assert names(folder, "*.zip") == {f"rl_model_{steps}_steps.zip" for steps in (128, 256, 320)}
    for file in folder.glob("*.zip"):
        Checkpoint.read(file)
    assert names(folder, ".*") == set()


def test_resuming_ends_where_the_uninterrupted_run_ends(resumed):
    assert "Resuming at step 320 of 640" in resumed.output
    model = KLipPPO.load(resumed.folder("resumed") / "Hopper-v4.zip", device="cpu")
    assert (model.num_timesteps, model._n_updates) == (640, 20)
    assert_same_end(resumed.folder("resumed"), resumed.folder("reference"))
    assert "UserWarning: The run goes on" not in resumed.errors


def test_resuming_takes_the_steps_that_remained(resumed):
    assert resumed.steps == 640 - 320
    # Checkpoints are saved where those of the run would have been.
    assert names(resumed.folder("resumed"), "rl_model_*.zip") == {f"rl_model_{steps}_steps.zip" for steps in (448, 512, 640)}


def test_resuming_takes_the_hyperparameters_of_the_run(resumed):
    assert config(resumed.folder("resumed")) == config(resumed.folder("reference"))
    assert "Resuming with the hyperparameters of the interrupted run: killed/klip_ppo/Hopper-v4_1/" in resumed.output


def test_the_record_of_a_resumed_run_tells_its_seed(resumed):
    arguments, expected = (
        dict(yaml.load((resumed.folder(run) / "Hopper-v4" / "args.yml").read_text(), Loader=yaml.UnsafeLoader))
        for run in ("resumed", "reference")
    )
    assert arguments["seed"] == expected["seed"] == 3


def test_a_run_with_another_seed_ends_elsewhere(resumed):
    """Otherwise the equality above would say little."""
    train_here(*HOPPER, "--seed", 4, "-f", "other", *HOPPER_UPDATE, cwd=resumed.cwd)
    with pytest.raises(AssertionError):
        assert_same_end(resumed.folder("other"), resumed.folder("reference"))


def test_a_resumed_run_is_resumed_and_evaluated(resumed):
    command = ("--env", "Hopper-v4", "--num-threads", 1, "--eval-freq", 64, "--eval-episodes", 1, "-f", "again")
    checkpoint = "resumed/klip_ppo/Hopper-v4_1/rl_model_512_steps.zip"
    output = train_here(*command, "-i", checkpoint, "-params", "resume:True", cwd=resumed.cwd)
    assert "Resuming at step 512 of 640" in output
    assert REPORT not in output
    assert_same_end(resumed.folder("again"), resumed.folder("reference"))
    assert np.load(resumed.folder("again") / "evaluations.npz")["timesteps"].tolist() == [576, 640]


@pytest.mark.parametrize(
    ("algo", "env_id", "params"),
    [
        ("klip_ppo", "CartPole-v1", ["n_steps:16", "beta:'adaptive'"]),
        ("klip_ppo", "Pendulum-v1", ["n_steps:32", "batch_size:32", "normalize:True"]),  # with gSDE
        ("klip_ppo", "Hopper-v4", ["n_envs:2", "n_steps:32", "frame_stack:3"]),
        ("klip_ppo_lstm", "CartPoleNoVel-v1", ["n_envs:2", "n_steps:32", "n_epochs:1"]),
    ],
)
def test_runs_of_all_kinds_go_on_where_they_were(tmp_path, algo, env_id, params):
    """From a checkpoint in the middle of a run that went on, which is as good as one that was killed."""
    common = ("--env", env_id, "--num-threads", 1, *SILENT)
    train_here(
        *common, "--seed", 0, "-n", 512, "--save-freq", 256, "-f", "reference", "-params", *params, cwd=tmp_path, algo=algo
    )
    reference = tmp_path / "reference" / algo / f"{env_id}_1"
    checkpoint = reference / "rl_model_256_steps.zip"
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "The run goes on")
        output = train_here(*common, "-i", checkpoint, "-f", "resumed", "-params", "resume:True", cwd=tmp_path, algo=algo)
    assert "Resuming at step 256 of 512" in output
    assert_same_end(tmp_path / "resumed" / algo / f"{env_id}_1", reference, ALGOS[algo])


def test_a_run_in_an_environment_that_cannot_be_read_goes_on_with_a_new_episode(tmp_path):
    common = ("--env", "BreakoutNoFrameskip-v4", "--num-threads", 1, *SILENT)
    params = ("n_envs:2", "n_steps:16", "batch_size:32", "n_epochs:1")
    first = (*common, "--seed", 0, "-n", 96, "--save-freq", 32, "-f", "first", "-params", *params)
    problem = "at the start of an episode, .* <AtariEnv<BreakoutNoFrameskip-v4>> cannot be read"
    with pytest.warns(UserWarning, match=f"A run that is resumed from these checkpoints will go on {problem}"):
        train_here(*first, cwd=tmp_path)
    checkpoint = "first/klip_ppo/BreakoutNoFrameskip-v4_1/rl_model_32_steps.zip"
    with pytest.warns(UserWarning, match=f"The run goes on {problem}"):
        train_here(*common, "-i", checkpoint, "-f", "resumed", "-params", "resume:True", cwd=tmp_path)
    folders = [tmp_path / run / "klip_ppo" / "BreakoutNoFrameskip-v4_1" for run in ("first", "resumed")]
    models = [KLipPPO.load(folder / "BreakoutNoFrameskip-v4.zip", device="cpu") for folder in folders]
    assert [(model.num_timesteps, model._n_updates) for model in models] == [(96, 3), (96, 3)]


@pytest.mark.parametrize(
    ("checkpoint", "params", "message"),
    [
        ("rl_model_128_steps.zip", ["resume:True", "n_epochs:3"], "resume:True takes the hyperparameters .* n_epochs cannot"),
        ("rl_model_128_steps.zip", ["n_epochs:3", "gamma:0.9", "resume:True"], "so n_epochs, gamma cannot be set"),
        ("Hopper-v4.zip", ["resume:True"], "Hopper-v4.zip' has nothing to resume from: .* Load it without resume=True"),
        (None, ["resume:True"], "resume:True needs the checkpoint to resume from: -i "),
        ("rl_model_128_steps.zip", ["resume:'no'"], "resume:'no' must be True or False"),
        ("rl_model_128_steps.zip", ["resume:True", "beta:sapo"], "'step' with {}, so beta cannot be 'soft_adaptive' with"),
    ],
)
def test_what_cannot_be_resumed(checkpoints, tmp_path, checkpoint, params, message):
    agent = () if checkpoint is None else ("-i", checkpoints / "logs" / "klip_ppo" / "Hopper-v4_1" / checkpoint)
    with pytest.raises(ValueError, match=message):
        train_here("--env", "Hopper-v4", *RUN, *SILENT, *agent, "-params", *params, cwd=tmp_path)
    assert files(tmp_path) == set()


def test_a_run_is_not_resumed_to_end_before_its_checkpoint(checkpoints, tmp_path):
    agent = checkpoints / "logs" / "klip_ppo" / "Hopper-v4_1" / "rl_model_128_steps.zip"
    command = ("--env", "Hopper-v4", "--num-threads", 1, "-n", 100, *SILENT, "-i", agent, "-params", "resume:True")
    with pytest.raises(ValueError, match=r"ends this run at 100 steps, and it is resumed at 128: .* ended at 320"):
        train_here(*command, cwd=tmp_path)


def test_a_run_with_classes_and_a_nameless_coefficient_is_resumed(tmp_path):
    """RL Zoo's config.yml has tags of Python for the one, and the file has no name to find the other by."""
    command = ("--env", "CartPole-v1", "--num-threads", 1, "-n", 192, *SILENT)
    beta = "beta:lambda ratio, advantages, clip_range: 0.5 * (ratio > 1.2).to(ratio.dtype)"
    own = ('policy_kwargs:"dict(activation_fn=nn.ReLU)"', "env_kwargs:{'sutton_barto_reward': True}")
    train_here(*command, "--save-freq", 64, "--seed", 3, "-params", *SMALL_UPDATE, *own, beta, cwd=tmp_path)
    run = tmp_path / "logs" / "klip_ppo" / "CartPole-v1_1"
    agent = ("-i", run / "rl_model_128_steps.zip", "-f", "resumed", "-params", "resume:True")
    with pytest.raises(ValueError, match=r"saved with the coefficient 'rl_zoo3.*<lambda>'|is not known in this program"):
        train_here(*command, *agent, cwd=tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "config.yml")
        train_here(*command, *agent, beta, cwd=tmp_path)
    ends = [KLipPPO.load(path / "CartPole-v1.zip", beta="step") for path in (run, tmp_path / "resumed/klip_ppo/CartPole-v1_2")]
    assert_identical(*ends)


def test_an_agent_of_ppo_has_nothing_to_resume_from(ppo_agent, tmp_path):
    agent = ppo_agent / "logs" / "ppo" / "Hopper-v4_1" / "Hopper-v4.zip"
    with pytest.raises(ValueError, match=r"Hopper-v4\.zip' has nothing to resume from"):
        train_here("--env", "Hopper-v4", *RUN, *SILENT, "-i", agent, "-params", "resume:True", cwd=tmp_path)
    assert files(tmp_path) == set()


def test_a_checkpoint_without_its_hyperparameters_is_not_resumed(checkpoints, tmp_path):
    shutil.copy(checkpoints / "logs" / "klip_ppo" / "Hopper-v4_1" / "rl_model_128_steps.zip", tmp_path)
    command = ("--env", "Hopper-v4", *RUN, *SILENT, "-i", "rl_model_128_steps.zip", "-params", "resume:True")
    with pytest.raises(ValueError, match=r"cannot be resumed: there is no config\.yml"):
        train_here(*command, cwd=tmp_path)
    assert files(tmp_path) == {Path("rl_model_128_steps.zip")}


def test_a_run_is_not_resumed_on_another_environment(checkpoints, tmp_path):
    """Hopper-v5 has the same spaces, and a class of the same name."""
    agent = checkpoints / "logs" / "klip_ppo" / "Hopper-v4_1" / "rl_model_128_steps.zip"
    with pytest.raises(ValueError, match=r"Hopper-v4.*Hopper-v5|Hopper-v5.*Hopper-v4"):
        train_here("--env", "Hopper-v5", "--num-threads", 1, *SILENT, "-i", agent, "-params", "resume:True", cwd=tmp_path)
    assert files(tmp_path) == set()


def test_a_run_is_not_resumed_with_other_arguments_of_the_environment(checkpoints, tmp_path):
    agent = checkpoints / "logs" / "klip_ppo" / "Hopper-v4_1" / "rl_model_128_steps.zip"
    command = ("--env", "Hopper-v4", *SILENT, "-i", agent, "--env-kwargs", "ctrl_cost_weight:9.0", "-params", "resume:True")
    with pytest.raises(ValueError, match=r"had --env-kwargs=None, so --env-kwargs=\{'ctrl_cost_weight': 9.0\} cannot be set"):
        train_here(*command, cwd=tmp_path)
    assert files(tmp_path) == set()


def test_a_run_in_processes_is_resumed_in_processes(tmp_path):
    common = ("--env", "CartPole-v1", "--num-threads", 1, *SILENT, "-n", 192)
    with pytest.warns(UserWarning, match="are not in this process"):
        train_here(*common, "--vec-env", "subproc", "--save-freq", 64, "--seed", 0, "-params", *SMALL_UPDATE, cwd=tmp_path)
    agent = "logs/klip_ppo/CartPole-v1_1/rl_model_64_steps.zip"
    with pytest.warns(UserWarning, match="at the start of an episode, .* of a SubprocVecEnv are not in this process"):
        train_here(*common, "-i", agent, "-f", "resumed", "-params", "resume:True", cwd=tmp_path)


@pytest.fixture(scope="module")
def resumed_twice(tmp_path_factory) -> list[str]:
    """What three runs printed: one with an argument of the environment, and two that each resume the one before."""
    cwd = tmp_path_factory.mktemp("resumed_twice")
    common = ("--env", "CartPole-v1", "--num-threads", 1, "--save-freq", 64, "--eval-freq", 64, "--eval-episodes", 1)
    first = ("--seed", 0, "-n", 256, "--env-kwargs", "sutton_barto_reward:True")
    outputs = [train_here(*common, *first, "-params", *SMALL_UPDATE, cwd=cwd)]
    for number, steps in ((1, 64), (2, 128)):
        agent = f"logs/klip_ppo/CartPole-v1_{number}/rl_model_{steps}_steps.zip"
        outputs.append(train_here(*common, "-i", agent, "-params", "resume:True", cwd=cwd))
    return outputs


@pytest.mark.parametrize("run", [0, 1, 2])
def test_the_environment_keeps_its_arguments(resumed_twice, run):
    assert re.search(r"^env_kwargs=\{'sutton_barto_reward': True\}$", resumed_twice[run], re.MULTILINE)


@pytest.mark.parametrize("run", [0, 1, 2])
def test_the_environment_to_evaluate_on_keeps_its_arguments(resumed_twice, run):
    assert re.search(r"^eval_env_kwargs=\{'sutton_barto_reward': True\}$", resumed_twice[run], re.MULTILINE)


def play_options(algo: str, folder: str) -> tuple[object, ...]:
    return ("--algo", algo, "--env", "Hopper-v4", "-f", folder, "--no-render", "-n", 400)


def episodes(output: str) -> list[str]:
    return re.findall(r"Episode (?:Reward:|Length) \S+", output)


@pytest.fixture(scope="module")
def played(ppo_agent) -> list[str]:
    """The episodes that RL Zoo has the agent of ppo play."""
    output = zoo_here("enjoy", *play_options("ppo", "logs"), cwd=ppo_agent)
    assert "No agent of" not in output
    assert episodes(output)
    return episodes(output)


def test_an_agent_of_ppo_is_played(ppo_agent, played):
    output = zoo_here("enjoy", *play_options("klip_ppo", "logs"), cwd=ppo_agent)
    assert "No agent of klip_ppo for Hopper-v4 in logs: this is one of ppo" in output
    assert "Loading logs/ppo/Hopper-v4_1/Hopper-v4.zip" in output
    assert episodes(output) == played


def test_an_agent_of_ppo_from_the_days_of_gym_is_played(gym_era_agent, played, monkeypatch):
    monkeypatch.setitem(sys.modules, "gym", None)
    output = zoo_here("enjoy", *play_options("klip_ppo", "old"), cwd=gym_era_agent)
    assert "No agent of klip_ppo for Hopper-v4 in old: this is one of ppo" in output
    assert episodes(output) == played


def test_agents_for_other_environments_are_listed(ppo_agent, gym_era_agent):
    for cwd, folder, agents in (
        (ppo_agent, "logs", "ppo/Hopper-v4_1"),
        (gym_era_agent, "old", "ppo/Hopper-v3_1, ppo/Hopper-v4_1"),
    ):
        message = f"{folder} has no agent of klip_ppo or ppo for CartPole-v1, but {agents}. An agent for another"
        with pytest.raises(ValueError, match=message):
            zoo_here("enjoy", "--algo", "klip_ppo", "--env", "CartPole-v1", "-f", folder, "--no-render", cwd=cwd)


def test_files_of_the_tuner_are_no_agents(tmp_path):
    (tmp_path / "logs" / "ppo" / "CartPole-v1_1").mkdir(parents=True)
    (tmp_path / "logs" / "ppo" / "report_CartPole-v1_2-trials-random.csv").touch()
    with pytest.raises(ValueError, match=r"for Pendulum-v1, but ppo/CartPole-v1_1\. An agent"):
        zoo_here("enjoy", "--algo", "klip_ppo", "--env", "Pendulum-v1", "-f", "logs", "--no-render", cwd=tmp_path)


def test_a_folder_without_agents_is_as_in_rl_zoo(tmp_path):
    with pytest.raises(AssertionError, match=r"The nothing/klip_ppo folder was not found"):
        zoo_here("enjoy", "--algo", "klip_ppo", "--env", "CartPole-v1", "-f", "nothing", "--no-render", cwd=tmp_path)


def test_algorithms_of_the_zoo_take_over_no_agent(ppo_agent):
    with pytest.raises(AssertionError, match=r"The logs/a2c folder was not found"):
        zoo_here("enjoy", *play_options("a2c", "logs"), cwd=ppo_agent)


def test_with_an_agent_of_ours_a_wrong_number_is_an_error(tmp_path):
    cartpole = ("--env", "CartPole-v1", *RUN, *SILENT, "-params", *SMALL_UPDATE)
    train_here(*cartpole, cwd=tmp_path)
    for _ in range(2):
        train_here(*cartpole, cwd=tmp_path, algo="ppo")
    play = ("--algo", "klip_ppo", "--env", "CartPole-v1", "-f", "logs", "--no-render", "-n", 10)
    with pytest.raises(AssertionError, match="The logs/klip_ppo/CartPole-v1_2 folder was not found"):
        zoo_here("enjoy", *play, "--exp-id", 2, cwd=tmp_path)
    with pytest.raises(ValueError, match=r"No model found for klip_ppo on CartPole-v1, path: .*best_model\.zip"):
        zoo_here("enjoy", *play, "--load-best", cwd=tmp_path)
    for options in ((), ("--exp-id", 1)):
        output = zoo_here("enjoy", *play, *options, cwd=tmp_path)
        assert "Loading logs/klip_ppo/CartPole-v1_1/CartPole-v1.zip" in output
        assert "No agent of" not in output


class _Hub:
    """Takes the place of HfApi, and keeps what is uploaded."""

    uploads: list[dict[str, Any]]

    def create_repo(self, *, repo_id: str, token: str | None, private: bool, exist_ok: bool) -> str:
        return f"https://huggingface.co/{repo_id}"

    def snapshot_download(self, *, repo_id: str, local_dir: Path) -> None:
        Path(local_dir).mkdir(parents=True)

    def upload_folder(self, **upload: Any) -> None:
        self.uploads.append(upload)


class Pushed(NamedTuple):
    """An agent that was pushed to the hub: where it was trained, and the repository."""

    cwd: Path
    repository: Path
    uploads: list[dict[str, Any]]


@pytest.fixture(scope="module", params=["CartPole-v1", "Hopper-v4"])
def env_id(request) -> str:
    """One environment without statistics, and one with."""
    return request.param


@pytest.fixture(scope="module")
def pushed(env_id, tmp_path_factory) -> Pushed:
    cwd = tmp_path_factory.mktemp("pushed")
    evaluation = ("--eval-freq", 128, "--eval-episodes", 1)
    train_here("--env", env_id, *RUN, *evaluation, "-params", *SMALL_UPDATE, "beta:'none'", cwd=cwd)
    arguments = ("--algo", "klip_ppo", "--env", env_id, "-f", "logs", "-orga", "someone", "--no-render", "-m", "My agent")
    uploads: list[dict[str, Any]] = []
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setattr("huggingface_hub.HfApi", type("Hub", (_Hub,), {"uploads": uploads}))
        patch.chdir(cwd)
        patch.setattr(sys, "argv", ["rl_zoo3.push_to_hub", *arguments])
        runpy.run_module("rl_zoo3.push_to_hub", run_name="__main__", alter_sys=True)
    return Pushed(cwd, cwd / "hub" / f"klip_ppo-{env_id}", uploads)


def test_files_on_the_hub(pushed, env_id):
    (upload,) = pushed.uploads
    assert (upload["repo_id"], upload["commit_message"]) == (f"someone/klip_ppo-{env_id}", "My agent")
    assert pushed.cwd / upload["folder_path"] == pushed.repository
    expected = {f"klip_ppo-{env_id}.zip", "config.yml", "args.yml", "env_kwargs.yml", "train_eval_metrics.zip"}
    expected |= {"results.json", "README.md", ".gitattributes", f"klip_ppo-{env_id}"}
    if env_id == "Hopper-v4":
        expected.add("vec_normalize.pkl")
    assert names(pushed.repository, "*") == expected
    # The zip once more, unpacked.
    assert {"data", "policy.pth"} <= names(pushed.repository / f"klip_ppo-{env_id}", "*")

    trained = pushed.cwd / "logs" / "klip_ppo" / f"{env_id}_1"
    for name in ("config.yml", "args.yml"):
        assert (pushed.repository / name).read_bytes() == (trained / env_id / name).read_bytes()
    assert yaml.safe_load((pushed.repository / "env_kwargs.yml").read_text()) == {}
    with zipfile.ZipFile(pushed.repository / "train_eval_metrics.zip") as archive:
        assert set(archive.namelist()) == {"0.monitor.csv", "evaluations.npz"}
    results = json.loads((pushed.repository / "results.json").read_text())
    assert np.isfinite([results["mean_reward"], results["std_reward"]]).all()
    assert (results["n_eval_episodes"], results["is_deterministic"]) == (10, True)


def test_the_model_card(pushed, env_id):
    _, front, card = (pushed.repository / "README.md").read_text().split("---\n", 2)
    metadata = yaml.safe_load(front)
    assert metadata["library_name"] == "stable-baselines3"
    assert env_id in metadata["tags"]
    (model,) = metadata["model-index"]
    assert model["name"] == "KLipPPO"
    (result,) = model["results"]
    assert result["dataset"]["name"] == env_id
    results = json.loads((pushed.repository / "results.json").read_text())
    assert result["metrics"][0]["value"] == f"{results['mean_reward']:.2f} +/- {results['std_reward']:.2f}"

    assert f"# **KLipPPO** Agent playing **{env_id}**" in card
    commands = re.findall(r"python -m rl_zoo3\.(\w+) --algo (\S+) --env (\S+)", card)
    assert {script for script, _, _ in commands} == {"load_from_hub", "enjoy", "train", "push_to_hub"}
    assert {words[1:] for words in commands} == {("klip_ppo", env_id)}
    assert "('beta', 'none')" in card


@pytest.mark.parametrize("algorithm", [KLipPPO, PPO])
def test_the_zip_on_the_hub_loads(pushed, env_id, algorithm):
    trained = KLipPPO.load(pushed.cwd / "logs" / "klip_ppo" / f"{env_id}_1" / f"{env_id}.zip", device="cpu")
    model = algorithm.load(pushed.repository / f"klip_ppo-{env_id}.zip", device="cpu")
    assert_identical(model, trained)
    if algorithm is KLipPPO:
        assert model.beta.name == "none"


def test_hyperparameters_are_found_in_a_clone_of_the_repository(pushed, env_id):
    """They stand beside the zip, as does a folder of its name with what is in it."""
    found = Checkpoint.read(pushed.repository / f"klip_ppo-{env_id}.zip").config()
    assert found is not None
    file, hyperparams = found
    assert file == pushed.repository / "config.yml"
    assert hyperparams["n_steps"] == 64


def test_a_clone_of_the_repository_is_trained_further(pushed, env_id, tmp_path):
    agent = pushed.repository / f"klip_ppo-{env_id}.zip"
    output = train_here("--env", env_id, *RUN, *SILENT, "-i", agent, "-params", *SMALL_UPDATE, cwd=tmp_path)
    stated = f"Loading saved VecNormalize stats: {pushed.repository / 'vec_normalize.pkl'}"
    assert (stated in output) is (env_id == "Hopper-v4")
    model = KLipPPO.load(tmp_path / "logs" / "klip_ppo" / f"{env_id}_1" / f"{env_id}.zip", device="cpu")
    assert (model._n_updates, model.beta.name) == (8, "none")


def test_from_the_hub_and_back(pushed, env_id, tmp_path, monkeypatch):
    zoo.register()
    script = importlib.import_module("rl_zoo3.load_from_hub")
    asked = []

    def load_from_hub(repo_id: str, filename: str) -> str:
        asked.append(repo_id)
        file = pushed.repository / filename
        if not file.is_file():
            raise HTTPError("404 Client Error")
        return str(file)

    monkeypatch.setattr(script, "load_from_hub", load_from_hub)
    script.download_from_hub("klip_ppo", EnvironmentName(env_id), 0, str(tmp_path / "logs"), "someone")
    assert set(asked) == {f"someone/klip_ppo-{env_id}"}

    _, path, folder = get_model_path(0, str(tmp_path / "logs"), "klip_ppo", EnvironmentName(env_id))
    assert Path(folder) == tmp_path / "logs" / "klip_ppo" / f"{env_id}_1"
    model = KLipPPO.load(path, device="cpu")
    assert model.beta.name == "none"
    assert (Path(folder) / env_id / "vecnormalize.pkl").is_file() is (env_id == "Hopper-v4")
    output = zoo_here("enjoy", "--algo", "klip_ppo", "--env", env_id, "-f", "logs", "--no-render", "-n", 20, cwd=tmp_path)
    assert f"Loading logs/klip_ppo/{env_id}_1/{env_id}.zip" in output


@pytest.mark.slow
@pytest.mark.parametrize("script", ["push_to_hub", "load_from_hub"])
def test_scripts_for_the_hub_know_our_algorithms(tmp_path, script):
    usage = python("-m", f"rl_zoo3.{script}", "--help", cwd=tmp_path).stdout
    choices = re.search(r"--algo\s*\{([^}]*)\}", usage)[1]
    assert {"ppo", "klip_ppo", "klip_ppo_lstm"} <= set(re.sub(r"\s", "", choices).split(","))
