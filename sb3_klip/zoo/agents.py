"""RL Zoo with trained agents: training one further, resuming a run that was killed, playing agents of the base algorithm."""

import os
import sys
from pathlib import Path
from typing import Any

from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.utils import ALGOS, get_latest_run_id
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import CheckpointCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv

from sb3_klip.callbacks import ResumableCheckpointCallback
from sb3_klip.checkpoints.file import Checkpoint
from sb3_klip.checkpoints.zoo_run import load_vecnormalize, read_zoo_yaml, statistics_file
from sb3_klip.coefficients.registry import make_beta
from sb3_klip.reproducibility import unchanged_generators
from sb3_klip.zoo.hyperparams import evaluate_beta_kwargs

#: Episodes that an agent plays to be evaluated: a loaded one before it is trained further, and the last and the best of a run.
EPISODES = 20

#: The hyperparameter that asks ``rl_zoo3.train -i`` to resume: ``-params resume:True``.
RESUME = "resume"


def read_resumed(manager: ExperimentManager, hyperparams: dict[str, Any]) -> dict[str, Any] | None:
    """
    The hyperparameters of the run to resume, if the user asks to resume one.

    :param manager: RL Zoo's manager; its seed, number of steps, kind of vectorized environments and arguments of environments
        are set to those of the run
    :param hyperparams: hyperparameters that RL Zoo has read, also from the command line; ``resume`` is removed
    :return: the hyperparameters of the interrupted run; None if no run is to be resumed
    :raises ValueError: if there is no checkpoint to resume from, or if other hyperparameters or environments are given
    """
    manager.resume = resume = hyperparams.pop(RESUME, False)  # type: ignore[attr-defined]
    if not isinstance(resume, bool):
        raise ValueError(f"resume:{resume!r} must be True or False")
    if not resume:
        return None
    if not manager.continue_training:
        raise ValueError("resume:True needs the checkpoint to resume from: -i …/rl_model_…_steps.zip")
    given = manager.custom_hyperparams or {}
    if others := [name for name in given if name not in (RESUME, "beta", "beta_kwargs")]:
        raise ValueError(f"resume:True takes the hyperparameters of the interrupted run, so {', '.join(others)} cannot be set")
    checkpoint = Checkpoint.read(manager.trained_agent)
    checkpoint.resume_state(trusted=True)
    config = checkpoint.config(trusted=True)
    if config is None or "n_timesteps" not in config[1]:
        raise ValueError(f"{checkpoint.name} cannot be resumed: there is no config.yml with its hyperparameters beside it")
    file, resumed = config
    _check_same_beta(checkpoint, given)
    _take_over(manager, checkpoint, read_zoo_yaml(file.with_name("args.yml"), trusted=True))
    print(f"Resuming with the hyperparameters of the interrupted run: {file}")
    return resumed


def _take_over(manager: ExperimentManager, checkpoint: Checkpoint, arguments: dict[str, Any]) -> None:
    """
    Set the manager's seed, number of steps, kind of vectorized environments and arguments of environments to those of the run.

    :param checkpoint: of the run to resume
    :param arguments: what ``rl_zoo3.train`` was called with then
    :raises ValueError: if the run had another environment
    """
    if (env_id := arguments.get("env", manager.env_name.gym_id)) != manager.env_name.gym_id:
        raise ValueError(f"{checkpoint.name} is of a run on {env_id}, which cannot be resumed on {manager.env_name.gym_id}")
    env_kwargs = arguments.get("env_kwargs") or {}
    if manager.env_kwargs and manager.env_kwargs != env_kwargs:
        raise ValueError(
            f"resume:True takes the environment of the interrupted run, which had --env-kwargs={env_kwargs or None}, so "
            f"--env-kwargs={manager.env_kwargs} cannot be set"
        )
    # They are written to the args.yml of this run, so that it can be resumed in turn.
    manager.seed = manager.args.seed = arguments.get("seed", manager.seed)
    manager.env_kwargs = manager.args.env_kwargs = env_kwargs
    manager.eval_env_kwargs = arguments.get("eval_env_kwargs") or manager.env_kwargs
    manager.args.vec_env = arguments.get("vec_env", "dummy")
    manager.vec_env_class = {"dummy": DummyVecEnv, "subproc": SubprocVecEnv}[manager.args.vec_env]
    if manager.n_timesteps <= 0:
        manager.n_timesteps = checkpoint.data["_total_timesteps"]


def _check_same_beta(checkpoint: Checkpoint, given: dict[str, Any]) -> None:
    """
    Refuse another coefficient than that of the run to resume; its own has to be given again if it has no name to find it by.

    :param checkpoint: of the run
    :param given: hyperparameters of the command line
    :raises ValueError: if it is another one
    """
    saved, saved_kwargs = checkpoint.data["beta"], checkpoint.data.get("beta_kwargs")
    if "beta" in given or "beta_kwargs" in given:
        evaluate_beta_kwargs(given)
        beta = make_beta(given.get("beta", saved), given.get("beta_kwargs"))
        if (beta.name, dict(beta.parameters)) != (saved, saved_kwargs):
            raise ValueError(
                f"resume:True goes on with the coefficient of the interrupted run, {saved!r} with {saved_kwargs}, so beta "
                f"cannot be {beta.name!r} with {dict(beta.parameters)}"
            )


def keep_statistics(manager: ExperimentManager, *hyperparams: dict[str, Any]) -> None:
    """
    If an agent has ``VecNormalize`` statistics, normalize in its further training, too, and save the statistics.

    :param manager: RL Zoo's manager
    :param hyperparams: the hyperparameters, in which ``normalize`` is set
    """
    if statistics_file(Path(manager.trained_agent)) is not None:
        for each in hyperparams:
            each["normalize"] = each.get("normalize") or True


def make_checkpoints_resumable(manager: ExperimentManager, first: int) -> None:
    """
    Replace RL Zoo's checkpoint callbacks by resumable ones.

    :param manager: RL Zoo's manager, which has just created its callbacks
    :param first: position of its first callback; the callbacks before it are the user's
    """
    for position, callback in enumerate(manager.callbacks):
        if position >= first and type(callback) is CheckpointCallback:
            manager.callbacks[position] = ResumableCheckpointCallback(
                callback.save_freq,
                callback.save_path,
                callback.name_prefix,
                save_vecnormalize=True,
                verbose=callback.verbose,
            )


def with_statistics_of_agent(manager: ExperimentManager, env: VecEnv, eval_env: bool) -> VecEnv | None:
    """
    Environments with the ``VecNormalize`` statistics of the agent that is trained further.

    :param manager: RL Zoo's manager
    :param env: the environments
    :param eval_env: whether they are for evaluation
    :return: the environments; None if no agent is trained further, or if it has no statistics
    """
    file = statistics_file(Path(manager.trained_agent)) if manager.continue_training else None
    if file is None:
        return None
    print(f"Loading saved VecNormalize stats: {file}")
    normalized = load_vecnormalize(file, env)
    if eval_env:
        normalized.training = False
        normalized.norm_reward = False
    return normalized


def resume(manager: ExperimentManager, env: VecEnv) -> BaseAlgorithm:
    """
    The model of the run that is resumed.

    :param manager: RL Zoo's manager
    :param env: the environments
    """
    model = ALGOS[manager.algo].load(
        manager.trained_agent,
        env=env,
        device=manager.device,
        resume=True,
        **{name: value for name, value in (manager.custom_hyperparams or {}).items() if name in ("beta", "beta_kwargs")},
        tensorboard_log=manager.tensorboard_log,
        verbose=manager.verbose,
    )
    print(f"Resuming at step {model.num_timesteps} of {manager.n_timesteps}")
    return model


def report(manager: ExperimentManager, model: BaseAlgorithm) -> None:
    """
    Evaluate an agent before it is trained further, and print its return.

    :param manager: RL Zoo's manager
    :param model: the agent
    """
    with unchanged_generators():  # playing must not change what training draws
        eval_env = manager.create_envs(1, eval_env=True, no_log=True)
        mean, std = evaluate_policy(model, eval_env, EPISODES, deterministic=True)
        eval_env.close()
    print(f"The loaded agent's deterministic return over {EPISODES} episodes: {mean:.2f} +/- {std:.2f}")


def may_take_over(folder: str, algo: str, env_name: Any) -> bool:
    """
    Whether an agent of the base algorithm may be played if none of ours was found.

    It may not if there are agents of ours for this environment, as then one of these was asked for. Nor may the script that
    uploads an agent use it, as the agent would be uploaded under the name of another algorithm.

    :param folder: folder of the agents
    :param algo: our algorithm
    :param env_name: name of the environment
    """
    script = getattr(sys.modules["__main__"], "__spec__", None)
    is_upload = script is not None and script.name == "rl_zoo3.push_to_hub"
    return not is_upload and get_latest_run_id(os.path.join(folder, algo), env_name) <= 0


def missing_agent(folder: str, algo: str, base: str, env_name: Any, error: Exception) -> Exception:
    """
    The exception to raise if there is neither an agent of ours nor one of the base algorithm.

    :param folder: folder of the agents
    :param algo: our algorithm
    :param base: the base algorithm
    :param env_name: name of the environment
    :param error: exception that RL Zoo has raised
    """
    found = [path for name in (algo, base) for path in Path(folder).glob(f"{name}/*_*") if path.is_dir()]
    agents = sorted(str(path.relative_to(folder)) for path in found)
    if not agents:
        return error
    return ValueError(
        f"{folder} has no agent of {algo} or {base} for {env_name}, but {', '.join(agents)}. An agent for another "
        "version of the environment can be trained further: rl_zoo3.train -i."
    )
