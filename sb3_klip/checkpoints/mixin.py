"""Saving, loading and resuming: what the algorithms add to ``save``, ``load`` and ``learn`` of Stable-Baselines3."""

import io
import pathlib
import warnings
import zipfile
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.save_util import load_from_zip_file, open_path
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, TensorDict

from sb3_klip.checkpoints.arguments import LoadArguments
from sb3_klip.checkpoints.callback_state import continue_callbacks, fingerprints, warn_of_beginning_anew
from sb3_klip.checkpoints.file import FORMAT, RESUME, Checkpoint
from sb3_klip.checkpoints.parameters import check_parameters, plain_names
from sb3_klip.checkpoints.resuming import Boundary, log_again, read_state, restore_state
from sb3_klip.checkpoints.zoo_run import statistics_file
from sb3_klip.coefficients import Coefficient
from sb3_klip.errors import check_flag
from sb3_klip.files import write_atomically
from sb3_klip.reproducibility import read_generators, set_generators

SelfCheckpoints = TypeVar("SelfCheckpoints", bound="Checkpoints")


class Checkpoints(OnPolicyAlgorithm):
    """``save``, ``load``, ``set_parameters`` and the continuation of runs, for the algorithms of this package."""

    # The coefficient, see sb3_klip.algorithm.
    beta: Any
    # The last moment between two rollouts, if that is now; see sb3_klip.checkpoints.resuming.
    _rollout_boundary: Boundary | None = None
    # What is to be called at such moments.
    _at_boundaries: tuple[Callable[[], None], ...] = ()
    # What a resumed run goes on with when learning begins, in a model that was loaded with resume=True.
    _resuming_from: dict[str, Any] | None = None
    # The callbacks of the running call of learn, and of what their data was when it began.
    _learn_callback: BaseCallback | None = None
    _fingerprints: dict[int, dict[str, bytes]] | None = None
    # Of sb3_klip.reuse, which this is mixed with.
    forget_rollouts: Callable[[], None]
    # Steps at which the running call of learn began to count.
    _first_timestep: int = 0

    # -- moments between two rollouts ----------------------------------------------------------------------------------

    @property
    def between_rollouts(self) -> bool:
        """
        Whether ``save(..., resumable=True)`` is possible now.

        It is possible if no steps were collected since the last update: from the end of ``train`` to ``on_rollout_start``, and
        after ``learn``, as long as nobody has stepped the environments in between.
        """
        return self._rollout_boundary is not None and self._rollout_boundary.is_now(self)

    def at_rollout_boundaries(self, function: Callable[[], None]) -> None:
        """
        Register a function that is called between two rollouts of this call of ``learn``, and at its end.

        :param function: function without arguments; it may save the model with ``resumable=True``
        """
        self._at_boundaries += (function,)

    def collect_rollouts(self, *args: Any, **kwargs: Any) -> bool:
        """Collect a rollout, as the base class does; a run that is resumed goes on with its random generators here."""
        if self._resuming_from is not None:
            warn_of_beginning_anew(self._learn_callback, self._resuming_from["restored"])
            set_generators(self._resuming_from["generators"])
            self._resuming_from = None
        # Before gSDE draws its noise, so that a checkpoint from on_rollout_start draws the same again.
        self._rollout_boundary = Boundary.now(self, read_generators())
        for function in self._at_boundaries:
            function()
        try:
            return super().collect_rollouts(*args, **kwargs)
        except BaseException:  # Ctrl-C inside an environment leaves it in the middle of a step
            self._rollout_boundary = None
            raise

    def train(self) -> None:
        """
        Update the policy on the current rollout, see ``sb3_klip/training.py``.

        :raises ValueError: if an advantage is NaN or infinite, or the learning rate is NaN; or if a gradient is NaN or
            infinite, and then the policy is reset to its parameters before the update
        """
        self._rollout_boundary = None
        super().train()
        self._rollout_boundary = Boundary.now(self)
        if self.num_timesteps >= self._total_timesteps:
            for function in self._at_boundaries:
                function()

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        tb_log_name: str = "run",
        progress_bar: bool = False,
    ) -> Any:
        self._at_boundaries = ()
        resuming = self._resuming_from
        if resuming is None:
            if reset_num_timesteps:
                self.forget_rollouts()
            self._first_timestep = 0 if reset_num_timesteps else self.num_timesteps
        else:
            total_timesteps = self._remaining_timesteps(total_timesteps, reset_num_timesteps)
            reset_num_timesteps = False  # SB3 adds the steps that were taken
        total_timesteps, callback = super()._setup_learn(
            total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar
        )
        self._learn_callback, self._fingerprints = callback, fingerprints(callback)
        if resuming is not None:
            continue_callbacks(callback, resuming["callbacks"], self.num_timesteps // self.n_envs)
            resuming["restored"] = fingerprints(callback)
            log_again(self.logger, resuming["logged"])
        return total_timesteps, callback

    def _remaining_timesteps(self, total_timesteps: int, reset_num_timesteps: bool) -> int:
        """Steps that a call of ``learn`` has left which is made again, with the same arguments, in a resumed run."""
        if not reset_num_timesteps and self.num_timesteps >= self._total_timesteps:
            self._first_timestep = self.num_timesteps  # the saved call had come to its end, so this one is the next
            return total_timesteps
        end = total_timesteps if reset_num_timesteps else total_timesteps + self._first_timestep
        # A run that has ended may have gone past the steps asked for, to the end of its last rollout: none are left then.
        if end < self.num_timesteps and end != self._total_timesteps:
            raise ValueError(
                f"total_timesteps={total_timesteps} ends this run at {end} steps, and it is resumed at {self.num_timesteps}: "
                f"give those of the run that is resumed, which would have ended at {self._total_timesteps}"
            )
        if end != self._total_timesteps:
            warnings.warn(
                f"total_timesteps={total_timesteps} ends this run at {end} steps, and the run that is resumed would have "
                f"ended at {self._total_timesteps}: schedules, and all else that depends on the progress of training, will "
                "differ from that run.",
                stacklevel=5,
            )
        return end - self.num_timesteps

    def __getstate__(self) -> dict[str, Any]:
        # A copy does not take the callbacks of the running call of learn along, which may well not be copied, or pickled.
        of_the_call = ("_learn_callback", "_fingerprints", "_at_boundaries")
        return {name: value for name, value in vars(self).items() if name not in of_the_call}

    # -- files ---------------------------------------------------------------------------------------------------------

    def _excluded_save_params(self) -> list[str]:
        own = ("_beta", "update_beta", "_kept_rollouts", "_replay_pool", "_time_limits")
        of_learning = ("_rollout_boundary", "_at_boundaries", "_resuming_from", "_learn_callback", "_fingerprints")
        return [*super()._excluded_save_params(), *own, *of_learning]

    def save(
        self,
        path: str | pathlib.Path | io.BufferedIOBase,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
        resumable: bool = False,
    ) -> None:
        """
        Save the model to a zip file that ``PPO.load`` can also open. The coefficient is saved as plain JSON.

        An existing file is replaced in one step: after a kill at any moment, there is a complete old or new file.

        :param path: file to write; ".zip" is added to a name without a suffix
        :param exclude: attributes to leave out in addition to the default ones
        :param include: attributes to save although they are left out by default
        :param resumable: Whether to also save what is needed to resume exactly: the random generators, the environments in the
            middle of their episodes and their wrappers, the last observations, and the state of callbacks. This is possible
            only between two rollouts, see :class:`~sb3_klip.ResumableCheckpointCallback`.
        :raises ValueError: if ``resumable`` is set in the middle of a rollout or an update
        :raises TypeError: if ``resumable`` is no bool
        """
        check_flag("resumable", resumable)
        state = read_state(self) if resumable else None
        # What the file has and the model has not goes into a copy: the model may be in use in another thread.
        beta = self.beta
        extra: dict[str, Any] = {"beta": beta, "klip_format": FORMAT}
        if isinstance(beta, Coefficient):
            extra.update(beta=beta.name, beta_kwargs=beta.parameters, beta_state={beta.name: beta.state_dict()})
        shown = object.__new__(type(self))
        vars(shown).update(vars(self) | extra)
        buffer = io.BytesIO()
        super(Checkpoints, shown).save(buffer, exclude, include)
        if state is not None:
            with zipfile.ZipFile(buffer, "a", zipfile.ZIP_DEFLATED) as archive:
                archive.writestr(RESUME, state)
        if not isinstance(path, (str, pathlib.Path)):
            open_path(path, "w").write(buffer.getvalue())
            return
        path = pathlib.Path(path)
        if path.suffix == "":
            path = path.with_name(f"{path.name}.zip")
        if path.is_dir():
            path = path.with_name(f"{path.name}_2")
            warnings.warn(f"A folder has the name of the file to save, so it is saved to {path}", stacklevel=2)
        if not path.parent.exists():
            warnings.warn(f"Path '{path.parent}' does not exist. Will create it.", stacklevel=2)
            path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, buffer.getvalue())

    @classmethod
    def load(
        cls: type[SelfCheckpoints],
        path: str | pathlib.Path | io.BufferedIOBase,
        env: GymEnv | None = None,
        device: Any = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        trusted: bool = True,
        resume: bool = False,
        **kwargs: Any,
    ) -> SelfCheckpoints:
        """
        Load a model from a zip file, as SB3 does. The file may come from the base class, or from RL Zoo's old agents with
        ``gym``.

        A checkpoint contains pickles, which can run code when they are loaded. Load files that you do not trust with
        ``trusted=False``.

        :param path: the file, with or without ".zip", or an open file
        :param env: the environment to train on; its observation space may differ from the file's in dtype and bounds
        :param device: Device (cpu, cuda, ...) on which to run
        :param custom_objects: attributes that replace those in the file
        :param print_system_info: Whether to print the system that saved the file, and this one
        :param force_reset: Whether to reset ``env`` before training
        :param trusted: Whether the file may run code. With False, only weights, spaces and plain hyperparameters are loaded.
            Functions, such as schedules, are replaced by defaults with a warning. A file with anything else is refused.
        :param resume: Whether to restore all that ``save(..., resumable=True)`` has saved. Then call ``learn`` with the same
            arguments as in the interrupted run: it runs the remaining steps, and ends as that run would have ended.
        :param kwargs: arguments of the constructor that replace those in the file; if ``beta`` is given, ``beta_kwargs`` of
            the file is ignored
        :return: the model
        :raises FileNotFoundError: if there is no such file
        :raises ValueError: if the file is not a complete checkpoint of the right algorithm, does not fit ``env``, contains
            more than plain data with ``trusted=False``, or has no state to resume from with ``resume=True``; or an argument
            has a wrong value
        :raises TypeError: if an argument is unknown or of a wrong type
        """
        check_flag("trusted", trusted)
        check_flag("resume", resume)
        arguments = LoadArguments(cls, custom_objects, kwargs)
        checkpoint = Checkpoint.read(path)
        checkpoint.check_algorithm(cls)
        state = checkpoint.resume_state(trusted) if resume else None
        if resume and env is None:
            raise ValueError("resume=True needs env, made as that of the interrupted run")
        arguments.read(checkpoint, trusted, resume)
        if env is not None:
            env = cls._wrap_env(env, checkpoint.data.get("verbose", 0))
            arguments.fit(env)
        with checkpoint.refused_weights():
            model = super().load(
                checkpoint.file, env, device, arguments.objects, print_system_info, force_reset, **arguments.kwargs
            )
        arguments.warn_of_lost(model)
        statistics = None if env is None or checkpoint.path is None else statistics_file(checkpoint.path)
        if statistics is not None and model.get_vec_normalize_env() is None:
            warnings.warn(
                f"The agent has learned from normalized observations or rewards, as {statistics} lies beside it, but env does "
                f"not normalize. Wrap it: env = sb3_klip.load_vecnormalize({str(statistics)!r}, env)",
                stacklevel=2,
            )
        if state is not None:
            model._resuming_from = restore_state(model, state, {*arguments.given, *arguments.kwargs})
        return model

    def set_parameters(self, load_path_or_dict: str | TensorDict, exact_match: bool = True, device: Any = "auto") -> None:
        """
        Load parameters from a file or a dictionary, as SB3 does.

        :param load_path_or_dict: a checkpoint, or what ``get_parameters`` returns
        :param exact_match: Whether the names of the parameters must match exactly
        :param device: Device on which to load them
        :raises ValueError: if they belong to another architecture, or the file is not a checkpoint of the right algorithm;
            then the model is unchanged
        """
        name = "load_path_or_dict"
        if not isinstance(load_path_or_dict, dict):
            checkpoint = Checkpoint.read(load_path_or_dict)
            checkpoint.check_algorithm(type(self))
            name = checkpoint.name
            with checkpoint.refused_weights():
                _, load_path_or_dict, _ = load_from_zip_file(checkpoint.file, load_data=False, device=device)
        if isinstance(policy := load_path_or_dict.get("policy"), Mapping):
            load_path_or_dict = {**load_path_or_dict, "policy": plain_names(policy)}
        check_parameters(load_path_or_dict, self.policy, name, exact_match)
        super().set_parameters(load_path_or_dict, exact_match, device)
