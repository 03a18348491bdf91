"""Callbacks that show what a training does, for any algorithm of Stable-Baselines3."""

from pathlib import Path

from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import CSVOutputFormat


class CSVLogCallback(BaseCallback):
    """
    Write what the logger gets to a CSV file as well, one row per dump.

    SB3 does so by itself only with a logger that the user configures, which RL Zoo does not offer. There, among the
    hyperparameters: ``callback: {sb3_klip.callbacks.CSVLogCallback: {path: progress.csv}}``.

    :param path: file to write; its folder is made, and a file of that name replaced
    :param verbose: Verbosity level, as for other callbacks
    """

    def __init__(self, path: str | Path, verbose: int = 0):
        super().__init__(verbose)
        self.path = Path(path)

    def _on_training_start(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._csv = CSVOutputFormat(str(self.path))
        self.logger.output_formats.append(self._csv)

    def _on_step(self) -> bool:
        return True

    def _on_training_end(self) -> None:
        # RL Zoo ends the training of its first callback a second time.
        if self._csv in self.logger.output_formats:
            self.logger.output_formats.remove(self._csv)
            self._csv.close()
