"""What many test modules need: a small training, the comparison of bits, and commands as a user types them."""

import contextlib
import importlib
import io
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
import yaml
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.utils import set_random_seed

# -- training a small model --------------------------------------------------------------------------------------------

#: A short rollout and few updates.
FAST: dict[str, Any] = {"learning_rate": 3e-3, "n_steps": 64, "batch_size": 32, "n_epochs": 3}


def pendulum() -> gym.Env:
    return gym.make("Pendulum-v1")


def cartpole() -> gym.Env:
    return gym.make("CartPole-v1")


class Counter(gym.Env):
    """Observes the step of its episode; episodes last 5, 7, 9, … steps. Every action is allowed."""

    observation_space = spaces.Box(0, 100, (1,), np.float32)
    action_space = spaces.Discrete(2)
    length = 3

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        self.step_count, self.length = 0, self.length + 2
        return np.array([0.0], np.float32), {}

    def step(self, action: Any) -> Any:
        self.step_count += 1
        return np.array([self.step_count], np.float32), float(action), self.step_count >= self.length, False, {}

    def action_masks(self) -> np.ndarray:
        return np.array([True, True])


class Recorder(KVWriter):
    """Keeps what each update logs."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def write(self, key_values: dict[str, Any], key_excluded: Any, step: int = 0) -> None:
        self.rows.append(dict(key_values))

    def close(self) -> None:
        pass

    def column(self, key: str) -> list[Any]:
        return [row[key] for row in self.rows if key in row]


def train(
    algorithm: type[BaseAlgorithm], policy: str | type, make_env: Callable[[], Any], steps: int, **kwargs: Any
) -> tuple[BaseAlgorithm, Recorder]:
    """Train from seed 0; returns the model and what it logged."""
    # Some of SB3's toy environments draw random numbers when they are made.
    set_random_seed(0)
    recorder = Recorder()
    model = algorithm(policy, make_env(), seed=0, device="cpu", **kwargs)
    model.set_logger(Logger(None, [recorder]))
    model.learn(steps)
    model.logger.dump()
    model.get_env().close()
    return model, recorder


@contextlib.contextmanager
def collected() -> Iterator[list[str]]:
    """The messages of all warnings; to be read when this has ended."""
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield messages
    messages.extend(str(warning.message) for warning in caught)


# -- comparing bits ----------------------------------------------------------------------------------------------------


def state_tensors(model: BaseAlgorithm) -> dict[str, th.Tensor]:
    """Every tensor that training changes: the policy's, buffers included, and the optimizer's."""
    tensors = {f"policy.{name}": tensor for name, tensor in model.policy.state_dict().items()}
    for index, state in model.policy.optimizer.state_dict()["state"].items():
        tensors.update({f"optimizer.{index}.{name}": tensor for name, tensor in state.items()})
    return tensors


def assert_identical(model: BaseAlgorithm, reference: BaseAlgorithm) -> None:
    """Compare the states of two models, with no tolerance."""
    ours, theirs = state_tensors(model), state_tensors(reference)
    assert list(ours) == list(theirs)
    assert any(name.startswith("optimizer") for name in ours)
    assert all(tensor.isfinite().all() for tensor in theirs.values())
    differing = [name for name in ours if not th.equal(ours[name], theirs[name])]
    assert not differing
    assert (model.num_timesteps, model._n_updates) == (reference.num_timesteps, reference._n_updates)


def assert_same_generators(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Compare what ``read_generators`` returned at two times."""
    assert ours["python"] == theirs["python"]
    assert all(np.array_equal(a, b) for a, b in zip(ours["numpy"], theirs["numpy"], strict=True))
    assert th.equal(ours["torch"], theirs["torch"])


# -- an update that is not PPO's ---------------------------------------------------------------------------------------


def sabotage(monkeypatch: pytest.MonkeyPatch, call: int, action: Callable[[Any], float]) -> None:
    """Let KLipPPO do something else in one minibatch: the action gets the policy, and returns what to multiply the loss by."""
    from sb3_klip import KLipPPO

    compute, calls = KLipPPO._minibatch_loss, []

    def loss(self: Any, *args: Any) -> Any:
        calls.append(None)
        factor = action(self.policy) if len(calls) == call else 1
        computed, minibatch = compute(self, *args)
        return computed * factor, minibatch

    monkeypatch.setattr(KLipPPO, "_minibatch_loss", loss)


def nothing(policy: Any) -> float:
    return 1


def loss_a_little_larger(policy: Any) -> float:
    return 1 + th.finfo(th.float32).eps


def parameter_a_little_larger(policy: Any) -> float:
    with th.no_grad():
        weight = policy.value_net.weight
        weight[0, 0] = th.nextafter(weight[0, 0], weight.new_tensor(np.inf))
    return 1


SABOTAGE = [loss_a_little_larger, parameter_a_little_larger]

# -- running a command -------------------------------------------------------------------------------------------------


def run(*command: object, cwd: Path, status: int = 0, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, and check its exit status."""
    completed = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
    )
    if completed.returncode != status:
        shown = f"{completed.stdout[-4000:]}\n{completed.stderr[-4000:]}"
        raise AssertionError(f"{' '.join(completed.args)}\nexited with {completed.returncode}, not {status}:\n{shown}")
    return completed


def python(*arguments: object, cwd: Path, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    """Run this Python."""
    return run(sys.executable, *arguments, cwd=cwd, **kwargs)


def zoo_train(*arguments: object, cwd: Path, algo: str = "klip_ppo", **kwargs: Any) -> subprocess.CompletedProcess[str]:
    """``python -m rl_zoo3.train``, which writes into ``logs``."""
    return python("-m", "rl_zoo3.train", "--algo", algo, *arguments, cwd=cwd, **kwargs)


def zoo_here(script: str, *arguments: object, cwd: Path) -> str:
    """A script of RL Zoo in this process, as importing it takes longer than it runs; returns what it prints."""
    from sb3_klip import zoo

    zoo.register()
    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", [f"rl_zoo3.{script}", *map(str, arguments)])
        getattr(importlib.import_module(f"rl_zoo3.{script}"), script)()
    return output.getvalue()


def config(run_folder: Path) -> dict[str, Any]:
    """The hyperparameters that RL Zoo recorded for a training run."""
    (path,) = run_folder.glob("*/config.yml")
    # RL Zoo writes an OrderedDict, and reads it back this way itself.
    return dict(yaml.load(path.read_text(), Loader=yaml.UnsafeLoader))


def eventually(condition: Callable[[], Any], seconds: float = 300) -> None:
    """Wait until the condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} seconds"
        time.sleep(0.05)


#: A module with an environment of the user's own, in which something may go wrong after a while.
OWN_ENV_PY = """
import os
from pathlib import Path

import gymnasium as gym
import numpy as np
from gymnasium import spaces


class Own(gym.Env):
    observation_space = spaces.Box(-1, 1, (2,), np.float32)
    action_space = spaces.Discrete(3)

    def __init__(self, trouble="", after=0):
        self.trouble, self.after, self.taken = trouble, after, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.observation(), {}

    def observation(self):
        unseeded = self.trouble == "chance" and self.taken >= self.after
        self.seen = (np.random.default_rng() if unseeded else self.np_random).uniform(-1, 1, 2).astype(np.float32)
        return self.seen

    def step(self, action):
        reward = float(self.seen[int(action) % 2])
        self.steps += 1
        self.taken += 1
        if self.taken == self.after:
            if self.trouble == "raise":
                raise RuntimeError("the motor is off")
            if self.trouble == "exit":
                os._exit(3)
            if self.trouble == "nan":
                reward = float("nan")
            if self.trouble == "tell":
                Path(f"{os.getpid()}.pid").touch()
        return self.observation(), reward, self.steps == 10, False, {}

    def action_masks(self):
        return np.array([True, self.steps % 2 == 0, self.steps % 3 == 0])


gym.register("Own-v0", Own)
"""
