"""``python -m sb3_klip.experiments run``: what it trains, what it leaves, and what is left when something goes wrong."""

import contextlib
import csv
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import dask
import dask.system
import gymnasium as gym
import numpy as np
import pandas as pd
import psutil
import pytest
import yaml
from commands import config, python, run
from dask.distributed import Client, LocalCluster
from filelock import FileLock
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import CSVOutputFormat
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sb3_klip import KLipPPO
from sb3_klip.experiments import cell as cell_module
from sb3_klip.experiments import scheduling
from sb3_klip.experiments.__main__ import main
from sb3_klip.experiments.cell import Cell, CellError, commit, run_cell
from sb3_klip.experiments.folder import check_worker, open_folder
from sb3_klip.experiments.results import (
    POINTS,
    Result,
    digest,
    read_episodes,
    read_result,
    summarize,
    write_result,
)
from sb3_klip.experiments.suite import Suite, included, read_suite, select
from sb3_klip.callbacks import CSVLogCallback
from sb3_klip.diagnostics import PERCENTILES

# Starting RL Zoo takes longer than these steps.
TINY = {"n_steps": 64, "n_epochs": 1}
SUITE: dict[str, Any] = {
    "hyperparams": "sb3_klip.hyperparams.paper",
    "timesteps": 512,
    "tasks": ["CartPole-v1"],
    "seeds": [0, 1],
    "methods": {"ppo": {"algo": "ppo", **TINY}, "step": {"beta": "step", **TINY}},
}
PAPER_TASKS = ["Hopper-v4", "HalfCheetah-v4", "Walker2d-v4", "Ant-v4", "Humanoid-v4", "CartPole-v1", "LunarLander-v3"]


@pytest.fixture(autouse=True)
def _signals(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The command sets handlers."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def write_suite(folder: Path, **changes: Any) -> str:
    """The suite as a file, with other keys; a key that is None is left out."""
    content = {key: value for key, value in {**SUITE, **changes}.items() if value is not None}
    path = folder / "mine.yml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return str(path)


def eventually(condition: Callable[[], Any], seconds: float = 300) -> None:
    """Wait until the condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} seconds"
        time.sleep(0.05)


def trainings(folder: Path) -> list[psutil.Process]:
    """The processes that train below a suite's folder."""
    found = []
    for process in psutil.process_iter():
        try:
            is_training = any(word.startswith("runs/") for word in process.cmdline())
            if is_training and Path(process.cwd()) == folder.resolve():
                found.append(process)
        except psutil.Error:  # it has ended, or is not ours
            continue
    return found


def digests(folder: Path) -> dict[str, str]:
    """What was trained, by cell: equal if and only if all episodes are."""
    paths = sorted(folder.glob("results/**/*.csv"))
    return {str(path.relative_to(folder / "results")): read_result(path).about["episodes_sha256"] for path in paths}


def snapshot(folder: Path, *patterns: str) -> dict[Path, tuple[int, int]]:
    """Inode and time of each file that matches: they change when it is written again."""
    paths = [path for pattern in patterns for path in folder.glob(pattern) if path.is_file()]
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}


# -- the included suites -----------------------------------------------------------------------------------------------


def test_all_included_suites_can_be_run():
    assert included() == ["coefficients", "knobs", "paper", "smoke"]
    for name in included():
        suite = read_suite(name)
        assert suite.name == name
        names = [cell.name for cell in suite.cells]
        assert len(set(names)) == len(names) == len({cell.result(Path()) for cell in suite.cells})


@pytest.mark.parametrize(
    ("name", "tasks", "methods", "seeds"),
    [
        ("paper", PAPER_TASKS, 4, 5),
        ("coefficients", ["Hopper-v4", "HalfCheetah-v4", "Walker2d-v4"], 8, 5),
        ("knobs", ["CartPole-v1", "HalfCheetah-v4", "Hopper-v4"], 17, 5),
        ("smoke", ["CartPole-v1", "Hopper-v4"], 4, 2),
    ],
)
def test_cells_of_an_included_suite(name, tasks, methods, seeds):
    cells = read_suite(name).cells
    assert len(cells) == len(tasks) * methods * seeds
    assert list(dict.fromkeys(cell.task for cell in cells)) == tasks
    assert {cell.seed for cell in cells} == set(range(seeds))
    per_seed = len(tasks) * methods
    assert [cell.seed for cell in cells] == sorted(cell.seed for cell in cells), "whole tables must come early"
    assert {(c.task, c.method) for c in cells[:per_seed]} == {(c.task, c.method) for c in cells[-per_seed:]}
    assert len({(c.task, c.method) for c in cells[:per_seed]}) == per_seed


def test_paper_suite_is_the_table_of_the_paper():
    cells = {(cell.task, cell.method): cell for cell in read_suite("paper").cells if cell.seed == 0}
    for task in PAPER_TASKS:
        assert {cell.timesteps for (of, _), cell in cells.items() if of == task} == {100_000 if "Cart" in task else 1_000_000}
        assert (cells[task, "ppo"].algo, cells[task, "ppo"].hyperparams) == ("ppo", {})
        assert (cells[task, "step"].algo, cells[task, "step"].hyperparams) == ("klip_ppo", {"beta": "step"})
        assert cells[task, "fixed"].hyperparams == {"beta": "fixed", "beta_kwargs": {"value": 1.0}}
        assert cells[task, "adaptive"].hyperparams == {"beta": "adaptive", "beta_kwargs": {"kl_target": 0.02}}
    # The hyperparameters' own length, which nothing overrides.
    assert "-n" not in cells["Ant-v4", "ppo"].command()


def test_knobs_are_those_of_the_paper():
    cells = {cell.method: cell for cell in read_suite("knobs").cells}
    assert all(cell.algo == "klip_ppo" for cell in cells.values())
    swept = {
        "clip_range": {cell.hyperparams["clip_range"] for cell in cells.values() if "clip_range" in cell.hyperparams},
        **{
            (beta, key): {cell.hyperparams["beta_kwargs"][key] for cell in cells.values() if cell.hyperparams["beta"] == beta}
            for beta, key in (("fixed", "value"), ("adaptive", "kl_target"), ("linear_ramp", "width"))
        },
    }
    assert swept == {
        "clip_range": {0.1, 0.2, 0.3},
        ("fixed", "value"): {0.1, 0.3, 1, 3, 10},
        ("adaptive", "kl_target"): {0.003, 0.01, 0.02, 0.03, 0.1},
        ("linear_ramp", "width"): {0.01, 0.03, 0.05, 0.1},
    }
    for method, cell in cells.items():
        knob, value = method.split("=")
        given = {**cell.hyperparams, **cell.hyperparams.get("beta_kwargs", {})}
        name = {"fixed": "value", "linear_ramp": "width"}.get(knob, knob)
        assert given[name] == float(value)


def test_coefficients_suite_has_published_defaults():
    for cell in read_suite("coefficients").cells:
        assert cell.hyperparams == {"beta": cell.method}


def test_smoke_suite_overrides_the_length():
    cell = read_suite("smoke").cells[0]
    assert cell.timesteps == 8192
    assert cell.command()[cell.command().index("-n") + 1] == "8192"


# -- a suite of one's own ----------------------------------------------------------------------------------------------


def test_cells_of_a_suite(tmp_path):
    suite = read_suite(write_suite(tmp_path))
    assert suite.name == "mine"
    assert [(cell.seed, cell.method) for cell in suite.cells] == [(0, "ppo"), (0, "step"), (1, "ppo"), (1, "step")]
    assert suite.cells[1] == Cell(
        "CartPole-v1", "step", 0, "klip_ppo", SUITE["hyperparams"], 512, True, {"beta": "step", **TINY}
    )


def test_a_method_may_have_no_hyperparameters_of_its_own(tmp_path):
    assert [cell.hyperparams for cell in read_suite(write_suite(tmp_path, methods={"plain": {}}, seeds=[3])).cells] == [{}]


def test_selection(tmp_path):
    suite = read_suite(write_suite(tmp_path, tasks=["CartPole-v1", "Hopper-v4"]))

    def names(*selection: Sequence[Any]) -> list[str]:
        return [cell.name for cell in select(suite, *selection)]

    assert names([], [], []) == [cell.name for cell in suite.cells]
    assert names(["Hopper-v4"], ["ppo"], []) == ["Hopper-v4/ppo/seed-0", "Hopper-v4/ppo/seed-1"]
    assert names(["Hopper-v4"], ["ppo"], [7, 1]) == ["Hopper-v4/ppo/seed-7", "Hopper-v4/ppo/seed-1"]
    assert names(["Hopper-v4"], ["ppo"], [7, 7]) == ["Hopper-v4/ppo/seed-7"]
    assert len(names([], [], [5])) == 4


@pytest.mark.parametrize("task", ["CartPoleNoVel-v1", "BreakoutNoFrameskip-v4"])
def test_tasks_are_those_that_rl_zoo_knows(tmp_path, task):
    (tmp_path / "tuned.yml").write_text("default: {n_timesteps: 100}\natari: {n_timesteps: 300}\n")
    suite = read_suite(write_suite(tmp_path, hyperparams="tuned.yml", tasks=[task], timesteps=None))
    # RL Zoo has an entry for all Atari games.
    assert {cell.timesteps for cell in suite.cells} == {300 if "Breakout" in task else 100}


def test_a_slash_in_the_name_of_a_task_is_no_folder(tmp_path):
    gym.register("some/CartPole-v1", entry_point="gymnasium.envs.classic_control:CartPoleEnv")
    try:
        (cell, *_) = read_suite(write_suite(tmp_path, tasks=["some/CartPole-v1"])).cells
    finally:
        del gym.registry["some/CartPole-v1"]
    assert cell.result(tmp_path).parents[2] == tmp_path / "results"
    assert cell.command()[cell.command().index("--env") + 1] == "some/CartPole-v1"


# -- real trainings ----------------------------------------------------------------------------------------------------


class Finished(NamedTuple):
    """A run of a suite, one of whose cells fails."""

    folder: Path
    suite: str
    output: str


def command(*arguments: object) -> tuple[object, ...]:
    """The arguments of Python for ``run``."""
    return ("-m", "sb3_klip.experiments", "run", *arguments)


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
    methods = {"bad": {"policy": "NoSuchPolicy"}, **SUITE["methods"]}
    suite = write_suite(cwd, seeds=[0], methods=methods)
    completed = python(*command("--suite", suite, "-f", "out", "--workers", 2), cwd=cwd, status=1)
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
    assert "ValueError: policy='NoSuchPolicy' must be one of MlpPolicy" in lines[end - 1]
    assert "1 of 3 cells failed. To try them again:" in lines[end + 1]
    assert lines[end + 2] == f"  python -m sb3_klip.experiments run --suite {finished.suite} -f out --workers 2"


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
    play = ("--algo", "klip_ppo", "--env", "CartPole-v1", "-f", "runs/CartPole-v1/step/seed-0", "--no-render", "-n", 100)
    python("-m", "rl_zoo3.enjoy", *play, cwd=finished.folder)


def test_a_cell_is_an_ordinary_run_of_rl_zoo(finished):
    run_folder = finished.folder / "runs" / "CartPole-v1" / "ppo" / "seed-0" / "ppo" / "CartPole-v1_1"
    assert PPO.load(run_folder / "CartPole-v1.zip").num_timesteps == 512
    assert config(run_folder)["n_steps"] == 64
    # Not what ends with its worker: by hand there is none.
    typed = (run_folder / "CartPole-v1" / "command.txt").read_text()
    assert typed.startswith(f"{sys.executable} -m rl_zoo3.train --algo ppo --env CartPole-v1 --seed 0 ")
    arguments = yaml.load((run_folder / "CartPole-v1" / "args.yml").read_text(), Loader=yaml.UnsafeLoader)
    assert (arguments["seed"], arguments["n_timesteps"], arguments["conf_file"]) == (0, 512, SUITE["hyperparams"])


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
    result = read_result(cell.result(folder))
    assert config(cell.run(folder) / "klip_ppo" / "CartPole-v1_1")["learning_rate"] == 0.012

    shutil.rmtree(tmp_path / "mine")
    copy = folder.rename(tmp_path / "moved")
    shutil.rmtree(copy / "runs")
    by_hand(result.about["command"], copy)
    assert sha256_of_episodes(cell.run(copy) / "klip_ppo" / "CartPole-v1_1") == result.about["episodes_sha256"]


def test_hyperparameters_that_are_no_plain_data(tmp_path, monkeypatch):
    """As a module may have them; a folder is gone on with, and a change is noticed."""
    module = "from torch import nn\nhyperparams = {'default': {'n_timesteps': 9, 'activation': nn.ReLU, 'rate': lambda x: x}}"
    (tmp_path / "own_tuned.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    path = write_suite(tmp_path, hyperparams="own_tuned", methods={"step": {}})
    open_folder(tmp_path / "out", read_suite(path), 1)
    sys.modules.pop("own_tuned")
    open_folder(tmp_path / "out", read_suite(path), 1)
    sys.modules.pop("own_tuned").hyperparams["default"]["activation"] = None
    (tmp_path / "own_tuned.py").write_text(module.replace("ReLU", "Tanh  "))
    with pytest.raises(ValueError, match="activation: 'ReLU' there, 'Tanh' here"):
        open_folder(tmp_path / "out", read_suite(path), 1)
    sys.modules.pop("own_tuned")


def test_what_rl_zoo_takes_for_itself_may_be_of_a_method(tmp_path):
    method = {"env_kwargs": {"sutton_barto_reward": True}, "monitor_kwargs": {}, "n_envs": 2}
    assert read_suite(write_suite(tmp_path, methods={"own": method}, seeds=[0])).cells[0].hyperparams == method


def test_hyperparameters_that_have_changed(tmp_path):
    def suite(n_steps: int, n_envs: int) -> Suite:
        entry = {"n_timesteps": 100, "n_steps": n_steps, "n_envs": n_envs}
        (tmp_path / "tuned.yml").write_text(yaml.safe_dump({"default": entry}))
        return read_suite(write_suite(tmp_path, hyperparams="tuned.yml", methods={"step": {}}))

    open_folder(tmp_path / "out", suite(64, 1), 1)
    open_folder(tmp_path / "out", suite(64, 1), 1)
    with pytest.raises(ValueError, match="has results of another suite or version") as error:
        open_folder(tmp_path / "out", suite(32, 2), 1)
    assert set(str(error.value).splitlines()[1:]) == {
        "  - definition.CartPole-v1/step.n_steps: 64 there, 32 here",
        "  - definition.CartPole-v1/step.n_envs: 1 there, 2 here",
    }


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
    assert read_result(suite.cells[0].result(tmp_path / "out")).about["timesteps"] == 720


def test_interrupted_training_is_not_finished(tmp_path):
    """RL Zoo saves the agent and exits with 0 when it gets Ctrl-C."""
    suite = read_suite(write_suite(tmp_path, timesteps=10_000_000, methods={"ppo": {"algo": "ppo"}}, seeds=[0]))
    folder = tmp_path / "out"
    (cell,) = suite.cells
    open_folder(folder, suite, 1)

    def interrupt() -> None:
        eventually(lambda: (cell.run(folder) / "progress.csv").is_file() and trainings(folder))
        trainings(folder)[0].send_signal(signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(CellError, match=r"^CartPole-v1/ppo/seed-0 was interrupted before its last step"):
        run_cell(cell, folder)
    thread.join()
    assert list(cell.run(folder).glob("ppo/*/CartPole-v1.zip")), "RL Zoo did not end as it does after Ctrl-C"
    assert not cell.result(folder).exists()


# -- the driver, with trainings that only pretend ----------------------------------------------------------------------

# It writes what RL Zoo does, and notes that it has begun; files of its folder say what else it is to do.
FAKE = """#!{python} -IS
import argparse, json, os, signal, sys, time, zipfile
from pathlib import Path

home = Path({home!r})
parser = argparse.ArgumentParser()
for option, kind in (("-m", str), ("--algo", str), ("--env", str), ("--seed", int), ("-n", int), ("-f", str)):
    parser.add_argument(option, type=kind)
args, _ = parser.parse_known_args()
cell = args.f.removeprefix("runs/")
with (home / "started").open("a") as file:
    file.write(cell + "\\n")
todo = home / cell
if (todo / "wait").exists():
    (todo / "waits").touch()
while (todo / "wait").exists():
    time.sleep(0.05)
steps = args.n // 2 if (todo / "interrupted").exists() else args.n
run = Path(args.f, args.algo, args.env + "_1")
run.mkdir(parents=True)
lengths = [args.seed + 10 * i for i in range(1, 6)]
rows = "".join(f"{{length}}.0,{{length}},0.1\\n" for length in lengths)
(run / "0.monitor.csv").write_text("#{{}}\\nr,l,t\\n" + rows)
Path(args.f, "progress.csv").write_text(f"time/total_timesteps,train/kill_fraction\\n{{steps}},0.25\\n")
if (todo / "fails").exists():
    sys.exit("it fails")
if (todo / "killed").exists():
    os.kill(os.getpid(), signal.SIGKILL)
with zipfile.ZipFile(run / (args.env + ".zip"), "w") as file:
    file.writestr("data", json.dumps({{"num_timesteps": steps}}))
"""


class Fake:
    """A cluster in this process, whose workers start something that is quicker than RL Zoo."""

    def __init__(self, home: Path, address: str):
        self.home, self.address = home, address
        self.folder = home / "out"
        self.suite = write_suite(home)

    @property
    def started(self) -> list[str]:
        """Each cell that a training was started for, in order."""
        path = self.home / "started"
        return path.read_text().splitlines() if path.exists() else []

    def tell(self, cell: str, what: str) -> Path:
        """What a cell's training is to do."""
        path = self.home / cell / what
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        return path

    def run(self, *options: str) -> int:
        """The command."""
        return main(["run", "--suite", self.suite, "-f", str(self.folder), "--scheduler", self.address, *options])


@contextlib.contextmanager
def in_this_process(workers: int) -> Iterator[str]:
    """A scheduler whose workers are threads; without Dask's profiler, which may hang for ever (python/cpython#106883)."""
    options = {"threads_per_worker": 1, "processes": False, "dashboard_address": "127.0.0.1:0"}
    no_profiler = {"distributed.worker.profile.enabled": False}
    with dask.config.set(no_profiler), LocalCluster(n_workers=workers, **options) as cluster:
        yield cluster.scheduler_address


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A scheduler with two workers."""
    with in_this_process(2) as address:
        yield address


@pytest.fixture
def fake(tmp_path, address, monkeypatch) -> Fake:
    """Trainings that only pretend."""
    program = tmp_path / "fake"
    program.write_text(FAKE.format(python=sys.executable, home=str(tmp_path)))
    program.chmod(0o755)
    monkeypatch.setattr(cell_module.sys, "executable", str(program))
    monkeypatch.setattr(scheduling, "INTERVAL", 0.05)
    return Fake(tmp_path, address)


CELLS = [f"CartPole-v1/{method}/seed-{seed}" for seed in (0, 1) for method in ("ppo", "step")]


def test_finished_cells_are_never_run_again(fake, capsys):
    assert fake.run() == 0
    assert sorted(fake.started) == sorted(CELLS)
    out = capsys.readouterr().out
    assert out.splitlines()[0] == f"4 cells, 0 finished already; results go to {fake.folder}"
    assert out.splitlines()[-1] == f"  python -m sb3_klip.experiments report {fake.folder}"
    before = snapshot(fake.folder, "runs/**/*", "results/**/*")
    assert len(before) > 4 * 4

    assert fake.run() == 0
    assert capsys.readouterr().out.splitlines()[0] == f"4 cells, 4 finished already; results go to {fake.folder}"
    assert len(fake.started) == 4
    assert snapshot(fake.folder, "runs/**/*", "results/**/*") == before

    # More seeds go into the same folder.
    assert fake.run("--methods", "step", "--seeds", "0", "5") == 0
    assert fake.started[4:] == ["CartPole-v1/step/seed-5"]
    assert before.items() <= snapshot(fake.folder, "runs/**/*", "results/**/*").items()


def test_a_half_written_run_is_made_again(fake):
    run_folder = fake.folder / "runs" / CELLS[1]
    (run_folder / "klip_ppo" / "CartPole-v1_1").mkdir(parents=True)
    (run_folder / "klip_ppo" / "CartPole-v1_1" / "0.monitor.csv").write_text("#{}\nr,l,t\n9.0,9,0.1\n")
    (run_folder / "progress.csv").write_text("time/total_timesteps\n256\n")
    (run_folder / "log.txt").write_text("half of it\n")
    assert fake.run() == 0
    assert digests(fake.folder)[f"{CELLS[1]}.csv"] == digests(fake.folder)[f"{CELLS[0]}.csv"]
    assert [path.name for path in (run_folder / "klip_ppo").iterdir()] == ["CartPole-v1_1"]


def test_a_finished_training_without_its_result(fake):
    """The worker was killed between the two."""
    assert fake.run() == 0
    path = fake.folder / "results" / f"{CELLS[0]}.csv"
    before = path.read_bytes()
    path.unlink()
    assert fake.run() == 0
    assert path.read_bytes() == before
    assert len(fake.started) == 4


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("fails", "exited with status 1. The end of its log:\n    it fails\n"),
        ("killed", "exited with status -9. The end of its log:\n"),
        ("interrupted", "was interrupted before its last step. The end of its log:\n"),
    ],
)
def test_a_cell_that_failed_is_tried_again(fake, capsys, what, reason):
    told = fake.tell(CELLS[2], what)
    assert fake.run() == 1
    assert f"\n{CELLS[2]} {reason}" in capsys.readouterr().out
    assert set(digests(fake.folder)) == {f"{cell}.csv" for cell in CELLS if cell != CELLS[2]}

    told.unlink()
    assert fake.run() == 0
    assert fake.started[4:] == [CELLS[2]]
    assert set(digests(fake.folder)) == {f"{cell}.csv" for cell in CELLS}


def test_the_way_to_go_on(fake, capsys):
    """What was given to main, and not what pytest was started with."""
    fake.tell(CELLS[0], "fails")
    assert fake.run("--methods", "ppo") == 1
    last = capsys.readouterr().out.splitlines()[-1]
    options = f"run --suite {fake.suite} -f {fake.folder} --scheduler {fake.address} --methods ppo"
    assert last == f"  python -m sb3_klip.experiments {options}"


def test_cells_start_in_the_order_of_the_suite(fake):
    seeds = [str(seed) for seed in range(6)]
    with in_this_process(1) as fake.address:
        assert fake.run("--seeds", *seeds) == 0
    assert fake.started == [f"CartPole-v1/{method}/seed-{seed}" for seed in seeds for method in ("ppo", "step")]


def test_interrupted_driver(fake, capsys, monkeypatch):
    """Ctrl-C, while cells of an external scheduler's workers run: their workers stay, and their trainings must not."""
    for cell in CELLS[:2]:
        fake.tell(cell, "wait")
    ended, reset = [], signal.getsignal(signal.SIGINT)
    original = scheduling.wait

    def wait(*args: Any, **kwargs: Any) -> Any:
        if all((fake.home / cell / "waits").exists() for cell in CELLS[:2]):
            ended.extend(trainings(fake.folder))
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(scheduling, "wait", wait)
        assert fake.run() == 130
    signal.signal(signal.SIGINT, reset)
    assert len(ended) == 2
    eventually(lambda: not trainings(fake.folder), 10)
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in ended)
    out = capsys.readouterr().out
    assert f"Interrupted. What is finished is in {fake.folder}; to go on:\n  python -m sb3_klip.experiments run" in out
    assert digests(fake.folder) == {}

    for cell in CELLS[:2]:
        (fake.home / cell / "wait").unlink()
    assert fake.run() == 0
    assert set(digests(fake.folder)) == {f"{cell}.csv" for cell in CELLS}
    assert sorted(fake.started[2:]) == sorted(CELLS)


def test_another_run_is_at_work(fake, capsys):
    fake.folder.mkdir()
    with FileLock(fake.folder / ".lock"):
        assert fake.run() == 2
    assert capsys.readouterr().err == f"another run is at work in {fake.folder}\n"
    assert fake.started == []
    assert fake.run() == 0


def test_workers_that_cannot_run_the_cells(fake, capsys, monkeypatch):
    monkeypatch.setattr(scheduling, "check_worker", lambda folder: f"{folder} is on the moon")
    assert fake.run() == 2
    first, *workers = capsys.readouterr().err.splitlines()
    assert first == "these workers cannot run the cells:"
    assert len(workers) == 2
    assert all(line.startswith("  - inproc://") and line.endswith(f": {fake.folder} is on the moon") for line in workers)
    assert fake.started == []


def test_a_worker_that_comes_later_and_cannot_run_a_cell(fake, capsys, monkeypatch):
    asked = fake.home / "asked"

    def check(folder: str) -> str | None:
        with asked.open("a") as file:
            file.write("asked\n")
        return None if asked.read_text().count("asked") <= 2 else "it has lost its disk"

    monkeypatch.setattr(scheduling, "check_worker", check)
    assert fake.run("--methods", "ppo", "--seeds", "0") == 1
    assert "CartPole-v1/ppo/seed-0 did not start on its worker: it has lost its disk" in capsys.readouterr().out
    assert fake.started == []


# -- workers and schedulers --------------------------------------------------------------------------------------------


def test_what_hinders_a_worker(tmp_path):
    folder = tmp_path / "out"
    assert "does not see" in str(check_worker(str(folder)))
    assert "which must be on a disk that all workers share" in str(check_worker(str(folder)))
    open_folder(folder, read_suite(write_suite(tmp_path)), 1)
    assert check_worker(str(folder)) is None

    path = folder / "suite.json"
    content = json.loads(path.read_text())
    ours = content["versions"]["torch"]
    content["versions"]["torch"] = "1.0"
    path.write_text(json.dumps(content))
    assert check_worker(str(folder)) == f"its versions are not those of {folder}: torch: '1.0' there, {ours!r} here"


@pytest.mark.filterwarnings("error:Port 8787 is already in use")
def test_workers_of_this_machine(tmp_path):
    workers = 2 if dask.system.CPU_COUNT == 1 else 1
    with socket.socket() as dashboard:
        with contextlib.suppress(OSError):  # somebody else's is there
            dashboard.bind(("", 8787))
            dashboard.listen()
        with scheduling.connect(None, workers, tmp_path) as client:
            threads = client.nthreads()
            profilers = client.run(lambda dask_worker: "profile" in dask_worker.periodic_callbacks)
    assert list(threads.values()) == [1] * workers
    # Dask's profiler may hang a worker for ever (python/cpython#106883).
    assert list(profilers.values()) == [False] * workers


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:9", "no such thing", "udp://127.0.0.1:9"])
def test_a_scheduler_that_does_not_answer(tmp_path, capsys, monkeypatch, address):
    # Dask tries for as long as it may.
    monkeypatch.setattr(scheduling, "Client", lambda address, timeout: Client(address, timeout="0.5s"))
    folder = tmp_path / "out"
    assert main(["run", "--suite", write_suite(tmp_path), "-f", str(folder), "--scheduler", address]) == 2
    assert capsys.readouterr().err.startswith(f"--scheduler={address!r} does not answer: ")


@pytest.mark.slow
def test_a_scheduler_that_does_not_answer_from_the_command_line(tmp_path):
    options = command("--suite", write_suite(tmp_path), "-f", "out", "--scheduler", "tcp://127.0.0.1:9")
    completed = python(*options, cwd=tmp_path, status=2)
    assert completed.stderr.startswith("--scheduler='tcp://127.0.0.1:9' does not answer: ")
    assert "Traceback" not in completed.stderr


# -- kills and interrupts, for real ------------------------------------------------------------------------------------

# Some seconds each, so that they can be caught in the middle.
LONG: dict[str, Any] = {"timesteps": 20_480, "seeds": [0, 1, 2], "methods": {"step": {"beta": "step", "n_epochs": 2}}}


class Driver:
    """The command as a process, in a session of its own as in a terminal."""

    def __init__(self, folder: Path, *options: object):
        self.folder = folder
        self.log = folder.with_suffix(".log")
        suite = write_suite(folder.parent, **LONG)
        words = [sys.executable, *command("--suite", suite, "-f", folder, *options)]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [str(word) for word in words],
                cwd=folder.parent,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def end(self, status: int, seconds: float = 300) -> str:
        """Wait for its end."""
        assert self.process.wait(seconds) == status, self.log.read_text()
        return self.log.read_text()

    def is_in_the_middle(self) -> bool:
        """Whether one cell is finished, and another is being trained and has logged something."""
        assert self.process.poll() is None, self.log.read_text()
        return bool(digests(self.folder)) and any(
            len(path.read_text().splitlines()) > 5
            for process in trainings(self.folder)
            for path in [self.folder / run_of(process) / "progress.csv"]
            if path.exists()
        )

    def interrupt(self, number: int, group: bool) -> None:
        """A signal, to it alone or, as a terminal does, to all that it has started."""
        (os.killpg if group else os.kill)(self.process.pid, number)


def run_of(training: psutil.Process) -> str:
    """Folder of the run that a process is at work on."""
    return next(word for word in training.cmdline() if word.startswith("runs/"))


@pytest.fixture
def drive(tmp_path) -> Iterator[Callable[..., Driver]]:
    """Start drivers, of which nothing is left after the test."""
    drivers: list[Driver] = []

    def drive(*options: object) -> Driver:
        drivers.append(Driver(tmp_path / "out", *options))
        return drivers[-1]

    yield drive
    for driver in drivers:
        if driver.process.poll() is None:
            driver.interrupt(signal.SIGKILL, group=True)
        driver.process.wait()
    for process in trainings(tmp_path / "out"):
        process.kill()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, str]:
    """What the cells are when nothing happens."""
    folder = tmp_path_factory.mktemp("undisturbed") / "out"
    Driver(folder, "--workers", 2).end(0)
    assert len(digests(folder)) == len(set(digests(folder).values())) == 3
    return digests(folder)


def kept(folder: Path) -> dict[Path, tuple[int, int]]:
    """All files of the finished cells."""
    names = [path.relative_to(folder / "results").with_suffix("") for path in folder.glob("results/*/*/*.csv")]
    return snapshot(folder, *(f"results/{name}.csv" for name in names), *(f"runs/{name}/**/*" for name in names))


def assert_goes_on(drive: Callable[..., Driver], folder: Path, undisturbed: dict[str, str]) -> None:
    """Start again: what is finished stays as it is, and the rest becomes what it would have been."""
    before, done = kept(folder), len(digests(folder))
    output = drive("--workers", 2).end(0)
    assert output.startswith(f"3 cells, {done} finished already")
    assert output.count("finished CartPole-v1/") == 3 - done
    assert snapshot(folder, *(str(path.relative_to(folder)) for path in before)) == before
    assert digests(folder) == undisturbed
    assert trainings(folder) == []


@pytest.mark.slow
def test_a_worker_is_killed(drive, undisturbed):
    driver = drive("--workers", 2)
    eventually(driver.is_in_the_middle)
    before = kept(driver.folder)
    victim = trainings(driver.folder)[0]
    cell = run_of(victim)
    worker = victim.parent()
    assert worker is not None
    assert worker.pid != driver.process.pid
    worker.kill()
    # Its training must not go on beside the one that takes its place.
    eventually(lambda: not victim.is_running() or victim.status() == psutil.STATUS_ZOMBIE, 60)
    eventually(
        lambda: (
            [process for process in trainings(driver.folder) if run_of(process) == cell]
            or digests(driver.folder) == undisturbed
        )
    )
    output = driver.end(0)
    assert digests(driver.folder) == undisturbed
    assert snapshot(driver.folder, *(str(path.relative_to(driver.folder)) for path in before)) == before
    assert output.count("\nfinished CartPole-v1/") == 3
    assert "failed CartPole-v1" not in output


@pytest.mark.slow
def test_the_driver_is_killed(drive, undisturbed):
    driver = drive("--workers", 2)
    eventually(driver.is_in_the_middle)
    driver.process.kill()
    driver.process.wait()
    eventually(lambda: trainings(driver.folder) == [], 15)
    assert 1 <= len(digests(driver.folder)) < 3
    assert_goes_on(drive, driver.folder, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "group"),
    [
        pytest.param(signal.SIGINT, True, id="ctrl-c"),
        pytest.param(signal.SIGINT, False, id="SIGINT"),
        pytest.param(signal.SIGTERM, False, id="SIGTERM"),
    ],
)
def test_the_driver_is_interrupted(drive, undisturbed, number, group):
    driver = drive("--workers", 2)
    eventually(driver.is_in_the_middle)
    driver.interrupt(number, group)
    output = driver.end(130, 30)
    eventually(lambda: trainings(driver.folder) == [], 10)
    assert "Traceback" not in output
    again = f"run --suite {driver.folder.parent / 'mine.yml'} -f {driver.folder} --workers 2"
    assert output.endswith(
        f"Interrupted. What is finished is in {driver.folder}; to go on:\n  python -m sb3_klip.experiments {again}\n"
    )
    assert 1 <= len(digests(driver.folder)) < 3
    assert_goes_on(drive, driver.folder, undisturbed)


@pytest.mark.slow
def test_interrupted_twice(drive):
    """Somebody is in a hurry."""
    driver = drive("--workers", 2)
    eventually(lambda: len(trainings(driver.folder)) == 2)
    driver.interrupt(signal.SIGINT, group=True)
    eventually(lambda: trainings(driver.folder) == [], 15)
    if driver.process.poll() is None:
        driver.interrupt(signal.SIGINT, group=True)
    assert "Traceback" not in driver.end(130, 30)


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0, 0.5, 2])
def test_interrupted_as_the_workers_start(drive, seconds):
    """Dask's own processes are half made then, and have not been told yet that Ctrl-C is not for them."""
    driver = drive("--workers", 2)
    eventually(psutil.Process(driver.process.pid).children)
    time.sleep(seconds)
    driver.interrupt(signal.SIGINT, group=True)
    output = driver.end(130, 60)
    assert "Traceback" not in output
    assert "Fatal" not in output
    assert "\nInterrupted. What is finished is in " in output
    eventually(lambda: trainings(driver.folder) == [], 10)


@pytest.mark.slow
def test_interrupted_as_a_training_starts(drive):
    """The moment at which nobody knows the new process yet."""
    driver = drive("--workers", 2)
    eventually(lambda: trainings(driver.folder))
    driver.interrupt(signal.SIGINT, group=False)
    driver.end(130, 60)
    eventually(lambda: trainings(driver.folder) == [], 10)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ModuleNotFoundError("No module named 'dask'")])
def test_interrupted_or_incomplete_before_anything_starts(tmp_path, capsys, monkeypatch, error):
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr("sb3_klip.experiments.suite.read_suite", fail)
    try:
        status = main(["run", "--suite", write_suite(tmp_path), "-f", str(tmp_path / "out")])
    except KeyboardInterrupt:  # it would end pytest
        pytest.fail("a traceback")
    assert status == (130 if error is KeyboardInterrupt else 2)
    missing = "No module named 'dask': the benchmark needs more packages: pip install \"sb3-klip[benchmark]\"\n"
    assert capsys.readouterr().err == ("" if error is KeyboardInterrupt else missing)


@pytest.fixture
def dask_cluster(tmp_path) -> Iterator[SimpleNamespace]:
    """A scheduler and two workers as their own commands start them, and nothing of ours."""
    scheduler_file = tmp_path / "scheduler.json"
    processes: list[subprocess.Popen[bytes]] = []
    # Two workers of one machine; each with a nanny, as by default.
    commands = [
        ("dask_scheduler", "--scheduler-file", str(scheduler_file), "--host", "127.0.0.1", "--port", "0", "--no-dashboard"),
        *[("dask_worker", "--scheduler-file", str(scheduler_file), "--nthreads", "1", "--no-dashboard")] * 2,
    ]
    with (tmp_path / "dask.log").open("w") as log:
        for words in commands:
            program = [sys.executable, "-m", f"distributed.cli.{words[0]}", *words[1:]]
            processes.append(subprocess.Popen(program, cwd=tmp_path, stdout=log, stderr=log, start_new_session=True))
            eventually(scheduler_file.exists, 60)
    address = json.loads(scheduler_file.read_text())["address"]
    with Client(address) as client:
        client.wait_for_workers(2, timeout=60)
    yield SimpleNamespace(address=address, processes=processes)
    for process in reversed(processes):
        process.terminate()
    for process in processes:
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.mark.slow
def test_an_external_scheduler(drive, undisturbed, dask_cluster):
    """Its workers outlive the driver; trainings that nobody waits for must not."""
    driver = drive("--scheduler", dask_cluster.address)
    eventually(driver.is_in_the_middle)
    driver.process.kill()
    driver.process.wait()
    eventually(lambda: trainings(driver.folder) == [], 30)
    before = kept(driver.folder)

    driver = drive("--scheduler", dask_cluster.address)
    eventually(lambda: trainings(driver.folder))
    driver.interrupt(signal.SIGTERM, group=False)
    assert "Interrupted." in driver.end(130, 30)
    eventually(lambda: trainings(driver.folder) == [], 10)
    assert all(process.poll() is None for process in dask_cluster.processes)

    drive("--scheduler", dask_cluster.address).end(0)
    assert digests(driver.folder) == undisturbed
    assert before.items() <= kept(driver.folder).items()


@pytest.mark.slow
def test_an_external_scheduler_goes_away(drive, undisturbed, dask_cluster):
    driver = drive("--scheduler", dask_cluster.address)
    eventually(driver.is_in_the_middle)
    os.killpg(dask_cluster.processes[0].pid, signal.SIGKILL)
    said = driver.end(1, 120)
    assert "The scheduler is gone." in said
    assert "to go on:\n  python -m sb3_klip.experiments run --suite" in said
    assert "Traceback" not in said
    eventually(lambda: trainings(driver.folder) == [], 60)
    drive().end(0)
    assert digests(driver.folder) == undisturbed


@pytest.mark.slow
def test_a_worker_of_an_external_scheduler_is_killed(drive, undisturbed, dask_cluster):
    driver = drive("--scheduler", dask_cluster.address)
    eventually(driver.is_in_the_middle)
    before = kept(driver.folder)
    victim = trainings(driver.folder)[0]
    # With its nanny, as when a machine is lost.
    lost = next(process for process in dask_cluster.processes[1:] if victim in psutil.Process(process.pid).children(True))
    os.killpg(lost.pid, signal.SIGKILL)
    for child in victim.parents()[:1]:
        child.kill()
    driver.end(0)
    assert digests(driver.folder) == undisturbed
    assert before.items() <= kept(driver.folder).items()


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys) -> Callable[..., str]:
    """Run the command: it must end with 2 and a message, before it makes anything or asks for a worker."""

    def must_not_start(*_: Any) -> None:
        pytest.fail("it has started workers")

    monkeypatch.setattr(scheduling, "connect", must_not_start)

    def refused(*options: object) -> str:
        before = sorted(tmp_path.rglob("*"))
        monkeypatch.chdir(tmp_path)
        assert main(["run", *(str(option) for option in options)]) == 2
        assert sorted(tmp_path.rglob("*")) == before
        return capsys.readouterr().err

    return refused


def test_all_mistakes_at_once(refused, tmp_path):
    methods = {
        "algorithm": {"algo": "klip_pppo"},
        "coefficient": {"beta": "stpe"},
        "parameter": {"beta": "linear_ramp", "beta_kwargs": {"widht": 0.1}},
        "value": {"beta": "linear_ramp", "beta_kwargs": {"width": -1}},
        "hyperparameter": {"learning_rat": 1},
        "plain": {"algo": "ppo", "beta": "step"},
        "taken": {"seed": 3},
        "number": 3,
        "fol/der": {},
        ".hidden": {},
        "end.": {},
        "clip:0.1": {},
        "right": {},
    }
    message = refused("--suite", write_suite(tmp_path, tasks=["Hoper-v4", "CartPole-v1"], methods=methods))
    first, *lines = message.splitlines()
    assert first == f"the suite {tmp_path / 'mine.yml'} cannot be run:"
    for line, expected in zip(
        lines,
        (
            "unknown task 'Hoper-v4'. Did you mean 'Hopper-v4'?",
            "method 'algorithm': unknown algorithm 'klip_pppo'. Did you mean 'klip_ppo'?",
            "'stpe' is not a coefficient. Did you mean 'step'?",
            "'linear_ramp' has no parameter 'widht'. Did you mean 'width'?",
            "width=-1 of 'linear_ramp' is out of range",
            "klip_ppo has no hyperparameter 'learning_rat'. Did you mean 'learning_rate'?",
            "ppo has no hyperparameter 'beta'.",
            "klip_ppo has no hyperparameter 'seed'.",
            "method 'number' must be a mapping of hyperparameters, not 3",
            "method 'fol/der' names a folder",
            "method '.hidden' names a folder",
            "method 'end.' names a folder",
            "method 'clip:0.1' names a folder",
        ),
        strict=True,
    ):
        assert line.startswith("  - ")
        assert expected in line


def test_all_mistakes_of_the_whole_at_once(refused, tmp_path):
    (tmp_path / "mine.yml").write_text("tsks: [CartPole-v1]\nseeds: [a]\nmethods: []\nhyperparams: 3\ntimesteps: -5\n")
    lines = refused("--suite", "mine.yml").splitlines()[1:]
    assert len(lines) == 6
    assert lines[0] == "  - unknown key 'tsks'. Did you mean 'tasks'?"
    assert lines[1] == "  - 'tasks' is missing"
    for key, line in zip(("hyperparams", "seeds", "methods", "timesteps"), lines[2:], strict=True):
        assert line.startswith(f"  - {key} must be ")


@pytest.mark.parametrize("key", ["hyperparams", "tasks", "seeds", "methods"])
def test_missing_keys(refused, tmp_path, key):
    assert refused("--suite", write_suite(tmp_path, **{key: None})).splitlines()[1:] == [f"  - {key!r} is missing"]


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("hyperparams", ["", 3, [1]]),
        ("tasks", ["x", [], {"CartPole-v1": 1}, [3], [["CartPole-v1"]], ["CartPole-v1", "CartPole-v1"]]),
        ("seeds", [3, "0", [], ["a"], [0.5], [True], [None], [-1], [2**32], [0, 1, 0]]),
        ("methods", [[], {}, "step", ["step"]]),
        # 1e5 is a text in YAML 1.1.
        ("timesteps", [0, -5, 1.5, 1e5, "1e5", True, [100]]),
    ],
)
def test_values_of_the_wrong_kind(refused, tmp_path, key, values):
    for value in values:
        lines = refused("--suite", write_suite(tmp_path, **{key: value})).splitlines()[1:]
        assert len(lines) == 1, value
        assert lines[0].startswith(f"  - {key} must be ")
        assert lines[0].endswith(f", not {value!r}")


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ("{3: {}}", "method 3 must be"),
        ("{on: {}}", "method True must be"),
        ("{a: }", "method 'a' must be a mapping"),
        ("{a: {algo: [ppo]}}", "method 'a': unknown algorithm ['ppo']"),
        ("{a: {algo: }}", "method 'a': unknown algorithm None"),
        ("{a: {3: 4}}", "klip_ppo has no hyperparameter 3"),
        ("{a: {callback: x}}", "klip_ppo has no hyperparameter 'callback'"),
        ("{gate=step: {}}", "method 'gate=step': after '=' stands the value of a knob"),
        ("{width=0: {}}", "so it must be a number above 0"),
        ("{a: {}, A: {}}", "methods must differ in more than case"),
        ("{a: {beta: [1]}}", "method 'a': beta must be"),
        ("{a: {beta: 'no_such_module:f'}}", "method 'a': beta='no_such_module:f' is not a coefficient"),
        ("{a: {beta: step, beta_kwargs: [1]}}", "method 'a': "),
        # What the command line of RL Zoo cannot be told.
        ("{a: {target_kl: .inf}}", "method 'a': "),
        ("{a: {n_steps: 2026-01-01}}", "method 'a': "),
    ],
)
def test_wrong_methods(refused, tmp_path, methods, message):
    path = Path(write_suite(tmp_path, methods=None))
    path.write_text(f"{path.read_text()}methods: {methods}\n")
    assert message in refused("--suite", path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"tasks: [", "is not YAML"),
        (b"", "must be a mapping of hyperparams, tasks, seeds, methods, timesteps, not None"),
        (b"- a\n- b\n", "must be a mapping of"),
        (b"\xff\xfe\x00", "mine.yml"),
    ],
)
def test_files_that_are_no_suites(refused, tmp_path, content, message):
    (tmp_path / "mine.yml").write_bytes(content)
    assert message in refused("--suite", "mine.yml")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smok", "--suite='smok' is none of coefficients, knobs, paper, smoke, and no YAML file. Did you mean 'smoke'?"),
        ("missing.yml", "--suite: missing.yml cannot be read: "),
        ("folder.yml", "--suite: folder.yml cannot be read: "),
        ("mine.txt", "--suite='mine.txt' is none of "),
    ],
)
def test_suites_that_are_not_there(refused, tmp_path, name, message):
    (tmp_path / "folder.yml").mkdir()
    (tmp_path / "mine.txt").touch()
    assert refused("--suite", name).startswith(message)


@pytest.mark.parametrize(
    ("conf", "content", "message"),
    [
        ("missing.yml", None, "hyperparams='missing.yml' cannot be read: "),
        ("no_such_module", None, "hyperparams='no_such_module' cannot be read: "),
        ("sb3_klip.errors", None, "hyperparams='sb3_klip.errors' cannot be read: "),
        ("../mine", None, "hyperparams='../mine' cannot be read: "),
        ("tuned.yml", "a: [", "hyperparams='tuned.yml' cannot be read: "),
        ("tuned.yml", "", "tuned.yml"),
        ("tuned.yml", "[CartPole-v1]", "tuned.yml"),
        ("tuned.yml", "CartPole-v1: 3", "tuned.yml"),
        ("tuned.yml", "Hopper-v4: {n_timesteps: 100}", "tuned.yml has no entry for 'CartPole-v1', and none for 'default'"),
        ("tuned.yml", "default: {n_steps: 100}", "n_timesteps"),
        ("tuned.yml", "default: {n_timesteps: long}", "n_timesteps"),
        ("tuned.yml", "default: {n_timesteps: -5}", "no n_timesteps above 0 for 'CartPole-v1'"),
        ("tuned.yml", "{}", "must be a mapping of environments, not {}"),
        ("tuned.yml", "default: {n_timesteps: 9, callback: a.B}", "has a callback for 'CartPole-v1', and the benchmark gives"),
    ],
)
def test_wrong_hyperparameters(refused, tmp_path, conf, content, message):
    if content is not None:
        (tmp_path / "tuned.yml").write_text(content)
    # RL Zoo asks for n_timesteps when it is told another length, too.
    for timesteps in (None, 512):
        error = refused("--suite", write_suite(tmp_path, hyperparams=conf, timesteps=timesteps))
        assert error.startswith(f"the suite {tmp_path / 'mine.yml'} cannot be run:\n  - ")
        assert message in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "CartPole-v1", "Hopper-v4"], "--tasks: 'Hopper-v4' is not in the suite, which has CartPole-v1."),
        (["--methods", "stpe"], "--methods: 'stpe' is not in the suite, which has ppo, step. Did you mean 'step'?"),
        (["--seeds", "0", "-1"], "--seeds"),
        (["--seeds", str(2**32)], "--seeds"),
        (["--workers", "0"], "--workers=0 must be at least 1"),
        (["--workers", "-2"], "--workers=-2 must be at least 1"),
        (["--workers", "2", "--scheduler", "tcp://localhost:8786"], "--workers starts workers here"),
    ],
)
def test_wrong_options(refused, tmp_path, options, message):
    assert refused("--suite", write_suite(tmp_path), "-f", "out", *options).startswith(message)


@pytest.mark.parametrize("options", [["--seeds", "a"], ["--seeds"], ["--workers", "2.5"], ["--tasks"], ["--wrkers", "2"]])
def test_options_that_are_no_options(tmp_path, capsys, options):
    with pytest.raises(SystemExit) as error:
        main(["run", "--suite", write_suite(tmp_path), "-f", str(tmp_path / "out"), *options])
    assert error.value.code == 2
    assert options[0] in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_no_traceback_on_the_command_line(tmp_path):
    completed = python(*command("--suite", "smok"), cwd=tmp_path, status=2)
    assert completed.stderr.splitlines()[-1].endswith("Did you mean 'smoke'?")
    assert "Traceback" not in completed.stderr
    assert list(tmp_path.iterdir()) == []


# -- folders -----------------------------------------------------------------------------------------------------------


def test_a_folder_of_another_suite(refused, tmp_path):
    suite = write_suite(tmp_path)
    open_folder(tmp_path / "out", read_suite(suite), 1)
    methods = {"ppo": SUITE["methods"]["ppo"], "step": {"beta": "step", **TINY, "n_steps": 32}, "none": {"beta": "none"}}
    lines = refused("--suite", write_suite(tmp_path, methods=methods), "-f", "out").splitlines()
    assert lines[0].startswith(f"{tmp_path / 'out'} has results of another suite or version")
    assert lines[1:] == [
        "  - definition.CartPole-v1/step.n_steps: 64 there, 32 here",
        "  - definition.CartPole-v1/none: only here",
    ]


def test_a_folder_of_other_versions(refused, tmp_path):
    suite = write_suite(tmp_path)
    open_folder(tmp_path / "out", read_suite(suite), 1)
    path = tmp_path / "out" / "suite.json"
    content = json.loads(path.read_text())
    content["versions"]["mujoco"] = "2.1"
    path.write_text(json.dumps(content))
    assert "  - versions.mujoco: '2.1' there, " in refused("--suite", suite, "-f", "out")


def test_a_folder_of_another_name(refused, tmp_path):
    open_folder(tmp_path / "out", read_suite(write_suite(tmp_path)), 1)
    (tmp_path / "mine.yml").rename(tmp_path / "yours.yml")
    assert "  - suite: 'mine' there, 'yours' here" in refused("--suite", "yours.yml", "-f", "out")


@pytest.mark.parametrize("content", ["", "[", "3"])
def test_a_folder_whose_description_is_damaged(refused, tmp_path, content):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "suite.json").write_text(content)
    assert str(tmp_path / "out") in refused("--suite", write_suite(tmp_path), "-f", "out")


@pytest.mark.parametrize("folder", ["file", "file/below"])
def test_a_file_where_the_folder_should_be(refused, tmp_path, folder):
    (tmp_path / "file").touch()
    message = refused("--suite", write_suite(tmp_path), "-f", folder)
    assert message.startswith(f"the folder {tmp_path / folder} cannot be written to: ")


def test_a_disk_that_is_too_full(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=30_000_000))
    folder = tmp_path / "out"
    assert main(["run", "--suite", write_suite(tmp_path), "-f", str(folder)]) == 2
    assert capsys.readouterr().err == f"{folder} has 0.0 GB left, and 4 cells may need 0.1 GB\n"
    assert not (folder / "suite.json").exists()
    # One cell fits.
    open_folder(folder, read_suite(write_suite(tmp_path)), 1)
    assert sorted(path.name for path in folder.iterdir()) == ["suite.json"]


def test_a_disk_that_takes_nothing(tmp_path, monkeypatch, capsys):
    def write_bytes(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    assert main(["run", "--suite", write_suite(tmp_path), "-f", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith(f"the folder {tmp_path / 'out'} cannot be written to: ")


def test_default_folder(tmp_path, monkeypatch, fake):
    monkeypatch.chdir(tmp_path)
    assert main(["run", "--suite", fake.suite, "--scheduler", fake.address]) == 0
    assert set(digests(tmp_path / "logs" / "benchmark" / "mine")) == {f"{cell}.csv" for cell in CELLS}


# -- the commit --------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Callable[..., str]:
    """A repository, in which this package seems to lie."""
    package = tmp_path / "checkout" / "sb3_klip"
    (package / "benchmark").mkdir(parents=True)
    (tmp_path / "checkout" / "hyperparams").mkdir()
    for path in ("sb3_klip/benchmark/cell.py", "sb3_klip/surrogate.py", "hyperparams/paper.yml", "README.md"):
        (tmp_path / "checkout" / path).touch()
    monkeypatch.setattr(cell_module, "__file__", str(package / "benchmark" / "cell.py"))
    monkeypatch.setattr(
        cell_module.importlib.metadata, "distribution", lambda name: SimpleNamespace(read_text=lambda name: None)
    )
    identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")

    def git(*words: str) -> str:
        return run("git", *identity, *words, cwd=tmp_path / "checkout").stdout.strip()

    git("init", "-q")
    return git


@pytest.mark.parametrize("changed", ["sb3_klip/surrogate.py", "hyperparams/paper.yml", "sb3_klip/benchmark/cell.py"])
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


# -- results -----------------------------------------------------------------------------------------------------------


def write_monitors(folder: Path, *environments: list[tuple[float, int]]) -> list[Path]:
    """SB3's files, from the returns and lengths of each environment's episodes."""
    paths = []
    for index, episodes in enumerate(environments):
        rows = "".join(f"{episode_return},{length},{0.5 * i}\n" for i, (episode_return, length) in enumerate(episodes))
        paths.append(folder / f"{index}.monitor.csv")
        paths[-1].write_text(f'#{{"t_start": 0.0, "env_id": "CartPole-v1"}}\nr,l,t\n{rows}')
    return paths


def test_episodes_of_several_environments(tmp_path):
    paths = write_monitors(tmp_path, [(1.5, 3), (2.5, 5)], [(3.5, 4), (4.5, 4)], [(0.0, 8)])
    episodes = read_episodes(paths[::-1])
    assert episodes.columns.tolist() == ["timesteps", "env", "return", "length"]
    # Three environments take three steps at a time; those that end at once stay in the order of the environments.
    assert episodes.to_numpy().tolist() == [[9, 0, 1.5, 3], [12, 1, 3.5, 4], [24, 0, 2.5, 5], [24, 1, 4.5, 4], [24, 2, 0.0, 8]]


def test_no_episode_has_ended(tmp_path):
    episodes = read_episodes(write_monitors(tmp_path, [], []))
    assert len(episodes) == 0
    result = summarize(episodes, pd.DataFrame({"time/total_timesteps": [100]}), 100, 128)
    assert (result.about["episodes"], result.about["final_return"], result.about["final_episodes"]) == (0, None, 0)
    write_result(tmp_path / "result.csv", result)
    assert read_result(tmp_path / "result.csv").curve["episodes"].tolist() == [0] * POINTS


@pytest.mark.filterwarnings("error")
def test_an_environment_without_an_episode(tmp_path):
    with_one = read_episodes(write_monitors(tmp_path, [(1.5, 3)], []))
    assert with_one.to_numpy().tolist() == [[6, 0, 1.5, 3]]
    assert digest(with_one) == hashlib.sha256(b"0,1.5,3").hexdigest()


def test_digest(tmp_path):
    first, second = [(1.0, 3), (2.0, 5)], [(3.0, 4), (4.0, 4)]

    def of(*environments: list[tuple[float, int]]) -> str:
        return digest(read_episodes(write_monitors(tmp_path, *environments)))

    text = "0,1.0,3\n1,3.0,4\n0,2.0,5\n1,4.0,4"
    assert of(first, second) == hashlib.sha256(text.encode()).hexdigest()
    others = [
        of([(1.000001, 3), (2.0, 5)], second),
        of([(1.0, 4), (2.0, 5)], second),
        of([(1.0, 3), (2.0, 6)], second),
        of(second, first),
        of([*first, (9.0, 1)], second),
        of(first[:1], second),
        of(first[::-1], second),
        of(first),
    ]
    assert len({of(first, second), *others}) == 1 + len(others)


def test_digest_does_not_depend_on_time(tmp_path):
    (path,) = write_monitors(tmp_path, [(1.0, 3), (2.0, 5)])
    before = digest(read_episodes([path]))
    path.write_text(path.read_text().replace('"t_start": 0.0', '"t_start": 7.0').replace(",0.5\n", ",7.5\n"))
    assert digest(read_episodes([path])) == before


def test_summary_by_hand():
    """A training of 1000 steps, which are cut into parts of ten, and which ended at step 1004."""
    steps = [5, 10, 11, 900, 905, 1000, 1004]
    episodes = pd.DataFrame({"timesteps": steps, "env": 0, "return": [1.0, 3, 5, 100, 7, 9, 11.2], "length": 5})
    log = pd.DataFrame(
        {
            "time/total_timesteps": [4, 8, 10, 500, 1004],
            "train/kill_fraction": [np.nan, 0.1, 0.3, 0.25, 0.05],
            "train/beta_p50": [np.nan, 1.0, 2.0, -3.0, 4.0],
            "train/unrelated": 1.0,
        }
    )
    about, curve = summarize(episodes, log, 1000, 1024)
    assert about.pop("episodes_sha256") == digest(episodes)
    assert about == {
        "timesteps": 1000,
        "episodes": 7,
        "final_return": 9.0667,  # (7 + 9 + 11.2) / 3
        "final_episodes": 3,
        "peak_kill_fraction": 0.3,
    }
    assert curve.columns.tolist() == ["timesteps", "episodes", "return", "kill_fraction", "beta_p50"]
    assert curve["timesteps"].tolist() == list(range(10, 1001, 10))

    def filled(name: str) -> dict[int, float]:
        return {index: pytest.approx(value) for index, value in curve[name].items() if value == value and value != 0}

    assert filled("episodes") == {0: 2, 1: 1, 89: 1, 90: 1, 99: 2}
    assert filled("return") == {0: 2.0, 1: 5.0, 89: 100.0, 90: 7.0, 99: 10.1}
    assert filled("kill_fraction") == {0: 0.2, 49: 0.25, 99: 0.05}
    assert filled("beta_p50") == {0: 1.5, 49: -3.0, 99: 4.0}


def test_summary_of_a_training_that_skips_frames():
    """Monitors below a wrapper such as Atari's count frames, here four in a step."""
    episodes = pd.DataFrame({"timesteps": [400, 2000, 3600, 4096], "env": 0, "return": [1.0, 2, 3, 4], "length": 1})
    about, curve = summarize(episodes, pd.DataFrame({"time/total_timesteps": []}), 1000, 1024)
    assert curve["episodes"].to_numpy().nonzero()[0].tolist() == [9, 49, 89, 99]
    assert (about["final_return"], about["final_episodes"]) == (4.0, 1)


def test_more_than_ten_environments(tmp_path):
    paths = write_monitors(tmp_path, *[[(float(i), 1)] for i in range(11)])
    assert read_episodes(paths)["return"].tolist() == list(range(11))


def test_summary_of_an_algorithm_that_kills_nothing():
    episodes = pd.DataFrame({"timesteps": [5], "env": [0], "return": [1.0], "length": [5]})
    result = summarize(episodes, pd.DataFrame({"time/total_timesteps": [100], "train/approx_kl": [0.1]}), 100, 128)
    assert "peak_kill_fraction" not in result.about
    assert result.curve.columns.tolist() == ["timesteps", "episodes", "return", "approx_kl"]


@pytest.fixture
def result() -> Result:
    """A result with numbers of all sizes."""
    curve = pd.DataFrame({"timesteps": np.arange(1, POINTS + 1) * 12345, "episodes": range(POINTS)})
    curve["return"] = np.random.default_rng(0).normal(size=POINTS) * np.logspace(-6, 6, POINTS)
    curve.loc[7, "return"] = np.nan
    about = {"task": "Hopper-v4", "seed": 0, "episodes_sha256": "ab" * 32, "final_return": None, "hyperparams": {"a": "β\n,"}}
    return Result(about, curve)


def test_written_and_read(tmp_path, result):
    path = tmp_path / "deep" / "er" / "seed-0.csv"
    write_result(path, result)
    about, curve = read_result(path)
    assert about == result.about
    assert curve.columns.tolist() == result.curve.columns.tolist()
    for name in ("timesteps", "episodes"):
        assert curve[name].tolist() == result.curve[name].tolist()
    np.testing.assert_array_equal(curve["return"], [float(f"{value:.4g}") for value in result.curve["return"]])
    assert [path.name for path in path.parent.iterdir()] == ["seed-0.csv"]


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda content: b"", id="empty"),
        pytest.param(lambda content: content[:30], id="cut in the first line"),
        pytest.param(lambda content: content.splitlines()[0], id="without its curve"),
        pytest.param(lambda content: b"\n".join(content.splitlines()[1:]), id="without its first line"),
        pytest.param(lambda content: b"\n".join(content.splitlines()[:40]), id="cut in the curve"),
        pytest.param(lambda content: content.replace(b"# {", b"# [3]\n{"), id="something else"),
        pytest.param(lambda content: b"\xff\xfe" + content, id="bytes"),
        pytest.param(lambda content: bytes(len(content)), id="zeros"),
    ],
)
def test_damaged_results(tmp_path, result, damage):
    path = tmp_path / "seed-0.csv"
    write_result(path, result)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"seed-0\.csv is not the result of a cell: ") as error:
        read_result(path)
    assert str(path) in str(error.value)


# -- the log as CSV ----------------------------------------------------------------------------------------------------


class Formats(BaseCallback):
    """Keeps the CSV files that the logger writes to during training."""

    def _init_callback(self) -> None:
        self.seen: list[CSVOutputFormat] = []

    def _on_step(self) -> bool:
        self.seen += [each for each in self.logger.output_formats if isinstance(each, CSVOutputFormat)]
        return True


TINY_MODEL: dict[str, Any] = {"n_steps": 64, "batch_size": 32, "n_epochs": 2, "seed": 0}


@pytest.mark.parametrize("algorithm", [PPO, KLipPPO])
def test_csv_log(tmp_path, algorithm):
    model = algorithm("MlpPolicy", "CartPole-v1", **TINY_MODEL)
    path, formats = tmp_path / "deep" / "er" / "progress.csv", Formats()
    model.learn(192, callback=[CSVLogCallback(path), formats])

    log = pd.read_csv(path)
    assert log["time/total_timesteps"].tolist() == [64, 128, 192]
    ours = {"train/kill_fraction", "train/beta_mean", *(f"train/beta_p{level:02}" for level in (1, 5, 25, 50, 75, 95, 99))}
    assert {"rollout/ep_rew_mean", "train/clip_fraction", "train/approx_kl"} <= set(log)
    assert (ours <= set(log)) == (algorithm is KLipPPO)
    # A row comes before the update.
    assert log["train/clip_fraction"].isna().tolist() == [True, False, False]

    # Nothing is left of it.
    assert len({*formats.seen}) == 1
    assert formats.seen[0].file.closed
    assert not any(isinstance(each, CSVOutputFormat) for each in model.logger.output_formats)


def test_csv_log_of_two_trainings(tmp_path):
    model, callback = PPO("MlpPolicy", "CartPole-v1", **TINY_MODEL), CSVLogCallback(tmp_path / "progress.csv")

    def steps() -> list[int]:
        return pd.read_csv(tmp_path / "progress.csv")["time/total_timesteps"].tolist()

    model.learn(128, callback=callback)
    assert steps() == [64, 128]
    model.learn(128, callback=callback, reset_num_timesteps=False)
    assert steps() == [64, 128, 192, 256]
    # One that begins replaces the file.
    model.learn(64, callback=callback)
    assert steps() == [64]


def test_csv_log_whose_last_row_was_cut_off(tmp_path):
    model, callback = PPO("MlpPolicy", "CartPole-v1", **TINY_MODEL), CSVLogCallback(tmp_path / "progress.csv")
    model.learn(192, callback=callback)
    text = (tmp_path / "progress.csv").read_text()
    (tmp_path / "progress.csv").write_text(text[:-3])
    model.learn(64, callback=callback, reset_num_timesteps=False)
    assert pd.read_csv(tmp_path / "progress.csv")["time/total_timesteps"].tolist() == [64, 128, 256]
    # Some other file is replaced.
    (tmp_path / "progress.csv").write_text("a,b\n1,2\n")
    model.learn(64, callback=callback, reset_num_timesteps=False)
    assert pd.read_csv(tmp_path / "progress.csv")["time/total_timesteps"].tolist() == [320]


def test_csv_log_of_a_training_that_did_not_begin(tmp_path):
    """RL Zoo ends the training of its first callback in any case; that must not hide what went wrong."""
    CSVLogCallback(tmp_path / "progress.csv").on_training_end()
    assert list(tmp_path.iterdir()) == []


# -- percentiles of β --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("beta", "clip_range"), [("step", 0.01), ("quadratic", 0.2), ("sigmoid", 0.05)])
def test_percentiles_of_beta(beta, clip_range):
    """β of the second epoch, from the policy that the first one left and from the definition of each coefficient."""

    def trained(n_epochs: int) -> KLipPPO:
        options = {"n_steps": 256, "batch_size": 256, "learning_rate": 0.01, "seed": 0}
        return KLipPPO("MlpPolicy", "CartPole-v1", n_epochs=n_epochs, beta=beta, clip_range=clip_range, **options).learn(256)

    first, both = trained(1), trained(2)
    buffer = first.rollout_buffer
    np.testing.assert_array_equal(buffer.actions, both.rollout_buffer.actions)
    observations, actions = first.policy.obs_to_tensor(buffer.observations)[0], buffer.actions.ravel()
    distribution = first.policy.get_distribution(observations).distribution
    new = distribution.log_prob(distribution.logits.new_tensor(actions)).detach().numpy().astype(float)
    ratio = np.exp(new - buffer.log_probs.ravel())
    advantages = buffer.advantages.ravel().astype(float)
    advantages = (advantages - advantages.mean()) / (advantages.std(ddof=1) + 1e-8)

    # How far past the boundary that the advantage points to.
    distance = np.where(advantages > 0, ratio - (1 + clip_range), (1 - clip_range) - ratio)
    gate = {
        "step": np.where(distance > 0, 1.0, 0.0),
        "quadratic": np.sign(advantages) * (ratio - 1) / clip_range,
        "sigmoid": 1 / (1 + np.exp(-distance / 0.05)),
    }[beta]
    values = -ratio * advantages * gate
    assert len(np.unique(values)) > 50
    expected = np.percentile(values, PERCENTILES)
    logged = [both.logger.name_to_value[f"train/beta_p{level:02}"] for level in PERCENTILES]
    np.testing.assert_allclose(logged, expected, rtol=1e-3, atol=1e-5)
    assert np.ptp(logged) > 0.1


def test_percentiles_are_for_files_and_not_for_the_terminal(tmp_path, capsys):
    model = KLipPPO("MlpPolicy", "CartPole-v1", **TINY_MODEL, verbose=1, tensorboard_log=str(tmp_path / "tb"))
    model.learn(192, callback=CSVLogCallback(tmp_path / "progress.csv"))
    out = capsys.readouterr().out
    assert "kill_fraction" in out
    assert "beta_p" not in out
    log = pd.read_csv(tmp_path / "progress.csv")
    (folder,) = (tmp_path / "tb").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    for level in PERCENTILES:
        name = f"train/beta_p{level:02}"
        shown = [event.value for event in events.Scalars(name)]
        assert len(shown) == 2
        np.testing.assert_allclose(log[name].dropna(), shown, rtol=1e-6, atol=1e-12)


def test_a_coefficient_that_trainings_would_not_find(tmp_path):
    (tmp_path / "gates.py").write_text("def ramp(ratio, advantages, clip_range):\n    return 0 * ratio\n")
    suite = write_suite(tmp_path, methods={"own": {"beta": "gates:ramp"}})
    completed = python(*command("--suite", suite, "-f", "out"), cwd=tmp_path, status=2)
    assert "'gates:ramp' is not a coefficient" in completed.stderr
    assert not (tmp_path / "out").exists()
