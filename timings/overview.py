"""
Everything that the documentation says about speed: one table, its numbers, and a figure. Takes 45 minutes, idle.

    python timings/overview.py --sbx-python sbx/bin/python
    python timings/overview.py --redraw      # table and figure, from the numbers that are there
"""

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent


def measure(repeats: int, threads: int, sbx_python: Path | None) -> dict[str, Any]:
    """Time everything in turn."""
    import end_to_end
    import torch as th
    import train

    th.set_num_threads(threads)
    runs = [
        *(end_to_end.Run(n_envs=n_envs) for n_envs in (1, 8, 16)),  # of the figure
        end_to_end.Run("HalfCheetah-v4", normalize=True),
        end_to_end.Run("CartPole-v1", 8),
    ]
    compiled = {"KLipPPO": {}, "KLipPPO, compiled": {"compile": True}}
    return {
        "updates": [train.compare(setting, compiled, repeats) for setting in train.USUAL],
        "others": [train.compare(setting, {"KLipPPO": {}}, repeats) for setting in train.OTHERS],
        "coefficients": train.compare(train.Setting(), train.coefficients(), 3),
        "grid": [train.compare(setting, {"KLipPPO": {}}, 3) for setting in train.GRID],
        "runs": [end_to_end.compare(run, 20_480, 3, threads, sbx_python) for run in runs],
        "start": end_to_end.compare(end_to_end.Run(), 0, 3, threads, sbx_python),
    }


def tables(found: dict[str, Any]) -> dict[str, tuple[tuple[str, ...], list[tuple[str, ...]]]]:
    """Header and rows of each table, by name."""

    def ratio(result: dict[str, Any], name: str) -> str:
        middle, low, high = result["ratios"].get(name, (None,) * 3)
        return "" if middle is None else f"{middle:.2f} ({low:.2f} to {high:.2f})"

    def row(start: str, result: dict[str, Any]) -> tuple[str, ...]:
        return (f"{start}{result['setting']}", *(ratio(result, name) for name in names))

    names = ("KLipPPO", "KLipPPO, compiled", "SBX PPO")
    speed = [row("`train()`: ", result) for result in (*found["updates"], *found["others"])]
    speed += [row("training: ", result) for result in found["runs"]]
    speed += [row("first 20 000 steps, imports included: ", found["start"])]
    coefficients = sorted(name for name in found["coefficients"]["ratios"] if name != "PPO")
    memory = [(r["setting"], *(f"{r['peak'][n] / r['peak']['PPO']:.2f}" for n in names[:2])) for r in found["runs"]]
    return {
        "speed": (("", *names), speed),
        "coefficients": (("`beta`", "speed"), [(f"`{name}`", ratio(found["coefficients"], name)) for name in coefficients]),
        "sizes": (("`train()`", "speed"), [(r["setting"], ratio(r, "KLipPPO")) for r in found["grid"]]),
        "memory": (("", *names[:2]), memory),
    }


def draw(found: dict[str, Any], path: Path) -> None:
    """Frames per second over the number of environments."""
    import matplotlib.pyplot as plt

    runs = [result for result in found["runs"] if result["run"]["env"] == "Hopper-v4"]
    names = list(runs[0]["seconds"])
    plt.rcParams["svg.hashsalt"] = "sb3-klip"
    figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
    for place, name in enumerate(names):
        heights = [1 / result["seconds"][name] for result in runs]
        offsets = [group + (place - (len(names) - 1) / 2) * 0.8 / len(names) for group in range(len(runs))]
        bars = axes.bar(offsets, heights, 0.8 / len(names), label=name)
        axes.bar_label(bars, fmt="{:.0f}", fontsize=7)
    axes.set_xticks(range(len(runs)), [str(result["run"]["n_envs"]) for result in runs])
    axes.set(xlabel="environments (Hopper-v4, DummyVecEnv)", ylabel="frames per second")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Measure, unless that is done, and show."""
    from common import parser, table, write

    options = parser(__doc__, repeats=5)
    options.set_defaults(json=FOLDER / "overview.json")
    options.add_argument("--figure", type=Path, default=FOLDER.parent / "docs/figures/fps.svg")
    options.add_argument("--sbx-python", type=Path, help="Python of an environment that has sbx-rl")
    options.add_argument("--redraw", action="store_true", help="show the numbers of the JSON file, and measure nothing")
    args = options.parse_args()
    if not args.redraw:
        write(args.json, measure(args.repeats, args.threads, args.sbx_python))
    found = json.loads(args.json.read_text())["results"]
    for name, (header, rows) in tables(found).items():
        table(name, header, rows)
    draw(found, args.figure)


if __name__ == "__main__":
    main()
