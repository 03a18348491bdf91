"""RL Zoo by name: its own commands, with nothing of ours on the command line but ``--algo klip_ppo``."""

import importlib
import re
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import rl_zoo3
import rl_zoo3.train
import torch as th
import yaml
from helpers import assert_identical, config, run, zoo_here, zoo_train
from rl_zoo3.utils import ALGOS
from stable_baselines3 import PPO
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sb3_klip import KLipPPO

# One small rollout and a short update: these tests are about the way there.
SMALL = ("--eval-freq", -1, "-n", 64)
SMALL_UPDATE = ("n_envs:1", "n_steps:64", "batch_size:32", "n_epochs:1")


PAPER_YML = Path(importlib.import_module("sb3_klip.hyperparams").__path__[0]) / "paper.yml"
MUJOCO = ("Hopper-v4", "HalfCheetah-v4", "Walker2d-v4", "Ant-v4", "Humanoid-v4")


class Trained(NamedTuple):
    """A training run, and what it printed."""

    cwd: Path
    folder: Path
    output: str


@pytest.fixture(scope="module")
def hopper(tmp_path_factory) -> Trained:
    """One run with every option that writes or prints something: starting RL Zoo takes longer than training."""
    cwd = tmp_path_factory.mktemp("hopper")
    options = ("-P", "--eval-freq", 128, "--eval-episodes", 1, "--save-freq", 128, "--tensorboard-log", "tb")
    update = ("-params", "n_steps:64", "n_epochs:2")
    completed = zoo_train("--env", "Hopper-v4", "--seed", 0, "-n", 256, *options, *update, cwd=cwd)
    return Trained(cwd, cwd / "logs" / "klip_ppo" / "Hopper-v4_1", completed.stdout)


def test_train_uses_the_tuned_hyperparameters_of_ppo(hopper):
    tuned = yaml.safe_load((Path(rl_zoo3.__file__).parent / "hyperparams" / "ppo.yml").read_text())["Hopper-v4"]
    asked_for = {"n_steps": 64, "n_epochs": 2}
    assert config(hopper.folder) == {**tuned, **asked_for, "beta": "step", "beta_kwargs": {}}

    model = KLipPPO.load(hopper.folder / "Hopper-v4.zip")
    assert model.num_timesteps == 256
    assert (model.batch_size, model.gamma, model.vf_coef) == (32, 0.999, 0.835671)
    assert model.beta.name == "step"
    assert (hopper.folder / "Hopper-v4" / "vecnormalize.pkl").exists()


def test_progress_bar(hopper):
    assert re.search(r"100% .*256/256", hopper.output)


def test_eval_freq(hopper):
    assert np.load(hopper.folder / "evaluations.npz")["timesteps"].tolist() == [128, 256]
    assert KLipPPO.load(hopper.folder / "best_model.zip").num_timesteps in (128, 256)


def test_save_freq(hopper):
    for steps in (128, 256):
        assert KLipPPO.load(hopper.folder / f"rl_model_{steps}_steps.zip").num_timesteps == steps


def test_tensorboard_log(hopper):
    events = EventAccumulator(str(hopper.cwd / "tb" / "Hopper-v4" / "KLipPPO_1")).Reload()
    ours = {"kill_fraction", "pass_fraction", "beta_mean", "beta_abs_max", "kl_penalty", "klip_loss"}
    dashboards_of_ppo = {"approx_kl", "clip_fraction", "entropy_loss", "explained_variance", "policy_gradient_loss"}
    assert {f"train/{key}" for key in ours | dashboards_of_ppo} <= set(events.Tags()["scalars"])


def test_enjoy(hopper):
    # As many steps as the longest episode has, so that one ends.
    options = ("--algo", "klip_ppo", "--env", "Hopper-v4", "-f", "logs", "--no-render", "-n", 1000)
    output = zoo_here("enjoy", *options, cwd=hopper.cwd)
    assert "Loading logs/klip_ppo/Hopper-v4_1/Hopper-v4.zip" in output
    assert re.search(r"Mean reward: -?\d+", output)


@pytest.mark.slow
def test_vec_env_subproc(tmp_path):
    update = ("-params", "n_envs:2", *SMALL_UPDATE[1:])
    length = ("--seed", 0, "-n", 512, "--eval-freq", -1)
    zoo_train("--env", "CartPole-v1", "--vec-env", "subproc", *length, *update, cwd=tmp_path)
    folder = tmp_path / "logs" / "klip_ppo" / "CartPole-v1_1"
    # One log per environment, each with the header and at least one episode.
    for number in (0, 1):
        assert len((folder / f"{number}.monitor.csv").read_text().splitlines()) > 2


@pytest.mark.slow
def test_beta_from_the_command_line_stays_with_the_checkpoint(tmp_path):
    update = ("-params", *SMALL_UPDATE, "learning_rate:0.0")
    command = ("--env", "CartPole-v1", *SMALL)
    logs = tmp_path / "logs" / "klip_ppo"
    zoo_train(*command, *update, "beta:'none'", cwd=tmp_path)
    first = KLipPPO.load(logs / "CartPole-v1_1" / "CartPole-v1.zip")
    assert first.beta.name == "none"
    assert config(logs / "CartPole-v1_1")["beta"] == "none"

    checkpoint = ("-i", "logs/klip_ppo/CartPole-v1_1/CartPole-v1.zip")
    zoo_train(*command, *checkpoint, *update, cwd=tmp_path)
    zoo_train(*command, *checkpoint, *update, "beta:'step'", cwd=tmp_path)
    kept, changed = (KLipPPO.load(logs / f"CartPole-v1_{number}" / "CartPole-v1.zip") for number in (2, 3))
    assert kept.beta.name == "none"
    assert changed.beta.name == "step"
    assert config(logs / "CartPole-v1_3")["beta"] == "step"
    # With a learning rate of 0, that the parameters are still those of the checkpoint shows that it was loaded.
    for model in (kept, changed):
        assert model.num_timesteps == 64
        assert all(map(th.equal, first.policy.state_dict().values(), model.policy.state_dict().values()))


@pytest.mark.parametrize(
    ("conf", "algo"),
    [
        ("sb3_klip.hyperparams.paper", "klip_ppo"),
        pytest.param("sb3_klip.hyperparams.paper", "ppo", marks=pytest.mark.slow),
        pytest.param(PAPER_YML, "klip_ppo", marks=pytest.mark.slow),
        pytest.param(PAPER_YML, "ppo", marks=pytest.mark.slow),
    ],
)
def test_paper_protocol(tmp_path, algo, conf):
    zoo_here("train", "--algo", algo, "--env", "CartPole-v1", "-conf", conf, "--eval-freq", -1, "-n", 512, cwd=tmp_path)
    model = ALGOS[algo].load(tmp_path / "logs" / algo / "CartPole-v1_1" / "CartPole-v1.zip")
    assert (model.n_envs, model.n_steps, model.vf_coef, model.ent_coef) == (4, 128, 0.25, 0.0)
    assert model.learning_rate(1.0) == 3e-4
    assert model.learning_rate(0.5) == 1.5e-4


@pytest.mark.slow
def test_console_script(tmp_path):
    script = Path(sys.executable).with_name("rl_zoo3")
    update = ("-params", *SMALL_UPDATE)
    run(script, "train", "--algo", "klip_ppo", "--env", "CartPole-v1", *SMALL, *update, cwd=tmp_path)
    assert (tmp_path / "logs" / "klip_ppo" / "CartPole-v1_1" / "CartPole-v1.zip").exists()


@pytest.mark.slow
def test_optimize_hyperparameters(tmp_path):
    search = ("-optimize", "--n-trials", 2, "--n-jobs", 1, "--sampler", "random", "--pruner", "none")
    study = ("--storage", "study.log", "--study-name", "study")
    command = ("--env", "CartPole-v1", "-n", 64, "--seed", 0, *study)
    # What is not searched for is taken from the command line, the coefficient included.
    completed = zoo_train(*command, *search, "--no-optim-plots", "-params", "n_envs:1", "beta:'none'", cwd=tmp_path)
    assert "Number of finished trials:  2" in completed.stdout
    assert len(list((tmp_path / "logs" / "klip_ppo").glob("report_*.csv"))) == 1

    zoo_train(*command, "--eval-freq", -1, "--trial-id", 1, cwd=tmp_path)
    # The trials left a folder of their own, with no model in it.
    (model,) = (tmp_path / "logs" / "klip_ppo").glob("*/CartPole-v1.zip")
    assert {"gae_lambda", "max_grad_norm", "policy_kwargs"} <= set(config(model.parent))


@pytest.mark.parametrize("env_id", ["CartPoleNoVel-v1", pytest.param("PendulumNoVel-v1", marks=pytest.mark.slow)])
def test_recurrent_training_and_playing(tmp_path, env_id):
    task = ("--algo", "klip_ppo_lstm", "--env", env_id)
    zoo_here("train", *task, *SMALL, "-params", "n_steps:64", "n_epochs:1", cwd=tmp_path)
    assert "Mean reward" in zoo_here("enjoy", *task, "-f", "logs", "--no-render", "-n", 250, cwd=tmp_path)
    written = config(tmp_path / "logs" / "klip_ppo_lstm" / f"{env_id}_1")
    tuned = yaml.safe_load((Path(rl_zoo3.__file__).parent / "hyperparams" / "ppo_lstm.yml").read_text())[env_id]
    changed = {"n_steps": 64, "n_epochs": 1, "beta": "step", "beta_kwargs": {}}
    assert written == {**tuned, **changed}


@pytest.mark.slow
def test_atari(tmp_path):
    """The zoo's Atari hyperparameters and preprocessing, with fewer environments."""
    arguments = ("--env", "BreakoutNoFrameskip-v4", "--eval-freq", -1, "-n", 300, "-params", "n_envs:2")
    for algo in ("ppo", "klip_ppo"):
        zoo_train(*arguments, "--seed", 0, "--num-threads", 1, cwd=tmp_path, algo=algo)
    ours, theirs = (
        ALGOS[algo].load(tmp_path / "logs" / algo / "BreakoutNoFrameskip-v4_1" / "BreakoutNoFrameskip-v4.zip", device="cpu")
        for algo in ("klip_ppo", "ppo")
    )
    assert_identical(ours, theirs)
    assert "features_extractor.cnn.0.weight" in theirs.policy.state_dict()


@pytest.mark.slow
@pytest.mark.parametrize("env_id", ["CartPoleNoVel-v1", "PendulumNoVel-v1"])
def test_recurrent_tuning(tmp_path, env_id):
    tuning = ("-optimize", "--n-trials", 2, "--sampler", "random", "--pruner", "none", "--no-optim-plots")
    small = ("-n", 200, "--n-evaluations", 1, "--eval-episodes", 1, "-params", "beta:'search'", "n_envs:1")
    output = zoo_train("--env", env_id, *tuning, *small, cwd=tmp_path, algo="klip_ppo_lstm").stdout
    assert "beta: " in output


def assert_same_training(cwd: Path, env_id: str, steps: int) -> None:
    """Train ``ppo`` and ``klip_ppo`` from one seed; every episode, parameter and optimizer state must be equal."""
    for algo in ("ppo", "klip_ppo"):
        options = ("--seed", 0, "--num-threads", 1, "--eval-freq", -1)
        zoo_here("train", "--algo", algo, "--env", env_id, "-n", steps, *options, cwd=cwd)
    theirs, ours = (cwd / "logs" / algo / f"{env_id}_1" for algo in ("ppo", "klip_ppo"))

    # The third column is wall-clock time.
    their_episodes, our_episodes = (
        [line.split(",")[:2] for line in (folder / "0.monitor.csv").read_text().splitlines()[1:]] for folder in (theirs, ours)
    )
    assert their_episodes[0] == ["r", "l"]
    assert len(their_episodes) > 2
    assert our_episodes == their_episodes

    assert_identical(KLipPPO.load(ours / f"{env_id}.zip", device="cpu"), PPO.load(theirs / f"{env_id}.zip", device="cpu"))


def test_hopper_is_ppo_bit_for_bit(tmp_path):
    assert_same_training(tmp_path, "Hopper-v4", 2048)
    model = KLipPPO.load(tmp_path / "logs" / "klip_ppo" / "Hopper-v4_1" / "Hopper-v4.zip")
    assert model._n_updates == 4 * model.n_epochs


@pytest.mark.slow
@pytest.mark.parametrize("env_id", [env_id for env_id in MUJOCO if env_id != "Hopper-v4"])
def test_mujoco_tasks_are_ppo_bit_for_bit(tmp_path, env_id):
    assert_same_training(tmp_path, env_id, 2048)
