"""The two trainings, each in its own process and set up as by RL Zoo, and the messages that they send for each update."""

import argparse
import contextlib
import hashlib
import importlib
import multiprocessing
import os
import signal
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch as th
from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.utils import ALGOS
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.utils import set_random_seed

from sb3_klip import zoo
from sb3_klip.algorithm import KLipAlgorithm
from sb3_klip.interruption import deferred_interrupt
from sb3_klip.rollout import rollout_copy
from sb3_klip.variants import VARIANTS
from sb3_klip.verify.analytic import analytic_residual
from sb3_klip.verify.bits import GradientRecorder, state_tensors

#: The variants that are compared, by what ``--algo`` calls them.
PAIRS = {variant.zoo_base.removeprefix("ppo_"): variant for variant in VARIANTS}
#: Tensors by name, as they go through a pipe.
Arrays: TypeAlias = dict[str, np.ndarray]


class Update(NamedTuple):
    """
    What a training tells of an update, after the gradients of its minibatches.

    :param steps: of the environment, so far
    :param state: parameters and optimizer state after it
    :param kill: share of samples whose gradient the clip removes; None for PPO
    :param passed: share of samples outside the band that are let through, likewise
    :param residual: shares of the gradient that the best analytic penalty leaves, of each sample that the clip removes
    """

    steps: int
    state: Arrays
    kill: float | None
    passed: float | None
    residual: np.ndarray


class Training:
    """The other end of one of the two trainings."""

    def __init__(self, options: argparse.Namespace, algo: str, folder: str, conf: str):
        context = multiprocessing.get_context("spawn")
        self.algo = algo
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=train_and_report, args=(options, algo, folder, conf, theirs), daemon=True)
        with deferred_interrupt():
            self.process.start()
        theirs.close()

    def next(self) -> tuple[str, Any]:
        """The next message."""
        try:
            return self.connection.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            return "error", f"the process ended with status {self.process.exitcode}"

    def finish(self, kind: str, content: Any) -> tuple[str, Any]:
        """The message that ends the update which a message is about."""
        while kind == "gradient":
            kind, content = self.next()
        return kind, content

    def send(self, message: Any) -> None:
        with contextlib.suppress(ConnectionError):
            self.connection.send(message)

    def end(self) -> None:
        """End it, wherever it is: as soon as it has something to tell, which nobody hears, or else at once."""
        self.connection.close()
        self.process.join(timeout=2)
        self.process.kill()
        self.process.join()


def train_and_report(options: argparse.Namespace, algo: str, folder: str, conf: str, connection: Connection) -> None:
    """One of the two trainings; everything that it has to tell goes through the connection."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent sees to it
    tempfile.tempdir = folder  # where SB3 and torch leave things as well
    try:
        with Path(os.devnull).open("w", encoding="utf-8") as silence, contextlib.redirect_stdout(silence):
            model, callbacks = _make(options, algo, conf, folder)
            model.learn(options.n_timesteps, callback=[_Reporter(connection, options.estimator == "analytic"), *callbacks])
        connection.send(("end", None))
    except BaseException as error:
        with contextlib.suppress(OSError):  # nobody hears it: the parent has ended the comparison
            connection.send(("error", f"{type(error).__name__}: {error}"))


def _make(options: argparse.Namespace, algo: str, conf: str, logs: str) -> tuple[Any, list[Any]]:
    """The model as RL Zoo makes it, and the callbacks that the hyperparameters ask for."""
    th.set_num_threads(options.num_threads)
    for package in options.gym_packages:
        importlib.import_module(package)
    zoo.register()
    for variant in VARIANTS:
        if not variant.in_zoo:  # RL Zoo has no masks when it evaluates, but nothing is evaluated here
            ALGOS.update({variant.zoo_base: variant.base_algorithm, variant.zoo_name: variant.algorithm})
    params = dict(options.params)
    if algo == PAIRS[options.algo].zoo_name:
        params["beta"] = "sb3_klip.verify.analytic:analytic_step" if options.estimator == "analytic" else options.beta
    else:
        known = zoo.hyperparameters(PAIRS[options.algo].base_algorithm)
        params = {name: value for name, value in params.items() if name in known}
    set_random_seed(options.seed)
    manager = ExperimentManager(
        options,
        algo,
        options.env,
        logs,
        n_timesteps=options.n_timesteps,
        eval_freq=-1,
        hyperparams=params,
        env_kwargs=options.env_kwargs,
        seed=options.seed,
        verbose=0,
        device="cpu",
        config=conf,
    )
    experiment = manager.setup_experiment()
    assert experiment is not None
    return experiment[0], manager.callbacks


class _Reporter(BaseCallback):
    """Sends what each update did, and then waits to be told to go on, or to send the samples of a minibatch."""

    def __init__(self, connection: Connection, analytic: bool):
        super().__init__()
        self.connection = connection
        self.analytic = analytic
        self.recorder: GradientRecorder | None = None

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self.buffer = rollout_copy(self.model.rollout_buffer)  # type: ignore[attr-defined]
        self.connection.send(("rollout", _digest(self.buffer)))
        self.generator = np.random.get_state()
        ours = isinstance(self.model, KLipAlgorithm)
        self.snapshot = self.model.take_snapshot() if ours and self.analytic else None  # type: ignore[attr-defined]
        self.recorder = GradientRecorder(self.model.policy)

    def _on_rollout_start(self) -> None:
        self._report()

    def _on_training_end(self) -> None:
        self._report()

    def _report(self) -> None:
        if self.recorder is None:
            return
        gradients = self.recorder.take()
        self.recorder.close()
        self.recorder = None
        for gradient in gradients:
            self.connection.send(("gradient", _arrays(gradient)))
        logged = self.logger.name_to_value
        update = Update(
            self.num_timesteps,
            _arrays(state_tensors(self.model.policy)),
            logged.get("train/kill_fraction"),
            logged.get("train/pass_fraction"),
            np.zeros(0)
            if self.snapshot is None
            else analytic_residual(self.model, self.buffer, self.snapshot, logged["train/clip_range"]),
        )
        self.connection.send(("update", update))
        if (minibatch := self.connection.recv()) is not None:
            self.connection.send(("samples", self._samples(minibatch)))
            self.connection.recv()

    def _samples(self, minibatch: int) -> dict[str, Any]:
        """The samples of a minibatch of the last update, drawn again."""
        np.random.set_state(self.generator)
        drawn = -1
        while True:
            for samples in self.buffer.get(self.model.batch_size):  # type: ignore[attr-defined]
                drawn += 1
                if drawn == minibatch:
                    return _plain(samples)


def _arrays(tensors: dict[str, th.Tensor]) -> Arrays:
    """As numpy arrays, which go through a pipe as they are; torch would share its memory instead."""
    return {name: tensor.detach().cpu().numpy() for name, tensor in tensors.items()}


def _plain(samples: Any) -> Any:
    """Named tuples as dictionaries, which ``torch.load`` takes for mere data."""
    if isinstance(samples, tuple) and hasattr(samples, "_asdict"):
        return {name: _plain(value) for name, value in samples._asdict().items()}
    return tuple(_plain(each) for each in samples) if isinstance(samples, tuple) else samples


def _digest(buffer: Any) -> str:
    """What two rollouts share if and only if they are the same."""
    content = hashlib.sha256()
    observations = buffer.observations if isinstance(buffer.observations, dict) else {"": buffer.observations}
    for array in (*observations.values(), buffer.actions, buffer.rewards, buffer.episode_starts):
        content.update(array.tobytes())
    return content.hexdigest()
