"""Commands as a user types them, run as processes of their own, and what RL Zoo leaves behind."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml


def run(*command: object, cwd: Path, status: int = 0, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, and check its exit status."""
    completed = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
    )
    if completed.returncode != status:
        shown = f"{completed.stdout[-4000:]}\n{completed.stderr[-4000:]}"
        raise AssertionError(f"{' '.join(completed.args)}\nexited with {completed.returncode}, not {status}:\n{shown}")
    return completed


def python(*arguments: object, cwd: Path, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    """Run this Python."""
    return run(sys.executable, *arguments, cwd=cwd, **kwargs)


def train(*arguments: object, cwd: Path, algo: str = "klip_ppo", **kwargs: Any) -> subprocess.CompletedProcess[str]:
    """``python -m rl_zoo3.train``, which writes into ``logs``."""
    return python("-m", "rl_zoo3.train", "--algo", algo, *arguments, cwd=cwd, **kwargs)


def config(run_folder: Path) -> dict[str, Any]:
    """The hyperparameters that RL Zoo recorded for a training run."""
    (path,) = run_folder.glob("*/config.yml")
    # RL Zoo writes an OrderedDict, and reads it back this way itself.
    return dict(yaml.load(path.read_text(), Loader=yaml.UnsafeLoader))
