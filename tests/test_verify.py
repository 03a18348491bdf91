"""
Whether a training is PPO's, and how to find out: units in the last place, ``IdentityCheckCallback`` and ``sb3_klip.verify``;
and the histogram of β.

A check is worth what it finds, so each that finds nothing here stands beside one where there is something to find.
"""

import copy
import functools
import gc
import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import types
import warnings
from pathlib import Path
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import pytest
import rl_zoo3.import_envs  # registers the environments without velocities
import rl_zoo3.train
import torch as th
from commands import python
from hypothesis import given, settings
from hypothesis import strategies as st
from identity_helpers import Recorder, assert_identical
from sb3_contrib.common.envs import InvalidActionEnvDiscrete
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import IdentityEnvMultiBinary, IdentityEnvMultiDiscrete, SimpleMultiObsEnv
from stable_baselines3.common.logger import Logger, configure
from stable_baselines3.common.utils import LinearSchedule, set_random_seed
from stable_baselines3.common.vec_env import VecNormalize
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import sb3_klip.verify
from sb3_klip import (
    BetaHistogramCallback,
    IdentityCheckCallback,
    KLipMaskablePPO,
    KLipPPO,
    KLipRecurrentPPO,
    ResumableCheckpointCallback,
    speed,
    zoo,
)
from sb3_klip.verify.bits import Difference, compare_gradients, largest_difference, ulps
from sb3_klip.resume import read_generators
from sb3_klip.surrogate import clip_objective
from sb3_klip.verify import analytic_residual

settings.register_profile("suite", deadline=None)
settings.load_profile("suite")

LARGEST = 2**63 - 1

# Large steps, so that samples are clipped; every case asserts that some are.
FAST = {"learning_rate": 1e-2, "n_steps": 128, "batch_size": 60, "n_epochs": 3}


# -- units in the last place -----------------------------------------------------------------------------------------------


def place(number: float, dtype: th.dtype) -> int:
    """How many numbers of the type lie between 0 and this one; by its exponent and mantissa, in integers of any length."""
    if number < 0:
        return -place(-number, dtype)
    info = th.finfo(dtype)
    if math.isinf(number):
        return place(info.max, dtype) + 1
    digits, lowest = -round(math.log2(info.eps)), round(math.log2(info.tiny))
    if number < info.tiny:
        return int(number / math.ldexp(1, lowest - digits))
    mantissa, exponent = math.frexp(number)
    return (exponent - lowest) * 2**digits + int((2 * mantissa - 1) * 2**digits)


def distance(a: float, b: float, dtype: th.dtype) -> int:
    if math.isnan(a) or math.isnan(b):
        return 0 if math.isnan(a) and math.isnan(b) else LARGEST
    # Between double-precision numbers of opposite signs there may be more numbers than an integer of torch has values.
    return min(abs(place(a, dtype) - place(b, dtype)), LARGEST)


WIDTHS = {32: th.float32, 64: th.float64}


@given(st.data())
@pytest.mark.parametrize("width", WIDTHS)
def test_ulps_counts_the_numbers_between(width, data):
    numbers = st.floats(width=width)
    pairs = data.draw(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=4))
    a, b = (th.tensor(column, dtype=WIDTHS[width]) for column in zip(*pairs, strict=True))
    counted = ulps(a, b)
    assert counted == ulps(b, a) == max(distance(*pair, WIDTHS[width]) for pair in pairs)
    if not a.isnan().any() and not b.isnan().any():
        assert (counted == 0) == th.equal(a, b)
    assert ulps(a, a.clone()) == 0


@given(st.data())
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_ulps_counts_the_steps_to_a_neighbour(dtype, data):
    """Also across zero, through the subnormal numbers, and to infinity."""
    info = np.finfo(dtype)
    places = [0.0, -0.0, info.smallest_subnormal, -3 * info.smallest_subnormal, info.tiny, -info.tiny, info.max, np.inf]
    number = st.sampled_from(places) | st.floats(width=info.bits, allow_nan=False)
    start = end = dtype(data.draw(number))
    towards = dtype(data.draw(st.sampled_from([-np.inf, 0.0, np.inf])))
    steps = 0
    for _ in range(data.draw(st.integers(0, 20))):
        steps += end != towards
        with np.errstate(over="ignore"):
            end = np.nextafter(end, towards)
    assert ulps(th.tensor(start), th.tensor(end)) == steps


@pytest.mark.parametrize("dtype", [th.float16, th.bfloat16])
def test_ulps_in_half_precision_against_all_numbers(dtype):
    """There are few enough of them to count."""
    every = th.arange(2**16).to(th.int16).view(dtype)
    numbers = every[~every.isnan()]
    ordered = numbers.double().unique()  # ±0 are one number
    chosen = numbers[th.randint(len(numbers), (1000, 2), generator=th.Generator().manual_seed(0))]
    for a, b in chosen:
        between = (th.searchsorted(ordered, a.double()) - th.searchsorted(ordered, b.double())).abs()
        assert ulps(a, b) == between


@pytest.mark.parametrize("dtype", WIDTHS.values())
def test_ulps_of_special_numbers(dtype):
    def of(a, b):
        return ulps(th.tensor([1.0, a], dtype=dtype), th.tensor([1.0, b], dtype=dtype))

    nan, tiny, inf = math.nan, th.finfo(dtype).smallest_normal * th.finfo(dtype).eps, math.inf
    assert of(0.0, -0.0) == 0
    assert of(tiny, -0.0) == of(0.0, -tiny) == 1
    assert of(tiny, -tiny) == 2
    assert of(inf, th.finfo(dtype).max) == of(-inf, th.finfo(dtype).min) == 1
    assert of(inf, inf) == of(nan, nan) == of(nan, -nan) == 0
    assert of(nan, 1.0) == of(0.0, nan) == of(nan, inf) == LARGEST
    assert of(inf, -inf) == min(2 * place(inf, dtype), LARGEST)
    # A NaN has many bit patterns.
    integers = {th.float32: th.int32, th.float64: th.int64}[dtype]
    other = (th.tensor([nan], dtype=dtype).view(integers) + 1).view(dtype)
    assert other.isnan().all()
    assert ulps(other, th.tensor([nan], dtype=dtype)) == 0


def test_ulps_of_any_layout():
    assert ulps(th.zeros(0), th.zeros(0)) == ulps(th.zeros(3, 0), th.zeros(3, 0)) == 0
    a = th.linspace(1, 2, 12).reshape(3, 4)
    b = a.clone()
    for _ in range(3):
        b[2, 1] = th.nextafter(b[2, 1], th.tensor(9.0))
    assert not a.T.is_contiguous()
    assert ulps(a.T, b.T.contiguous()) == ulps(a.T.contiguous(), b.T) == 3
    assert ulps(a[:, ::2], b[:, ::2]) == 0
    assert ulps(a[:, 1::2], b[:, 1::2]) == 3
    assert ulps(a[2, 1].requires_grad_(), b[2, 1]) == 3
    assert ulps(th.tensor(1.0).expand(2), th.tensor([1.0, 1.0])) == 0


def test_largest_difference_names_the_tensor():
    a = {"one": th.ones(2), "two": th.full((3,), 2.0), "empty": th.zeros(0)}
    assert largest_difference(a, {name: tensor.clone() for name, tensor in a.items()}) == Difference(0, "")
    next_to_two = th.nextafter(a["two"], th.tensor(3.0))
    assert largest_difference(a, {**a, "two": next_to_two}) == Difference(1, "two")
    assert largest_difference(a, {**a, "two": next_to_two, "one": th.tensor([1.0, 1.5])}) == Difference(2**22, "one")
    assert largest_difference(a, {**a, "two": th.full((1, 3), 2.0)}) == Difference(LARGEST, "two")
    assert largest_difference(a, {**a, "three": th.ones(1)}) == largest_difference({**a, "three": th.ones(1)}, a)
    assert largest_difference(a, {**a, "three": th.ones(1)}) == Difference(LARGEST, "three")
    assert largest_difference({}, {}) == Difference(0, "")


def test_gradients_are_compared_minibatch_by_minibatch():
    a = [{"w": th.ones(2)}, {"w": th.zeros(2)}]
    assert compare_gradients(a, copy.deepcopy(a)) == Difference(0, "")
    other = [a[0], {"w": th.tensor([0.0, 1e-45])}]
    assert compare_gradients(a, other) == Difference(1, "the gradient of w in minibatch 1")
    for less in (a[:1], []):
        found = compare_gradients(a, less)
        assert found == compare_gradients(less, a) == Difference(LARGEST, found.name)
    assert compare_gradients(a, a[:1]).name == "the gradient of w in minibatch 1"


# -- IdentityCheckCallback -------------------------------------------------------------------------------------------------

pendulum = functools.partial(gym.make, "Pendulum-v1")
cartpole = functools.partial(gym.make, "CartPole-v1")
LSTM = {"policy": "MlpLstmPolicy", "policy_kwargs": {"lstm_hidden_size": 8, "net_arch": [8]}}
CASES = {
    "box": (KLipPPO, pendulum, {}),
    "discrete": (KLipPPO, cartpole, {"batch_size": 64}),
    "dictionary": (
        KLipPPO,
        SimpleMultiObsEnv,
        {"policy": "MultiInputPolicy", "ent_coef": 0.01, "n_steps": 32, "batch_size": 20, "n_epochs": 2},
    ),
    "gsde": (KLipPPO, pendulum, {"use_sde": True, "sde_sample_freq": 4}),
    "squashed_gsde": (KLipPPO, pendulum, {"use_sde": True, "ent_coef": 0.01, "policy_kwargs": {"squash_output": True}}),
    "value_clipping": (KLipPPO, pendulum, {"clip_range_vf": 0.2}),
    "target_kl": (KLipPPO, pendulum, {"target_kl": 0.005, "n_epochs": 8}),
    "schedules": (
        KLipPPO,
        cartpole,
        {"learning_rate": LinearSchedule(1e-2, 1e-3, 1.0), "clip_range": LinearSchedule(0.2, -0.05, 1.0)},
    ),
    "sgd": (KLipPPO, pendulum, {"policy_kwargs": {"optimizer_class": th.optim.SGD}, "learning_rate": 3.0}),
    "vec_normalize": (KLipPPO, lambda: VecNormalize(make_vec_env("Pendulum-v1", 3, seed=0)), {"n_steps": 50}),
    "measured": (KLipPPO, pendulum, {"log_kl": True}),
    "recurrent": (KLipRecurrentPPO, lambda: gym.make("PendulumNoVel-v1"), {**LSTM, "n_steps": 64, "batch_size": 50}),
    "recurrent_discrete": (
        KLipRecurrentPPO,
        lambda: make_vec_env("CartPoleNoVel-v1", 2, seed=0),
        {**LSTM, "learning_rate": 5e-2, "n_steps": 32, "batch_size": 50},
    ),
    "maskable": (KLipMaskablePPO, lambda: InvalidActionEnvDiscrete(dim=20, n_invalid_actions=10), {}),
}


def make(case, **changes):
    algorithm, make_env, kwargs = CASES[case]
    set_random_seed(0)
    model = algorithm(env=make_env(), seed=0, device="cpu", **{"policy": "MlpPolicy", **FAST, **kwargs, **changes})
    model.set_logger(Logger(None, [Recorder()]))
    return model


def logged(model):
    model.logger.dump()
    return model.logger.output_formats[0]


def not_ppos(caught):
    return [str(warning.message) for warning in caught if "is not PPO's" in str(warning.message)]


def assert_same_generators(ours, theirs):
    assert ours["python"] == theirs["python"]
    assert all(np.array_equal(a, b) for a, b in zip(ours["numpy"], theirs["numpy"], strict=True))
    assert th.equal(ours["torch"], theirs["torch"])


@pytest.mark.parametrize("case", CASES)
def test_the_callback_finds_no_difference_and_makes_none(case):
    check, models, generators = IdentityCheckCallback(), [], []
    for callback in (check, None):
        model = make(case)
        steps = 2 * model.n_steps * model.n_envs + 1  # three updates
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.learn(steps, callback=callback)
        assert not_ppos(caught) == []
        models.append(model)
        generators.append(read_generators())
    assert check.identical
    assert check.difference == Difference(0, "")
    # Every step of the optimizer was compared: Adam counts them.
    epochs, size = models[0].n_epochs, models[0].n_steps * models[0].n_envs
    steps = [int(state["step"]) for state in models[1].policy.optimizer.state.values() if "step" in state]
    assert {check.minibatches} == (set(steps) or {3 * epochs * -(-size // models[0].batch_size)})
    if case == "target_kl":
        assert check.minibatches < 3 * epochs * -(-size // models[0].batch_size)

    logs = logged(models[0])
    assert max(logs.column("train/kill_fraction")) > 0
    assert set(logs.column("identity/ulps")) == {0}
    assert len(logs.column("identity/minibatches")) == 3
    assert logs.column("identity/minibatches")[-1] == check.minibatches
    assert logs.column("train/loss") == logged(models[1]).column("train/loss")
    assert logged(models[1]).column("identity/ulps") == []

    assert_same_generators(*generators)
    if case != "sgd":  # which has no state
        assert_identical(*models)
    for model in models:
        set_random_seed(1)  # the two have drawn from the same generators, one after the other
        model.learn(model.n_steps * model.n_envs, reset_num_timesteps=False)
    ours, theirs = (model.policy.state_dict() for model in models)
    assert all(th.equal(ours[name], theirs[name]) for name in theirs)
    assert not any(parameter._post_accumulate_grad_hooks for parameter in models[0].policy.parameters())


def test_two_trainings_with_one_callback():
    check, model = IdentityCheckCallback(), make("box")
    model.learn(256, callback=check)
    counted = check.minibatches
    model.learn(128, callback=check, reset_num_timesteps=False)
    assert (counted, check.minibatches) == (2 * 9, 3 * 9)
    assert check.identical


def test_before_anything_is_compared_nothing_is_claimed():
    assert not IdentityCheckCallback().identical


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        ("box", {"beta": "linear_ramp"}),
        ("discrete", {"beta": "sigmoid"}),
        ("box", {"beta": "fixed"}),
        ("recurrent", {"beta": "none"}),
        ("maskable", {"beta": "linear_ramp"}),
    ],
)
def test_another_coefficient_is_found_to_be_another(case, changes):
    check, model = IdentityCheckCallback(), make(case, **changes)
    name = r"(the gradient of [a-z_.0-9]+ in minibatch \d+|[a-z_.0-9]+)"
    with pytest.warns(UserWarning, match="is not PPO's") as caught:
        model.learn(256, callback=check)
    (message,) = not_ppos(caught)  # and not one for each update
    found = re.fullmatch(
        rf"The update after (128|256) steps is not PPO's: {name} differs by (\d+) units in the last place", message
    )
    assert found
    assert any(parameter in found[2] for parameter in model.policy.state_dict())
    assert int(found[3]) > 0
    assert not check.identical
    assert check.difference.ulps >= int(found[3])
    assert logged(model).column("identity/ulps")[-1] == check.difference.ulps


def sabotage(monkeypatch, call, action):
    """Let KLipPPO do something else in one minibatch: the action gets the policy, and returns what to multiply the loss by."""
    compute, calls = KLipPPO._loss, []

    def loss(self, *args):
        calls.append(None)
        factor = action(self.policy) if len(calls) == call else 1
        computed, minibatch = compute(self, *args)
        return computed * factor, minibatch

    monkeypatch.setattr(KLipPPO, "_loss", loss)


def nothing(policy):
    return 1


def loss_a_little_larger(policy):
    return 1 + th.finfo(th.float32).eps


def parameter_a_little_larger(policy):
    with th.no_grad():
        weight = policy.value_net.weight
        weight[0, 0] = th.nextafter(weight[0, 0], weight.new_tensor(np.inf))
    return 1


SABOTAGE = [loss_a_little_larger, parameter_a_little_larger]


@pytest.mark.parametrize("action", SABOTAGE)
@pytest.mark.parametrize("minibatch", [0, 4, 8])
def test_the_last_bit_in_one_minibatch_is_found(monkeypatch, action, minibatch):
    # The second of three updates, of nine minibatches each.
    with monkeypatch.context() as patch:
        sabotage(patch, 9 + minibatch + 1, nothing)
        check = IdentityCheckCallback()
        make("box").learn(384, callback=check)
        assert check.identical

    sabotage(monkeypatch, 9 + minibatch + 1, action)
    check, model = IdentityCheckCallback(), make("box")
    with pytest.warns(UserWarning, match="The update after 256 steps is not PPO's") as caught:
        model.learn(384, callback=check)
    assert len(not_ppos(caught)) == 1
    assert check.minibatches == 3 * 9
    # What is compared next begins at the same state again, and is the same.
    assert logged(model).column("identity/ulps") == [0, check.difference.ulps, check.difference.ulps]
    assert check.difference.ulps > 0


def test_what_differs_but_the_gradients_is_found(monkeypatch):
    """An optimizer that does something else, which shows in the parameters; in the gradients only afterwards."""
    honest = speed.adam

    def adam(*args, lr, **kwargs):
        honest(*args, lr=lr * (1 + 1e-6), **kwargs)

    monkeypatch.setattr(speed, "adam", adam)
    check, model = IdentityCheckCallback(), make("box", batch_size=128, n_epochs=1)
    with pytest.warns(UserWarning, match=r"is not PPO's: (?!the gradient)[a-z_.0-9]+ differs by"):
        model.learn(128, callback=check)
    assert check.difference.name in model.policy.state_dict()
    assert check.minibatches == 1


def test_moments_that_differ_are_found(monkeypatch):
    honest = speed.adam

    def adam(parameters, gradients, averages, squares, *args, **kwargs):
        honest(parameters, gradients, averages, squares, *args, **kwargs)
        squares[0].mul_(1 + 1e-6)

    monkeypatch.setattr(speed, "adam", adam)
    check, model = IdentityCheckCallback(), make("box", batch_size=128, n_epochs=1)
    with pytest.warns(UserWarning, match=r"is not PPO's: optimizer\.\d+\.exp_avg_sq differs by"):
        model.learn(128, callback=check)


@pytest.mark.parametrize("callback", [IdentityCheckCallback, BetaHistogramCallback])
def test_for_the_algorithms_of_this_package_only(callback):
    model = PPO("MlpPolicy", "CartPole-v1", n_steps=32, batch_size=32, n_epochs=1, device="cpu")
    with pytest.raises(ValueError, match=rf"{callback.__name__} .*this package's algorithms.* PPO"):
        model.learn(32, callback=callback())
    assert model.num_timesteps == 0


def test_a_compiled_update_is_not_the_same_bits():
    check = IdentityCheckCallback()
    model = make("discrete", compile={"backend": "eager"})
    with pytest.warns(UserWarning, match="is not PPO's"):
        model.learn(128, callback=check)
    assert check.difference.ulps > 0
    assert check.minibatches == 6


def test_early_stopping_is_announced_once(capsys):
    """The second update that is made to compare with speaks for nobody."""
    model = make("target_kl", verbose=1)
    model.learn(128, callback=IdentityCheckCallback())
    with_check = capsys.readouterr().out.count("Early stopping")
    model = make("target_kl", verbose=1)
    model.learn(128)
    assert with_check == capsys.readouterr().out.count("Early stopping") == 1


class StoppedError(Exception):
    """Raised in the middle of an update."""


def raise_at(monkeypatch, call, error=StoppedError):
    def action(policy):
        raise error

    sabotage(monkeypatch, call, action)


def test_an_update_that_was_broken_off_is_not_compared(monkeypatch):
    check, model = IdentityCheckCallback(), make("box")
    with monkeypatch.context() as patch, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        raise_at(patch, 9 + 5)
        with pytest.raises(StoppedError):
            model.learn(384, callback=check)
    assert check.minibatches == 9
    with warnings.catch_warnings(record=True) as caught_later:
        warnings.simplefilter("always")
        model.learn(128, callback=check, reset_num_timesteps=False)
    assert not_ppos([*caught, *caught_later]) == []
    assert check.difference == Difference(0, "")
    assert check.minibatches == 2 * 9


def tensors_alive():
    gc.collect()
    return sum(type(each) is th.Tensor for each in gc.get_objects())


def test_after_an_exception_training_goes_on_without_the_callback(monkeypatch):
    check, models = IdentityCheckCallback(), []
    for callback in (check, None):
        model = make("box")
        with monkeypatch.context() as patch:
            raise_at(patch, 9 + 5)
            with pytest.raises(StoppedError):
                model.learn(384, callback=callback)
        set_random_seed(1)
        model.learn(128, reset_num_timesteps=False)
        before = tensors_alive()
        model.learn(256, reset_num_timesteps=False)
        models.append(model)
        # No gradients are kept that nobody will compare: 18 minibatches of 13 parameters.
        assert tensors_alive() - before < 50
    assert_identical(*models)
    assert check.minibatches == 9


# -- IdentityCheckCallback beside others, and in RL Zoo -------------------------------------------------------------------


class Interrupt(BaseCallback):
    def _on_step(self):
        if self.num_timesteps == 300:
            raise StoppedError
        return True


def test_a_run_that_is_resumed(tmp_path):
    reference = make("box").learn(512)
    check = IdentityCheckCallback()
    callbacks = [check, ResumableCheckpointCallback(128, str(tmp_path)), Interrupt()]
    with pytest.raises(StoppedError):
        make("box").learn(512, callback=callbacks)
    assert check.minibatches == 2 * 9

    model = KLipPPO.load(tmp_path / "rl_model_256_steps.zip", env=pendulum(), device="cpu", resume=True)
    again = IdentityCheckCallback()
    model.learn(512, callback=[ResumableCheckpointCallback(128, str(tmp_path)), again])
    assert again.identical
    assert again.minibatches == 2 * 9
    assert_identical(model, reference)


@pytest.fixture
def train_here(tmp_path, monkeypatch):
    """``rl_zoo3.train`` in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    zoo.register()

    def train_here(*arguments):
        command = ("rl_zoo3.train", "--eval-freq", -1, "--seed", 0, *arguments)
        monkeypatch.setattr(sys, "argv", [str(word) for word in command])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            rl_zoo3.train.train()
        return not_ppos(caught)

    return train_here


ZOO = ("n_envs:2", "normalize:True", "n_steps:64", "batch_size:60", "n_epochs:2", "learning_rate:0.01")
CHECK = "callback:['sb3_klip.IdentityCheckCallback', {'sb3_klip.CSVLogCallback': {'path': 'progress.csv'}}]"


@pytest.mark.parametrize(("algo", "env"), [("klip_ppo", "Pendulum-v1"), ("klip_ppo_lstm", "CartPoleNoVel-v1")])
def test_in_the_hyperparameters_of_rl_zoo(train_here, algo, env):
    command = ("--algo", algo, "--env", env, "-n", 384, "-params", *ZOO, CHECK)
    assert train_here(*command) == []
    header, *rows = [line.split(",") for line in Path("progress.csv").read_text().splitlines()]
    last = dict(zip(header, rows[-1], strict=True))
    assert float(last["identity/minibatches"]) == 2 * 2 * 3  # the third update comes after the last row
    assert float(last["identity/ulps"]) == 0
    assert float(last["train/kill_fraction"]) > 0


def test_another_coefficient_in_rl_zoo(train_here):
    (message,) = train_here(
        "--algo", "klip_ppo", "--env", "Pendulum-v1", "-n", 128, "-params", *ZOO, CHECK, "beta:'linear_ramp'"
    )
    assert message.startswith("The update after 128 steps is not PPO's")


def test_interrupted_in_rl_zoo(train_here, monkeypatch):
    """Ctrl-C in the middle of an update, after which RL Zoo ends the training of its first callback, and saves."""
    raise_at(monkeypatch, 6 + 3, KeyboardInterrupt)
    assert train_here("--algo", "klip_ppo", "--env", "Pendulum-v1", "-n", 384, "-params", *ZOO, CHECK) == []
    assert len(list(Path("logs").glob("klip_ppo/Pendulum-v1_1/Pendulum-v1.zip"))) == 1


# -- what the analytic divergence leaves -----------------------------------------------------------------------------------


class Keep(BaseCallback):
    """The last rollout, and the policy that made it."""

    def _on_step(self):
        return True

    def _on_rollout_end(self):
        self.buffer = copy.deepcopy(self.model.rollout_buffer)
        action_dist = self.model.policy.action_dist
        self.policy = copy.deepcopy(self.model.policy, {id(action_dist): copy.copy(action_dist)})
        self.snapshot = self.model._snapshot()


def gaussian_gradients(old, new, actions):
    """Of log π(a|s) and of the KL divergence, with respect to mean and standard deviation; by hand."""
    (old_mean, old_std), (mean, std) = ((d.loc.double().numpy(), d.scale.double().numpy()) for d in (old, new))
    error = actions - mean
    score = np.hstack([error / std**2, error**2 / std**3 - 1 / std])
    moved = mean - old_mean
    divergence = np.hstack([moved / std**2, 1 / std - (old_std**2 + moved**2) / std**3])
    return score, divergence


def categorical_gradients(old, new, actions):
    """Likewise, with respect to the logits."""
    old_probs, probs = old.probs.double().numpy(), new.probs.double().numpy()
    return np.eye(probs.shape[1])[actions.astype(int).ravel()] - probs, probs - old_probs


def multi_categorical_gradients(old, new, actions):
    parts = [categorical_gradients(o, n, actions[:, i]) for i, (o, n) in enumerate(zip(old, new, strict=True))]
    return tuple(np.hstack(column) for column in zip(*parts, strict=True))


def bernoulli_gradients(old, new, actions):
    return actions - new.probs.double().numpy(), (new.probs.double() - old.probs.double()).numpy()


ANALYTIC = {
    "gaussian_of_1": (pendulum, {}, gaussian_gradients),
    "gaussian_of_3": (lambda: gym.make("Hopper-v4"), {"learning_rate": 3e-3}, gaussian_gradients),
    "gsde": (pendulum, {"use_sde": True}, gaussian_gradients),
    "squashed_gsde": (pendulum, {"use_sde": True, "policy_kwargs": {"squash_output": True}}, gaussian_gradients),
    "two_actions": (cartpole, {}, categorical_gradients),
    "three_actions": (lambda: gym.make("Acrobot-v1"), {}, categorical_gradients),
    "multi_discrete": (lambda: IdentityEnvMultiDiscrete(4), {}, multi_categorical_gradients),
    "multi_binary": (lambda: IdentityEnvMultiBinary(4), {}, bernoulli_gradients),
}


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("case", ANALYTIC)
def test_what_the_analytic_divergence_leaves(case, normalize):
    make_env, kwargs, gradients = ANALYTIC[case]
    set_random_seed(0)
    # One minibatch, so that its advantages are normalized as a whole.
    kwargs = {"learning_rate": 1e-2, "n_steps": 256, "batch_size": 256, "n_epochs": 20, **kwargs}
    keep = Keep()
    model = KLipPPO("MlpPolicy", make_env(), normalize_advantage=normalize, seed=0, device="cpu", **kwargs)
    model.learn(256, callback=keep)
    buffer = copy.deepcopy(keep.buffer)
    before = {name: tensor.clone() for name, tensor in model.policy.state_dict().items()}
    kept, generators = model.rollout_buffer, read_generators()
    shares = analytic_residual(model, keep.buffer, keep.snapshot)
    assert model.rollout_buffer is kept
    assert_same_generators(generators, read_generators())
    assert all(th.equal(tensor, before[name]) for name, tensor in model.policy.state_dict().items())

    observations = th.as_tensor(buffer.observations[:, 0])
    actions = buffer.actions[:, 0].reshape(256, -1)
    with th.no_grad():
        old = copy.copy(keep.policy.get_distribution(observations))
        new = copy.copy(model.policy.get_distribution(observations))
        taken = th.as_tensor(actions).float()
        log_prob = new.log_prob(taken.flatten() if gradients is categorical_gradients else taken).numpy()
    if case == "squashed_gsde":
        actions = np.arctanh(actions.astype(np.float64).clip(-1 + 1e-7, 1 - 1e-7))
    advantages = buffer.advantages[:, 0]
    if normalize:
        advantages = (advantages - advantages.mean()) / advantages.std()
    ratio = np.exp(log_prob - buffer.log_probs[:, 0])
    kill = ((ratio > 1.2) & (advantages > 0)) | ((ratio < 0.8) & (advantages < 0))
    pair = (getattr(each, "distributions", None) or each.distribution for each in (old, new))
    score, divergence = gradients(*pair, actions.astype(np.float64))
    expected = []
    for goal, direction in zip(score[kill], divergence[kill], strict=True):
        best, *_ = np.linalg.lstsq(direction[:, None], goal, rcond=None)
        expected.append(np.linalg.norm(goal - direction * best) / np.linalg.norm(goal))
    assert len(expected) > 5
    assert len(shares) == len(expected)
    np.testing.assert_allclose(np.sort(shares), np.sort(expected), atol=2e-4)
    if case == "two_actions":
        assert max(shares) < 1e-6
    else:
        assert np.median(shares) > 0.01


@pytest.mark.parametrize(("case", "rate"), [("recurrent", 0.03), ("recurrent_discrete", 0.01), ("maskable", 0.01)])
def test_the_other_algorithms_have_a_residual_too(case, rate):
    model, keep = make(case, n_epochs=10, learning_rate=rate), Keep()
    model.learn(192, callback=keep)
    shares = analytic_residual(model, keep.buffer, keep.snapshot)
    assert len(shares) > 0
    assert shares.min() >= 0
    assert shares.max() <= 1
    if case == "recurrent_discrete":  # of two actions
        assert shares.max() < 1e-6
    else:
        assert shares.max() > 0.01


# -- the command -----------------------------------------------------------------------------------------------------------

#: An environment of the user's own, in which something may go wrong after a while.
OWN = """
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


class Result(NamedTuple):
    """What the command did."""

    status: int
    out: str
    err: str

    def cell(self, name):
        """A number in the table."""
        (found,) = re.findall(rf"│ {name}\s*│ (.*?)\s*│", self.out)
        return found


def eventually(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


#: Where processes can be forked, they have all modules from the start, which takes most of the time.
FORKS = sys.platform == "linux" and not th.cuda.is_available()
forks = pytest.mark.skipif(not FORKS, reason="what is patched here would not be patched in the two processes")


@pytest.fixture
def verify(tmp_path, monkeypatch, capfd):
    """The command in this process, in an empty folder that has a module with an environment of its own."""
    (tmp_path / "own_env.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    registered = dict(gym.envs.registry)
    if FORKS:
        PPO("MlpPolicy", "CartPole-v1", n_steps=8, batch_size=8, n_epochs=1, device="cpu").learn(8)  # imports what it needs
        context = types.SimpleNamespace(get_context=lambda method: multiprocessing.get_context("fork"))
        monkeypatch.setattr(sb3_klip.verify, "multiprocessing", context)

    def verify(*arguments):
        capfd.readouterr()
        before = multiprocessing.active_children()  # of another test's environments
        status = sb3_klip.verify.main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        assert "Traceback" not in out + err
        eventually(lambda: set(multiprocessing.active_children()) <= set(before))
        return Result(status, out, err)

    yield verify
    sys.modules.pop("own_env", None)
    gym.envs.registry.clear()
    gym.envs.registry.update(registered)


DEFAULT = ("--env", "CartPole-v1", "--hyperparams", "default")
OWN_ENV = ("--env", "Own-v0", "--gym-packages", "own_env", "--hyperparams", "default")
# Four updates, of ten minibatches each.
UPDATES = ("-n", 256, "-params", "n_steps:64", "learning_rate:0.01")


SMALL_LSTM = "policy_kwargs:dict(lstm_hidden_size=8,net_arch=[8])"


def assert_identical_result(result):
    assert (result.status, result.err) == (0, "")
    count = result.cell("minibatches compared")
    assert f"\nIDENTICAL: all {count} gradients and all parameters, to the last bit.\n" in result.out
    for name in ("largest difference of gradients", "largest difference of parameters and optimizer"):
        assert result.cell(name) == "0 ulp"
    assert float(result.cell("samples whose gradient the clip removes").split("%")[0]) > 0
    kernels, threads = th.backends.cpu.get_cpu_capability(), "with 1 thread"
    assert f"This holds for torch {th.__version__} on this machine's CPU ({kernels} kernels) {threads}." in result.out
    return int(count)


@pytest.mark.parametrize(
    ("arguments", "minibatches"),
    [
        ((*DEFAULT, *UPDATES), 40),
        ((*DEFAULT, *UPDATES, "batch_size:60", "target_kl:0.02"), None),
        ((*DEFAULT, *UPDATES, "n_envs:3", "normalize:True", "batch_size:50"), 2 * 10 * 4),
        ((*OWN_ENV, *UPDATES), 40),
        ((*OWN_ENV, "--algo", "mask", *UPDATES, "batch_size:60"), 80),
        ((*DEFAULT, "--algo", "lstm", "-n", 128, *UPDATES[2:], "batch_size:50", SMALL_LSTM), 40),
        (("--env", "CartPole-v1", "-n", 512), 40),  # eight environments, both schedules
        (("--env", "Hopper-v4", "-n", 256, "-params", "n_steps:128", "n_envs:2"), 40),  # VecNormalize
        (("--env", "Hopper-v4", "--hyperparams", "paper", "-n", 128, "-params", "n_steps:128", "learning_rate:0.003"), 20),
        (("--env", "Pendulum-v1", "-n", 256, "-params", "n_steps:64", "learning_rate:0.01"), 40),  # gSDE
        (("--env", "CartPole-v1", "--hyperparams", "paper", "-n", 512, "-params", "learning_rate:0.003"), 80),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_identical(verify, arguments, minibatches):
    count = assert_identical_result(verify(*arguments))
    assert count == minibatches or minibatches is None
    assert not Path("difference.pt").exists()


def test_of_dictionaries_of_images(verify):
    gym.register("Images-v0", functools.partial(SimpleMultiObsEnv, random_start=False))
    arguments = ("--hyperparams", "default", "-n", 32, "-params", "n_steps:32", "batch_size:20", "learning_rate:0.01")
    result = verify("--env", "Images-v0", *arguments, "n_epochs:2")
    assert_identical_result(result)
    assert result.cell("minibatches compared") == "4"
    result = verify("--env", "Images-v0", "--beta", "none", *arguments, "n_epochs:2")
    assert result.status == 1
    saved = th.load("difference.pt", weights_only=True)
    assert saved["samples of ppo"]["observations"]["img"].shape == (20, 1, 64, 64)


def found_difference(result, path="difference.pt"):
    """What the command found and saved."""
    assert (result.status, result.err) == (1, "")
    assert "This holds for torch" in result.out
    where = re.search(
        r"DIFFERENT: the gradient of (\S+), first in minibatch (\d+) of update (\d+), .* (\S+) \(torch", result.out
    )
    assert where[4] == str(path)
    saved = th.load(path, weights_only=True)
    assert (saved["minibatch"], saved["update"]) == (int(where[2]), int(where[3]))
    return where[1], saved


def test_a_difference_that_cannot_be_saved(verify, monkeypatch):
    def full(*_):
        raise RuntimeError("unexpected pos 128 vs 22")

    monkeypatch.setattr(th, "save", full)
    result = verify(*DEFAULT, "--beta", "linear_ramp", "-n", 256, "-params", "n_steps:64", "learning_rate:0.01")
    assert result.status == 1
    assert "DIFFERENT: the gradient of " in result.out
    assert "which could not be saved to difference.pt: unexpected pos 128 vs 22." in result.out


@pytest.mark.parametrize("update", [0, 1])
def test_the_first_difference_can_be_computed_again(verify, update):
    """From the parameters at that minibatch, which are still those of PPO, and the samples that were saved."""
    # A small learning rate leaves all samples in the band in the first update.
    rate = {0: 0.01, 1: 0.0004}[update]
    arguments = ("-n", 1024, "-params", "n_steps:64", "batch_size:32", f"learning_rate:{rate}")
    result = verify(*DEFAULT, "--beta", "linear_ramp", "-o", "first.pt", *arguments)
    name, saved = found_difference(result, "first.pt")
    assert saved["update"] >= update
    assert result.cell("updates") == str(saved["update"] + 1)
    theirs, ours = saved["gradient of ppo"], saved["gradient of klip_ppo"]
    assert int(result.cell("largest difference of gradients").split()[0]) > 0
    assert not th.equal(theirs[name], ours[name])
    for key, tensor in saved["samples of ppo"].items():
        assert th.equal(saved["samples of klip_ppo"][key], tensor)

    set_random_seed(0)
    vec_env = make_vec_env("CartPole-v1", 1, seed=0)
    model = PPO("MlpPolicy", vec_env, n_steps=64, batch_size=32, learning_rate=rate, seed=0, device="cpu")
    evaluate_actions, states = model.policy.evaluate_actions, []

    def keeping(*args):
        states.append(copy.deepcopy(model.policy.state_dict()))
        return evaluate_actions(*args)

    model.policy.evaluate_actions = keeping
    model.learn(64 * (saved["update"] + 1))
    model.policy.load_state_dict(states[20 * saved["update"] + saved["minibatch"]])

    samples = types.SimpleNamespace(**saved["samples of ppo"])
    advantages = (samples.advantages - samples.advantages.mean()) / (samples.advantages.std() + 1e-8)
    gradients = {}
    for algo in ("ppo", "klip_ppo"):
        values, log_prob, _ = evaluate_actions(samples.observations, samples.actions.long().flatten())
        ratio = (log_prob - samples.old_log_prob).exp()
        if algo == "ppo":
            objective = clip_objective(ratio, advantages, 0.2)
        else:
            past = th.where(advantages > 0, ratio - 1.2, 0.8 - ratio)
            objective = ratio * advantages - (ratio * advantages * (past / 0.05).clamp(0, 1)).detach() * log_prob
        model.policy.zero_grad()
        (0.5 * (samples.returns - values.flatten()).square().mean() - objective.mean()).backward()
        gradients[algo] = {key: parameter.grad.clone() for key, parameter in model.policy.named_parameters()}
    for key, gradient in gradients["ppo"].items():
        th.testing.assert_close(theirs[key], gradient, rtol=1e-4, atol=1e-6)
        th.testing.assert_close(ours[key], gradients["klip_ppo"][key], rtol=1e-4, atol=1e-6)
    # Far more than rounding.
    assert (gradients["ppo"][name] - gradients["klip_ppo"][name]).abs().max() > 1e-4


def test_different_numbers_of_minibatches(verify):
    """The two stop early at different minibatches, after the first that differs."""
    arguments = ("-n", 256, "-params", "n_steps:256", "learning_rate:0.01", "target_kl:0.03", "n_epochs:20")
    result = verify(*DEFAULT, "--beta", "none", *arguments)
    _, saved = found_difference(result)
    assert not th.equal(saved["gradient of ppo"]["action_net.weight"], saved["gradient of klip_ppo"]["action_net.weight"])


@pytest.mark.parametrize("algo", ["lstm", "mask"])
def test_different_with_the_other_algorithms(verify, algo):
    result = verify(*OWN_ENV, "--algo", algo, "--beta", "none", *UPDATES, *([SMALL_LSTM] if algo == "lstm" else []))
    name, saved = found_difference(result)
    ours, theirs = (saved[f"gradient of {prefix}ppo_{algo}"][name] for prefix in ("klip_", ""))
    assert ours.shape == theirs.shape
    assert not th.equal(ours, theirs)
    extra = {"lstm": {"lstm_states", "episode_starts", "mask"}, "mask": {"action_masks"}}[algo]
    for prefix in ("klip_", ""):
        assert {"observations", "actions", "old_log_prob", *extra} <= set(saved[f"samples of {prefix}ppo_{algo}"])


def test_a_coefficient_with_parameters(verify):
    """Width 0 is the step."""
    ramp = (*DEFAULT, "--beta", "linear_ramp", *UPDATES)
    assert_identical_result(verify(*ramp, "beta_kwargs:dict(width=0)"))
    found_difference(verify(*ramp, "beta_kwargs:dict(width=0.01)"))


def test_what_only_our_algorithms_have(verify):
    assert_identical_result(verify(*DEFAULT, *UPDATES, "log_kl:True"))


@forks
@pytest.mark.parametrize("action", SABOTAGE)
def test_the_last_bit_is_found_by_the_command(verify, monkeypatch, action):
    sabotage(monkeypatch, 25, nothing)
    assert_identical_result(verify(*DEFAULT, *UPDATES))
    sabotage(monkeypatch, 25, action)
    _, saved = found_difference(verify(*DEFAULT, *UPDATES))
    assert (saved["update"], saved["minibatch"]) == (2, 4)


@forks
def test_an_optimizer_that_differs_is_found_by_the_command(verify, monkeypatch):
    honest = speed.adam
    monkeypatch.setattr(speed, "adam", lambda *args, lr, **kwargs: honest(*args, lr=lr * (1 + 1e-6), **kwargs))
    result = verify(*DEFAULT, *UPDATES, "n_epochs:1")
    assert result.status == 1
    assert re.search(r"^DIFFERENT: \S+ after update 0, though all gradients are equal\.$", result.out, re.MULTILINE)
    assert result.cell("largest difference of gradients") == "0 ulp"
    assert int(result.cell("largest difference of parameters and optimizer").split()[0]) > 0
    assert not Path("difference.pt").exists()


@forks
@pytest.mark.parametrize("arguments", [(), ("--beta", "none"), ("--hyperparams", "zoo", "--beta", "nnoe")])
def test_nothing_is_left_behind(verify, monkeypatch, tmp_path, arguments):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    files = set(tmp_path.rglob("*"))
    verify(*DEFAULT, *arguments, *UPDATES)
    left = {path.name for path in set(tmp_path.rglob("*")) - files}
    assert left == ({"difference.pt"} if arguments == ("--beta", "none") else set())


# -- where the identity ends ----------------------------------------------------------------------------------------------


def residual(result):
    found_difference(result)
    words = r"On the (\d+) clipped samples of this update, .* leaves ([\d.]+)% of .* \(median; at least ([\d.]+)%\)"
    return [float(number) for number in re.search(words, result.out).groups()]


def test_the_analytic_divergence_of_gaussians(verify):
    result = verify(
        *("--env", "Hopper-v4", "--hyperparams", "default", "--estimator", "analytic"),
        *("-n", 256, "-params", "n_steps:256", "learning_rate:0.003"),
    )
    count, middle, low = residual(result)
    assert count > 10
    assert 5 < middle < 100
    assert low < middle
    assert "Here that is nothing" not in result.out


def test_the_analytic_divergence_of_two_actions(verify):
    """The best coefficient for each sample would do here; but it is not the identity's."""
    result = verify(*DEFAULT, "--estimator", "analytic", *UPDATES)
    count, middle, low = residual(result)
    assert count > 3
    assert (middle, low) == (0, 0)
    assert "Here that is nothing" in result.out


# -- what cannot be compared ----------------------------------------------------------------------------------------------


def assert_one_message(result, pattern):
    """One line that says it, and nothing else."""
    assert result.status == 2
    assert "IDENTICAL" not in result.out
    assert "DIFFERENT" not in result.out
    (line,) = result.err.splitlines()
    assert re.search(pattern, line), line
    assert not Path("difference.pt").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--env", "Hoper-v4"), r"--env='Hoper-v4' is not registered\. Did you mean 'Hopper-v4'\?"),
        (("--env", "Own-v0"), "--env='Own-v0' is not registered"),
        ((*DEFAULT, "--beta", "stpe"), r"'stpe' is not a coefficient\. Did you mean 'step'\?"),
        ((*DEFAULT, "--beta", "own_env:nothing"), "'own_env:nothing' is not a coefficient"),
        (
            (*DEFAULT, "--beta", "linear_ramp", "-params", "beta_kwargs:dict(widht=1)"),
            r"no parameter 'widht'\. Did you mean 'width'\?",
        ),
        ((*DEFAULT, "--beta", "linear_ramp", "-params", "beta_kwargs:dict(width=-1)"), "width=-1 .* out of range"),
        ((*DEFAULT, "--beta", "linear_ramp", "-params", "beta_kwargs:3"), "beta_kwargs must be a dict"),
        ((*DEFAULT, "-params", "policy:MlpPolicy"), "name 'MlpPolicy' is not defined"),
        ((*DEFAULT, "--env-kwargs", "length:"), "--env-kwargs"),
        ((*DEFAULT, "-params", "learnin_rate:0.1"), r"no hyperparameter 'learnin_rate'\. Did you mean 'learning_rate'\?"),
        ((*DEFAULT, "-params", "beta:'linear_ramp'"), "-params beta:'linear_ramp': .* --beta"),
        ((*DEFAULT, "--beta", "linear_ramp", "--estimator", "analytic"), "--estimator=analytic .*'linear_ramp'"),
        ((*DEFAULT, "--seed", -1), "--seed=-1 must be from 0"),
        ((*DEFAULT, "-n", 0), "--n-timesteps=0 must be at least 1"),
        ((*DEFAULT, "-n", -5), "--n-timesteps=-5 must be at least 1"),
        ((*DEFAULT, "--num-threads", 0), "--num-threads=0 must be at least 1"),
        ((*DEFAULT, "-o", "no/where.pt"), r"--output=no.where\.pt: the folder does not exist"),
        ((*DEFAULT, "-o", ".", *UPDATES), r"--output=\. is a folder"),
        ((*DEFAULT, "--gym-packages", "no_such_package"), "no_such_package cannot be imported: .*No module named"),
        ((*DEFAULT, "--gym-packages", "own_env", "broken"), "broken cannot be imported: .*NameError"),
        ((*DEFAULT, "--env-kwargs", "gravity:1"), "CartPole-v1 cannot be made: .*gravity"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_bad_arguments(verify, arguments, message):
    """Before any training begins."""
    Path("broken.py").write_text("nonsense")
    assert_one_message(verify(*arguments), message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--env", "CartPole-v1", "--env-kwargs", "gravity:1"), "ppo stopped after 0 steps. TypeError: .*'gravity'"),
        ((*DEFAULT, "--algo", "mask", *UPDATES), "ppo_mask stopped after 0 steps. .*mask"),
        ((*DEFAULT, "--beta", "adaptive", *UPDATES, "n_steps:-1"), "ppo stopped after 0 steps."),
        (
            (*OWN_ENV, "--env-kwargs", "trouble:'raise'", "after:150", *UPDATES),
            "ppo stopped after 128 steps. RuntimeError: the motor is off",
        ),
        (
            (*OWN_ENV, "--env-kwargs", "trouble:'exit'", "after:150", *UPDATES),
            "ppo stopped after 128 steps. the process ended with status 3",
        ),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_trainings_that_stop(verify, arguments, message):
    assert_one_message(verify(*arguments), message)


def test_rewards_that_are_nan(verify):
    result = verify(*OWN_ENV, "--env-kwargs", "trouble:'nan'", "after:150", *UPDATES)
    assert result.status == 2
    assert "ppo stopped after 128 steps. ValueError: " in result.err
    assert re.search(r"\bnan\b|not finite", result.err, re.IGNORECASE)


@pytest.mark.parametrize("after", [0, 100])
def test_an_environment_that_does_not_repeat_itself(verify, after):
    result = verify(*OWN_ENV, "--env-kwargs", "trouble:'chance'", f"after:{after}", *UPDATES)
    message = f"The rollout of update {after // 64} differs, .*: Own-v0 does not repeat its episodes for the same seed"
    assert_one_message(result, message)


def test_an_environment_that_does_not_repeat_itself_and_early_stopping(verify):
    """The two make different numbers of steps, which says nothing about the algorithms."""
    result = verify(*OWN_ENV, "--env-kwargs", "trouble:'chance'", *UPDATES, "target_kl:0.001")
    assert_one_message(result, "does not repeat its episodes")


def test_no_sample_is_clipped(verify):
    result = verify(*DEFAULT, "-n", 128, "-params", "n_steps:64", "learning_rate:1e-9")
    assert_one_message(result, "^Equal so far, but no sample has been clipped, so nothing has been tried")
    assert result.cell("largest difference of gradients") == "0 ulp"
    assert result.cell("minibatches compared") == "20"


def test_schedules_that_run_out_before_the_first_update(verify):
    """RL Zoo's clip range for CartPole-v1 falls to 0 over training, which is shorter than a rollout here."""
    result = verify("--env", "CartPole-v1", "-n", 100)
    assert_one_message(result, "^Equal so far, but the clip range was 0 or less, .* first rollout of 256 steps ends")


def test_no_update_is_made(verify):
    stop = "callback:{'stable_baselines3.common.callbacks.StopTrainingOnMaxEpisodes': {'max_episodes': 1}}"
    assert_one_message(verify(*DEFAULT, *UPDATES, stop), "^No update was made in 256 steps")


# -- as it is typed ------------------------------------------------------------------------------------------------------


def test_help(capsys):
    with pytest.raises(SystemExit) as exit_:
        sb3_klip.verify.main(["--help"])
    assert exit_.value.code == 0
    shown = capsys.readouterr().out
    assert "exit status: 0 identical, 1 different, 2 could not be compared, 130 interrupted" in shown
    for option in vars(sb3_klip.verify.parser().parse_args(["--env", "x"])):
        assert f"--{option.replace('_', '-')}" in shown


@pytest.mark.parametrize("arguments", [(), ("--env",), ("--env", "x", "--algo", "dqn"), ("--env", "x", "-n", "many")])
def test_usage(capsys, arguments):
    with pytest.raises(SystemExit) as exit_:
        sb3_klip.verify.main(list(arguments))
    assert exit_.value.code == 2
    assert "usage: python -m sb3_klip.verify" in capsys.readouterr().err


def command(*arguments, **kwargs):
    completed = python("-m", "sb3_klip.verify", *arguments, env={"COLUMNS": "160"}, **kwargs)
    # That Hopper-v4 is out of date.
    err = re.sub(r".*DeprecationWarning: .*is out of date.*\n.*\n", "", completed.stderr)
    return Result(completed.returncode, completed.stdout, err)


def test_as_it_is_typed(tmp_path):
    assert_identical_result(command(*DEFAULT, *UPDATES, cwd=tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_different_as_it_is_typed(tmp_path):
    result = command(*DEFAULT, "--beta", "linear_ramp", "-o", tmp_path / "d.pt", *UPDATES, cwd=tmp_path, status=1)
    found_difference(result, tmp_path / "d.pt")


@pytest.mark.slow
def test_bad_input_as_it_is_typed(tmp_path):
    assert_one_message(command("--env", "Hoper-v4", cwd=tmp_path, status=2), "Did you mean 'Hopper-v4'")


@pytest.mark.slow
@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1", "Hopper-v4"])
@pytest.mark.parametrize("hyperparams", ["zoo", "paper", "default"])
def test_whole_updates_as_they_are_typed(tmp_path, env, hyperparams):
    result = command("--env", env, "--hyperparams", hyperparams, "-n", 4000, "--seed", 1, cwd=tmp_path)
    assert assert_identical_result(result) > 50


@pytest.mark.slow
@pytest.mark.parametrize("algo", ["ppo", "lstm", "mask"])
def test_an_environment_of_the_users_own_as_it_is_typed(tmp_path, algo):
    """In a module on PYTHONPATH, which the two processes import by themselves."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "own_env.py").write_text(OWN)
    completed = python(
        *("-m", "sb3_klip.verify", *OWN_ENV, "--algo", algo, *UPDATES, "batch_size:32"),
        cwd=tmp_path,
        env={"COLUMNS": "160", "PYTHONPATH": os.pathsep.join([str(tmp_path / "modules"), os.environ.get("PYTHONPATH", "")])},
    )
    assert_identical_result(Result(0, completed.stdout, completed.stderr))


def running(pid):
    """Whether a process is there; one that has ended and waits for its parent is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def endless(tmp_path):
    """The command, training for long in a process group of its own."""
    (tmp_path / "own_env.py").write_text(f"{OWN}\nPath(f'{{os.getpid()}}.imported').touch()\n")
    arguments = (*OWN_ENV, "--env-kwargs", "trouble:'tell'", "after:200", "-n", 10**7, "-params", "n_steps:64")
    process = subprocess.Popen(
        [sys.executable, "-m", "sb3_klip.verify", *map(str, arguments)],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    yield process
    with process:
        process.kill()


def pids(folder, suffix):
    return {int(path.stem) for path in folder.glob(f"*.{suffix}")}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("seconds", [0.1, 0.5, 1, 2, None])
def test_interrupted(endless, tmp_path, seconds):
    """While the two processes start, and are importing what they need; or train."""
    if seconds is None:
        eventually(lambda: len(pids(tmp_path, "pid")) == 2)
    else:
        eventually(lambda: len(pids(tmp_path, "imported")) == 1)
        children = Path(f"/proc/{endless.pid}/task/{endless.pid}/children")
        eventually(lambda: len(children.read_text().split()) >= 2)
        time.sleep(seconds)
    group = {int(path.name) for path in Path("/proc").glob("[0-9]*") if in_group(path, endless.pid)}
    assert len(group) >= 3
    os.killpg(endless.pid, signal.SIGINT)
    out, err = endless.communicate(timeout=60)
    assert endless.returncode == 130
    assert err == ""
    found = re.search(r"^Interrupted after (\d+) minibatches, (\d+) steps; no verdict\.$", out, re.MULTILINE)
    assert (int(found[2]) >= 128) == (seconds is None)
    eventually(lambda: not any(map(running, group)), 10)


@pytest.mark.parametrize("module", ["sb3_klip.verify", "sb3_klip.plot"])
def test_interrupted_while_importing(module, tmp_path):
    words = [sys.executable, "-X", "importtime", "-m", module, "--help"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        for line in process.stderr:
            if line.rstrip().endswith(" numpy"):
                process.send_signal(signal.SIGINT)
                break
        assert "Traceback" not in process.stderr.read()
        assert process.stdout.read() == ""
    assert process.returncode == -signal.SIGINT


def in_group(process, group):
    try:
        return int((process / "stat").read_text().rpartition(")")[2].split()[2]) == group
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("number", ["SIGTERM", "SIGKILL"])
def test_the_two_trainings_end_with_the_command(endless, tmp_path, number):
    eventually(lambda: len(pids(tmp_path, "pid")) == 2)
    assert all(map(running, pids(tmp_path, "pid")))
    endless.send_signal(getattr(signal, number))
    endless.wait(60)
    eventually(lambda: not any(map(running, pids(tmp_path, "pid"))), 30)


# -- BetaHistogramCallback -------------------------------------------------------------------------------------------------


def histograms(folder):
    return EventAccumulator(str(folder), size_guidance={"histograms": 0, "scalars": 0}).Reload()


@pytest.mark.parametrize("algorithm", [KLipPPO, KLipRecurrentPPO])
def test_a_histogram_of_each_update(tmp_path, algorithm):
    recurrent = algorithm is KLipRecurrentPPO
    model = algorithm(
        "MlpLstmPolicy" if recurrent else "MlpPolicy",
        make_vec_env("CartPole-v1", 3, seed=0),
        n_steps=32,
        batch_size=40,
        n_epochs=1,
        learning_rate=0.05,
        tensorboard_log=str(tmp_path),
        seed=0,
        device="cpu",
    )
    model.learn(5 * 96, callback=BetaHistogramCallback())
    (folder,) = tmp_path.iterdir()
    events = histograms(folder)
    found = events.Histograms("train/beta")
    # Like all that an update logs, with the rollout that follows it.
    assert (
        [event.step for event in found] == [event.step for event in events.Scalars("train/beta_mean")] == [192, 288, 384, 480]
    )
    largest = [event.value for event in events.Scalars("train/beta_abs_max")]
    means = [event.value for event in events.Scalars("train/beta_mean")]
    for event, peak, mean in zip(found, largest, means, strict=True):
        values = event.histogram_value
        assert values.num == 3 * 32
        assert max(-values.min, values.max) == pytest.approx(peak, rel=1e-6)
        assert np.sign(values.sum) == np.sign(mean)
    assert max(largest) > 0


def test_the_histogram_is_for_tensorboard_only(tmp_path, capsys):
    model = KLipPPO("MlpPolicy", "CartPole-v1", n_steps=64, batch_size=64, n_epochs=2, seed=0, device="cpu")
    model.set_logger(configure(str(tmp_path), ["stdout", "log", "json", "csv", "tensorboard"]))
    model.learn(192, callback=BetaHistogramCallback())
    model.logger.close()
    assert [event.histogram_value.num for event in histograms(tmp_path).Histograms("train/beta")] == [64, 64]
    for text in (capsys.readouterr().out, (tmp_path / "log.txt").read_text()):
        assert re.search(r"\| +beta_mean +\|", text)
        assert not re.search(r"\| +beta +\|", text)
    for name in ("progress.json", "progress.csv"):
        text = (tmp_path / name).read_text()
        assert re.search(r"train/beta_mean\b", text)
        assert not re.search(r"train/beta\b", text)


def test_histograms_go_on_with_the_training(tmp_path):
    model = KLipPPO(
        "MlpPolicy", "CartPole-v1", n_steps=64, batch_size=64, n_epochs=2, seed=0, device="cpu", tensorboard_log=str(tmp_path)
    )
    model.learn(128, callback=BetaHistogramCallback(), tb_log_name="run")
    model.learn(128, callback=BetaHistogramCallback(), tb_log_name="run", reset_num_timesteps=False)
    steps = [event.step for event in histograms(tmp_path / "run_1").Histograms("train/beta")]
    assert steps == sorted(set(steps))
    assert steps[-1] == 256
    assert all(event.histogram_value.num == 64 for event in histograms(tmp_path / "run_1").Histograms("train/beta"))
