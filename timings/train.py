"""
Time ``train()`` of PPO and KLipPPO on the same rollout, each in a process of its own, in turn.

    python timings/train.py                  # networks of 64-64 with minibatches of 64 and 256, and of 256-256 with 32
    python timings/train.py --compile        # with torch.compile, too
    python timings/train.py --grid           # over sizes of rollout, minibatch, network and observation, and a CNN
    python timings/train.py --others         # MaskablePPO and RecurrentPPO
    python timings/train.py --coefficients   # every coefficient

Prints the median time per minibatch, and the median and quartiles of PPO's time over each of the others'.
"""

import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import count
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch as th
from common import in_turn, parser, ratios, table, write
from gymnasium import spaces
from sb3_contrib import MaskablePPO, RecurrentPPO
from stable_baselines3 import PPO
from stable_baselines3.common.logger import Logger

from sb3_klip import KLipMaskablePPO, KLipPPO, KLipRecurrentPPO
from sb3_klip.coefficients import available, make
from sb3_klip.fast.graph import WARM_UP

#: Numbers in an observation and an action.
TASKS = {"Hopper": (11, 3), "HalfCheetah": (17, 6), "Ant": (27, 8), "Humanoid": (376, 17)}


#: PPO and its subclass of this package, and the policy for numbers.
VARIANTS: dict[str, tuple[Any, Any, str]] = {
    "PPO": (PPO, KLipPPO, "MlpPolicy"),
    "MaskablePPO": (MaskablePPO, KLipMaskablePPO, "MlpPolicy"),
    "RecurrentPPO": (RecurrentPPO, KLipRecurrentPPO, "MlpLstmPolicy"),
}


class Setting(NamedTuple):
    """What an update costs depends on."""

    task: str = "Hopper"
    net: int = 64
    batch_size: int = 64
    samples: int = 2048
    epochs: int = 10
    variant: str = "PPO"

    def __str__(self) -> str:
        network = "CNN" if self.task == "image" else f"{self.net}-{self.net}"
        start = "" if self.variant == "PPO" else f"{self.variant}, "
        epochs = {1: ", 1 epoch", 10: ""}.get(self.epochs, f", {self.epochs} epochs")
        return f"{start}{self.task}, {network}, minibatch {self.batch_size}, {self.samples} samples{epochs}"


#: What the README's and the documentation's tables have.
USUAL = [Setting(), Setting(net=256, batch_size=32), Setting(batch_size=256)]
#: One size at a time away from the default, and the corners.
GRID = [
    *(Setting(samples=samples, epochs=2) for samples in (512, 2048, 8192, 65536)),
    *(Setting(batch_size=batch_size, samples=max(2048, 2 * batch_size)) for batch_size in (32, 64, 256, 1024, 4096)),
    *(Setting(net=net) for net in (128, 256, 512)),
    *(Setting(task=task) for task in ("HalfCheetah", "Ant", "Humanoid")),
    Setting(net=256, batch_size=32),
    Setting("Humanoid", 512, 4096, 65536, 1),
    Setting("Humanoid", 512, 32, 2048, 1),
    Setting("image", 0, 64, 256, 1),
    Setting("image", 0, 256, 1024, 1),
]
#: The other algorithms. RecurrentPPO has an LSTM of 256 before the layers of 64.
OTHERS = [Setting("masks", variant="MaskablePPO"), Setting(samples=512, epochs=2, variant="RecurrentPPO")]


class Sized(gym.Env):
    """An environment that has spaces, random observations and rewards, and nothing else."""

    def __init__(self, task: str):
        self.observation_space: spaces.Space = spaces.Box(-np.inf, np.inf, (11,), np.float64)
        self.action_space: spaces.Space = spaces.Discrete(6)
        if task == "image":
            self.observation_space = spaces.Box(0, 255, (4, 84, 84), np.uint8)
        elif task != "masks":
            seen, acted = TASKS[task]
            self.observation_space = spaces.Box(-np.inf, np.inf, (seen,), np.float64)
            self.action_space = spaces.Box(-1.0, 1.0, (acted,), np.float32)
        self.random = np.random.default_rng(0)
        self.count = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        return self._seen(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.count += 1
        return self._seen(), self.random.normal(), self.count % 200 == 0, False, {}

    def action_masks(self) -> np.ndarray:
        """Half of the actions, and the first."""
        return np.array([True, *(self.random.random(5) < 0.5)])

    def _seen(self) -> np.ndarray:
        space = self.observation_space
        assert isinstance(space, spaces.Box)
        if space.dtype == np.uint8:
            return self.random.integers(0, 255, space.shape, np.uint8)
        return self.random.normal(size=space.shape)


def filled(algorithm: Any, setting: Setting, **kwargs: Any) -> Any:
    """A model with a rollout."""
    image = setting.task == "image"
    model = algorithm(
        "CnnPolicy" if image else VARIANTS[setting.variant][2],
        Sized(setting.task),
        n_steps=setting.samples,
        batch_size=setting.batch_size,
        n_epochs=setting.epochs,
        policy_kwargs={} if image else {"net_arch": [setting.net, setting.net]},
        seed=0,
        device="cpu",
        **kwargs,
    )
    _, callback = model._setup_learn(setting.samples)
    model.set_logger(Logger(None, []))
    assert model.env is not None
    model.collect_rollouts(model.env, callback, model.rollout_buffer, n_rollout_steps=setting.samples)
    return model


def timing(model: Any) -> Callable[[], float]:
    """A function that trains on the rollout once more, and returns how many seconds that took."""
    buffer = model.rollout_buffer
    content = {name: value.copy() for name, value in vars(buffer).items() if isinstance(value, np.ndarray)}
    initial = {name: tensor.clone() for name, tensor in model.policy.state_dict().items()}

    calls = count()

    def timed() -> float:
        np.random.seed(next(calls))  # each model's minibatches, which decide how many sequences a recurrent one has
        # train() has flattened the arrays; and the policy should be as far from the rollout's each time.
        vars(buffer).update({name: value.copy() for name, value in content.items()})
        buffer.generator_ready = False
        model.policy.load_state_dict(initial)
        start = time.perf_counter()
        model.train()
        return time.perf_counter() - start

    # Not counted: the first updates make the optimizer's state, and compile, or trace their graphs.
    minibatches = model.n_epochs * -(-buffer.buffer_size // model.batch_size)
    for _ in range(1 + -(-WARM_UP // minibatches) * hasattr(model, "update_path")):
        timed()
    calls = count()
    return timed


#: What a process that :func:`apart` began times.
_timed: Callable[[], float]


@contextmanager
def apart(algorithm: Any, setting: Setting, arguments: dict[str, Any]) -> Iterator[Callable[[], float]]:
    """
    The same, in a process of its own: in one process, where memory is free for one model depends on what others left, which
    makes differences of a tenth between equal models with convolutions.
    """
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, _begin, (th.get_num_threads(), algorithm, setting, arguments)) as process:
        yield lambda: process.submit(_again).result()


def _begin(threads: int, algorithm: Any, setting: Setting, arguments: dict[str, Any]) -> None:
    global _timed
    th.set_num_threads(threads)
    _timed = timing(filled(algorithm, setting, **arguments))


def _again() -> float:
    return _timed()


def compare(setting: Setting, models: dict[str, dict[str, Any]], repeats: int) -> dict[str, Any]:
    """Times per minibatch in µs, and ratios, of PPO and of our subclass with each of these arguments."""
    theirs, ours, _ = VARIANTS[setting.variant]
    kinds = {"PPO": (theirs, {}), **{name: (ours, arguments) for name, arguments in models.items()}}
    with ExitStack() as stack:
        timed = {name: stack.enter_context(apart(kind, setting, arguments)) for name, (kind, arguments) in kinds.items()}
        seconds = in_turn(timed, repeats)
    minibatches = setting.epochs * -(-setting.samples // setting.batch_size)
    microseconds = {name: statistics.median(values) / minibatches * 1e6 for name, values in seconds.items()}
    return {"setting": str(setting), "microseconds": microseconds, "ratios": ratios(seconds, "PPO")}


def coefficients() -> dict[str, dict[str, Any]]:
    """Arguments of KLipPPO for every coefficient that takes continuous actions."""
    models: dict[str, dict[str, Any]] = {name: {"beta": name} for name in available() if not make(name).needs_probabilities}
    # What the coefficients that need the rollout policy's distribution cost without it.
    for name in [name for name in available() if make(name).estimator == "analytic" and name != "truly"]:
        models[f"{name}, k3"] = {"beta": name, "beta_kwargs": {"estimator": "k3"}}
    return models


def main() -> None:
    """Run the comparison."""
    options = parser(__doc__, repeats=7)
    options.add_argument("--beta", default="step", help="coefficient of KLipPPO (default: %(default)s)")
    options.add_argument("--compile", action="store_true", help="compare KLipPPO(compile=True), too")
    options.add_argument("--grid", action="store_true", help="many sizes")
    options.add_argument("--others", action="store_true", help="MaskablePPO and RecurrentPPO")
    options.add_argument("--coefficients", action="store_true", help="every coefficient")
    args = options.parse_args()
    th.set_num_threads(args.threads)

    settings = GRID if args.grid else OTHERS if args.others else USUAL
    models: dict[str, dict[str, Any]] = {"KLipPPO": {"beta": args.beta}}
    if args.compile:
        models["compiled"] = {"beta": args.beta, "compile": True}
    if args.coefficients:
        settings, models = settings[:1], coefficients()

    results = []
    for setting in settings:
        result = compare(setting, models, args.repeats)
        results.append(result)
        rows = [
            (name, f"{median:.0f}", *(f"{ratio:.2f}" for ratio in result["ratios"][name]))
            for name, median in result["microseconds"].items()
        ]
        table(
            f"{setting}, {args.threads} thread(s)",
            ("", "µs per minibatch", "PPO's time over it", "quartile", "quartile"),
            rows,
        )
    write(args.json, results)


if __name__ == "__main__":
    main()
