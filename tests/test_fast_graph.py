"""The traced update: the bits of the eager one, used where nothing speaks against it, and left as soon as a bit differs."""

import copy
import signal
import warnings
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.envs import FakeImageEnv, IdentityEnvMultiDiscrete
from stable_baselines3.common.utils import FloatSchedule
from torch import nn

from sb3_klip import IdentityCheckCallback, KLipPPO
from sb3_klip.coefficients import available, make
from sb3_klip.fast import graph, pure

SMALL: dict[str, Any] = {"n_steps": 64, "batch_size": 32, "n_epochs": 2, "seed": 0, "device": "cpu", "clip_range": 0.05}
STEPS = 192


@pytest.fixture(autouse=True)
def _from_the_first_minibatch_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "WARM_UP", 0)


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A function that trains without graphs."""

    def train(model: Any) -> Any:
        with monkeypatch.context() as switched_off:
            switched_off.setattr("sb3_klip.training.reason_against", lambda *args: "a test wants it so")
            return model.learn(STEPS)

    return train


def model(algorithm: type[Any] = KLipPPO, env: Any = "Pendulum-v1", policy: str = "MlpPolicy", **kwargs: Any) -> Any:
    small = {"net_arch": [16], **kwargs.pop("policy_kwargs", {})}
    return algorithm(policy, env, **{**SMALL, "policy_kwargs": small, **kwargs})


def traced(learner: Any) -> dict[Any, Any]:
    """The graphs of a model."""
    return graph._GRAPHS[learner].traced if learner in graph._GRAPHS else {}


def assert_same(ours: Any, theirs: Any) -> None:
    for mine, other in zip(ours.policy.parameters(), theirs.policy.parameters(), strict=True):
        assert mine.equal(other)
    moments = [each.policy.optimizer.state_dict()["state"] for each in (ours, theirs)]
    for index, state in moments[1].items():
        assert all(state[name].equal(moments[0][index][name]) for name in state)


class TwoBoxes(gym.ObservationWrapper):
    """Observations in two parts."""

    def __init__(self) -> None:
        super().__init__(gym.make("Pendulum-v1"))
        box = self.env.observation_space
        parts = {"position": slice(0, 2), "velocity": slice(2, 3)}
        self.parts = parts
        self.observation_space = gym.spaces.Dict(
            {name: gym.spaces.Box(box.low[part], box.high[part]) for name, part in parts.items()}
        )

    def observation(self, observation: Any) -> Any:
        return {name: observation[part] for name, part in self.parts.items()}


class RowAndColumn(gym.ObservationWrapper):
    """A place, in two parts."""

    def __init__(self) -> None:
        super().__init__(gym.make("FrozenLake-v1"))
        self.observation_space = gym.spaces.Dict(row=gym.spaces.Discrete(4), column=gym.spaces.Discrete(4))

    def observation(self, observation: Any) -> Any:
        return {"row": observation // 4, "column": observation % 4}


CASES: dict[str, dict[str, Any]] = {
    "gaussian": {},
    "categorical": {"env": "CartPole-v1"},
    # So wide that a product of matrices is added up in blocks, and a bias that is added afterwards rounds otherwise.
    "wide": {"policy_kwargs": {"net_arch": [256, 256], "ortho_init": False}},
    "gsde": {"use_sde": True},
    "squashed": {"use_sde": True, "policy_kwargs": {"squash_output": True}, "ent_coef": 0.01},
    "dictionary": {"env": lambda: TwoBoxes(), "policy": "MultiInputPolicy"},
    "one-hot": {"env": "FrozenLake-v1"},
    "one-hot, several": {"env": lambda: IdentityEnvMultiDiscrete(3)},
    "one-hot, dictionary": {"env": lambda: RowAndColumn(), "policy": "MultiInputPolicy"},
    "value clipping": {"clip_range_vf": 0.1, "ent_coef": 0.01},
    "schedules": {"clip_range": lambda p: 0.1 * p, "clip_range_vf": lambda p: 0.3 * p, "learning_rate": lambda p: 0.01 * p},
    "target_kl": {"target_kl": 0.001, "learning_rate": 0.01},
    "no normalization": {"normalize_advantage": False},
    "separate extractors": {"policy_kwargs": {"share_features_extractor": False, "activation_fn": nn.ELU}},
    "AdamW": {"policy_kwargs": {"optimizer_class": th.optim.AdamW, "optimizer_kwargs": {"weight_decay": 0.1}}},
    "RMSprop": {"policy_kwargs": {"optimizer_class": th.optim.RMSprop}},
}


@pytest.mark.parametrize("case", CASES)
def test_the_bits_are_those_of_ppo(case: str) -> None:
    def make_model(algorithm: type[Any]) -> Any:
        arguments = copy.copy(CASES[case])
        if callable(arguments.get("env")):
            arguments["env"] = arguments["env"]()
        return model(algorithm, **arguments)

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*fast path")
        ours = make_model(KLipPPO).learn(STEPS)
    assert ours.update_path == "traced"
    assert 1 <= len(traced(ours)) <= 2  # a graph for whole minibatches, and one for the last
    assert_same(ours, make_model(PPO).learn(STEPS))


#: Of each kind one: the clip itself, one that looks at the KL divergence, one with a weight, and those that look at what else
#: there is to know of each sample.
FEW = ("step", "trust_region", "fixed", "position", "trust_region_guided", "mass_adaptive")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in FEW else pytest.mark.slow) for name in available() if make(name).is_constant],
)
def test_every_coefficient_has_the_bits_of_its_eager_update(name: str, eager: Callable[..., Any]) -> None:
    env = "CartPole-v1" if make(name).needs_probabilities else "Pendulum-v1"
    ours = model(env=env, beta=name).learn(STEPS)
    assert ours.update_path == "traced"
    assert traced(ours)
    assert_same(ours, eager(model(env=env, beta=name)))


class Counting:
    """A coefficient with a state that every call changes, and that looks at data."""

    estimator = "k3"

    def __init__(self) -> None:
        self.calls = 0

    def __call__(
        self,
        ratio: th.Tensor,
        advantages: th.Tensor,
        clip_range: float,
        *,
        kl: th.Tensor,
        position: th.Tensor,
        progress: float,
        strength: float = 1.0,
    ) -> tuple[th.Tensor, th.Tensor]:
        assert type(clip_range) is float
        assert not th.is_grad_enabled() or not ratio.requires_grad
        self.calls += 1
        share = self.calls % 3 / 3 + 0.1 * progress
        far = ratio.max() > 1 + clip_range
        removal = th.where(kl > 1e-4, share, position / 200) if far else th.zeros_like(ratio)
        return removal, strength * th.full_like(ratio, share)


CHANGING: dict[str, dict[str, Any]] = {
    "learns": {"beta": "adaptive", "beta_kwargs": {"kl_target": 1e-4}},
    "scheduled": {"beta": "linear_ramp", "beta_kwargs": {"width": "lin_0.1"}},
    "function of the progress": {"beta": "sigmoid", "beta_kwargs": {"temperature": lambda progress: 0.1 + progress}},
    "own": {"beta": Counting(), "beta_kwargs": {"strength": 0.5}},
    "own, reused": {"beta": Counting(), "reuse": [0.5, 0.3, 0.2]},
}


@pytest.mark.parametrize("case", CHANGING)
def test_a_coefficient_that_may_change_is_called_between_two_graphs(case: str, eager: Callable[..., Any]) -> None:
    ours = model(**CHANGING[case]).learn(STEPS)
    assert ours.update_path == "traced"
    assert 1 <= len(traced(ours)) <= 4
    theirs = eager(model(**CHANGING[case]))
    assert_same(ours, theirs)
    assert {**ours.logger.name_to_value, "train/traced": 0} == theirs.logger.name_to_value
    if case.startswith("own"):  # as often as in the eager update
        assert ours.beta.function.calls == theirs.beta.function.calls > 0


def test_a_coefficient_that_is_given_other_bits_is_found(monkeypatch: pytest.MonkeyPatch, eager: Callable[..., Any]) -> None:
    trace = graph._traced

    def wrong(*args: Any) -> Any:
        whole, of_given = trace(*args)
        return whole, lambda *tensors: [tensor.nextafter(th.tensor(1e9)) for tensor in of_given(*tensors)]

    monkeypatch.setattr(graph, "_traced", wrong)
    with pytest.warns(UserWarning, match="does not give the bits"):
        ours = model(beta="adaptive").learn(STEPS)
    assert_same(ours, eager(model(beta="adaptive")))


@pytest.mark.parametrize("name", ["step", "fixed", "position"])
def test_reused_samples_have_the_bits_of_the_eager_update(name: str, eager: Callable[..., Any]) -> None:
    ours = model(beta=name, reuse=[0.5, 0.3, 0.2]).learn(STEPS)
    assert ours.update_path == "traced"
    assert traced(ours)
    theirs = eager(model(beta=name, reuse=[0.5, 0.3, 0.2]))
    assert_same(ours, theirs)
    assert {**ours.logger.name_to_value, "train/traced": 0} == theirs.logger.name_to_value


def test_constant_coefficients_are_most_of_them() -> None:
    assert {name for name in available() if not make(name).is_constant} == {"adaptive"}
    assert not make("linear_ramp", width="lin_0.1").is_constant
    assert not make("sigmoid", temperature=lambda progress: progress).is_constant
    assert not make(lambda ratio, advantages, clip_range: ratio * 0).is_constant
    assert not make("position", base="adaptive").is_constant


def test_what_is_logged_is_the_same(eager: Callable[..., Any]) -> None:
    ours, theirs = model(beta="fixed").learn(STEPS), eager(model(beta="fixed"))
    assert ours.logger.name_to_value.pop("train/traced") == 1
    assert theirs.logger.name_to_value.pop("train/traced") == 0
    assert ours.logger.name_to_value == theirs.logger.name_to_value
    assert ours.update_beta.equal(theirs.update_beta)


def test_the_identity_check_compares_the_traced_update() -> None:
    check = IdentityCheckCallback()
    ours = model().learn(STEPS, callback=check)
    assert check.identical
    assert traced(ours)


# -- when it pays ----------------------------------------------------------------------------------------------------------


def test_a_short_training_traces_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "WARM_UP", 3)
    learner = model(batch_size=64)  # two minibatches of one size in each update, of which the last is always eager
    assert not traced(learner.learn(3 * 64))
    assert len(traced(learner.learn(64, reset_num_timesteps=False))) == 1


def test_numbers_that_change_too_often(monkeypatch: pytest.MonkeyPatch, eager: Callable[..., Any]) -> None:
    monkeypatch.setattr(graph, "MOST_GRAPHS", 1)
    ours = model(ent_coef=0.01, batch_size=40).learn(STEPS)  # the last one of an epoch is smaller
    assert ours.update_path == "eager, as what the loss depends on changes too often"
    assert ours.logger.name_to_value["train/traced"] == 0
    assert_same(ours, eager(model(ent_coef=0.01, batch_size=40)))


def test_a_copy_has_graphs_of_its_own() -> None:
    learner = model()
    twin = copy.deepcopy(learner)
    learner.learn(STEPS)
    before = [parameter.clone() for parameter in learner.policy.parameters()]
    assert not traced(twin)
    twin.learn(STEPS)
    assert all(a.equal(b) for a, b in zip(before, learner.policy.parameters(), strict=True))


# -- a difference ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("update", [1, 2])
def test_a_bit_that_differs_is_found_before_a_step_is_taken(update: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the first minibatch of any update, not only of the first one."""
    trace = graph._traced
    learner = model()

    def wrong(*args: Any) -> Any:
        right = trace(*args)

        def run(*tensors: Any) -> Any:
            gradient, *others = right[0](*tensors)
            return (gradient.nextafter(th.tensor(1e9)) if learner._n_updates >= 2 * (update - 1) else gradient, *others)

        return run, right[1]

    monkeypatch.setattr(graph, "_traced", wrong)
    with pytest.warns(UserWarning, match=rf"does not give the bits of the eager one.*at {64 * update} steps"):
        learner.learn(STEPS)
    assert learner.update_path == "eager, as a graph did not give the bits of the eager update"
    assert learner.logger.name_to_value["train/traced"] == 0
    assert_same(learner, model(PPO).learn(STEPS))


def test_a_schedule_that_was_baked_in_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    rebuilt = pure._rebuilt

    def baked(example: Any, update: Any, *tensors: Any) -> Any:
        data, indices, _ = rebuilt(example, update, *tensors)
        return data, indices, update

    monkeypatch.setattr(pure, "_rebuilt", baked)
    schedule = {"clip_range": lambda progress: 0.1 * progress}
    learner = model(**schedule)
    with pytest.warns(UserWarning, match="does not give the bits"):
        learner.learn(2 * STEPS)
    assert_same(learner, model(PPO, **schedule).learn(2 * STEPS))


def test_convolutions_are_eager() -> None:
    env = FakeImageEnv(screen_height=36, screen_width=36)
    learner = model(env=env, policy="CnnPolicy", n_steps=16).learn(16)
    assert learner.update_path == "eager, as ActorCriticCnnPolicy is not known"


def test_what_cannot_be_traced_is_eager(eager: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """torch looks at the values that it makes one-hot vectors of."""
    monkeypatch.setattr(pure, "_one_hot", th.nn.functional.one_hot)
    ours = model(env=gym.make("FrozenLake-v1")).learn(STEPS)
    assert ours.update_path.startswith("eager, as it cannot be traced (")
    assert_same(ours, eager(model(env=gym.make("FrozenLake-v1"))))


# -- what speaks against it ------------------------------------------------------------------------------------------------


class OwnLoss(KLipPPO):
    """A subclass with another value loss."""

    def _value_function_loss(self, returns: th.Tensor, values: th.Tensor, mask: th.Tensor | None) -> th.Tensor:
        return 2 * super()._value_function_loss(returns, values, mask)


class OwnLayer(nn.Linear):
    """A layer that may do anything."""


def own_layer(learner: Any) -> None:
    learner.policy.action_net = OwnLayer(16, 1)
    learner.policy.optimizer = th.optim.Adam(learner.policy.parameters())


def replaced_method(learner: Any) -> None:
    extract = learner.policy.extract_features
    learner.policy.extract_features = lambda *args: extract(*args)


def another_optimizer(learner: Any) -> None:
    learner.policy.optimizer = th.optim.Adam(list(learner.policy.parameters())[1:])


REASONS: dict[str, Callable[[Any], Any]] = {
    "OwnLayer is not known": own_layer,
    "has a hook": lambda learner: learner.policy.value_net.register_forward_hook(lambda *args: None),
    "was replaced": replaced_method,
    "is frozen": lambda learner: learner.policy.value_net.requires_grad_(False),
    "frozen, has a hook": lambda learner: next(learner.policy.parameters()).register_hook(lambda gradient: None),
    "not that of the policy's parameters": another_optimizer,
}


@pytest.mark.parametrize("reason", REASONS)
def test_reasons_in_the_policy(reason: str) -> None:
    learner = model()
    REASONS[reason](learner)
    assert reason in learner.learn(64).update_path
    assert not traced(learner)


def test_reasons_in_the_algorithm() -> None:
    assert "a part of the loss of OwnLoss was replaced" in model(OwnLoss).learn(64).update_path
    patched = model()
    patched._value_function_loss = lambda *args: KLipPPO._value_function_loss(patched, *args)
    assert "was replaced" in patched.learn(64).update_path


CONTEXTS: dict[str, Callable[[], Any]] = {
    "autocast": lambda: th.autocast("cpu", dtype=th.bfloat16),
    "anomaly detection": lambda: th.autograd.set_detect_anomaly(True),
    "a profiler": lambda: th.autograd.profiler.profile(),
    "a mode of torch's functions": lambda: th.device("cpu"),
}


@pytest.mark.parametrize("reason", CONTEXTS)
def test_reasons_in_torch(reason: str) -> None:
    learner = model()
    learner.learn(64)
    with CONTEXTS[reason]():
        assert reason in graph.reason_against(learner)
    assert graph.reason_against(learner) == ""


def test_the_path_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    model(verbose=1).learn(STEPS)
    assert capsys.readouterr().out.count("The update is traced") == 1


def test_no_graph_where_comparing_it_takes_longer_than_it_saves() -> None:
    """400 000 parameters and 256 samples: as many products as a graph is worth in 25 minibatches, of which there are 2."""
    large: dict[str, Any] = {"policy_kwargs": {"net_arch": [440, 440]}, "n_steps": 512, "batch_size": 256}
    learner = model(env="CartPole-v1", n_epochs=1, **large).learn(512)
    assert learner.update_path == "eager, as products of matrices take nearly all of its time"
    assert graph.reason_not_worth_it(model(env="CartPole-v1", n_epochs=20, **large)) == ""
    large["batch_size"] = np.int16(256)  # with a type whose products overflow
    assert graph.reason_not_worth_it(model(env="CartPole-v1", n_epochs=1, **large)) != ""


class InDoublePrecision(RolloutBuffer):
    """Advantages and returns in float64."""

    def compute_returns_and_advantage(self, *args: Any, **kwargs: Any) -> None:
        super().compute_returns_and_advantage(*args, **kwargs)
        self.advantages, self.returns = self.advantages.astype(np.float64), self.returns.astype(np.float64)


@pytest.mark.parametrize("normalize_advantage", [True, False])
def test_advantages_in_double_precision(normalize_advantage: bool) -> None:
    kwargs = {"rollout_buffer_class": InDoublePrecision, "normalize_advantage": normalize_advantage}
    ours, theirs = (model(algorithm, **kwargs).learn(STEPS) for algorithm in (KLipPPO, PPO))
    assert ours.update_path == "traced"
    assert_same(ours, theirs)


@pytest.mark.parametrize(("before", "after"), [(None, 0.1), (0.1, None)])
def test_clipping_of_values_is_switched_on_or_off(before: float | None, after: float | None) -> None:
    def trained(algorithm: type[Any]) -> Any:
        learner = model(algorithm, clip_range_vf=before).learn(STEPS)
        learner.clip_range_vf = after if after is None else FloatSchedule(after)
        return learner.learn(STEPS, reset_num_timesteps=False)

    ours, theirs = trained(KLipPPO), trained(PPO)
    assert ours.update_path == "traced"
    assert_same(ours, theirs)


class TimeIsUpError(Exception):
    pass


@pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="the system has no alarm")
def test_an_exception_of_a_signal_while_tracing_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def handler(number: int, frame: Any) -> None:
        raise TimeIsUpError

    def interrupted(*args: Any) -> Any:
        signal.raise_signal(signal.SIGALRM)

    monkeypatch.setattr(graph, "_traced", interrupted)
    before = signal.signal(signal.SIGALRM, handler)
    try:
        with pytest.raises(TimeIsUpError):
            model().learn(STEPS)
    finally:
        signal.signal(signal.SIGALRM, before)


def test_a_graph_that_fails_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*args: Any) -> Any:
        raise RuntimeError("a test wants it so\nand more")

    monkeypatch.setattr(graph, "_run", failing)
    ours = model().learn(STEPS)
    assert ours.update_path == "eager, as it cannot be traced (RuntimeError: a test wants it so)"
    assert_same(ours, model(PPO).learn(STEPS))


def test_all_samples_in_one_minibatch() -> None:
    """``batch_size=None`` of SB3's buffers, which can be set after the model is made."""

    def trained(algorithm: type[Any]) -> Any:
        learner = model(algorithm)
        learner.batch_size = None
        return learner.learn(STEPS)

    assert_same(trained(KLipPPO), trained(PPO))


def test_a_weight_of_the_loss_that_changes_is_an_input() -> None:
    def decaying(algorithm: type[Any]) -> Any:
        learner = model(algorithm, ent_coef=0.1, batch_size=40)
        for number in range(12):
            learner.learn(64, reset_num_timesteps=False)
            learner.ent_coef = 0.1 / (number + 2)
        return learner

    ours = decaying(KLipPPO)
    assert ours.update_path == "traced"
    assert len(traced(ours)) == 4  # for two sizes of minibatches, with the first weight and with any
    assert_same(ours, decaying(PPO))


# -- what others may see ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kwargs", [{}, {"target_kl": 1e-4, "learning_rate": 1e-2}, {"batch_size": 24}])
def test_the_policy_holds_the_distribution_of_the_last_minibatch(kwargs: dict[str, Any]) -> None:
    means = []
    for algorithm in (KLipPPO, PPO):
        learner = model(algorithm, **kwargs).learn(STEPS)
        means.append(learner.policy.action_dist.distribution.mean)
    assert learner._n_updates < 6 or "target_kl" not in kwargs
    assert means[0].equal(means[1])
    assert means[0].requires_grad == means[1].requires_grad


def test_a_parameter_that_the_loss_does_not_depend_on() -> None:
    learners = []
    for algorithm in (KLipPPO, PPO):
        learner = model(algorithm)
        learner.policy.spare = nn.Linear(2, 2)
        learner.policy.optimizer = th.optim.Adam(learner.policy.parameters(), lr=1e-3)
        learners.append(learner.learn(STEPS))
    assert_same(*learners)
    assert "the loss does not depend on a parameter" in learners[0].update_path


def test_samples_that_lead_to_something_that_learns() -> None:
    scales = []
    for algorithm in (KLipPPO, PPO):
        scale = nn.Parameter(th.ones(3))

        class Scaled(RolloutBuffer):
            def get(self, batch_size: int | None = None, scale: nn.Parameter = scale) -> Any:
                for samples in super().get(batch_size):
                    yield samples._replace(observations=samples.observations * scale)

        model(algorithm, rollout_buffer_class=Scaled).learn(STEPS)
        scales.append(scale)
    assert scales[1].grad is not None
    assert scales[1].grad.abs().sum() > 0
    assert scales[0].grad is not None
    assert scales[0].grad.equal(scales[1].grad)


def test_a_loss_that_draws_random_numbers_where_nobody_knows(
    eager: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison finds it out, and draws none that the training sees."""

    original = th.Tensor.mean

    def noisy(self: th.Tensor, *args: Any, **kwargs: Any) -> th.Tensor:
        found = original(self, *args, **kwargs)
        return found + 1e-3 * th.randn_like(found) if self.requires_grad else found

    monkeypatch.setattr(th.Tensor, "mean", noisy)
    with pytest.warns(UserWarning, match="does not give the bits of the eager one"):
        ours = model().learn(STEPS)
    assert_same(ours, eager(model()))


class OwnBuffer:
    """A buffer that derives from nothing."""

    def __init__(self, *args: Any, **kwargs: Any):
        self._inner = RolloutBuffer(*args, **kwargs)

    def reset(self) -> None:
        self._inner.reset()

    def add(self, *args: Any) -> None:
        self._inner.add(*args)

    def compute_returns_and_advantage(self, *args: Any, **kwargs: Any) -> None:
        self._inner.compute_returns_and_advantage(*args, **kwargs)

    def get(self, batch_size: int | None = None) -> Any:
        return self._inner.get(batch_size)

    @property
    def values(self) -> Any:
        return self._inner.values

    @property
    def returns(self) -> Any:
        return self._inner.returns


def test_a_buffer_that_is_no_rollout_buffer() -> None:
    ours, theirs = (model(algorithm, rollout_buffer_class=OwnBuffer).learn(STEPS) for algorithm in (KLipPPO, PPO))
    assert_same(ours, theirs)
    assert ours.update_path == "eager, as OwnBuffer is no RolloutBuffer"
