"""Evaluate RL Zoo's latest training, and print the next commands: ``python -m sb3_klip.zoo.evaluate --env Hopper-v4``."""

import argparse
import contextlib
import functools
import importlib
import io
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rl_zoo3.import_envs  # noqa: F401
from huggingface_sb3 import EnvironmentName
from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.utils import ALGOS, create_test_env, get_latest_run_id, get_saved_hyperparams
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_klip.checkpoints.zoo_run import read_zoo_yaml
from sb3_klip.errors import did_you_mean
from sb3_klip.zoo.agents import EPISODES
from sb3_klip.zoo.registration import ALGORITHMS, register


@dataclass(frozen=True)
class Run:
    """
    A run of ``rl_zoo3.train``.

    :param folder: the zoo's log folder
    :param algo: algorithm, as the zoo names it
    :param env: environment
    :param number: its number among the runs of this algorithm on this environment, from 1
    """

    folder: Path
    algo: str
    env: EnvironmentName
    number: int

    @property
    def path(self) -> Path:
        """Its own folder."""
        return self.folder / self.algo / f"{self.env}_{self.number}"

    @property
    def agents(self) -> dict[str, Path]:
        """Paths of the last agent and of the one with the best evaluation, if they were saved."""
        files = {"last": self.path / f"{self.env}.zip", "best": self.path / "best_model.zip"}
        return {label: file for label, file in files.items() if file.is_file()}

    @functools.cached_property
    def arguments(self) -> dict[str, Any]:
        """What ``rl_zoo3.train`` was called with."""
        return read_zoo_yaml(self.path / self.env / "args.yml")

    @classmethod
    def latest(cls, folder: Path, algo: str, env: EnvironmentName) -> "Run":
        """The latest run with an agent, as a training that was refused leaves a folder without one; or else the latest."""
        number = get_latest_run_id(str(folder / algo), env)
        runs = [cls(folder, algo, env, each) for each in range(number, 0, -1)]
        return next((run for run in runs if run.agents), cls(folder, algo, env, number))

    @property
    def packages(self) -> list[str]:
        """The modules that register its environment."""
        return self.arguments.get("gym_packages") or []

    def tensorboard_log(self) -> Path | None:
        """The newest log for TensorBoard of a run on this environment, if any was written."""
        folder = self.arguments.get("tensorboard_log")
        files = list(Path(folder, self.env).glob("*/events.out.tfevents.*")) if folder else []
        return max(files, key=lambda file: file.stat().st_mtime).parent if files else None


def evaluated_return(run: Run, agent: Path, seed: int = 0) -> tuple[float, float]:
    """
    The return of an agent, played as by ``rl_zoo3.enjoy``: with its statistics, and mostly deterministically.

    Only on Atari and MiniGrid, actions are drawn at random.

    :param run: its run
    :param agent: its checkpoint
    :param seed: of the environment
    :return: mean and standard deviation over :data:`~sb3_klip.zoo.agents.EPISODES` episodes
    """
    hyperparams, statistics = get_saved_hyperparams(str(run.path / run.env), test_mode=True)
    env_kwargs = run.arguments.get("env_kwargs") or hyperparams.pop("env_kwargs", None)
    id_ = run.env.gym_id
    with contextlib.redirect_stdout(io.StringIO()):  # the zoo says which statistics it loads
        env = create_test_env(id_, 1, statistics, seed, None, False, hyperparams, env_kwargs)
    model = ALGOS[run.algo].load(agent, device="cpu")
    deterministic = not (ExperimentManager.is_atari(id_) or ExperimentManager.is_minigrid(id_))
    mean, std = evaluate_policy(model, env, EPISODES, deterministic=deterministic)
    env.close()
    return float(mean), float(std)  # type: ignore[arg-type]


def next_commands(run: Run, best: bool) -> dict[str, str]:
    """
    The commands to watch the agent, record a video and plot the run.

    :param run: its run
    :param best: whether to use the best agent, not the last
    :return: command by purpose
    """
    folder = shlex.quote(str(run.folder))
    agent = f"--algo {run.algo} --env {run.env.gym_id} -f {folder}{' --load-best' if best else ''}"
    packages = " ".join(["", "--gym-packages", *run.packages]) if run.packages else ""
    # MuJoCo draws by way of a window unless told otherwise, and a machine without a display has none.
    prefix = "MUJOCO_GL=egl " if sys.platform == "linux" and "mujoco" in ExperimentManager.entry_point(run.env.gym_id) else ""
    log = run.tensorboard_log() if run.algo in ALGORITHMS else None
    if log:
        plot = f"sb3_klip.plot distribution {shlex.quote(str(log))} -o {shlex.quote(str(run.path))}"
    else:
        plot = f"rl_zoo3.cli plot_train -a {run.algo} -e {run.env} -f {folder}"
    # The zoo's record_video takes no packages, so it knows no environment of the user's own.
    film = {} if packages else {"film": f"{prefix}{_python()} -m rl_zoo3.record_video {agent}"}
    return {"watch": f"{_python()} -m rl_zoo3.enjoy {agent}{packages}", **film, "plot": f"{_python()} -m {plot}"}


def _python() -> str:
    """This Python, as it is typed: ``python`` where that is the one, as in an activated virtual environment."""
    found = shutil.which("python")
    if found and Path(found).absolute() == Path(sys.executable).absolute():
        return "python"
    executable = Path(sys.executable)
    return str(executable.relative_to(Path.cwd()) if executable.is_relative_to(Path.cwd()) else executable)


def main(argv: Sequence[str] | None = None) -> int:
    """
    Evaluate the last and the best agent of the latest run, and print the next commands.

    :param argv: arguments of the command line; None for those of the process
    :return: exit status
    :raises SystemExit: if an argument is not valid; its code is 2
    """
    parser = argparse.ArgumentParser(
        "python -m sb3_klip.zoo.evaluate",
        description="Evaluate the last and the best agent of RL Zoo's latest run, and print the next commands.",
    )
    parser.add_argument("--algo", default="klip_ppo", help="algorithm (default: %(default)s)")
    parser.add_argument("--env", type=EnvironmentName, required=True, help="id of the environment")
    parser.add_argument("-f", "--folder", type=Path, default=Path("logs"), help="RL Zoo's log folder (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the episodes (default: %(default)s)")
    args = parser.parse_args(argv)
    register()
    if args.algo not in ALGOS:
        parser.error(f"--algo: {args.algo!r} must be one of {', '.join(sorted(ALGOS))}.{did_you_mean(args.algo, ALGOS)}")
    if args.seed < 0:
        parser.error(f"--seed: {args.seed} must be 0 or more")
    run = Run.latest(args.folder, args.algo, args.env)
    agents = run.agents
    if "last" not in agents:
        if not args.folder.is_dir():
            parser.error(f"--folder: {args.folder} is no folder")
        finished = sorted({path.parts[-3:] for path in args.folder.glob("*/*_*/*-v*.zip")})
        runs = dict.fromkeys(f"{algo} on {Path(file).stem}" for algo, _, file in finished)
        parser.error(
            f"--env: {args.folder / args.algo} has no finished run on {args.env.gym_id!r}. Finished runs: "
            f"{', '.join(runs) or 'none'}.{did_you_mean(f'{args.algo} on {args.env}', runs)}"
        )
    for package in run.packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            parser.error(f"--env: {package!r}, which the training had as --gym-packages, cannot be imported: {error}")
    print(f"Return over {EPISODES} episodes, mean +/- standard deviation:")
    returns = {label: evaluated_return(run, file, args.seed) for label, file in agents.items()}
    for label, (mean, std) in returns.items():
        print(f"  {label} agent: {mean:.1f} +/- {std:.1f}   {agents[label]}")
    if "best" not in agents:
        frequency = run.arguments.get("eval_freq", 0)
        reason = (
            f"the training was shorter than --eval-freq {frequency}" if frequency > 0 else "it was not evaluated in training"
        )
        print(f"  best agent: none, as {reason}")
    print("Next:")
    for purpose, command in next_commands(run, best=max(returns, key=returns.__getitem__) == "best").items():
        print(f"  {purpose}: {command}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
