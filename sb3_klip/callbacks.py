"""Callbacks: logs, histograms of β, the comparison with PPO, and checkpoints to resume from."""

import csv
import os
import pickle
import warnings
from numbers import Real
from pathlib import Path
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback
from stable_baselines3.common.logger import CSVOutputFormat, HumanOutputFormat, JSONOutputFormat
from stable_baselines3.common.vec_env import VecNormalize

from sb3_klip.algorithm import KLipAlgorithm
from sb3_klip.checkpoints.env_state import EnvState
from sb3_klip.errors import check_flag
from sb3_klip.files import naming, write_atomically
from sb3_klip.reproducibility import unchanged_generators
from sb3_klip.verify.bits import Difference, GradientRecorder, compare_gradients, largest_difference, state_tensors


def _check_algorithm(callback: BaseCallback) -> None:
    """Refuse a model of another package."""
    name = type(callback.model).__name__
    if not isinstance(callback.model, KLipAlgorithm):
        raise ValueError(f"{type(callback).__name__} is for the algorithms of sb3-klip, not for {name}")


def _check_path(name: str, path: object) -> None:
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"{name}={path!r} must be a text or a path")


class _CSVOutput(CSVOutputFormat):
    """
    SB3's format, which can go on with a file.

    :param path: the file
    :param kept: what is kept of it, from its beginning; if nothing is, the file is emptied
    """

    def __init__(self, path: Path, kept: str):
        super().__init__(os.devnull if kept else str(path))
        if kept:
            self.file.close()
            self.file = path.open("r+", encoding="utf-8")
            self.file.truncate(len(kept.encode()))
            self.file.seek(0, os.SEEK_END)
            self.keys = next(csv.reader(kept.splitlines()))

    def write(self, *args: Any, **kwargs: Any) -> None:
        with naming(self.file.name):
            super().write(*args, **kwargs)


class CSVLogCallback(BaseCallback):
    """
    Also write the log to a CSV file, with one row per dump of the logger. It works with any algorithm of Stable-Baselines3.

    Without this callback, SB3 writes a CSV file only if the user configures the logger, which is not possible in RL Zoo. In RL
    Zoo, add to the hyperparameters: ``callback: {sb3_klip.CSVLogCallback: {path: progress.csv}}``.

    A training that continues, by ``learn(reset_num_timesteps=False)`` or by resuming, keeps the earlier rows of the file. A
    new training replaces the file.

    :param path: file to write; its folder is created if necessary
    :param verbose: Verbosity level, as for other callbacks
    :raises TypeError: if ``path`` is no path
    :raises ValueError: at the start of training, if a file that is to be continued is no log
    """

    def __init__(self, path: str | Path, verbose: int = 0):
        super().__init__(verbose)
        _check_path("path", path)
        self.path = Path(path)
        self._csv: CSVOutputFormat | None = None

    def _on_training_start(self) -> None:
        self._on_training_end()  # an earlier training may have ended with an exception
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._csv = _CSVOutput(self.path, self._kept())
        self._log = self.logger  # the model may have another one at the end
        self._log.output_formats.append(self._csv)

    def _kept(self) -> str:
        """The beginning of the file, as far as this training has its steps behind it."""
        if self.num_timesteps == 0 or not self.path.is_file():
            return ""
        try:
            with self.path.open(encoding="utf-8", newline="") as file:
                lines = [line for line in file if line.endswith("\n")]  # a crash may have cut off the last row
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path} is no log to continue: {error}. Move it away, or give another path") from error
        rows, kept = csv.DictReader(lines), 0
        for row in rows:
            if None in row:
                raise ValueError(
                    f"{self.path} is damaged: a row has more values than keys. Move it away, or give another path"
                )
            steps = str(row.get("time/total_timesteps"))
            # Rows without steps, which others have written, belong to the row after them.
            if steps.isdigit() and int(steps) <= self.num_timesteps:
                kept = rows.line_num
        return "".join(lines[:kept])

    def _on_step(self) -> bool:
        return True

    def _on_training_end(self) -> None:
        # RL Zoo ends the training of its first callback a second time, and one that did not begin, too.
        if self._csv is not None:
            self._log.output_formats.remove(self._csv)
            self._csv.close()
            self._csv = None


class BetaHistogramCallback(BaseCallback):
    """
    Log β of all samples in the last epoch of each update as a histogram, ``train/beta``, in TensorBoard.

    Weights & Biases also shows it if it reads TensorBoard's log, as with RL Zoo's ``--track``. Without TensorBoard, the
    callback only warns.

    :param verbose: Verbosity level, as for other callbacks
    :raises ValueError: at the start of training, if the algorithm does not belong to this package
    """

    #: Output formats that are text, and cannot hold a histogram.
    TEXT = (HumanOutputFormat, JSONOutputFormat, CSVOutputFormat)

    def _on_training_start(self) -> None:
        _check_algorithm(self)
        if all(isinstance(output, self.TEXT) for output in self.logger.output_formats):
            warnings.warn(
                "BetaHistogramCallback has nowhere to show its histograms: train with TensorBoard, by tensorboard_log=… or RL "
                "Zoo's --tensorboard-log",
                stacklevel=2,
            )

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        beta = self.model.update_beta  # type: ignore[attr-defined]
        if beta is not None:
            self.logger.record("train/beta", beta, exclude=("stdout", "log", "json", "csv"))


class IdentityCheckCallback(BaseCallback):
    """
    Repeat each update with the base class, from the same state and on the same samples, and compare the two.

    It compares the gradients of all minibatches, and after the update all parameters and the state of the optimizer. The
    training itself is unchanged, but takes longer by the time of PPO's updates. The callback logs ``identity/minibatches`` and
    ``identity/ulps`` (the largest difference so far, in units in the last place), and warns at the first difference.

    :param verbose: Verbosity level, as for other callbacks
    :raises ValueError: at the start of training, if the algorithm does not belong to this package
    """

    def __init__(self, verbose: int = 0):
        super().__init__(verbose)
        #: Minibatches compared so far.
        self.minibatches = 0
        #: The largest difference so far, and where it was.
        self.difference = Difference(0, "")
        self._pending: _PendingComparison | None = None

    @property
    def identical(self) -> bool:
        """Whether at least one minibatch was compared, and no difference was found."""
        return self.minibatches > 0 and self.difference.ulps == 0

    # An algorithm of sb3-klip, as _init_callback checks.
    model: Any

    def _init_callback(self) -> None:
        _check_algorithm(self)
        self._forget()  # an earlier training may have ended with an exception
        self.model.at_rollout_boundaries(self._compare)

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self._pending = _PendingComparison(self.model)

    def _on_training_end(self) -> None:
        # RL Zoo calls this also after an interruption, which may have come in the middle of an update.
        if getattr(getattr(self, "model", None), "between_rollouts", False):
            self._compare()
        self._forget()

    def _forget(self) -> None:
        """Do not compare the update that is being recorded, if there is one."""
        if self._pending is not None:
            self._pending.close()
            self._pending = None

    def _compare(self) -> None:
        """Compare the update that has ended, if there was one."""
        if self._pending is None:
            return
        gradients = self._pending.recorder.take()
        worst = compare_gradients(gradients, self._pending.gradients)
        worst = max(worst, largest_difference(state_tensors(self.model.policy), self._pending.state))
        self._forget()
        if worst.ulps > 0 and self.difference.ulps == 0:
            where = f"The update after {self.num_timesteps} steps is not PPO's"
            warnings.warn(f"{where}: {worst.name} differs by {worst.ulps} units in the last place", stacklevel=2)
        self.difference = max(self.difference, worst)
        self.minibatches += len(gradients)
        self.logger.record("identity/minibatches", self.minibatches)
        self.logger.record("identity/ulps", self.difference.ulps)


class _PendingComparison:
    """
    What the base class makes of the update that is about to begin, and a record of what the model makes of it.

    :param model: between a rollout and its update
    """

    def __init__(self, model: Any):
        twin = model.base_twin()
        recorder = GradientRecorder(twin.policy)
        with unchanged_generators(model.rollout_buffer):
            twin.train()
        self.gradients, self.state = recorder.take(), state_tensors(twin.policy)
        # One more than there should be, to see that there are more; not all of them, if the training ends with an exception.
        self.recorder = GradientRecorder(model.policy, len(self.gradients) + 1)

    def close(self) -> None:
        """Record no more."""
        self.recorder.close()


class ResumableCheckpointCallback(CheckpointCallback):
    """
    Save checkpoints to resume from, with ``KLipPPO.load(path, env=env, resume=True)`` or RL Zoo's
    ``-i … -params resume:True``.

    A checkpoint is due after every ``save_freq`` steps of an environment. It is saved at the next moment between two rollouts,
    also inside an event callback such as ``EveryNTimesteps``. A kill at any moment never damages a saved checkpoint.

    :param save_freq: Save after this many calls of the callback; each call is ``n_envs`` steps
    :param save_path: Folder to save to
    :param name_prefix: Prefix of the files; RL Zoo expects ``rl_model``
    :param save_replay_buffer: Ignored, as there is no replay buffer
    :param save_vecnormalize: Whether to also write the ``VecNormalize`` statistics to a file, for other programs
    :param verbose: Verbosity level: 0 for no output, 2 for indicating when a checkpoint is saved
    :raises ValueError: if ``save_freq`` is not a number above 0
    :raises TypeError: if ``save_path`` is no path, or ``save_vecnormalize`` no bool
    :raises OSError: if the folder cannot be written to
    """

    def __init__(
        self,
        save_freq: int,
        save_path: str,
        name_prefix: str = "rl_model",
        save_replay_buffer: bool = False,
        save_vecnormalize: bool = False,
        verbose: int = 0,
    ):
        frequency: Any = save_freq
        if not (isinstance(frequency, Real) and float(frequency) > 0):
            raise ValueError(f"save_freq={save_freq!r} must be a number above 0")
        _check_path("save_path", save_path)
        check_flag("save_vecnormalize", save_vecnormalize)
        super().__init__(save_freq, save_path, name_prefix, save_replay_buffer, save_vecnormalize, verbose)
        self._saved = 0

    # An algorithm of sb3-klip, as _init_callback checks.
    model: Any

    def _init_callback(self) -> None:
        _check_algorithm(self)
        super()._init_callback()
        # A folder that cannot be written to shows now, and not hours later.
        probe = Path(self.save_path) / f".{self.name_prefix}.{os.getpid()}.probe"
        probe.write_bytes(b"")
        probe.unlink()
        # Event callbacks tell those inside of them of steps only, and not of rollouts.
        self.model.at_rollout_boundaries(self._save_if_due)
        if problem := EnvState.read(self.training_env).problem:
            warnings.warn(
                f"A run that is resumed from these checkpoints will go on at the start of an episode, as {problem}.",
                stacklevel=2,
            )

    def _on_training_start(self) -> None:
        # Calls that a run which goes on has already had are not due again.
        self._saved = self.n_calls // self.save_freq

    def _on_step(self) -> bool:
        return True

    def _save_if_due(self) -> None:
        if self.n_calls // self.save_freq <= self._saved:
            return
        self._saved = self.n_calls // self.save_freq
        self.num_timesteps = self.model.num_timesteps  # which an event callback tells at events only
        statistics: VecNormalize | None = self.model.get_vec_normalize_env()
        if self.save_vecnormalize and statistics is not None:
            path = Path(self._checkpoint_path("vecnormalize_", extension="pkl"))
            write_atomically(path, pickle.dumps(statistics))
        path = Path(self._checkpoint_path(extension="zip"))
        self.model.save(path, resumable=True)
        if self.verbose >= 2:
            print(f"Saving model checkpoint to {path}")
