"""
``python -m sb3_klip.verify``: train PPO and KLipPPO side by side from one seed, and compare every gradient, bit for bit.

Each of the two trains in a process of its own, with the environment, the wrappers and the hyperparameters that RL Zoo would
give it, and sends the gradients of each update to this process, which compares them as they come.
"""

from sb3_klip import interruption

if __name__ == "__main__":
    interruption.end_at_once()  # until main

import argparse
import contextlib
import hashlib
import importlib
import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import gymnasium as gym
import numpy as np
import torch as th
import yaml
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.utils import ALGOS, StoreDict
from sb3_contrib import MaskablePPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.distributions import TanhBijector
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.utils import set_random_seed
from torch.distributions import Normal
from torch.nn import functional as F

from sb3_klip import KLipMaskablePPO, KLipPPO, KLipRecurrentPPO, zoo
from sb3_klip.divergence import DIVERGENCES, Parameters, parameters_of
from sb3_klip.errors import did_you_mean
from sb3_klip.identity import Difference, GradientRecorder, largest_difference, state_tensors
from sb3_klip.partition import partition
from sb3_klip.rollout import copied
from sb3_klip.training import PerSampleKLTraining, make_beta

#: The algorithms that are compared, by what ``--algo`` calls them.
PAIRS = {"ppo": ("ppo", "klip_ppo"), "lstm": ("ppo_lstm", "klip_ppo_lstm"), "mask": ("ppo_mask", "klip_ppo_mask")}
CLASSES: dict[str, type[BaseAlgorithm]] = {"ppo": KLipPPO, "lstm": KLipRecurrentPPO, "mask": KLipMaskablePPO}
HYPERPARAMS = ("zoo", "paper", "default")
#: Arguments that PPO does not have.
OURS = ("beta_kwargs", "log_kl", "compile")

EPILOG = """\
examples:
  python -m sb3_klip.verify --env Hopper-v4
  python -m sb3_klip.verify --env MyEnv-v0 --gym-packages my_package --hyperparams default -n 50000
  python -m sb3_klip.verify --env Hopper-v4 -params batch_size:60 n_epochs:3
  python -m sb3_klip.verify --env Hopper-v4 --estimator analytic     # where the identity ends, and why
  python -m sb3_klip.verify --env Hopper-v4 --beta linear_ramp       # not PPO, and found to be so

exit status: 0 identical, 1 different, 2 could not be compared, 130 interrupted
"""


def parser() -> argparse.ArgumentParser:
    """Options of the command line; those that RL Zoo has as well mean the same."""
    made = argparse.ArgumentParser(
        prog="python -m sb3_klip.verify",
        description="Train PPO and KLipPPO side by side from one seed, and compare every gradient and parameter, bit for bit. "
        "Differences are given in ulp, units in the last place of a float32.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--env", required=True, help="id of a registered environment")
    made.add_argument("--algo", choices=PAIRS, default="ppo", help="PPO, sb3-contrib's RecurrentPPO or its MaskablePPO")
    made.add_argument("-n", "--n-timesteps", type=int, default=20_000, help="steps of each training (default: %(default)s)")
    made.add_argument("--seed", type=int, default=0, help="random seed of both (default: %(default)s)")
    made.add_argument(
        "--hyperparams",
        choices=HYPERPARAMS,
        default="zoo",
        help="RL Zoo's tuned ones, the paper's protocol, or SB3's defaults (default: %(default)s)",
    )
    made.add_argument(
        *("-params", "--params"), nargs="+", action=StoreDict, default={}, help="override hyperparameters, as in RL Zoo"
    )
    made.add_argument("--env-kwargs", nargs="+", action=StoreDict, default={}, help="arguments of the environment, likewise")
    made.add_argument("--gym-packages", nargs="+", default=[], help="modules to import, which register environments")
    made.add_argument("--beta", default="step", help="coefficient of KLipPPO (default: step, which is PPO-Clip)")
    made.add_argument(
        "--estimator",
        choices=("sampled", "analytic"),
        default="sampled",
        help="KL estimate that the coefficient is put on; with the analytic one there is no identity (default: %(default)s)",
    )
    made.add_argument("--num-threads", type=int, default=1, help="threads of torch in each training (default: %(default)s)")
    made.add_argument(
        *("-o", "--output"),
        type=Path,
        default=Path("difference.pt"),
        help="where a first difference goes (default: %(default)s)",
    )
    return made


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


class Verdict(NamedTuple):
    """
    What came out.

    :param identical: None if the two could not be compared
    :param text: for the user
    """

    identical: bool | None
    text: str


# -- in the two processes ----------------------------------------------------------------------------------------------


def _train(options: argparse.Namespace, algo: str, folder: str, conf: str, connection: Connection) -> None:
    """One of the two trainings; everything that it has to tell goes through the connection."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent sees to it
    tempfile.tempdir = folder  # where SB3 and torch leave things as well
    try:
        with Path(os.devnull).open("w", encoding="utf-8") as silence, contextlib.redirect_stdout(silence):
            model, callbacks = _make(options, algo, conf, folder)
            model.learn(options.n_timesteps, callback=[_Reporter(connection, options.estimator == "analytic"), *callbacks])
        connection.send(("end", None))
    except (BrokenPipeError, EOFError):
        pass
    except BaseException as error:
        connection.send(("error", f"{type(error).__name__}: {error}"))


def _make(options: argparse.Namespace, algo: str, conf: str, logs: str) -> tuple[Any, list[Any]]:
    """The model as RL Zoo makes it, and the callbacks that the hyperparameters ask for."""
    th.set_num_threads(options.num_threads)
    for package in options.gym_packages:
        importlib.import_module(package)
    zoo.register()
    # RL Zoo has no masks when it evaluates, but nothing is evaluated here.
    ALGOS.update(ppo_mask=MaskablePPO, klip_ppo_mask=KLipMaskablePPO)
    params = dict(options.params)
    if algo == PAIRS[options.algo][1]:
        params["beta"] = "sb3_klip.verify:analytic_step" if options.estimator == "analytic" else options.beta
    else:
        params = {name: value for name, value in params.items() if name not in OURS}
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


def analytic_step(ratio: th.Tensor, advantages: th.Tensor, clip_range: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """A coefficient: the identity's \\|β\\|, put on the analytic KL divergence in place of the sampled one."""
    kill, _, _ = partition(ratio, advantages, clip_range)
    return th.zeros_like(ratio), kill * ratio * advantages.abs()


analytic_step.estimator = "analytic"  # type: ignore[attr-defined]


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
        self.buffer = copied(self.model.rollout_buffer)  # type: ignore[attr-defined]
        self.connection.send(("rollout", _digest(self.buffer)))
        self.generator = np.random.get_state()
        ours = isinstance(self.model, PerSampleKLTraining)
        self.snapshot = self.model._snapshot() if ours and self.analytic else None  # type: ignore[attr-defined]
        self.recorder = GradientRecorder(self.model.policy)

    def _on_rollout_start(self) -> None:
        self._report()

    def _on_training_end(self) -> None:
        self._report()

    def _report(self) -> None:
        if self.recorder is None:
            return
        gradients = self.recorder.take()
        self.recorder.remove()
        self.recorder = None
        for gradient in gradients:
            self.connection.send(("gradient", _arrays(gradient)))
        logged = self.logger.name_to_value
        update = Update(
            self.num_timesteps,
            _arrays(state_tensors(self.model.policy)),
            logged.get("train/kill_fraction"),
            logged.get("train/pass_fraction"),
            np.zeros(0) if self.snapshot is None else analytic_residual(self.model, self.buffer, self.snapshot),
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


def analytic_residual(model: Any, buffer: Any, snapshot: Any) -> np.ndarray:
    """
    What remains of the gradient of a sample that the clip removes when the analytic KL divergence is set against it, with the
    coefficient that is best for this one sample.

    The clip takes away w Â ∇log π(a|s). A penalty b KL(π_old ‖ π) can do so only where ∇KL is a multiple of ∇log π; both are
    taken with respect to the parameters of the distribution in this state. What the best b leaves is the sine of their angle.

    :param model: after the update
    :param buffer: the rollout
    :param snapshot: the rollout policy's distributions
    :return: a number from 0 (nothing remains) to 1 (all does) for each sample on the kill set
    """
    kept, model.rollout_buffer = model.rollout_buffer, buffer
    shares = []
    try:
        for rollout_data, indices, mask, log_prob in model._evaluated_rollout():
            rows = slice(None) if mask is None else mask
            family, parameters = parameters_of(model.policy.action_dist)
            leaves = tuple(parameter.detach()[rows].double().requires_grad_() for parameter in parameters)
            old = tuple(parameter[indices].double() for parameter in snapshot.parameters)
            actions = rollout_data.actions[rows].double()
            if model.policy.squash_output:
                actions = TanhBijector.inverse(actions)
            score = _per_sample_gradient(_log_prob(family, leaves, actions), leaves)
            divergence = _per_sample_gradient(DIVERGENCES[family](old, leaves), leaves)
            ratio = (log_prob - rollout_data.old_log_prob).exp()
            advantages = rollout_data.advantages
            if model.normalize_advantage:
                advantages = model._normalize_advantages(advantages, mask)
            kill, _, _ = partition(ratio, advantages, model.clip_range(model._current_progress_remaining))
            cosine = F.cosine_similarity(score, divergence, dim=1)[kill[rows]]
            shares.append((1 - cosine.square()).clamp(min=0).sqrt())
    finally:
        model.rollout_buffer = kept
    return th.cat(shares).numpy()


def _log_prob(family: str, parameters: Parameters, actions: th.Tensor) -> th.Tensor:
    """log π(a|s), up to a constant, from the parameters of the distribution."""
    if family == "gaussian":
        mean, std = parameters
        return Normal(mean, std).log_prob(actions).sum(dim=-1)
    if family == "bernoulli":
        return -F.binary_cross_entropy_with_logits(parameters[0], actions, reduction="none").sum(dim=-1)
    choices = actions.long().reshape(len(actions), len(parameters)).unbind(dim=1)
    chosen = [logits.log_softmax(dim=-1).gather(1, a[:, None])[:, 0] for logits, a in zip(parameters, choices, strict=True)]
    return th.stack(chosen).sum(dim=0)


def _per_sample_gradient(values: th.Tensor, parameters: Parameters) -> th.Tensor:
    """One row per sample: its gradient with respect to the parameters of its own distribution."""
    return th.cat(th.autograd.grad(values.sum(), parameters), dim=1)


# -- in this process ---------------------------------------------------------------------------------------------------


class _Training:
    """The other end of one of the two trainings."""

    def __init__(self, options: argparse.Namespace, algo: str, folder: str, conf: str):
        context = multiprocessing.get_context("spawn")
        self.algo = algo
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_train, args=(options, algo, folder, conf, theirs), daemon=True)
        with interruption.held_back():
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
        """End it, wherever it is."""
        self.process.kill()
        self.process.join()


class Comparison:
    """
    What two trainings have done, compared as it comes.

    :param options: of the command line
    """

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.steps = self.updates = self.minibatches = 0
        self.gradient = self.state = Difference(0, "")
        self.kill: list[float] = []
        self.passed: list[float] = []
        self.residual: list[np.ndarray] = []

    def run(self, base: _Training, ours: _Training, live: Live) -> Verdict:
        """Compare until both have ended, or one minibatch or one update differs."""
        index, first = 0, None
        while True:
            (kind, theirs), (our_kind, own) = base.next(), ours.next()
            if uneven := kind != our_kind:  # one of the two has stopped early
                (kind, theirs), (our_kind, own) = base.finish(kind, theirs), ours.finish(our_kind, own)
            for training, message in ((base, (kind, theirs)), (ours, (our_kind, own))):
                if message[0] == "error":
                    return Verdict(None, f"{training.algo} stopped after {self.steps} steps. {message[1]}")
            if kind == "end":
                return self._verdict()
            if kind == "rollout":
                if theirs != own:
                    return Verdict(
                        None,
                        f"The rollout of update {self.updates} differs, although the policies were equal to the last bit: "
                        f"{self.options.env} does not repeat its episodes for the same seed, so nothing can be compared on "
                        "it.",
                    )
                continue
            if kind == "gradient":
                self.minibatches += 1
                worst = largest_difference(_tensors(own), _tensors(theirs))
                if worst.ulps > 0 and first is None:
                    first = (index, theirs, own)
                self.gradient = max(self.gradient, worst)
                index += 1
                continue
            self._take(theirs, own)
            live.update(self.table())
            if first is not None or uneven or self.state.ulps > 0:
                return self._different(first, base, ours)
            index = 0
            base.send(None)
            ours.send(None)

    def _take(self, theirs: Update, own: Update) -> None:
        """The numbers of an update."""
        self.steps = own.steps
        self.updates += 1
        self.state = max(self.state, largest_difference(_tensors(own.state), _tensors(theirs.state)))
        if own.kill is not None and own.passed is not None:
            self.kill.append(own.kill)
            self.passed.append(own.passed)
        self.residual.append(own.residual)

    def _verdict(self) -> Verdict:
        if self.minibatches == 0:
            return Verdict(None, f"No update was made in {self.options.n_timesteps} steps; ask for more with -n.")
        if sum(self.kill) == 0:
            return Verdict(
                None, "Equal so far, but no sample has been clipped, so nothing has been tried; train for longer with -n."
            )
        if all(kill + passed > 1 - 1e-9 for kill, passed in zip(self.kill, self.passed, strict=True)):
            reason = f"the clip range was 0 or less, as schedules run out before the first rollout of {self.steps} steps ends"
            return Verdict(None, f"Equal so far, but {reason}; train for longer with -n.")
        return Verdict(True, f"IDENTICAL: all {self.minibatches} gradients and all parameters, to the last bit.")

    def _different(self, first: Any, base: _Training, ours: _Training) -> Verdict:
        """Save the first minibatch that differs."""
        if first is None:
            return Verdict(
                False, f"DIFFERENT: {self.state.name} after update {self.updates - 1}, though all gradients are equal."
            )
        minibatch, theirs, own = first
        base.send(minibatch)
        ours.send(minibatch)
        content = {
            "update": self.updates - 1,
            "minibatch": minibatch,
            **{f"gradient of {t.algo}": _tensors(gradient) for t, gradient in ((base, theirs), (ours, own))},
            **{f"samples of {t.algo}": t.next()[1] for t in (base, ours)},
        }
        try:
            th.save(content, self.options.output)
            saved = f"is saved to {self.options.output} (torch.load)"
        except (OSError, RuntimeError) as error:  # torch has its own for a file that cannot be written
            saved = f"could not be saved to {self.options.output}: {error}"
        return Verdict(
            False,
            f"DIFFERENT: the gradient of {self.gradient.name}, first in minibatch {minibatch} of update {self.updates - 1}, "
            f"which {saved}.",
        )

    def table(self) -> Table:
        """All numbers so far."""
        table = Table(show_header=False, title=f"{self.options.env}: {' and '.join(PAIRS[self.options.algo])}")
        rows = [
            ("steps", f"{self.steps} of {self.options.n_timesteps}"),
            ("updates", f"{self.updates}"),
            ("minibatches compared", f"{self.minibatches}"),
            ("largest difference of gradients", _shown(self.gradient)),
            ("largest difference of parameters and optimizer", _shown(self.state)),
        ]
        if self.kill:
            mean, peak = np.mean(self.kill), max(self.kill)
            rows.append(("samples whose gradient the clip removes", f"{mean:.2%} (in one update at most {peak:.2%})"))
            rows.append(("samples outside the band that it lets through", f"{np.mean(self.passed):.2%}"))
        for row in rows:
            table.add_row(*row)
        return table

    def why(self) -> str:
        """What the analytic divergence leaves of the gradient, in words."""
        shares = np.concatenate([np.zeros(0), *self.residual])
        if len(shares) == 0:
            return "No sample was clipped in this update, so there is nothing to show; try another seed or more epochs."
        low, middle = shares.min(), np.median(shares)
        text = (
            "Of each sample, the clip takes away a multiple of the gradient of log pi(a|s), which depends on the action. The "
            "gradient of the analytic KL divergence does not, and points elsewhere. "
            f"On the {len(shares)} clipped samples of this update, the "
            f"best coefficient for each one leaves {middle:.1%} of what it should remove (median; at least {low:.1%})."
        )
        if middle < 1e-6:
            text += " Here that is nothing: a distribution of a single parameter has gradients in one direction only."
        return text


def _tensors(arrays: Arrays) -> dict[str, th.Tensor]:
    return {name: th.from_numpy(array) for name, array in arrays.items()}


def _shown(difference: Difference) -> str:
    if difference.ulps == 0:
        return "0 ulp"
    return f"{difference.ulps} ulp ({difference.name})" if difference.ulps < 2**62 else f"shape or NaN ({difference.name})"


def _scope(options: argparse.Namespace) -> str:
    """What the verdict holds for."""
    kernels = th.backends.cpu.get_cpu_capability()
    threads = f"{options.num_threads} thread{'s' if options.num_threads > 1 else ''}"
    return f"This holds for torch {th.__version__} on this machine's CPU ({kernels} kernels) with {threads}."


def _check(options: argparse.Namespace) -> None:
    """
    Refuse what can be known to be wrong.

    :raises ValueError: naming the argument
    """
    for package in options.gym_packages:
        try:
            importlib.import_module(package)
        except Exception as error:
            raise ValueError(f"--gym-packages: {package} cannot be imported: {type(error).__name__}: {error}") from error
    if options.env not in gym.envs.registry:
        raise ValueError(f"--env={options.env!r} is not registered.{did_you_mean(options.env, gym.envs.registry)}")
    for name in ("n_timesteps", "num_threads"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')}={getattr(options, name)} must be at least 1")
    if not options.output.absolute().parent.is_dir():
        raise ValueError(f"--output={options.output}: the folder does not exist")
    if options.output.is_dir():
        raise ValueError(f"--output={options.output} is a folder")
    if not 0 <= options.seed < 2**32:
        raise ValueError(f"--seed={options.seed} must be from 0 to 2**32 - 1")
    _check_hyperparams(options)


def _check_hyperparams(options: argparse.Namespace) -> None:
    if "beta" in options.params:
        raise ValueError(f"-params beta:{options.params['beta']!r}: here the coefficient is given by --beta")
    known = zoo.hyperparameters(CLASSES[options.algo])
    for name in options.params:
        if name not in known:
            raise ValueError(f"-params: there is no hyperparameter {name!r}.{did_you_mean(name, known)}")
    if options.estimator == "analytic" and options.beta != "step":
        raise ValueError(f"--estimator=analytic shows what is left of --beta=step, not of {options.beta!r}")
    make_beta(options.beta, options.params.get("beta_kwargs"))


def _write_conf(options: argparse.Namespace, folder: Path) -> str:
    """Hyperparameters for both, where RL Zoo finds them."""
    if options.hyperparams == "paper":
        return "sb3_klip.hyperparams.paper"
    if options.hyperparams == "zoo":
        file = zoo.zoo_hyperparams() / ("ppo_lstm.yml" if options.algo == "lstm" else "ppo.yml")
        # The zoo's default for ppo_lstm has a policy that is none of its policies.
        if options.algo == "lstm" and options.env not in yaml.safe_load(file.read_text(encoding="utf-8")):
            raise ValueError(f"RL Zoo has no hyperparameters of ppo_lstm for {options.env}; try --hyperparams default")
        return str(file)
    try:
        env = gym.make(options.env, **options.env_kwargs)
    except Exception as error:
        raise ValueError(f"{options.env} cannot be made: {error}") from error
    space = env.observation_space
    env.close()
    kind = "MultiInput" if isinstance(space, gym.spaces.Dict) else "Cnn" if is_image_space(space) else "Mlp"
    policy = f"{kind}{'Lstm' if options.algo == 'lstm' else ''}Policy"
    conf = folder / "hyperparams.yml"
    conf.write_text(yaml.safe_dump({options.env: {"policy": policy, "n_timesteps": options.n_timesteps}}))
    return str(conf)


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Run the command.

    :param arguments: of the command line
    :return: exit status: 0 identical, 1 different, 2 could not be compared, 130 interrupted
    """
    try:
        options = parser().parse_args(arguments)
    except Exception as error:  # RL Zoo evaluates the values as Python
        form = "write NAME:VALUE with the value in Python, as in batch_size:60 or policy:\"'MlpPolicy'\""
        print(f"-params or --env-kwargs: {form}; {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    th.set_num_threads(1)  # the cores are for the two trainings
    console = Console()
    comparison = Comparison(options)
    try:
        _check(options)
        with tempfile.TemporaryDirectory() as folder:
            conf = _write_conf(options, Path(folder))
            base, ours = (_Training(options, algo, folder, conf) for algo in PAIRS[options.algo])
            try:
                with Live(comparison.table(), console=console, transient=True) as live:
                    verdict = comparison.run(base, ours, live)
            finally:
                base.end()
                ours.end()
        if comparison.updates > 0:
            console.print(comparison.table())
    except (ValueError, TypeError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"Interrupted after {comparison.minibatches} minibatches, {comparison.steps} steps; no verdict.")
        return 130
    if options.estimator == "analytic" and verdict.identical is False:
        print(comparison.why())
    print(verdict.text, file=sys.stderr if verdict.identical is None else sys.stdout)
    if verdict.identical is not None:
        print(_scope(options))
    return {True: 0, False: 1, None: 2}[verdict.identical]


if __name__ == "__main__":
    interruption.raise_again()
    sys.exit(main())
