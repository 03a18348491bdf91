"""
Frames per second and peak memory of whole training runs, each in a process of its own, in turn.

    python timings/end_to_end.py
    python timings/end_to_end.py --env CartPole-v1 --n-envs 8 --steps 65536
    python timings/end_to_end.py --sbx-python sbx/bin/python   # also SBX's PPO, from an environment that has sbx-rl

The setting is the paper's, which is also SB3's default: 2048 steps, minibatches of 64, 10 epochs, two layers of 64. The first
two rollouts, in which functions are compiled, do not count.
"""

import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

#: Rollouts that do not count.
WARM_UP = 2 * 2048


def worker(name: str, env_id: str, n_envs: int, steps: int, threads: int) -> None:
    """One run, in this process; prints what it measured."""
    import torch as th
    from stable_baselines3.common.env_util import make_vec_env

    th.set_num_threads(threads)
    kwargs: dict[str, object] = {} if name == "SBX PPO" else {"device": "cpu"}
    if name == "SBX PPO":
        import sbx

        algorithm = sbx.PPO
    elif name == "PPO":
        import stable_baselines3

        algorithm = stable_baselines3.PPO
    else:
        import sb3_klip

        algorithm = sb3_klip.KLipPPO
        kwargs["compile"] = name == "KLipPPO, compiled"
    model = algorithm("MlpPolicy", make_vec_env(env_id, n_envs), seed=0, **kwargs)
    model.learn(WARM_UP * n_envs)
    start = time.perf_counter()
    model.learn(steps, reset_num_timesteps=False)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in KiB on Linux
    print(json.dumps({"fps": (model.num_timesteps - WARM_UP * n_envs) / seconds, "peak": peak / 1024}))


def main() -> None:
    """Run the comparison."""
    if sys.argv[1:2] == ["worker"]:
        name, env_id, *numbers = sys.argv[2:]
        worker(name, env_id, *map(int, numbers))
        return

    from common import in_turn, parser, ratios, table, write

    options = parser(__doc__, repeats=5)
    options.add_argument("--env", default="Hopper-v4")
    options.add_argument("--n-envs", type=int, default=1, help="environments in one DummyVecEnv (default: %(default)s)")
    options.add_argument("--steps", type=int, default=20_480, help="steps that count (default: %(default)s)")
    options.add_argument("--sbx-python", type=Path, help="Python of an environment that has sbx-rl")
    args = options.parse_args()

    pythons = dict.fromkeys(("PPO", "KLipPPO", "KLipPPO, compiled"), sys.executable)
    if args.sbx_python:
        pythons["SBX PPO"] = str(args.sbx_python)
    peaks: dict[str, list[float]] = {name: [] for name in pythons}

    def run(name: str) -> float:
        numbers = (args.n_envs, args.steps, args.threads)
        command = [pythons[name], __file__, "worker", name, args.env, *map(str, numbers)]
        measured = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        peaks[name].append(measured["peak"])
        return 1 / measured["fps"]

    seconds = in_turn({name: lambda name=name: run(name) for name in pythons}, args.repeats)  # type: ignore[misc]
    compared = ratios(seconds, "PPO")
    memory = {name: statistics.median(values) for name, values in peaks.items()}
    rows = [
        (name, f"{1 / statistics.median(values):.0f}", *(f"{ratio:.2f}" for ratio in compared[name]), f"{memory[name]:.0f}")
        for name, values in seconds.items()
    ]
    header = ("", "frames per second", "over PPO's", "quartile", "quartile", "peak memory in MiB")
    table(f"{args.env}, {args.n_envs} environment(s), {args.threads} thread(s)", header, rows)
    write(
        args.json,
        {
            "env": args.env,
            "n_envs": args.n_envs,
            "fps": {name: [1 / s for s in v] for name, v in seconds.items()},
            "peak_mib": peaks,
        },
    )


if __name__ == "__main__":
    main()
