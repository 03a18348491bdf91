"""One cell: an ordinary run of RL Zoo, from its command to its result."""

import csv
import hashlib
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pandas as pd
import pytest
import yaml
from helpers import config, eventually, python, run, zoo_here
from small_suites import SUITE, TINY, digests, run_suite, trainings, write_suite
from stable_baselines3 import PPO

from sb3_klip.diagnostics import PERCENTILES
from sb3_klip.experiments import cell as cell_module
from sb3_klip.experiments.cell import CellError, commit, run_cell
from sb3_klip.experiments.folder import open_folder
from sb3_klip.experiments.results import POINTS, read_result
from sb3_klip.experiments.suite import read_suite


class Finished(NamedTuple):
    """A run of a suite, one of whose cells fails."""

    folder: Path
    suite: str
    output: str


def by_hand(recorded: str, folder: Path) -> None:
    """Type a command in a folder, in a shell that has this Python."""
    run("bash", "-c", recorded, cwd=folder, env={"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"})


def sha256_of_episodes(run_folder: Path) -> str:
    """The digest, from SB3's monitor files and nothing of ours."""
    rows = []
    monitors = list(run_folder.glob("*.monitor.csv"))
    for path in monitors:
        steps = 0
        for row in csv.DictReader(path.read_text().splitlines()[1:]):
            steps += int(row["l"]) * len(monitors)
            rows.append((steps, int(path.name.split(".")[0]), float(row["r"]), int(row["l"])))
    assert len(rows) > 3
    text = "\n".join(f"{env},{episode_return},{length}" for _, env, episode_return, length in sorted(rows))
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Finished:
    """A small suite, from the command line."""
    cwd = tmp_path_factory.mktemp("finished")
    methods = {"bad": {"learning_rate": 1.0e30, **TINY}, **SUITE["methods"]}
    suite = write_suite(cwd, seeds=[0], methods=methods)
    completed = python(*run_suite("--suite", suite, "-f", "out", "--workers", 1), cwd=cwd, status=1)
    return Finished(cwd / "out", suite, completed.stdout)


def test_a_failing_cell_does_not_stop_the_others(finished):
    assert set(digests(finished.folder)) == {f"CartPole-v1/{method}/seed-0.csv" for method in ("ppo", "step")}
    lines = finished.output.splitlines()
    assert lines[0] == f"3 cells, 0 finished already; results go to {finished.folder}"
    assert "failed CartPole-v1/bad/seed-0" in lines
    assert "finished CartPole-v1/ppo/seed-0" in lines
    assert "2 done, 0 running, 1 failed, 0 waiting" in finished.output

    # The end of its log, and how to go on.
    start = lines.index("CartPole-v1/bad/seed-0 exited with status 1. The end of its log:")
    assert lines[start + 1].startswith("    ")
    end = next(i for i in range(start, len(lines)) if not lines[i])
    assert "ValueError: KLipPPO with beta=step() stopped at 256 steps" in lines[end - 1]
    assert "1 of 3 cells failed. To try them again:" in lines[end + 1]
    assert lines[end + 2] == f"  python -m sb3_klip.experiments run --suite {finished.suite} -f out --workers 1"


def test_equal_methods_have_equal_digests(finished):
    assert len(set(digests(finished.folder).values())) == 1


def test_a_result_says_how_it_was_made(finished):
    run_folder = finished.folder / "runs" / "CartPole-v1" / "step" / "seed-0" / "klip_ppo" / "CartPole-v1_1"
    path = finished.folder / "results" / "CartPole-v1" / "step" / "seed-0.csv"
    result = read_result(path)
    about = {key: result.about[key] for key in ("task", "method", "seed", "algo", "timesteps")}
    assert about == {"task": "CartPole-v1", "method": "step", "seed": 0, "algo": "klip_ppo", "timesteps": 512}
    assert result.about["hyperparams"] == {"beta": "step", **TINY}
    assert result.about["episodes_sha256"] == sha256_of_episodes(run_folder)
    assert result.about["versions"]["stable-baselines3"] == sys.modules["stable_baselines3"].__version__
    assert result.about["commit"] == commit()
    assert result.about["processor"]
    assert 0 < result.about["seconds"] < 600
    # Another line for each part of training, and what the algorithm logs.
    assert len(path.read_text().splitlines()) == 1 + 1 + POINTS
    assert {"timesteps", "episodes", "return", "kill_fraction", "beta_p50"} <= set(result.curve)
    assert result.curve["episodes"].sum() == result.about["episodes"]
    assert result.curve["timesteps"].iloc[-1] == 512


def test_enjoy_finds_the_agent(finished):
    folder = "runs/CartPole-v1/step/seed-0"
    play = ("--algo", "klip_ppo", "--env", "CartPole-v1", "-f", folder, "--no-render", "-n", 100)
    output = zoo_here("enjoy", *play, cwd=finished.folder)
    assert f"Loading {folder}/klip_ppo/CartPole-v1_1/CartPole-v1.zip" in output


def test_a_cell_is_an_ordinary_run_of_rl_zoo(finished):
    run_folder = finished.folder / "runs" / "CartPole-v1" / "ppo" / "seed-0" / "ppo" / "CartPole-v1_1"
    assert PPO.load(run_folder / "CartPole-v1.zip").num_timesteps == 512
    assert config(run_folder)["n_steps"] == 64
    # Not what ends with its worker: by hand there is none.
    typed = (run_folder / "CartPole-v1" / "command.txt").read_text()
    assert typed.startswith(f"{sys.executable} -m rl_zoo3.train --algo ppo --env CartPole-v1 --seed 0 ")
    arguments = yaml.load((run_folder / "CartPole-v1" / "args.yml").read_text(), Loader=yaml.UnsafeLoader)
    assert (arguments["seed"], arguments["n_timesteps"], arguments["conf_file"]) == (0, 512, SUITE["hyperparams"])


@pytest.mark.slow
def test_the_recorded_command_gives_the_same(finished, tmp_path):
    (result,) = (finished.folder / "results").glob("*/step/seed-0.csv")
    copy = tmp_path / "copy"
    shutil.copytree(finished.folder, copy, ignore=shutil.ignore_patterns("runs", "results"))
    by_hand(read_result(result).about["command"], copy)
    run_folder = copy / "runs" / "CartPole-v1" / "step" / "seed-0" / "klip_ppo" / "CartPole-v1_1"
    assert sha256_of_episodes(run_folder) == read_result(result).about["episodes_sha256"]


def test_columns_of_a_log_through_rl_zoo(finished):
    for method, ours in (("ppo", False), ("step", True)):
        log = pd.read_csv(finished.folder / "runs" / "CartPole-v1" / method / "seed-0" / "progress.csv")
        assert log["time/total_timesteps"].tolist() == [256, 512]
        assert {"rollout/ep_rew_mean", "train/clip_fraction"} <= set(log)
        assert ({"train/kill_fraction", *(f"train/beta_p{level:02}" for level in PERCENTILES)} <= set(log)) == ours


@pytest.mark.slow
def test_hyperparameters_in_a_file_beside_the_suite(tmp_path, monkeypatch):
    """Whatever the folder that the command is typed in; and the recorded command needs nothing outside the suite's folder."""
    entry = {"policy": "MlpPolicy", "n_timesteps": 128, "n_steps": 64, "n_epochs": 1, "learning_rate": 0.012}
    suite_file = write_suite(tmp_path / "mine", hyperparams="own/tuned.yml", timesteps=None, methods={"step": {}}, seeds=[4])
    (tmp_path / "mine" / "own").mkdir()
    (tmp_path / "mine" / "own" / "tuned.yml").write_text(yaml.safe_dump({"CartPole-v1": entry}))
    monkeypatch.chdir(tmp_path)
    suite = read_suite("mine/mine.yml")
    assert suite_file == str(tmp_path / "mine" / "mine.yml")
    (cell,) = suite.cells
    assert cell.timesteps == 128

    folder = tmp_path / "out"
    open_folder(folder, suite, 1)
    run_cell(cell, folder)
    result = read_result(cell.result_file(folder))
    assert config(cell.run_folder(folder) / "klip_ppo" / "CartPole-v1_1")["learning_rate"] == 0.012

    shutil.rmtree(tmp_path / "mine")
    copy = folder.rename(tmp_path / "moved")
    shutil.rmtree(copy / "runs")
    by_hand(result.about["command"], copy)
    assert sha256_of_episodes(cell.run_folder(copy) / "klip_ppo" / "CartPole-v1_1") == result.about["episodes_sha256"]


@pytest.mark.slow
@pytest.mark.parametrize("n_steps", [5, 200])
def test_algorithms_that_log_now_and_then(tmp_path, n_steps):
    """A2C's last row is before its last step, or there is none."""
    entry = {"policy": "MlpPolicy", "n_timesteps": 100}
    (tmp_path / "tuned.yml").write_text(yaml.safe_dump({"default": entry}))
    methods = {"a2c": {"algo": "a2c", "n_steps": n_steps}}
    suite = read_suite(write_suite(tmp_path, hyperparams="tuned.yml", timesteps=720, methods=methods))
    open_folder(tmp_path / "out", suite, 1)
    run_cell(suite.cells[0], tmp_path / "out")
    assert read_result(suite.cells[0].result_file(tmp_path / "out")).about["timesteps"] == 720


def test_interrupted_training_is_not_finished(tmp_path):
    """RL Zoo saves the agent and exits with 0 when it gets Ctrl-C."""
    suite = read_suite(write_suite(tmp_path, timesteps=10_000_000, methods={"ppo": {"algo": "ppo"}}, seeds=[0]))
    folder = tmp_path / "out"
    (cell,) = suite.cells
    open_folder(folder, suite, 1)

    def interrupt() -> None:
        eventually(lambda: (cell.run_folder(folder) / "progress.csv").is_file() and trainings(folder))
        trainings(folder)[0].send_signal(signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(CellError, match=r"^CartPole-v1/ppo/seed-0 was interrupted before its last step"):
        run_cell(cell, folder)
    thread.join()
    assert list(cell.run_folder(folder).glob("ppo/*/CartPole-v1.zip")), "RL Zoo did not end as it does after Ctrl-C"
    assert not cell.result_file(folder).exists()


# -- the commit --------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Callable[..., str]:
    """A repository, in which this package seems to lie."""
    package = tmp_path / "checkout" / "sb3_klip"
    (package / "experiments").mkdir(parents=True)
    (tmp_path / "checkout" / "hyperparams").mkdir()
    for path in ("sb3_klip/experiments/cell.py", "sb3_klip/surrogate.py", "hyperparams/paper.yml", "README.md"):
        (tmp_path / "checkout" / path).touch()
    monkeypatch.setattr(cell_module, "__file__", str(package / "experiments" / "cell.py"))
    monkeypatch.setattr(
        cell_module.importlib.metadata, "distribution", lambda name: SimpleNamespace(read_text=lambda name: None)
    )
    identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")

    def git(*words: str) -> str:
        return run("git", *identity, *words, cwd=tmp_path / "checkout").stdout.strip()

    git("init", "-q")
    return git


@pytest.mark.parametrize("changed", ["sb3_klip/surrogate.py", "hyperparams/paper.yml", "sb3_klip/experiments/cell.py"])
def test_commit_of_a_checkout(checkout, tmp_path, changed):
    checkout("add", ".")
    checkout("commit", "-qm", "all")
    head = checkout("rev-parse", "HEAD")
    assert commit() == head
    (tmp_path / "checkout" / "README.md").write_text("that does not matter")
    assert commit() == head
    (tmp_path / "checkout" / changed).write_text("that does")
    assert commit() == f"{head}+changes"


def test_commit_of_a_repository_that_the_package_is_no_part_of(checkout):
    """A virtual environment within somebody's project."""
    checkout("add", "README.md")
    checkout("commit", "-qm", "all")
    assert commit() is None


def test_commit_that_pip_knows(monkeypatch):
    origin = json.dumps({"url": "https://example.org", "vcs_info": {"vcs": "git", "commit_id": "abc"}})
    monkeypatch.setattr(
        cell_module.importlib.metadata, "distribution", lambda name: SimpleNamespace(read_text=lambda name: origin)
    )
    assert commit() == "abc"
