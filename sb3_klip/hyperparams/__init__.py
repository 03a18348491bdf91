"""
The hyperparameters: in a clone, those of the folder ``hyperparams`` at the top level; a wheel has that folder here.

``python -m`` in a clone imports the package from the clone, not the installed one. It needs this file to find the folder.
"""

from pathlib import Path

__path__ = [str(Path(__file__).parents[2] / "hyperparams")]
