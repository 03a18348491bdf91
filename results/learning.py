"""
Learning curves' ends for every coefficient with its defaults, through RL Zoo with its tuned hyperparameters for PPO.

    python results/learning.py logs/learning --jobs 2     # CartPole-v1 on three seeds, Hopper-v4 on one, 100 000 steps each
    python results/learning.py logs/learning --beta step spo   # of these only

Each run is an ordinary ``rl_zoo3.train`` below the folder, whose command is in the first line of its file below ``results``;
runs that have ended are not repeated. Prints a table in Markdown: for CartPole-v1 the best mean return of 100 episodes in a
row, of each seed, and for Hopper-v4 the mean return of the first and of the last tenth of the episodes; none for a coefficient
that needs actions with probabilities.
"""

import argparse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sb3_klip.coefficients import available, make
from sb3_klip.experiments.cell import Cell, run_cell
from sb3_klip.experiments.results import read_episodes

SEEDS = {"CartPole-v1": (0, 1, 2), "Hopper-v4": (0,)}


def returns(folder: Path, beta: str, env_id: str, seed: int) -> list[float]:
    """Returns of the training episodes, in the order in which they ended; trains, unless that has been done."""
    cell = Cell(env_id, beta, seed, "klip_ppo", "sb3_klip.hyperparams.klip_ppo", 100_000, True, {"beta": beta})
    run_cell(cell, folder)
    return read_episodes(list(cell.run_folder(folder).glob("klip_ppo/*_1/*.monitor.csv")))["return"].tolist()


def mean(values: list[float]) -> float:
    """Mean of a list."""
    return sum(values) / len(values)


def main() -> None:
    """Train what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--beta", nargs="+", default=[*available(), "espo"], help="coefficients (default: all)")
    args = parser.parse_args()
    names = args.beta
    runs = [
        (beta, env_id, seed)
        for beta in names
        for env_id, seeds in SEEDS.items()
        for seed in seeds
        if env_id == "CartPole-v1" or not make(beta).needs_probabilities
    ]
    with ThreadPoolExecutor(args.jobs) as pool:
        made = dict(zip(runs, pool.map(lambda run: returns(args.folder, *run), runs), strict=True))

    print("\n| `beta` | CartPole-v1, best 100 episodes (3 seeds) | Hopper-v4, first → last tenth |\n|---|---|---|")
    for beta in names:
        best = []
        for seed in SEEDS["CartPole-v1"]:
            episodes = made[beta, "CartPole-v1", seed]
            best.append(max(mean(episodes[i : i + 100]) for i in range(max(1, len(episodes) - 99))))
        ends = "–"
        if episodes := made.get((beta, "Hopper-v4", 0)):
            tenth = max(1, len(episodes) // 10)
            ends = f"{mean(episodes[:tenth]):.0f} → {mean(episodes[-tenth:]):.0f}"
        print(f"| `{beta}` | {', '.join(f'{value:.0f}' for value in best)} | {ends} |")


if __name__ == "__main__":
    main()
