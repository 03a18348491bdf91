"""The compiled update: the same up to rounding, and nothing compiled twice."""

import copy
import itertools
import subprocess
import sys
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from helpers import Recorder
from scipy.stats import mannwhitneyu
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.monitor import Monitor
from torch.distributions import Distribution

from sb3_klip import KLipPPO
from sb3_klip.coefficients import available
from sb3_klip.fast import compiling
from sb3_klip.fast.validation import unvalidated_distributions
from sb3_klip.rollout import indexed_minibatches

SMALL: dict[str, Any] = {"n_steps": 100, "batch_size": 32, "n_epochs": 2, "learning_rate": 3e-3, "clip_range": 0.05}


#: Traces and differentiates as the default backend does, and makes no code, which would take long.
QUICK = {"backend": "aot_eager"}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (3, TypeError, "compile must be True, False or a dict of arguments of torch.compile, not 3"),
        ("yes", TypeError, "not 'yes'"),
        ({"backnd": "eager"}, TypeError, "Did you mean 'backend'"),
        ({"backend": "inductr"}, ValueError, "Did you mean 'inductor'"),
        ({"mode": "max-autotun"}, ValueError, "Did you mean 'max-autotune'"),
        (
            {"mode": "default", "options": {"cpp_wrapper": True}},
            ValueError,
            "has a mode and options",
        ),
        ({"options": {"cpp_wraper": True}}, ValueError, "Did you mean 'cpp_wrapper'"),
    ],
)
def test_wrong_options_are_refused(options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        KLipPPO("MlpPolicy", "CartPole-v1", compile=options)


def test_without_a_compiler_it_is_refused_at_construction() -> None:
    with th._inductor.config.patch({"cpp.cxx": ("/no/such/compiler",)}):
        with pytest.raises(RuntimeError, match="needs a C\\+\\+ compiler"):
            KLipPPO("MlpPolicy", "CartPole-v1", compile=True)
        KLipPPO("MlpPolicy", "CartPole-v1", compile=QUICK)


def test_where_it_cannot_be_compiled_a_saved_model_trains_anyhow(tmp_path: Any) -> None:
    KLipPPO("MlpPolicy", "CartPole-v1", compile=True, device="cpu", **SMALL).save(tmp_path / "model")
    with (
        th._inductor.config.patch({"cpp.cxx": ("/no/such/compiler",)}),
        pytest.warns(
            UserWarning, match="The update of the saved model was compiled, but this one is not: .* C\\+\\+ compiler"
        ),
    ):
        model = KLipPPO.load(tmp_path / "model", env=gym.make("CartPole-v1"))
    assert model.compile is False
    model.learn(100)


@pytest.mark.slow
def test_compiling_leaves_other_programs_their_validation() -> None:
    """In a process of its own, as torch switches it off once."""
    code = """
from torch.distributions import Distribution
from sb3_klip import KLipPPO
KLipPPO("MlpPolicy", "CartPole-v1", n_steps=64, compile={"backend": "aot_eager"}, device="cpu").learn(64)
assert Distribution._validate_args is True
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class Graphs(BaseCallback):
    """Counts what has been compiled until each rollout."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: list[int] = []

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        self.counts.append(th._dynamo.utils.counters["stats"]["unique_graphs"])


FEW = ("adaptive",)


@pytest.mark.parametrize(
    ("beta", "beta_kwargs"),
    [
        ("adaptive", {}),
        *(pytest.param(name, {}, marks=pytest.mark.slow) for name in available() if name not in FEW),
        *(
            pytest.param(name, kwargs, marks=pytest.mark.slow)
            for name, kwargs in (
                ("linear_ramp", {"width": "lin_0.1"}),
                ("smoothing", {"alpha": "lin_0.1"}),
                ("soft_adaptive", {"tau_pos": "lin_3"}),
                ("fixed", {"value": "lin_2", "estimator": "k3"}),
                ("position", {"end": "lin_2"}),
                ("espo", {}),
            )
        ),
    ],
)
def test_nothing_is_compiled_anew_for_every_update(beta: str, beta_kwargs: dict[str, Any]) -> None:
    """The last minibatch is smaller than the others, and the clip range follows a schedule."""
    th._dynamo.reset()
    th._dynamo.utils.counters.clear()
    graphs = Graphs()
    small = {**SMALL, "clip_range": lambda progress: 0.2 * progress, "clip_range_vf": lambda progress: 0.2 * progress}
    model = KLipPPO(
        "MlpPolicy", "CartPole-v1", beta=beta, beta_kwargs=beta_kwargs, compile=QUICK, seed=0, device="cpu", **small
    )
    model.learn(800, callback=graphs)
    assert 0 < graphs.counts[-1] < 8  # where torch would give up
    assert graphs.counts[4:] == graphs.counts[4:5] * len(graphs.counts[4:])


def ramp(ratio: th.Tensor, advantages: th.Tensor, clip_range: Any) -> th.Tensor:
    return ((ratio - 1).abs() / 0.5).clamp(0, 1) * float(len(str(ratio.shape)) > 0)


@pytest.mark.parametrize(
    "kwargs",
    [
        *({"beta": ramp}, {"target_kl": 0.01}),
        *(pytest.param(kwargs, marks=pytest.mark.slow) for kwargs in ({"use_sde": True}, {"log_kl": True})),
    ],
)
def test_what_else_goes_with_it(kwargs: dict[str, Any], tmp_path: Any) -> None:
    recorder = Recorder()
    whole = {**SMALL, "batch_size": 50}  # all minibatches of one size, each of which takes seconds to compile
    model = KLipPPO("MlpPolicy", "Pendulum-v1", compile=QUICK, seed=0, device="cpu", **whole, **kwargs)
    model.set_logger(Logger(None, [recorder]))
    model.learn(200)
    assert np.isfinite(recorder.column("train/loss")).all()
    model.save(tmp_path / "model")
    loaded = KLipPPO.load(tmp_path / "model", env=gym.make("Pendulum-v1"))
    assert loaded.compile == QUICK
    loaded.learn(100)
    assert PPO.load(tmp_path / "model").n_steps == 100


def gradients(model: KLipPPO) -> list[th.Tensor]:
    """Of the first minibatch of the rollout."""
    update = model._begin_update()
    np.random.seed(0)
    data, indices = next(indexed_minibatches(model.rollout_buffer, model.batch_size))
    model.policy.zero_grad()
    loss, _ = (compiling.compiled_loss(model) if model.compile else model._minibatch_loss)(data, indices, update)
    loss.backward()
    return [parameter.grad for parameter in model.policy.parameters()]


@pytest.mark.slow
@pytest.mark.parametrize("beta", ["step", "sigmoid", "adaptive", "trust_region", "position"])
@pytest.mark.parametrize("env_id", ["Pendulum-v1", "CartPole-v1"])
def test_compiled_gradients_agree_to_rounding(env_id: str, beta: str) -> None:
    kwargs: dict[str, Any] = {**SMALL, "n_steps": 256, "batch_size": 64, "beta": beta, "seed": 0, "device": "cpu"}
    model = KLipPPO("MlpPolicy", env_id, **kwargs).learn(256)
    _, callback = model._setup_learn(256)
    model.collect_rollouts(model.env, callback, model.rollout_buffer, 256)
    with th.no_grad():  # away from the rollout's policy, so that samples are clipped
        for parameter in model.policy.parameters():
            parameter.add_(0.05 * th.randn_like(parameter))
    other = KLipPPO("MlpPolicy", env_id, compile=True, **kwargs)
    other.set_parameters(model.get_parameters())
    _, _ = other._setup_learn(256)
    other.rollout_buffer = copy.deepcopy(model.rollout_buffer)
    eager, compiled = gradients(model), gradients(other)
    # In units of each parameter's largest gradient: float32 has a rounding error of 6e-8, and sums of 64 samples some more.
    for expected, found in zip(eager, compiled, strict=True):
        assert float((expected - found).abs().max()) <= 2e-5 * float(expected.abs().max())


@pytest.mark.slow
def test_compiled_learning_is_statistically_the_same() -> None:
    def final_return(seed: int, compile: bool) -> float:
        env = Monitor(gym.make("CartPole-v1"))
        kwargs = {"n_steps": 256, "n_epochs": 10, "seed": seed, "device": "cpu", "policy_kwargs": {"net_arch": [32]}}
        KLipPPO("MlpPolicy", env, compile=compile, **kwargs).learn(8_192)
        return float(np.mean(env.get_episode_rewards()[-20:]))

    eager, compiled = ([final_return(seed, compile) for seed in range(6)] for compile in (False, True))
    print(f"eager {eager}, compiled {compiled}")
    assert min(np.mean(eager), np.mean(compiled)) > 60  # both learn: 20 without training
    assert mannwhitneyu(eager, compiled).pvalue > 0.02


def test_a_deep_copy_trains_itself() -> None:
    model = KLipPPO("MlpPolicy", "Pendulum-v1", n_steps=64, batch_size=32, n_epochs=1, seed=0, compile={"backend": "eager"})
    twin = copy.deepcopy(model)
    before = [parameter.clone() for parameter in model.policy.parameters()]
    twin.learn(64)
    assert all(now.equal(then) for now, then in zip(model.policy.parameters(), before, strict=True))
    assert not all(now.equal(then) for now, then in zip(twin.policy.parameters(), before, strict=True))


def test_validation_is_put_back_when_the_last_of_several_threads_leaves() -> None:
    """Also where the first one to come is the first one to go."""
    checked = Distribution._validate_args
    first, second = unvalidated_distributions(), unvalidated_distributions()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert Distribution._validate_args is False
    second.__exit__(None, None, None)
    assert Distribution._validate_args is checked


def test_no_arguments_are_the_defaults() -> None:
    assert KLipPPO("MlpPolicy", "Pendulum-v1", compile={}).compile is True


@pytest.mark.slow
def test_each_of_many_models_is_compiled() -> None:
    """torch compiles one function a few times only, and then no more in this process."""
    compiled: list[int] = []

    def backend(graph: Any, example: Any) -> Any:
        compiled.append(1)
        return graph.forward

    small = {"n_steps": 8, "batch_size": 8, "n_epochs": 1, "target_kl": 10.0, "compile": {"backend": backend}}
    numbers = []
    for width in range(2, 13):
        KLipPPO("MlpPolicy", "Pendulum-v1", policy_kwargs={"net_arch": [width]}, **small).learn(8)
        numbers.append(len(compiled))
    assert all(after > before for before, after in itertools.pairwise([0, *numbers]))
