"""
In a clone, the hyperparameters are those of the folder ``hyperparams`` at its top level; a wheel has that folder here.

A clone is found before an installed package by ``python -m``, run in the clone, and would have none otherwise.
"""

from pathlib import Path

__path__ = [str(Path(__file__).parents[2] / "hyperparams")]
