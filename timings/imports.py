"""
What the RL Zoo hook costs: ``import torch`` with it, and with torch's autoloading switched off, in processes in turn.

    python timings/imports.py
"""

import os
import statistics
import subprocess
import sys

from common import in_turn, parser, ratios, table, write

CODE = "import time; start = time.perf_counter(); import torch; print(time.perf_counter() - start)"


def seconds(autoload: str) -> float:
    """Time of ``import torch`` in a new process."""
    environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": autoload}
    run = subprocess.run([sys.executable, "-c", CODE], env=environment, check=True, capture_output=True, text=True)
    return float(run.stdout)


def main() -> None:
    """Run the comparison."""
    args = parser(__doc__, repeats=15).parse_args()
    seconds("1")  # not counted: files come from the disk
    times = in_turn({"without the hook": lambda: seconds("0"), "with the hook": lambda: seconds("1")}, args.repeats)
    compared = ratios(times, "without the hook")
    rows = [
        (name, f"{statistics.median(values):.3f}", *(f"{ratio:.3f}" for ratio in compared[name]))
        for name, values in times.items()
    ]
    table("import torch", ("", "seconds", "time without the hook over it", "quartile", "quartile"), rows)
    write(args.json, times)


if __name__ == "__main__":
    main()
