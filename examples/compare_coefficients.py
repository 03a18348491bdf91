"""
Three coefficients on one task: the trainings, a table with statistics, and the learning curves as a figure.

The suite is the YAML file beside this one. On the command line:

    python -m sb3_klip.experiments run --suite examples/compare_coefficients.yml --folder logs/compare
    python -m sb3_klip.experiments report logs/compare
"""

import sys
from pathlib import Path

from sb3_klip.experiments.__main__ import main

if __name__ == "__main__":  # the workers are processes that import this file
    suite = Path(__file__).with_suffix(".yml")
    sys.exit(main(["run", "--suite", str(suite), "--folder", "logs/compare"]) or main(["report", "logs/compare"]))
