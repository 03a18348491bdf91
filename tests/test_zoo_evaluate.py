"""What a training achieved, and the commands that are printed after it."""

import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from helpers import python, zoo_here
from huggingface_sb3 import EnvironmentName
from rl_zoo3.exp_manager import ExperimentManager
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecNormalize

from sb3_klip.zoo import evaluate
from sb3_klip.zoo.evaluate import Run, evaluated_return, main, next_commands

RUN = ("--num-threads", 1, "--seed", 0, "-n", 128, "-params", "n_envs:1", "n_steps:64", "batch_size:32", "n_epochs:1")


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """A folder in which there are a run with evaluations and a log for TensorBoard, and two of PPO without."""
    folder = tmp_path_factory.mktemp("runs")
    extras = ("--eval-freq", 64, "--eval-episodes", 1, "--tensorboard-log", "logs/tensorboard")
    zoo_here("train", "--algo", "klip_ppo", "--env", "CartPole-v1", *RUN, *extras, cwd=folder)
    zoo_here("train", "--algo", "ppo", "--env", "CartPole-v1", *RUN, cwd=folder)
    zoo_here("train", "--algo", "ppo", "--env", "Acrobot-v1", *RUN, "--eval-freq", -1, cwd=folder)
    return folder


def test_says_what_the_training_achieved_and_how_to_go_on(logs, monkeypatch, capsys):
    monkeypatch.chdir(logs)
    monkeypatch.setattr(evaluate, "EPISODES", 3)
    assert main(["--env", "CartPole-v1"]) == 0
    output = capsys.readouterr().out
    assert output.startswith("Return over 3 episodes, mean +/- standard deviation:\n")
    means = {}
    for label, file in (("last", "CartPole-v1.zip"), ("best", "best_model.zip")):
        path = Path("logs/klip_ppo/CartPole-v1_1", file)
        shown = re.search(rf"{label} agent: ([\d.]+) \+/- ([\d.]+)   {path}", output)
        run = Run(Path("logs"), "klip_ppo", EnvironmentName("CartPole-v1"), 1)
        assert [float(text) for text in shown.groups()] == pytest.approx(evaluated_return(run, path), abs=0.051)
        means[label] = float(shown[1])
    assert means["last"] >= 1
    commands = re.findall(r"^  (watch|film|plot): (.*)$", output, re.MULTILINE)
    assert [purpose for purpose, _ in commands] == ["watch", "film", "plot"]
    for _, command in commands[:2]:
        assert ("--load-best" in command) == (means["best"] >= means["last"])
    assert commands[2][1].endswith(f" -o {path.parent}")  # not into the working directory


def test_the_return_is_that_of_the_agent_with_its_statistics(tmp_path, monkeypatch):
    zoo_here("train", "--algo", "klip_ppo", "--env", "Pendulum-v1", *RUN, "normalize:True", cwd=tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "EPISODES", 3)
    run = Run(Path("logs"), "klip_ppo", EnvironmentName("Pendulum-v1"), 1)
    agent = run.path / "Pendulum-v1.zip"
    env = VecNormalize.load(str(run.path / "Pendulum-v1" / "vecnormalize.pkl"), make_vec_env("Pendulum-v1", seed=0))
    env.training, env.norm_reward = False, False
    mean, std = evaluate_policy(PPO.load(agent, device="cpu"), env, 3, deterministic=True)
    assert std > 0
    assert evaluated_return(run, agent) == pytest.approx((mean, std))


@pytest.mark.parametrize("kind", ["atari", "minigrid", "neither"])
def test_actions_are_drawn_where_enjoy_draws_them(logs, monkeypatch, kind):
    monkeypatch.chdir(logs)
    if kind != "neither":
        monkeypatch.setattr(ExperimentManager, f"is_{kind}", staticmethod(lambda env_id: True))
    asked = []
    monkeypatch.setattr(evaluate, "evaluate_policy", lambda *args, deterministic: asked.append(deterministic) or (0.0, 0.0))
    run = Run(Path("logs"), "ppo", EnvironmentName("CartPole-v1"), 1)
    evaluated_return(run, run.agents["last"])
    assert asked == [kind == "neither"]


@pytest.mark.parametrize(
    ("env", "reason"),
    [("CartPole-v1", "the training was shorter than --eval-freq 25000"), ("Acrobot-v1", "it was not evaluated in training")],
)
def test_without_an_evaluation_there_is_no_best_agent(env, reason, logs, monkeypatch, capsys):
    monkeypatch.chdir(logs)
    monkeypatch.setattr(evaluate, "EPISODES", 1)
    assert main(["--algo", "ppo", "--env", env]) == 0
    output = capsys.readouterr().out
    assert f"best agent: none, as {reason}\n" in output
    assert f"rl_zoo3.cli plot_train -a ppo -e {env}" in output  # which has no β


@pytest.mark.slow
def test_a_folder_without_an_agent_is_passed_over(logs, tmp_path, monkeypatch):
    """As a training leaves it that was refused; and paths with blanks are quoted in the commands."""
    folder = tmp_path / "two words"
    shutil.copytree(logs / "logs", folder)
    (folder / "klip_ppo" / "CartPole-v1_2" / "CartPole-v1").mkdir(parents=True)
    run = Run.latest(folder, "klip_ppo", EnvironmentName("CartPole-v1"))
    assert run.number == 1
    monkeypatch.chdir(logs)
    for command in next_commands(run, best=True).values():
        assert any(word.startswith(str(tmp_path / "two words")) for word in shlex.split(command))


@pytest.mark.parametrize("algo", ["klip_ppo", pytest.param("ppo", marks=pytest.mark.slow)])
def test_the_commands_run_as_they_are_printed(logs, algo):
    output = python("-m", "sb3_klip.zoo.evaluate", "--algo", algo, "--env", "CartPole-v1", cwd=logs).stdout
    commands = dict(re.findall(r"^  (watch|film|plot): (.*)$", output, re.MULTILINE))
    for purpose, more in (("watch", ["--no-render"]), ("film", ["-n", "20"]), ("plot", [])):
        python(*shlex.split(commands[purpose])[1:], *more, cwd=logs, env={"MPLBACKEND": "agg"})
    folder = logs / "logs" / algo / "CartPole-v1_1"
    assert list(folder.glob("videos/*.mp4"))
    assert (folder / "distribution.svg").exists() == (algo == "klip_ppo")  # RL Zoo's figure opens in a window
    assert {path.name for path in logs.iterdir()} == {"logs"}  # which git ignores


PACKAGE = """
import gymnasium as gym

gym.register("OfAPackage-v0", entry_point="gymnasium.envs.classic_control:CartPoleEnv", max_episode_steps=50)
"""


def test_an_environment_of_the_users_own(tmp_path, capsys):
    (tmp_path / "own_package.py").write_text(PACKAGE)
    (tmp_path / "own.yml").write_text("OfAPackage-v0: {policy: MlpPolicy, n_timesteps: 64, n_steps: 32, batch_size: 32}")
    options = ["--env", "OfAPackage-v0", "-f", str(tmp_path / "logs")]
    own = ["--gym-packages", "own_package", "-conf", "own.yml", "--eval-freq", "-1"]
    python("-m", "rl_zoo3.train", "--algo", "klip_ppo", *options, *own, cwd=tmp_path)
    said = python("-m", "sb3_klip.zoo.evaluate", *options, cwd=tmp_path).stdout
    assert "last agent:" in said
    assert "--gym-packages own_package" in said
    assert "film:" not in said
    (tmp_path / "own_package.py").unlink()
    with pytest.raises(SystemExit) as stopped:
        main(options)
    assert stopped.value.code == 2
    assert "'own_package', which the training had as --gym-packages, cannot be imported" in capsys.readouterr().err


def test_what_needs_mujoco_is_drawn_without_a_display(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(Run, "tensorboard_log", lambda run: None)
    commands = {
        env: next_commands(Run(tmp_path, "klip_ppo", EnvironmentName(env), 1), False) for env in ("Hopper-v4", "CartPole-v1")
    }
    assert commands["Hopper-v4"]["film"].startswith("MUJOCO_GL=egl ")
    assert "MUJOCO_GL" not in commands["CartPole-v1"]["film"]
    monkeypatch.setattr(sys, "platform", "win32")
    assert "MUJOCO_GL" not in next_commands(Run(tmp_path, "klip_ppo", EnvironmentName("Hopper-v4"), 1), False)["film"]


def test_python_is_named_as_it_is_typed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv/bin/python"))
    assert evaluate._python() == str(Path(".venv/bin/python"))
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.touch(0o755)
    monkeypatch.setenv("PATH", f"{python.parent}{os.pathsep}{os.environ['PATH']}")
    assert evaluate._python() == "python"  # the virtual environment is active


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (
            ["--env", "CartPole-v0"],
            [
                "--env: ",
                "no finished run on 'CartPole-v0'. Finished runs: klip_ppo on CartPole-v1, ppo on Acrobot-v1, ",
                "Did you mean 'klip_ppo on CartPole-v1'?",
            ],
        ),
        (["--algo", "klip_pop", "--env", "CartPole-v1"], ["--algo: 'klip_pop'", "klip_ppo_lstm", "Did you mean 'klip_ppo'?"]),
        (["--env", "CartPole-v1", "-f", "nowhere"], ["--folder: nowhere is no folder"]),
        (["--env", "CartPole-v1", "--seed", "-1"], ["--seed: -1 must be 0 or more"]),
    ],
)
def test_errors_say_what_there_is(arguments, parts, logs, monkeypatch, capsys):
    monkeypatch.chdir(logs)
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    message = capsys.readouterr().err.partition("error: ")[2]
    for part in parts:
        assert part in message
