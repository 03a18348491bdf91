"""One cell of a suite: a single training by RL Zoo, in its own folder, from its command to its result."""

import contextlib
import importlib.metadata
import json
import shlex
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from sb3_klip.experiments.results import Result, read_episodes, summarize, write_result
from sb3_klip.files import write_atomically
from sb3_klip.reproducibility import processor, versions

#: Lines of its log that are shown of a cell that failed.
LOG_LINES = 12
#: File in the folder of a run that is there while it runs.
RUNNING = "running"


class CellError(RuntimeError):
    """A training that did not come to its end; the message has the last lines of its log."""


@dataclass(frozen=True)
class Cell:
    """
    One training.

    :param task: id of the environment
    :param method: name of the method, in the suite
    :param seed: random seed
    :param algo: RL Zoo's name of the algorithm
    :param conf: module or file of the hyperparameters, as for ``rl_zoo3.train --conf-file``
    :param timesteps: length of the training
    :param override: whether ``timesteps`` overrides that of the hyperparameters
    :param hyperparams: the method's own hyperparameters, which override those of ``conf``
    """

    task: str
    method: str
    seed: int
    algo: str
    conf: str
    timesteps: int
    override: bool = False
    hyperparams: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Path of the cell below ``runs`` and ``results``."""
        return f"{self.task.replace('/', '-')}/{self.method}/seed-{self.seed}"

    def result_file(self, folder: Path) -> Path:
        """File that exists once the cell is finished."""
        return folder / "results" / f"{self.name}.csv"

    def run_folder(self, folder: Path) -> Path:
        """Folder of the run, which RL Zoo takes for ``--log-folder``."""
        return folder / "runs" / self.name

    def command(self) -> list[str]:
        """The run, as it is typed in the suite's folder."""
        run = f"runs/{self.name}"
        params = {**self.hyperparams, "callback": {"sb3_klip.callbacks.CSVLogCallback": {"path": f"{run}/progress.csv"}}}
        return [
            *("python", "-m", "rl_zoo3.train", "--algo", self.algo, "--env", self.task, "--seed", str(self.seed)),
            *("--conf-file", self.conf, *(("-n", str(self.timesteps)) if self.override else ())),
            *("--num-threads", "1", "--eval-freq", "-1", "--verbose", "0", "-f", run),
            *("-params", *(f"{key}:{value!r}" for key, value in params.items())),
        ]


def commit() -> str | None:
    """The commit that this package was installed from, marked where files have changed since; None if it is not known."""
    origin = json.loads(importlib.metadata.distribution("sb3-klip").read_text("direct_url.json") or "{}")
    if "vcs_info" in origin:
        return origin["vcs_info"]["commit_id"]
    here = Path(__file__).resolve()
    git = ["git", "-C", str(here.parents[2])]
    try:
        # A virtual environment may lie in a repository of something else, which does not track it.
        subprocess.run([*git, "ls-files", "--error-unmatch", str(here)], capture_output=True, check=True)
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        status = [*git, "status", "--porcelain", "sb3_klip", "hyperparams"]
        changed = subprocess.run(status, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{head}+changes" if changed.strip() else head


def run_cell(cell: Cell, folder: Path, wanted: Callable[[], bool] = lambda: True) -> None:
    """
    Bring a cell to its end, from wherever it is: nothing is done twice, and a half-written run is made again.

    :param cell: what to run
    :param folder: the suite's folder
    :param wanted: asked every second; the training is ended when the answer is no
    :raises CellError: if the training fails, or is not wanted any more
    """
    if cell.result_file(folder).exists():
        return
    run = cell.run_folder(folder)
    if not _complete(cell, run):
        shutil.rmtree(run, ignore_errors=True)
        run.mkdir(parents=True)
        _train(cell, folder, run, wanted)
    write_result(cell.result_file(folder), _summary(cell, run))


def _train(cell: Cell, folder: Path, run: Path, wanted: Callable[[], bool]) -> None:
    """The training itself, as a process of its own, which ends when this one does."""
    about: dict[str, Any] = {
        "command": " ".join(_quoted(word) for word in cell.command()),
        "versions": versions(),
        "commit": commit(),
        "processor": processor(),
    }
    started = time.time()
    command = [sys.executable, "-m", "sb3_klip.experiments.training", *cell.command()[3:]]
    (run / RUNNING).touch()
    with (run / "log.txt").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT)
        try:
            status = None
            while status is None and wanted():
                with contextlib.suppress(subprocess.TimeoutExpired):
                    status = process.wait(timeout=1)
        finally:
            process.kill()
            process.communicate()
    (run / RUNNING).unlink(missing_ok=True)
    if status is None:
        raise CellError(f"{cell.name} was called off")
    if status != 0 or _taken(cell, run) < cell.timesteps:
        reason = f"exited with status {status}" if status != 0 else "was interrupted before its last step"
        raise CellError(f"{cell.name} {reason}. The end of its log:\n{log_tail(run)}")
    about["seconds"] = round(time.time() - started)
    write_atomically(run / "cell.json", f"{json.dumps(about)}\n".encode())


def log_tail(run: Path) -> str:
    """The last lines of a run's log."""
    lines = (run / "log.txt").read_text(errors="replace").rstrip().splitlines()
    return "\n".join(f"    {line}" for line in lines[-LOG_LINES:])


def steps_done(cell: Cell, folder: Path) -> int:
    """Steps that a running cell has logged, of ``cell.timesteps``."""
    try:
        with (cell.run_folder(folder) / "progress.csv").open() as file:
            column = file.readline().rstrip("\n").split(",").index("time/total_timesteps")
            last = file.readlines()[-1]
        return min(int(last.split(",")[column]), cell.timesteps)
    except (OSError, ValueError, IndexError):
        return 0


def is_running(cell: Cell, folder: Path) -> bool:
    """Whether a process is at work on the cell, or was when it was killed."""
    return (cell.run_folder(folder) / RUNNING).exists()


def _taken(cell: Cell, run: Path) -> int:
    """Steps that the saved agent has been trained for: RL Zoo saves it, and ends as if all were well, if interrupted, too."""
    for agent in run.glob(f"{cell.algo}/*_1/*.zip"):
        with zipfile.ZipFile(agent) as file:
            return json.loads(file.read("data"))["num_timesteps"]
    return 0


def _complete(cell: Cell, run: Path) -> bool:
    """Whether the training has ended well, and only its result is missing."""
    return (run / "cell.json").exists() and _taken(cell, run) >= cell.timesteps


def _summary(cell: Cell, run: Path) -> Result:
    about = json.loads((run / "cell.json").read_text())
    episodes = read_episodes(list(run.glob(f"{cell.algo}/*_1/*.monitor.csv")))
    path = run / "progress.csv"
    # Empty if the algorithm did not come to log anything.
    log = pd.read_csv(path) if path.stat().st_size else pd.DataFrame({"time/total_timesteps": []})
    result = summarize(episodes, log, cell.timesteps, _taken(cell, run))
    own = {"task": cell.task, "method": cell.method, "seed": cell.seed, "algo": cell.algo, "hyperparams": cell.hyperparams}
    return result._replace(about={**own, **result.about, **about})


def _quoted(word: str) -> str:
    """The word for a shell; what has Python's quotes in it is easier to read in double ones."""
    return f'"{word}"' if "'" in word and not set(word) & set('"$`\\!') else shlex.quote(word)
