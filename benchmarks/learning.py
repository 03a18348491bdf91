"""
Learning curves' ends for every coefficient with its defaults, through RL Zoo with its tuned hyperparameters for PPO.

    python benchmarks/learning.py learning --jobs 2     # CartPole-v1 on three seeds, Hopper-v4 on one, 100 000 steps each

Each run is an ordinary ``rl_zoo3.train`` below the folder, which is printed; runs that have ended are not repeated. Prints
a table in Markdown: for CartPole-v1 the best mean return of 100 episodes in a row, of each seed, and for Hopper-v4 the mean
return of the first and of the last tenth of the episodes.
"""

import argparse
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from stable_baselines3.common.monitor import load_results

from sb3_klip.coefficients import available

SEEDS = {"CartPole-v1": (0, 1, 2), "Hopper-v4": (0,)}


def train(folder: Path, beta: str, env_id: str, seed: int) -> None:
    """One run, unless it has been made."""
    if not list(folder.glob(f"{beta}/{seed}/klip_ppo/{env_id}_1/{env_id}.zip")):
        command = f"{sys.executable} -m rl_zoo3.train --algo klip_ppo --env {env_id} --seed {seed} -n 100000 --eval-freq -1"
        command += f" --num-threads 1 --verbose 0 -f {folder}/{beta}/{seed} -params"
        print(f"{command} beta:\"'{beta}'\"", flush=True)
        subprocess.run([*command.split(), f"beta:'{beta}'"], check=True, stdout=subprocess.DEVNULL)


def returns(folder: Path, beta: str, env_id: str, seed: int) -> list[float]:
    """Returns of the training episodes, in the order in which they ended."""
    return load_results(str(folder / beta / str(seed) / "klip_ppo" / f"{env_id}_1"))["r"].tolist()


def mean(values: list[float]) -> float:
    """Mean of a list."""
    return sum(values) / len(values)


def main() -> None:
    """Train what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    args = parser.parse_args()
    names = [*available(), "espo"]
    runs = [(args.folder, beta, env_id, seed) for beta in names for env_id, seeds in SEEDS.items() for seed in seeds]
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda run: train(*run), runs))

    print("\n| `beta` | CartPole-v1, best 100 episodes (3 seeds) | Hopper-v4, first → last tenth |\n|---|---|---|")
    for beta in names:
        best = []
        for seed in SEEDS["CartPole-v1"]:
            episodes = returns(args.folder, beta, "CartPole-v1", seed)
            best.append(max(mean(episodes[i : i + 100]) for i in range(max(1, len(episodes) - 99))))
        episodes = returns(args.folder, beta, "Hopper-v4", 0)
        tenth = max(1, len(episodes) // 10)
        ends = f"{mean(episodes[:tenth]):.0f} → {mean(episodes[-tenth:]):.0f}"
        print(f"| `{beta}` | {', '.join(f'{value:.0f}' for value in best)} | {ends} |")


if __name__ == "__main__":
    main()
