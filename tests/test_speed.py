"""The update and the rollouts take less time than SB3's, and do the same arithmetic; compiled, nearly the same."""

import copy
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from identity_helpers import Recorder, assert_identical, state_tensors, train
from scipy.stats import mannwhitneyu
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_klip import KLipPPO, speed
from sb3_klip.coefficients import available
from sb3_klip.rollout import indexed_minibatches

SMALL: dict[str, Any] = {"n_steps": 100, "batch_size": 32, "n_epochs": 2, "learning_rate": 3e-3, "clip_range": 0.05}


def both(policy: Any, env_id: str, **kwargs: Any) -> tuple[KLipPPO, PPO]:
    ours, theirs = (train(each, policy, lambda: gym.make(env_id), 300, **{**SMALL, **kwargs})[0] for each in (KLipPPO, PPO))
    return ours, theirs


# -- Adam on one tensor ------------------------------------------------------------------------------------------------


@pytest.fixture
def one_tensor_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with each step that is taken on all parameters as one tensor."""
    steps: list[int] = []
    original = speed._OneTensor.step

    def counted(self: Any, max_grad_norm: float) -> th.Tensor:
        steps.append(1)
        return original(self, max_grad_norm)

    monkeypatch.setattr(speed._OneTensor, "step", counted)
    return steps


class UnusedLayer(ActorCriticPolicy):
    """Has parameters that the loss does not depend on, which Adam leaves alone."""

    def _build(self, lr_schedule: Any) -> None:
        self.unused = th.nn.Linear(3, 3)
        super()._build(lr_schedule)


class OwnEntropy(ActorCriticPolicy):
    """Has a parameter that only the entropy depends on, so that its gradient is zero where the entropy has no weight."""

    def _build(self, lr_schedule: Any) -> None:
        self.bonus = th.nn.Parameter(th.ones(()))
        super()._build(lr_schedule)

    def evaluate_actions(self, obs: th.Tensor, actions: th.Tensor) -> Any:
        values, log_prob, entropy = super().evaluate_actions(obs, actions)
        return values, log_prob, entropy * self.bonus


class Scheduled(ActorCriticPolicy):
    """Has a scheduler of torch, which counts the optimizer's steps."""

    def _build(self, lr_schedule: Any) -> None:
        super()._build(lr_schedule)
        self.scheduler = th.optim.lr_scheduler.ConstantLR(self.optimizer)


class Watched(ActorCriticPolicy):
    """Has an optimizer with a hook."""

    def _build(self, lr_schedule: Any) -> None:
        super()._build(lr_schedule)
        self.optimizer.register_step_post_hook(lambda *args: None)


class TwoGroups(ActorCriticPolicy):
    """Has a learning rate of its own for the value function."""

    def _build(self, lr_schedule: Any) -> None:
        super()._build(lr_schedule)
        value = [*self.mlp_extractor.value_net.parameters(), *self.value_net.parameters()]
        rest = [p for p in self.parameters() if all(p is not v for v in value)]
        self.optimizer = self.optimizer_class(
            [{"params": rest}, {"params": value}], lr=lr_schedule(1), **self.optimizer_kwargs
        )


def optimizer(kind: type = th.optim.Adam, **kwargs: Any) -> dict[str, Any]:
    return {"policy_kwargs": {"optimizer_class": kind, "optimizer_kwargs": kwargs, "net_arch": [16, 9]}}


@pytest.mark.parametrize(
    ("policy", "kwargs"),
    [
        ("MlpPolicy", {}),
        ("MlpPolicy", {"policy_kwargs": {"net_arch": {"pi": [7, 5, 3], "vf": [33]}, "activation_fn": th.nn.ReLU}}),
        ("MlpPolicy", optimizer(weight_decay=0.01)),
        ("MlpPolicy", optimizer(th.optim.AdamW)),
        ("MlpPolicy", optimizer(betas=(0.8, 0.9), eps=1e-3)),
        ("MlpPolicy", {"max_grad_norm": 0.01}),
        ("MlpPolicy", {"target_kl": 0.001, "n_epochs": 5}),
        (OwnEntropy, optimizer(weight_decay=0.01)),
    ],
)
@pytest.mark.parametrize("env_id", ["Pendulum-v1", "CartPole-v1"])
def test_one_tensor_has_the_same_bits(policy: str, kwargs: dict[str, Any], env_id: str, one_tensor_steps: list[int]) -> None:
    assert_identical(*both(policy, env_id, **kwargs))
    assert one_tensor_steps


@pytest.mark.parametrize(
    ("policy", "kwargs"),
    [
        (UnusedLayer, {}),
        (Scheduled, {}),
        (Watched, {}),
        (TwoGroups, {}),
        ("MlpPolicy", optimizer(amsgrad=True)),
        ("MlpPolicy", optimizer(foreach=True)),
        ("MlpPolicy", optimizer(fused=True)),
        ("MlpPolicy", optimizer(th.optim.NAdam)),
        ("MlpPolicy", optimizer(th.optim.SGD, momentum=0.9)),
        ("MlpPolicy", {"policy_kwargs": {"net_arch": [600, 600]}, "n_steps": 40}),
    ],
)
def test_where_one_tensor_would_differ_or_not_help(policy: Any, kwargs: dict[str, Any], one_tensor_steps: list[int]) -> None:
    assert_identical(*both(policy, "Pendulum-v1", **kwargs))
    assert not one_tensor_steps


def test_a_user_may_have_trained_some_parameters_more() -> None:
    """The optimizer's steps then differ from one parameter to another."""

    def trained_once(algorithm: type[PPO]) -> PPO:
        model = algorithm("MlpPolicy", "Pendulum-v1", seed=0, device="cpu", **SMALL)
        model.policy.value_net.weight.sum().backward()
        model.policy.optimizer.step()
        return model.learn(200)

    assert_identical(trained_once(KLipPPO), trained_once(PPO))


def test_parameters_own_their_memory_afterwards() -> None:
    model, _ = both("MlpPolicy", "CartPole-v1")
    tensors = [*state_tensors(model).values()]
    assert all(tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size() for tensor in tensors)
    assert len({tensor.data_ptr() for tensor in tensors}) == len(tensors)


def test_an_error_in_the_middle_of_an_update_leaves_a_whole_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = KLipPPO("MlpPolicy", "CartPole-v1", seed=0, device="cpu", **SMALL).learn(100)
    calls: list[int] = []
    original = KLipPPO._value_loss

    def failing(*args: Any) -> th.Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("no more")
        return original(*args)

    monkeypatch.setattr(KLipPPO, "_value_loss", failing)
    before = model.policy.state_dict()["value_net.weight"].clone()
    with pytest.raises(RuntimeError, match="no more"):
        model.learn(100)
    # The two steps before are there, in parameters and in the optimizer.
    assert not th.equal(model.policy.value_net.weight, before)
    steps = {float(state["step"]) for state in model.policy.optimizer.state.values()}
    assert steps == {4 * 2 + 2}
    monkeypatch.undo()
    model.learn(100)


# -- rollouts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("env_id", ["Pendulum-v1", "CartPole-v1", "MountainCarContinuous-v0"])
@pytest.mark.parametrize("activation", [th.nn.Tanh, th.nn.ELU])
def test_the_policy_in_fewer_calls_has_the_same_bits(env_id: str, activation: type) -> None:
    policy = PPO("MlpPolicy", env_id, policy_kwargs={"activation_fn": activation}, device="cpu").policy
    observations = th.randn(5, *policy.observation_space.shape, dtype=th.float64)
    th.manual_seed(0)
    expected, drawn = policy(observations), th.rand(1)
    with speed.plain_forward(policy):
        assert isinstance(vars(policy)["forward"], speed._PlainForward)
        th.manual_seed(0)
        found, drawn_then = policy(observations), th.rand(1)
        certain = policy(observations, deterministic=True)
    assert all(th.equal(a, b) and a.dtype == b.dtype for a, b in zip(found, expected, strict=True))
    assert th.equal(drawn, drawn_then)
    assert th.equal(certain[0], policy(observations, deterministic=True)[0])
    assert "forward" not in vars(policy)


class Doubled(ActorCriticPolicy):
    def forward(self, obs: th.Tensor, deterministic: bool = False) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        actions, values, log_prob = super().forward(obs, deterministic)
        return actions, 2 * values, log_prob


def hooked(policy: ActorCriticPolicy) -> None:
    policy.value_net.register_forward_hook(lambda module, inputs, output: output + 1)


@pytest.mark.parametrize(
    ("policy", "change", "kwargs"),
    [
        (Doubled, None, {}),
        ("MlpPolicy", hooked, {}),
        ("MlpPolicy", None, {"use_sde": True}),
        ("MlpPolicy", None, {"policy_kwargs": {"share_features_extractor": False}}),
    ],
)
def test_another_policy_is_evaluated_as_it_wants(policy: Any, change: Callable[[Any], None] | None, kwargs: Any) -> None:
    def trained(algorithm: type[PPO]) -> PPO:
        model = algorithm(policy, "Pendulum-v1", seed=0, device="cpu", **SMALL, **kwargs)
        if change is not None:
            change(model.policy)
        with speed.plain_forward(model.policy):
            assert "forward" not in vars(model.policy)
        return model.learn(200)

    assert_identical(trained(KLipPPO), trained(PPO))


class CopyPolicy(BaseCallback):
    """Copies the policy in the middle of a rollout, and trains the original on."""

    def _on_step(self) -> bool:
        if self.n_calls == 50:
            self.copy = copy.deepcopy(self.model.policy)
        return True


def test_a_copy_made_during_a_rollout_is_a_copy() -> None:
    callback = CopyPolicy()
    model = KLipPPO("MlpPolicy", "CartPole-v1", seed=0, device="cpu", **SMALL).learn(100, callback=callback)
    observation = th.randn(1, 4)
    with th.no_grad():
        th.manual_seed(0)
        values = callback.copy(observation)[1]
        assert th.equal(values, callback.copy.predict_values(observation))
        assert not th.equal(values, model.policy.predict_values(observation))


class Breaks(gym.Wrapper):
    """Returns a NaN after some steps, and remembers the actions that it was given."""

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.actions: list[Any] = []

    def step(self, action: Any) -> Any:
        self.actions.append(action)
        observation, *rest = self.env.step(action)
        return observation * (np.nan if len(self.actions) == 10 else 1), *rest


@pytest.mark.parametrize("env_id", ["Pendulum-v1", "CartPole-v1"])
def test_no_environment_is_given_an_action_that_is_not_finite(env_id: str) -> None:
    for algorithm in (PPO, KLipPPO):
        env = Breaks(gym.make(env_id))
        model = algorithm("MlpPolicy", env, seed=0, device="cpu", **SMALL)
        with pytest.raises(ValueError, match="nan"):
            model.learn(100)
        assert len(env.actions) == 10
        assert np.isfinite(env.actions).all()
        assert "forward" not in vars(model.policy)


# -- compiled ----------------------------------------------------------------------------------------------------------

#: Traces and differentiates as the default backend does, and makes no code, which would take long.
QUICK = {"backend": "aot_eager"}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (3, TypeError, "compile must be True, False or a dict of arguments of torch.compile, not 3"),
        ("yes", TypeError, "not 'yes'"),
        ({"backnd": "eager"}, TypeError, "Did you mean 'backend'"),
        ({"backend": "inductr"}, ValueError, "Did you mean 'inductor'"),
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
        pytest.warns(UserWarning, match="The update is not compiled, as that of the saved model was: .* C\\+\\+ compiler"),
    ):
        model = KLipPPO.load(tmp_path / "model", env=gym.make("CartPole-v1"))
    assert model.compile is False
    model.learn(100)


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


FEW = ("step", "trust_region", "adaptive")


@pytest.mark.parametrize(
    ("beta", "beta_kwargs"),
    [
        ("step", {}),
        ("trust_region", {}),
        ("adaptive", {}),
        *(pytest.param(name, {}, marks=pytest.mark.slow) for name in available() if name not in FEW),
        ("linear_ramp", {"width": "lin_0.1"}),
        ("smoothing", {"alpha": "lin_0.1"}),
        ("soft_adaptive", {"tau_pos": "lin_3"}),
        ("fixed", {"value": "lin_2", "estimator": "k3"}),
        ("position", {"end": "lin_2"}),
        ("espo", {}),
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


@pytest.mark.parametrize("kwargs", [{"beta": ramp}, {"target_kl": 0.01}, {"use_sde": True}, {"log_kl": True}])
def test_what_else_goes_with_it(kwargs: dict[str, Any], tmp_path: Any) -> None:
    recorder = Recorder()
    model = KLipPPO("MlpPolicy", "Pendulum-v1", compile=QUICK, seed=0, device="cpu", **SMALL, **kwargs)
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
    loss, _ = (model._compiled_loss or model._loss)(data, indices, update)
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


def test_spaces_that_the_fast_path_knows() -> None:
    """Should SB3's policy change its arithmetic, the identity tests show it; here, that they still meet the fast path."""
    for space in (spaces.Box(-1, 1, (3,)), spaces.Discrete(4)):

        class Env(gym.Env):
            observation_space = spaces.Box(-1, 1, (2,))
            action_space = space

        assert speed._is_plain_mlp(PPO("MlpPolicy", Env(), device="cpu").policy)
