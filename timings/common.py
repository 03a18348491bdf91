"""What the timings share: things are timed in turn, so that whatever else the machine does slows all of them alike."""

import argparse
import json
import os
import platform
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch as th


def parser(description: str | None, repeats: int) -> argparse.ArgumentParser:
    """Options that all timings have."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--repeats", type=int, default=repeats, help="how often each is timed (default: %(default)s)")
    made.add_argument("--threads", type=int, default=1, help="threads of torch (default: %(default)s)")
    made.add_argument("--json", type=Path, help="file to write the numbers to")
    return made


def in_turn(timed: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Call each function, one after the other, again and again; returns what each returned."""
    rounds = [{name: function() for name, function in timed.items()} for _ in range(repeats)]
    return {name: [row[name] for row in rounds] for name in timed}


def ratios(values: dict[str, list[float]], base: str) -> dict[str, tuple[float, float, float]]:
    """Median and quartiles of what the base took over what each took, of neighbours in time."""
    compared = {}
    for name, ours in values.items():
        pairs = [a / b for a, b in zip(values[base], ours, strict=True)]
        low, middle, high = statistics.quantiles(pairs, n=4) if len(pairs) > 1 else pairs * 3
        compared[name] = (middle, low, high)
    return compared


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table in Markdown."""
    print(f"\n{title}\n\n| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |", flush=True)


def write(path: Path | None, content: Any) -> None:
    """Write the numbers, and the machine that they are from, to a JSON file."""
    if path is not None:
        machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count(), "torch": th.__version__}
        path.write_text(json.dumps({"machine": machine, "results": content}, indent=1) + "\n")
