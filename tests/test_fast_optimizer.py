"""Adam on one tensor: the same bits, and where it would differ or not help, ordinary steps."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from helpers import assert_identical, state_tensors, train
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_klip import KLipPPO
from sb3_klip.fast import optimizer

SMALL: dict[str, Any] = {"n_steps": 100, "batch_size": 32, "n_epochs": 2, "learning_rate": 3e-3, "clip_range": 0.05}


def both(policy: Any, env_id: str, **kwargs: Any) -> tuple[KLipPPO, PPO]:
    ours, theirs = (train(each, policy, lambda: gym.make(env_id), 300, **{**SMALL, **kwargs})[0] for each in (KLipPPO, PPO))
    return ours, theirs


@pytest.fixture
def one_tensor_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with each step that is taken on all parameters as one tensor."""
    steps: list[int] = []
    original = optimizer._OneTensor.step

    def counted(self: Any, *args: Any) -> th.Tensor:
        steps.append(1)
        return original(self, *args)

    monkeypatch.setattr(optimizer._OneTensor, "step", counted)
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


def with_optimizer(kind: type = th.optim.Adam, **kwargs: Any) -> dict[str, Any]:
    return {"policy_kwargs": {"optimizer_class": kind, "optimizer_kwargs": kwargs, "net_arch": [16, 9]}}


@pytest.mark.parametrize(
    ("policy", "kwargs"),
    [
        ("MlpPolicy", {}),
        ("MlpPolicy", {"policy_kwargs": {"net_arch": {"pi": [7, 5, 3], "vf": [33]}, "activation_fn": th.nn.ReLU}}),
        ("MlpPolicy", with_optimizer(weight_decay=0.01)),
        ("MlpPolicy", with_optimizer(th.optim.AdamW)),
        ("MlpPolicy", with_optimizer(betas=(0.8, 0.9), eps=1e-3)),
        ("MlpPolicy", {"max_grad_norm": 0.01}),
        ("MlpPolicy", {"target_kl": 0.001, "n_epochs": 5}),
        (OwnEntropy, with_optimizer(weight_decay=0.01)),
    ],
)
@pytest.mark.parametrize("env_id", ["Pendulum-v1", "CartPole-v1"])
def test_one_tensor_has_the_same_bits(policy: str, kwargs: dict[str, Any], env_id: str, one_tensor_steps: list[int]) -> None:
    assert_identical(*both(policy, env_id, **kwargs))
    assert one_tensor_steps


def test_where_torch_calculates_otherwise_its_own_adam_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a later version of torch might."""
    used: list[int] = []
    ours, theirs = optimizer._adam, optimizer._torch_adam

    def other(*args: Any) -> None:
        ours(*args)
        args[0].add_(1e-6)

    monkeypatch.setattr(optimizer, "_adam", other)
    monkeypatch.setattr(optimizer, "_torch_adam", lambda *args: used.append(1) or theirs(*args))  # type: ignore[func-returns-value]
    assert_identical(*both("MlpPolicy", "Pendulum-v1"))
    assert len(used) == 3 * (1 + 2 * 4)  # in each update once to compare, and then for every step


@pytest.mark.parametrize(
    ("policy", "kwargs"),
    [
        (UnusedLayer, {}),
        (Scheduled, {}),
        (Watched, {}),
        (TwoGroups, {}),
        ("MlpPolicy", with_optimizer(amsgrad=True)),
        ("MlpPolicy", with_optimizer(foreach=True)),
        ("MlpPolicy", with_optimizer(fused=True)),
        ("MlpPolicy", with_optimizer(betas=(th.tensor(0.8), th.tensor(0.9)))),
        ("MlpPolicy", with_optimizer(th.optim.NAdam)),
        ("MlpPolicy", with_optimizer(th.optim.SGD, momentum=0.9)),
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
    original = KLipPPO._value_function_loss

    def failing(*args: Any) -> th.Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("no more")
        return original(*args)

    monkeypatch.setattr(KLipPPO, "_value_function_loss", failing)
    before = model.policy.state_dict()["value_net.weight"].clone()
    with pytest.raises(RuntimeError, match="no more"):
        model.learn(100)
    # The two steps before are there, in parameters and in the optimizer.
    assert not th.equal(model.policy.value_net.weight, before)
    steps = {float(state["step"]) for state in model.policy.optimizer.state.values()}
    assert steps == {4 * 2 + 2}
    monkeypatch.undo()
    model.learn(100)


@pytest.mark.parametrize("shared", [False, True])
def test_parameters_stay_in_the_memory_where_they_are(shared: bool, one_tensor_steps: list[int]) -> None:
    """Other processes may look at them there, and other tensors may be views of them."""
    model = KLipPPO("MlpPolicy", "CartPole-v1", seed=0, device="cpu", **SMALL)
    if shared:
        model.policy.share_memory()
    parameters = dict(model.policy.named_parameters())
    places = {name: parameter.data_ptr() for name, parameter in parameters.items()}
    view = parameters["value_net.weight"].detach().view(-1)
    seen: list[bool] = []

    class Look(BaseCallback):
        def _on_step(self) -> bool:
            seen.append(th.equal(view, self.model.policy.value_net.weight.detach().view(-1)))
            return True

    model.learn(200, callback=Look())
    assert one_tensor_steps
    assert all(seen)
    for name, parameter in model.policy.named_parameters():
        assert parameter is parameters[name]
        assert parameter.data_ptr() == places[name]
        assert parameter.is_shared() == shared
    assert_identical(model, PPO("MlpPolicy", "CartPole-v1", seed=0, device="cpu", **SMALL).learn(200))


def test_another_default_type() -> None:
    def trained(algorithm: type[PPO]) -> PPO:
        model = algorithm("MlpPolicy", "Pendulum-v1", seed=0, device="cpu", **SMALL)
        th.set_default_dtype(th.float64)
        try:
            return model.learn(200)
        finally:
            th.set_default_dtype(th.float32)

    ours, theirs = trained(KLipPPO), trained(PPO)
    assert_identical(ours, theirs)
    steps = [state["step"].dtype for model in (ours, theirs) for state in model.policy.optimizer.state.values()]
    assert set(steps) == {th.float64}


def test_a_norm_that_overflows_is_clipped_to_nothing() -> None:
    """Each gradient is finite, but not the sum of their squares: PPO's step is 0, and so is ours."""

    def trained(algorithm: type[PPO]) -> PPO:
        env = gym.wrappers.TransformReward(gym.make("Pendulum-v1"), lambda reward: 1e18 * reward)
        return algorithm("MlpPolicy", env, seed=0, device="cpu", **SMALL).learn(200)

    ours = trained(KLipPPO)
    assert_identical(ours, trained(PPO))
    assert ours._n_updates == 2 * SMALL["n_epochs"]


def test_a_look_at_the_state_before_the_first_step(one_tensor_steps: list[int]) -> None:
    """The state of an optimizer is a defaultdict, so that a look adds an empty state."""
    models = []
    for algorithm in (KLipPPO, PPO):
        model = algorithm("MlpPolicy", "Pendulum-v1", seed=0, device="cpu", **SMALL)
        for parameter in model.policy.parameters():
            assert "exp_avg" not in model.policy.optimizer.state[parameter]
        models.append(model.learn(300))
    assert_identical(*models)
    assert one_tensor_steps


def test_a_learning_rate_of_numpy_in_single_precision(one_tensor_steps: list[int]) -> None:
    """torch divides such a number in single precision."""
    models = []
    for algorithm in (KLipPPO, PPO):
        model = algorithm("MlpPolicy", "Pendulum-v1", seed=0, device="cpu", **SMALL)
        model._update_learning_rate = lambda optimizer: None  # type: ignore[method-assign]
        model.policy.optimizer.param_groups[0]["lr"] = np.float32(7e-4)
        models.append(model.learn(300))
    assert_identical(*models)
    assert not one_tensor_steps


def test_a_checkpoint_that_is_written_within_an_update_has_the_moments(one_tensor_steps: list[int]) -> None:
    """As the handler of a signal may do."""
    seen: list[list[Any]] = []

    class Looking(ActorCriticPolicy):
        def evaluate_actions(self, *args: Any, **kwargs: Any) -> Any:
            state = self.optimizer.state_dict()["state"]
            seen[-1].append({(i, k): value.clone() for i, each in state.items() for k, value in each.items()})
            return super().evaluate_actions(*args, **kwargs)

    models = []
    for algorithm in (KLipPPO, PPO):
        seen.append([])
        models.append(algorithm(Looking, "Pendulum-v1", seed=0, device="cpu", **SMALL).learn(300))
    assert_identical(*models)
    assert one_tensor_steps
    ours, theirs = seen
    assert len(ours) == len(theirs) > 10
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        assert all(th.equal(mine[key], value) for key, value in other.items())
