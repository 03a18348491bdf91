"""
Resuming exactly: what Stable-Baselines3 leaves out of a checkpoint.

A training run that was killed and resumed ends with the parameters of one that was not, if all of its state comes back:
beside the model, every random generator, the environments in the middle of their episodes, their wrappers and the last
observations. All of that has one well-defined value between two rollouts, which is when it is read and put back.
"""

import contextlib
import pickle
import warnings
from collections.abc import Collection
from typing import Any, NamedTuple

import cloudpickle
import numpy as np
import torch as th
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from sb3_klip.checkpoints.callback_state import remembered
from sb3_klip.checkpoints.env_state import EnvState, unpickled
from sb3_klip.reproducibility import processor, read_generators, versions

#: Attributes of the model that SB3 does not save, or discards when it loads.
_MODEL_STATE = (
    *("_last_obs", "_last_episode_starts", "_last_original_obs", "_last_lstm_states", "action_space"),
    "_kept_rollouts",
)
#: Attributes of the rollout buffer that it has from the model, of a moment in which these may have been others.
_BUFFER_STATE = ("gamma", "gae_lambda")


class Boundary(NamedTuple):
    """
    A moment between two rollouts.

    :param num_timesteps: steps that were taken until then
    :param generators: state of the random generators then; None while nothing has drawn from them since
    :param environments: what environments in this process showed last, and drew from last
    """

    num_timesteps: int
    generators: dict[str, Any] | None
    environments: dict[Any, np.ndarray]

    @classmethod
    def now(cls, model: Any, generators: dict[str, Any] | None = None) -> "Boundary":
        """
        This moment.

        :param model: the model
        :param generators: state of the random generators, if something is about to draw from them
        """
        return cls(model.num_timesteps, generators, _traces(model.env))

    def is_now(self, model: Any) -> bool:
        """
        Whether nothing has happened since.

        :param model: the model
        """
        seen = _traces(model.env)
        same = seen.keys() == self.environments.keys() and all(
            np.array_equal(seen[key], array, equal_nan=array.dtype.kind in "fc") for key, array in self.environments.items()
        )
        return self.num_timesteps == model.num_timesteps and same


def _traces(env: VecEnv | None) -> dict[Any, np.ndarray]:
    """
    What anybody changes who steps or resets environments in this process: their last observations, and, where the vectorized
    environments are passed over, the generators that a reset draws from.
    """
    base = getattr(env, "unwrapped", None)
    if not isinstance(base, DummyVecEnv) or not vars(base).keys() >= {"envs", "buf_obs"}:  # or one with its own way to step
        return {}
    generators = [getattr(each.unwrapped, "_np_random", None) for each in base.envs]
    drawn = {}
    for number, generator in enumerate(generators):
        if isinstance(generator, np.random.Generator):
            with contextlib.suppress(Exception):  # seeded by something of a local class, say
                drawn[number] = np.frombuffer(pickle.dumps(generator), dtype=np.uint8)
    return {**{key: array.copy() for key, array in base.buf_obs.items()}, **drawn}


def conditions(device: th.device) -> dict[str, str]:
    """What the bits of a run depend on, beside its state."""
    return {
        **versions(),
        "torch threads": str(th.get_num_threads()),
        "processor": processor(),
        "torch kernels": th.backends.cpu.get_cpu_capability(),
        "device": th.cuda.get_device_name(device) if device.type == "cuda" else str(device),
    }


def read_state(model: Any) -> bytes:
    """
    All that a checkpoint lacks to resume from it.

    :param model: the model, between two rollouts
    :return: the state, as :func:`restore_state` takes it
    :raises ValueError: if the model is in the middle of a rollout or of an update, or has not begun to learn, or the
        environments have been stepped by others
    """
    boundary: Boundary | None = model._rollout_boundary
    if boundary is None or not boundary.is_now(model):
        stepped = boundary is not None and boundary.num_timesteps == model.num_timesteps
        raise ValueError(
            "resumable=True needs a moment between two rollouts: on_rollout_start of a callback, or the end of learn(). "
            "ResumableCheckpointCallback saves at such moments."
            + " The environments have been stepped or reset since the last one, for example by evaluate_policy: evaluate on "
            "separate environments." * stepped
        )
    state = {
        "versions": conditions(model.device),
        "generators": boundary.generators or read_generators(),
        "model": {name: getattr(model, name) for name in _MODEL_STATE if hasattr(model, name)},
        # What a callback may have changed, and a model that is loaded has from its constructor.
        "frozen": [name for name, parameter in model.policy.named_parameters() if not parameter.requires_grad],
        "buffer": {name: getattr(model.rollout_buffer, name) for name in _BUFFER_STATE if hasattr(model.rollout_buffer, name)},
        "lr_schedule": _packed(model.lr_schedule),
        "env": EnvState.read(model.env)._asdict(),
        "callbacks": [] if model._learn_callback is None else remembered(model._learn_callback, model._fingerprints),
        "logged": _logged(model._logger),
    }
    return cloudpickle.dumps(state)


def _packed(schedule: Any) -> bytes | None:
    """A schedule; None if it cannot be pickled."""
    try:
        return cloudpickle.dumps(schedule)
    except Exception:  # whatever an object may raise that cannot be pickled
        return None


def _logged(logger: Logger | None) -> dict[str, tuple[Any, int, Any]]:
    """The numbers of the last update, which are written only after the next rollout: value, count, and where not to write."""
    if logger is None:
        return {}
    numbers = {key: value for key, value in logger.name_to_value.items() if isinstance(value, (int, float, np.number))}
    return {key: (value, logger.name_to_count[key], logger.name_to_excluded.get(key)) for key, value in numbers.items()}


def log_again(logger: Logger, logged: dict[str, tuple[Any, int, Any]]) -> None:
    """
    Have numbers written that the interrupted run had not written yet.

    :param logger: of the resumed run
    :param logged: as :func:`read_state` has kept them
    """
    for key, (value, count, excluded) in logged.items():
        logger.record(key, value, excluded)
        logger.name_to_count[key] = count


def restore_state(model: Any, data: bytes, replaced: Collection[str] = ()) -> dict[str, Any]:
    """
    Put back what :func:`read_state` has read.

    :param model: the model, loaded with its environments
    :param data: the state
    :param replaced: names of hyperparameters that the user gives, which stay as they are
    :return: what is put back when learning goes on: the state of the random generators, of callbacks and of the logger
    :raises ValueError: if the environments are not like those of the state
    """
    state = unpickled(data)
    earlier = state["versions"]
    different = [
        f"{name} {earlier.get(name, 'unknown')} then, {value} now"
        for name, value in conditions(model.device).items()
        if earlier.get(name) != value
    ]
    if state["generators"]["cuda"] and not th.cuda.is_available():
        different.append("the run drew random numbers on a GPU, and there is none now: they are not the same")
    if different:
        warnings.warn(f"The run goes on under other conditions, so its bits may differ: {'; '.join(different)}.", stacklevel=4)
    env = EnvState(**state["env"])
    for name, value in state["model"].items():
        setattr(model, name, _on_device(value, model.device))
    # Older checkpoints do not have all of it.
    if (frozen := state.get("frozen")) is not None:
        for name, parameter in model.policy.named_parameters():
            parameter.requires_grad_(name not in frozen)
    for name, value in state.get("buffer", {}).items():
        if name not in replaced:
            setattr(model.rollout_buffer, name, value)
    if "learning_rate" not in replaced and (schedule := state.get("lr_schedule")) is not None:
        model.lr_schedule = unpickled(schedule)
    if not env.restore(model.env):
        warnings.warn(
            f"The run goes on at the start of an episode, and not exactly where it was, as {env.problem}.", stacklevel=4
        )
        model._last_obs = None  # makes learn() reset the environments
    return {"generators": state["generators"], "callbacks": state.get("callbacks", []), "logged": state.get("logged", {})}


def _on_device(value: Any, device: th.device) -> Any:
    """Tensors, also those in tuples such as the states of an LSTM, on the device of the model."""
    if isinstance(value, th.Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        moved = [_on_device(each, device) for each in value]
        return type(value)(*moved) if hasattr(value, "_fields") else tuple(moved)
    return value
