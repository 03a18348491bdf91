"""A minibatch from its samples to Adam's step as one graph: the same training up to rounding, and nothing compiled twice."""

import copy
from typing import Any

import gymnasium as gym
import pytest
import torch as th

from sb3_klip import KLipPPO
from sb3_klip.fast import whole_step

#: Without code generation, which takes half a minute.
QUICK = {"backend": "eager"}
SMALL: dict[str, Any] = {"n_steps": 100, "batch_size": 64, "n_epochs": 2, "seed": 0, "device": "cpu"}

CASES: dict[str, dict[str, Any]] = {
    "default": {"learning_rate": lambda progress: 1e-3 * progress},
    "categorical": {"env": "CartPole-v1", "ent_coef": 0.01},
    "value clipping, gSDE": {"clip_range_vf": 0.1, "use_sde": True},
    "divergence": {"beta": "fixed"},
    "reuse": {"reuse": [0.5, 0.3, 0.2]},
    "position": {"beta": "position"},
    "AdamW": {"policy_kwargs": {"optimizer_class": th.optim.AdamW, "optimizer_kwargs": {"weight_decay": 0.1}}},
    "Adam, decay": {"policy_kwargs": {"optimizer_kwargs": {"weight_decay": 0.1, "betas": (0.8, 0.99)}}},
    "maximize": {"policy_kwargs": {"optimizer_kwargs": {"maximize": True}}},
}


def trained(env: str = "Pendulum-v1", **kwargs: Any) -> KLipPPO:
    return KLipPPO("MlpPolicy", env, **{**SMALL, **kwargs}).learn(300)


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case in ("default", "divergence") else pytest.mark.slow) for case in CASES]
)
def test_the_training_is_that_of_the_eager_update_up_to_rounding(case: str) -> None:
    ours, eager = trained(compile=QUICK, **CASES[case]), trained(**CASES[case])
    assert ours.update_path == "compiled"
    assert len(whole_step._STEPS[ours]) == (6 if case == "reuse" else 2)  # whole minibatches, and the last of an epoch
    for mine, other in zip(ours.policy.parameters(), eager.policy.parameters(), strict=True):
        th.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)
        th.testing.assert_close(mine.grad, other.grad, rtol=1e-3, atol=1e-5)
    states = [each.policy.optimizer.state_dict()["state"] for each in (ours, eager)]
    for index, state in states[1].items():
        assert states[0][index]["step"].equal(state["step"])
        th.testing.assert_close(states[0][index]["exp_avg"], state["exp_avg"], rtol=1e-3, atol=1e-6)
        th.testing.assert_close(states[0][index]["exp_avg_sq"], state["exp_avg_sq"], rtol=1e-3, atol=1e-9)
    logs = [each.logger.name_to_value for each in (ours, eager)]
    for key in ("train/loss", "train/value_loss", "train/kill_fraction"):
        assert logs[0][key] == pytest.approx(logs[1][key], rel=1e-3, abs=1e-5)


@pytest.mark.slow
def test_a_copy_has_a_step_of_its_own() -> None:
    model = trained(compile=QUICK)
    twin = copy.deepcopy(model)
    before = [parameter.clone() for parameter in model.policy.parameters()]
    twin.learn(100, reset_num_timesteps=False)
    assert all(a.equal(b) for a, b in zip(before, model.policy.parameters(), strict=True))
    assert not all(a.equal(b) for a, b in zip(before, twin.policy.parameters(), strict=True))


@pytest.mark.slow
def test_it_goes_on_where_a_file_left_off(tmp_path: Any) -> None:
    model = trained(compile=QUICK)
    model.save(tmp_path / "model")
    loaded = KLipPPO.load(tmp_path / "model", env=gym.make("Pendulum-v1"))
    assert loaded.policy.optimizer.state_dict()["state"][0]["step"] == 12
    assert loaded.learn(100).update_path == "compiled"
    assert loaded.policy.optimizer.state_dict()["state"][0]["step"] == 16


@pytest.mark.parametrize(
    "kwargs",
    [
        {"target_kl": 0.1},  # decides between the loss and the step
        {"beta": "espo"},
        {"beta": "adaptive"},
        {"policy_kwargs": {"optimizer_class": th.optim.RMSprop}},
        {"policy_kwargs": {"optimizer_kwargs": {"amsgrad": True}}},
    ],
)
def test_for_the_rest_the_loss_alone_is_compiled(kwargs: dict[str, Any]) -> None:
    assert trained(compile=QUICK, batch_size=50, **kwargs).update_path == "compiled, the loss alone"


def test_a_gradient_that_is_not_finite_is_named() -> None:
    model = trained(compile=QUICK, batch_size=50)
    with th.no_grad():
        model.policy.value_net.weight.fill_(float("inf"))
    with pytest.raises(ValueError, match=r"inf|nan"):
        model.learn(100)


@pytest.mark.slow
def test_another_number_of_threads_is_compiled_for_anew() -> None:
    """The number is part of the code that torch makes."""
    model, threads = trained(compile=QUICK), th.get_num_threads()
    try:
        th.set_num_threads(threads + 1)
        model.learn(100, reset_num_timesteps=False)
    finally:
        th.set_num_threads(threads)
    assert len(whole_step._STEPS[model]) == 4


def test_weights_of_the_loss_are_inputs() -> None:
    """A callback that lowers the entropy's weight compiles nothing anew."""

    def decaying(**kwargs: Any) -> KLipPPO:
        model = KLipPPO("MlpPolicy", "Pendulum-v1", ent_coef=0.1, **SMALL, **kwargs)
        for number in range(3):
            model.learn(100, reset_num_timesteps=False)
            model.ent_coef, model.vf_coef = 0.1 / (number + 2), 0.5 + number
        return model

    ours, eager = decaying(compile=QUICK), decaying()
    assert len(whole_step._STEPS[ours]) == 2  # whole minibatches, and the last of an epoch
    for mine, other in zip(ours.policy.parameters(), eager.policy.parameters(), strict=True):
        th.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_module_that_is_set_otherwise() -> None:
    def trained_with_two_slopes(**kwargs: Any) -> KLipPPO:
        model = KLipPPO("MlpPolicy", "Pendulum-v1", policy_kwargs={"activation_fn": th.nn.LeakyReLU}, **SMALL, **kwargs)
        model.learn(100)
        for module in model.policy.modules():
            if isinstance(module, th.nn.LeakyReLU):
                module.negative_slope = 0.5
        return model.learn(100, reset_num_timesteps=False)

    ours, eager = trained_with_two_slopes(compile=QUICK), trained_with_two_slopes()
    for mine, other in zip(ours.policy.parameters(), eager.policy.parameters(), strict=True):
        th.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)
