"""Callbacks that show what a training does."""

import csv
from pathlib import Path
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import CSVOutputFormat

from sb3_klip.training import PerSampleKLTraining


class CSVLogCallback(BaseCallback):
    """
    Write what the logger gets to a CSV file as well, one row per dump; for any algorithm of Stable-Baselines3.

    SB3 does so by itself only with a logger that the user configures, which RL Zoo does not offer. There, among the
    hyperparameters: ``callback: {sb3_klip.CSVLogCallback: {path: progress.csv}}``.

    A training that goes on from where another was, as after ``learn(reset_num_timesteps=False)`` or when it is resumed, keeps
    the rows up to there; one that begins replaces the file.

    :param path: file to write; its folder is made
    :param verbose: Verbosity level, as for other callbacks
    """

    def __init__(self, path: str | Path, verbose: int = 0):
        super().__init__(verbose)
        self.path = Path(path)
        self._csv: CSVOutputFormat | None = None

    def _on_training_start(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        earlier = self._earlier_rows()
        self._csv = CSVOutputFormat(str(self.path))
        if earlier:
            writer = csv.DictWriter(self._csv.file, list(earlier[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(earlier)
            self._csv.keys = list(earlier[0])
        self.logger.output_formats.append(self._csv)

    def _earlier_rows(self) -> list[dict[str, Any]]:
        """The rows of the file that are of steps which this training has behind it."""
        if self.num_timesteps == 0 or not self.path.is_file():
            return []
        # A crash may have cut off the last row.
        rows = list(csv.DictReader(self.path.read_text(encoding="utf-8").rpartition("\n")[0].splitlines()))
        steps = "time/total_timesteps"
        return [row for row in rows if str(row.get(steps)).isdigit() and int(row[steps]) <= self.num_timesteps]

    def _on_step(self) -> bool:
        return True

    def _on_training_end(self) -> None:
        # RL Zoo ends the training of its first callback a second time, and one that did not begin, too.
        if self._csv is not None:
            self.logger.output_formats.remove(self._csv)
            self._csv.close()
            self._csv = None


class BetaHistogramCallback(BaseCallback):
    """
    Log β of all samples of each update as a histogram, ``train/beta``, which TensorBoard shows (and Weights & Biases, when it
    follows TensorBoard, as with RL Zoo's ``--track``).

    :param verbose: Verbosity level, as for other callbacks
    :raises ValueError: at the start of training, if the algorithm is none of this package's
    """

    def _on_training_start(self) -> None:
        if not isinstance(self.model, PerSampleKLTraining):
            name = type(self.model).__name__
            raise ValueError(f"BetaHistogramCallback shows the coefficient of this package's algorithms, and {name} has none")

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        beta = self.model.update_beta  # type: ignore[attr-defined]
        if beta is not None:
            self.logger.record("train/beta", beta, exclude=("stdout", "log", "json", "csv"))
