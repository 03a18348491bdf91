"""Suites of experiments that are quickly run, and what their trainings leave."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import yaml

from sb3_klip.diagnostics import PERCENTILES
from sb3_klip.experiments.folder import open_folder
from sb3_klip.experiments.results import POINTS, Result, read_result, write_result
from sb3_klip.experiments.suite import read_suite
from sb3_klip.reproducibility import PACKAGES

# Starting RL Zoo takes longer than these steps.
TINY = {"n_steps": 64, "n_epochs": 1}
SUITE: dict[str, Any] = {
    "hyperparams": "sb3_klip.hyperparams.paper",
    "timesteps": 512,
    "tasks": ["CartPole-v1"],
    "seeds": [0, 1],
    "methods": {"ppo": {"algo": "ppo", **TINY}, "step": {"beta": "step", **TINY}},
}


def write_suite(folder: Path, **changes: Any) -> str:
    """The suite as a file, with other keys; a key that is None is left out."""
    content = {key: value for key, value in {**SUITE, **changes}.items() if value is not None}
    path = folder / "mine.yml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return str(path)


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


def run_suite(*arguments: object) -> tuple[object, ...]:
    """The arguments of Python for ``run``."""
    return ("-m", "sb3_klip.experiments", "run", *arguments)


def made_up_result(task: str, method: str, seed: int, final: float, digest: str = "", first: float = 0.0) -> Result:
    """A finished cell whose return rises in a line from ``first`` to ``final``."""
    steps = np.linspace(0, 1000, POINTS + 1)[1:]
    curve = pd.DataFrame({"timesteps": steps.astype(int), "episodes": 1, "return": np.linspace(first, final, POINTS)})
    about = {"task": task, "method": method, "seed": seed, "algo": "ppo" if method == "ppo" else "klip_ppo"}
    about |= {"hyperparams": {}, "timesteps": 1000, "episodes": POINTS, "episodes_sha256": digest or f"{task} {seed}"}
    about |= {"final_return": final, "final_episodes": 10, "command": "python -m rl_zoo3.train …", "commit": None}
    about |= {"versions": dict.fromkeys(("python", "sb3-klip", *PACKAGES), "1.0"), "processor": "one", "seconds": 60}
    if method != "ppo":
        about["peak_kill_fraction"] = 0.125
        for name in ("kill_fraction", "pass_fraction"):
            curve[name] = np.linspace(0, 0.1, POINTS)
        for level in PERCENTILES:
            curve[f"beta_p{level:02}"] = (level - 50) / 50
    return Result(about, curve)


def write_results(folder: Path, results: list[Result], suite: str = "paper") -> Path:
    """Write results into the folder of a suite, below a folder; returns it."""
    folder = folder / suite
    whole = read_suite(suite)
    short = {name: {**settings, "n_timesteps": 1000} for name, settings in whole.definition.items()}
    open_folder(folder, whole._replace(definition=short), 1)
    for each in results:
        about = each.about
        write_result(folder / "results" / about["task"] / about["method"] / f"seed-{about['seed']}.csv", each)
    return folder
