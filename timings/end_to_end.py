"""
Frames per second, start-up and peak memory of whole training runs, each in a process of its own, in turn.

    python timings/end_to_end.py
    python timings/end_to_end.py --env HalfCheetah-v4 --normalize
    python timings/end_to_end.py --env CartPole-v1 --n-envs 8
    python timings/end_to_end.py --sbx-python sbx/bin/python   # also SBX's PPO, from an environment that has sbx-rl

The setting is the paper's, which is also SB3's default: 2048 steps, minibatches of 64, 10 epochs, two layers of 64. The first
4096 steps, in which functions are traced or compiled, do not count. XLA, which SBX uses, takes as many threads as it likes.
"""

import importlib
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

#: Steps that do not count.
WARM_UP = 2 * 2048
#: Steps of a short training, which counts from the start of its process.
SHORT = 20_000
#: What is timed: module, class, and arguments of its constructor.
METHODS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "PPO": ("stable_baselines3", "PPO", {"device": "cpu"}),
    "KLipPPO": ("sb3_klip", "KLipPPO", {"device": "cpu"}),
    "KLipPPO, compiled": ("sb3_klip", "KLipPPO", {"device": "cpu", "compile": True}),
    "SBX PPO": ("sbx", "PPO", {}),
}


class Run(NamedTuple):
    """What is trained on."""

    env: str = "Hopper-v4"
    n_envs: int = 1
    normalize: bool = False

    def __str__(self) -> str:
        number = "1 environment" if self.n_envs == 1 else f"{self.n_envs} environments"
        return f"{self.env}, {number}{', VecNormalize' if self.normalize else ''}"


def worker(name: str, run: Run, steps: int, threads: int, started: float) -> None:
    """One run, in this process; prints what it measured."""
    import torch as th
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize

    th.set_num_threads(threads)
    module, algorithm, kwargs = METHODS[name]
    env = make_vec_env(run.env, run.n_envs)
    env = VecNormalize(env) if run.normalize else env
    model = getattr(importlib.import_module(module), algorithm)("MlpPolicy", env, seed=0, **kwargs)
    if steps == 0:
        model.learn(SHORT)
        print(json.dumps({"seconds": time.time() - started}))
        return
    model.learn(WARM_UP)
    before, start = model.num_timesteps, time.perf_counter()
    model.learn(steps, reset_num_timesteps=False)
    seconds = time.perf_counter() - start
    # Not getrusage: there, Linux counts the memory of the process that started this one.
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])  # type: ignore[index]
    print(json.dumps({"seconds": seconds / (model.num_timesteps - before), "peak": peak / 1024}))


def compare(run: Run, steps: int, repeats: int, threads: int = 1, sbx_python: Path | None = None) -> dict[str, Any]:
    """
    Seconds per frame, ratios and peak memory of PPO and the others.

    :param steps: steps that count; 0 for the first 20 000 of the process, imports included
    :param repeats: number of processes of each
    :param threads: threads of torch
    :param sbx_python: Python of an environment that has sbx-rl
    """
    from common import in_turn, ratios

    pythons = {name: str(sbx_python) if module == "sbx" else sys.executable for name, (module, *_) in METHODS.items()}
    if sbx_python is None:
        del pythons["SBX PPO"]
    peaks: dict[str, list[float]] = {name: [] for name in pythons}

    def one(name: str) -> float:
        arguments = (run.env, run.n_envs, int(run.normalize), steps, threads, time.time())
        command = [pythons[name], __file__, "worker", name, *map(str, arguments)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        measured = json.loads(output.splitlines()[-1])
        peaks[name].append(measured.get("peak", 0.0))
        return measured["seconds"]

    seconds = in_turn({name: lambda name=name: one(name) for name in pythons}, repeats)  # type: ignore[misc]
    return {
        "setting": str(run),
        "run": run._asdict(),
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "peak": {name: statistics.median(values) for name, values in peaks.items()},
        "ratios": ratios(seconds, "PPO"),
    }


def main() -> None:
    """Run the comparison."""
    if sys.argv[1:2] == ["worker"]:
        name, env_id, n_envs, normalize, steps, threads, started = sys.argv[2:]
        worker(name, Run(env_id, int(n_envs), normalize == "1"), int(steps), int(threads), float(started))
        return

    from common import parser, table, write

    options = parser(__doc__, repeats=5)
    options.add_argument("--env", default="Hopper-v4")
    options.add_argument("--n-envs", type=int, default=1, help="environments in one DummyVecEnv (default: %(default)s)")
    options.add_argument("--normalize", action="store_true", help="with VecNormalize")
    options.add_argument("--steps", type=int, default=20_480, help="steps that count (default: %(default)s)")
    options.add_argument("--sbx-python", type=Path, help="Python of an environment that has sbx-rl")
    args = options.parse_args()

    result = compare(Run(args.env, args.n_envs, args.normalize), args.steps, args.repeats, args.threads, args.sbx_python)
    rows = [
        (name, f"{1 / value:.0f}", *(f"{ratio:.2f}" for ratio in result["ratios"][name]), f"{result['peak'][name]:.0f}")
        for name, value in result["seconds"].items()
    ]
    header = ("", "frames per second", "over PPO's", "quartile", "quartile", "peak memory in MiB")
    table(f"{result['setting']}, {args.threads} thread(s)", header, rows)
    write(args.json, result)


if __name__ == "__main__":
    main()
