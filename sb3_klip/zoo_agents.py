"""RL Zoo with trained agents: training one further, resuming a run that was killed, evaluating agents from the days of gym."""

import functools
import importlib
import os
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from rl_zoo3 import utils
from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.utils import ALGOS, get_latest_run_id
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import CheckpointCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from sb3_klip.checkpoint import Checkpoint, load_vecnormalize, read_zoo_yaml, statistics_file
from sb3_klip.resume import ResumableCheckpointCallback, read_generators, set_generators

#: Episodes that a loaded agent plays before it is trained further.
EPISODES = 20

#: The hyperparameter that asks ``rl_zoo3.train -i`` to resume: ``-params resume:True``.
RESUME = "resume"


def patch(ours: Mapping[str, str]) -> None:
    """
    Let RL Zoo handle trained agents of our algorithms; a second call changes nothing.

    :param ours: our algorithms, each with the zoo's whose agents it can take over
    """
    for owner, name, wrapper in (
        (ExperimentManager, "create_callbacks", _resumable_checkpoints),
        (ExperimentManager, "_maybe_normalize", _statistics_of_agent),
        (ExperimentManager, "_load_pretrained_agent", _reporting),
        (utils, "get_model_path", _or_base_agent),
    ):
        original = getattr(owner, name)
        if not hasattr(original, "__wrapped__"):
            setattr(owner, name, wrapper(original, ours))
    # create_test_env looks it up there, and uses nothing but load.
    utils.VecNormalize = _VecNormalizeOfAnyAge  # type: ignore[misc]
    # rl_zoo3.push_to_hub 2.9.2 imports a name that the integration's later versions have made private.
    hub = importlib.import_module("huggingface_sb3.push_to_hub")
    if not hasattr(hub, "generate_metadata"):
        hub.generate_metadata = lambda *args: hub._generate_metadata(*args).to_dict()  # type: ignore[attr-defined]


class _VecNormalizeOfAnyAge(VecNormalize):
    load = staticmethod(load_vecnormalize)  # type: ignore[assignment]


def read_resumed(manager: ExperimentManager, hyperparams: dict[str, Any]) -> dict[str, Any] | None:
    """
    The hyperparameters of the run to resume, if the user asks to resume one.

    :param manager: RL Zoo's manager; its seed, number of steps and environment arguments become those of the run
    :param hyperparams: as RL Zoo has read them, with the command line's; ``resume`` is taken out
    :return: those of the run that was interrupted
    :raises ValueError: if there is no checkpoint to resume from, or other hyperparameters are given
    """
    manager.resume = resume = hyperparams.pop(RESUME, False)  # type: ignore[attr-defined]
    if not resume:
        return None
    if not manager.continue_training:
        raise ValueError("resume:True needs the checkpoint to resume from: -i …/rl_model_…_steps.zip")
    if others := [name for name in manager.custom_hyperparams or () if name != RESUME]:
        raise ValueError(f"resume:True takes the hyperparameters of the interrupted run, so {', '.join(others)} cannot be set")
    checkpoint = Checkpoint.read(manager.trained_agent)
    checkpoint.resume_state(trusted=True)
    config = checkpoint.config()
    if config is None:
        raise ValueError(f"{checkpoint.name} cannot be resumed: there is no config.yml with its hyperparameters beside it")
    file, resumed = config
    print(f"Resuming with the hyperparameters of the interrupted run: {file}")
    arguments = read_zoo_yaml(file.with_name("args.yml"))
    if (env_id := arguments.get("env", manager.env_name.gym_id)) != manager.env_name.gym_id:
        raise ValueError(f"{checkpoint.name} is of a run on {env_id}, which cannot be resumed on {manager.env_name.gym_id}")
    # They are written to the args.yml of this run, so that it can be resumed in turn.
    manager.seed = manager.args.seed = arguments.get("seed", manager.seed)
    manager.env_kwargs = manager.args.env_kwargs = manager.env_kwargs or arguments.get("env_kwargs") or {}
    manager.eval_env_kwargs = arguments.get("eval_env_kwargs") or manager.env_kwargs
    if manager.n_timesteps <= 0:
        manager.n_timesteps = checkpoint.data["_total_timesteps"]
    return resumed


def keep_statistics(manager: ExperimentManager, *hyperparams: dict[str, Any]) -> None:
    """
    Where an agent has statistics, its further training has them too, and saves them, as its ``config.yml`` says.

    :param manager: RL Zoo's manager
    :param hyperparams: the hyperparameters, in which ``normalize`` is set
    """
    if statistics_file(Path(manager.trained_agent)) is not None:
        for each in hyperparams:
            each["normalize"] = each.get("normalize") or True


def _resumable_checkpoints(create_callbacks: Callable[..., None], ours: Collection[str]) -> Callable[..., None]:
    """Checkpoints of ``--save-freq`` that a run can be resumed from."""

    @functools.wraps(create_callbacks)
    def wrapper(self: ExperimentManager) -> None:
        users = len(self.callbacks)
        create_callbacks(self)
        for position, callback in enumerate(self.callbacks):
            if self.algo in ours and position >= users and type(callback) is CheckpointCallback:
                self.callbacks[position] = ResumableCheckpointCallback(
                    callback.save_freq,
                    callback.save_path,
                    callback.name_prefix,
                    save_vecnormalize=True,
                    verbose=callback.verbose,
                )

    return wrapper


def _statistics_of_agent(maybe_normalize: Callable[..., VecEnv], ours: Collection[str]) -> Callable[..., VecEnv]:
    """The statistics that lie with an agent, whatever version of the environment they were gathered on."""

    @functools.wraps(maybe_normalize)
    def wrapper(self: ExperimentManager, env: VecEnv, eval_env: bool) -> VecEnv:
        file = statistics_file(Path(self.trained_agent)) if self.algo in ours and self.continue_training else None
        if file is None:
            return maybe_normalize(self, env, eval_env)
        print(f"Loading saved VecNormalize stats: {file}")
        env = load_vecnormalize(file, env)
        if eval_env:
            env.training = False
            env.norm_reward = False
        return env

    return wrapper


def _reporting(load_pretrained_agent: Callable[..., BaseAlgorithm], ours: Collection[str]) -> Callable[..., BaseAlgorithm]:
    """An agent that is trained further first shows what it can do; one whose run is resumed goes on at once."""

    @functools.wraps(load_pretrained_agent)
    def wrapper(self: ExperimentManager, hyperparams: dict[str, Any], env: VecEnv) -> BaseAlgorithm:
        if self.algo not in ours:
            return load_pretrained_agent(self, hyperparams, env)
        if self.resume:  # type: ignore[attr-defined]
            model = ALGOS[self.algo].load(
                self.trained_agent,
                env=env,
                device=self.device,
                resume=True,
                tensorboard_log=self.tensorboard_log,
                verbose=self.verbose,
            )
            print(f"Resuming at step {model.num_timesteps} of {self.n_timesteps}")
            return model
        model = load_pretrained_agent(self, hyperparams, env)
        if self.eval_freq > 0:
            # Playing must not change what training draws.
            generators = read_generators()
            eval_env = self.create_envs(1, eval_env=True, no_log=True)
            mean, std = evaluate_policy(model, eval_env, EPISODES, deterministic=True)
            eval_env.close()
            set_generators(generators)
            print(f"The loaded agent's deterministic return over {EPISODES} episodes: {mean:.2f} +/- {std:.2f}")
        return model

    return wrapper


def _publishing() -> bool:
    """Whether this is the script that uploads an agent, which should not go under another algorithm's name."""
    script = getattr(sys.modules["__main__"], "__spec__", None)
    return script is not None and script.name == "rl_zoo3.push_to_hub"


def _or_base_agent(get_model_path: Callable[..., Any], ours: Mapping[str, str]) -> Callable[..., Any]:
    """Where there is no agent of ours for an environment, the zoo's own, which our algorithms load as well."""

    @functools.wraps(get_model_path)
    def wrapper(exp_id: int, folder: str, algo: str, env_name: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return get_model_path(exp_id, folder, algo, env_name, *args, **kwargs)
        except (AssertionError, ValueError) as error:
            base = ours.get(algo)
            # With agents of ours there, it was one of them that could not be found.
            if base is None or _publishing() or get_latest_run_id(os.path.join(folder, algo), env_name) > 0:
                raise
            try:
                found = get_model_path(exp_id, folder, base, env_name, *args, **kwargs)
            except (AssertionError, ValueError):
                agents = sorted(
                    str(path.relative_to(folder)) for name in (algo, base) for path in Path(folder).glob(f"{name}/*_*")
                )
                if not agents:
                    raise error from None
                raise ValueError(
                    f"{folder} has no agent of {algo} or {base} for {env_name}, but {', '.join(agents)}. An agent for another "
                    "version of the environment can be trained further: rl_zoo3.train -i."
                ) from error
            print(f"No agent of {algo} for {env_name} in {folder}: this is one of {base}, which {algo} plays as it is")
            return found

    return wrapper
