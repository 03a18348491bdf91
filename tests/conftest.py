"""What all tests share."""

import multiprocessing
import os
import random
import signal
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from helpers import OWN_ENV_PY, eventually
from hypothesis import settings
from stable_baselines3 import PPO
from verify_results import FORKS
from verify_results import Result as VerifyResult

# Bits depend on how torch splits its sums over threads, in the processes that tests start as well.
th.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
# In the background of a shell, Ctrl-C is ignored by all that is started from there.
signal.signal(signal.SIGINT, signal.default_int_handler)
# The first call of a test may import modules, and takes longer than the others.
settings.register_profile("suite", deadline=None)
settings.load_profile("suite")


@pytest.fixture(autouse=True)
def _restore_registry() -> Iterator[None]:
    """Coefficients that a test registers are gone after it."""
    from sb3_klip.coefficients import registry

    words = dict(registry._WORDS)
    yield
    registry._WORDS.clear()
    registry._WORDS.update(words)


@pytest.fixture(autouse=True)
def _restore_signals() -> Iterator[None]:
    """Commands that run in this process set handlers."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def _restore_generators() -> Iterator[None]:
    """Trainings seed the random generators of the process."""
    state = random.getstate(), np.random.get_state(), th.get_rng_state()
    yield
    random.setstate(state[0]), np.random.set_state(state[1]), th.set_rng_state(state[2])


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that is not to be written; a module that writes it can be imported."""
    # A name of its own for each test, as a module is imported once.
    folder = tmp_path / tmp_path.name
    folder.mkdir()
    path = folder / "marker"
    (tmp_path / f"module_{folder.name}.py").write_text(f"open({str(path)!r}, 'w')\n\ndef anything(*args):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    return path


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Callable[..., str]:
    """``sb3_klip.experiments run``, which must end with 2 and a message before it makes anything or asks for a worker."""
    from sb3_klip.experiments import scheduling
    from sb3_klip.experiments.__main__ import main

    def must_not_start(*_: Any) -> None:
        pytest.fail("it has started workers")

    monkeypatch.setattr(scheduling, "connect", must_not_start)

    def refused(*options: object) -> str:
        before = sorted(tmp_path.rglob("*"))
        monkeypatch.chdir(tmp_path)
        assert main(["run", *(str(option) for option in options)]) == 2
        assert sorted(tmp_path.rglob("*")) == before
        return capsys.readouterr().err

    return refused


@pytest.fixture
def verify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> Iterator[Callable[..., VerifyResult]]:
    """``sb3_klip.verify`` in this process, in an empty folder that has a module with an environment of its own."""
    from sb3_klip.verify import __main__ as command_line
    from sb3_klip.verify import training

    (tmp_path / "own_env.py").write_text(OWN_ENV_PY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    registered = dict(gym.envs.registry)
    if FORKS:
        PPO("MlpPolicy", "CartPole-v1", n_steps=8, batch_size=8, n_epochs=1, device="cpu").learn(8)  # imports what it needs
        context, train, ours = multiprocessing.get_context("fork"), training.train_and_report, []

        def pipe():
            ends = context.Pipe()
            ours.append(ends[0])
            return ends

        def train_and_report(*arguments):
            for end in ours:  # a forked process has them, too, and would never see them closed
                end.close()
            train(*arguments)

        forking = types.SimpleNamespace(Pipe=pipe, Process=context.Process)
        monkeypatch.setattr(training, "multiprocessing", types.SimpleNamespace(get_context=lambda method: forking))
        monkeypatch.setattr(training, "train_and_report", train_and_report)

    def verify(*arguments):
        capfd.readouterr()
        before = multiprocessing.active_children()  # of another test's environments
        status = command_line.main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        assert "Traceback" not in out + err
        eventually(lambda: set(multiprocessing.active_children()) <= set(before))
        return VerifyResult(status, out, err)

    yield verify
    sys.modules.pop("own_env", None)
    gym.envs.registry.clear()
    gym.envs.registry.update(registered)
