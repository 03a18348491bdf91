"""Functions and objects of the user's own as coefficients."""

import functools
import math
import threading
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch as th

from sb3_klip import KLipPPO
from sb3_klip.coefficients import make, register


def test_own_function_with_parameters_and_requests():
    @register("fading")
    def fading(ratio, advantages, clip_range, progress, position, *, strength=0.5):
        return th.full_like(ratio, strength * (1 - progress)) + position

    coefficient = make("fading", strength=0.8)
    assert coefficient.requests == ("progress", "position")
    coefficient.set_progress(0.25)
    ones = th.ones(2)
    removal, weight = coefficient(ones, ones, 0.2, position=th.zeros(2))
    assert weight is None
    th.testing.assert_close(removal, th.full((2,), 0.2))
    with pytest.raises(ValueError, match="'fading' needs 'position'"):
        coefficient(ones, ones, 0.2)
    assert make(fading).name == "fading"


def test_own_object_with_state():
    class Counting:
        def __init__(self):
            self.calls = 0

        def __call__(self, ratio, advantages, clip_range):
            self.calls += 1
            return th.zeros_like(ratio)

        def state_dict(self):
            return {"calls": self.calls}

        def load_state_dict(self, state):
            self.calls = state["calls"]

    coefficient = make(Counting())
    coefficient.load_state_dict({"calls": 7})
    coefficient(th.ones(1), th.ones(1), 0.2)
    assert coefficient.state_dict() == {"calls": 8}


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (
            lambda ratio, advantages, clip_range: ratio.mean(),
            ValueError,
            r"shape \(\).*expected a tensor of shape \(8,\)",
        ),
        (lambda ratio, advantages, clip_range: ratio.double(), ValueError, r"torch\.float64"),
        (lambda ratio, advantages, clip_range: ratio * math.nan, ValueError, "must be finite"),
        (lambda ratio, advantages, clip_range: ratio.clone().requires_grad_(), ValueError, "requires_grad=True"),
        (lambda ratio, advantages, clip_range: 0.0, TypeError, "is float, expected a tensor"),
        (lambda ratio, advantages, clip_range: (ratio, ratio), ValueError, "names no `estimator`"),
        (lambda ratio, advantages: ratio, TypeError, "must take"),
        (lambda a, b, c: b, TypeError, r"must take \(ratio, advantages, clip_range, ...\), .* in any order, not \(a, b, c\)"),
        (lambda ratio, advantage, clip_range: ratio, TypeError, "Did you mean 'advantages'"),
        (lambda ratio, advantages, clip_range, *rest: ratio, TypeError, "not take"),
        (lambda ratio, advantages, clip_range, positions: ratio, TypeError, "Did you mean 'position'"),
    ],
)
def test_functions_that_do_not_fit_are_refused(function, error, message):
    with pytest.raises(error, match=message):
        make(function)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("argument", ["ratio", "advantages"])
def test_functions_that_change_what_they_are_given_are_refused(argument, inference):
    """The loss is computed from the same tensors. Also where the trial's values stay the same."""

    def bounds(ratio, advantages, clip_range):
        {"ratio": ratio, "advantages": advantages}[argument].clamp_(-100, 100)
        return th.zeros_like(ratio)

    message = f"must return new tensors, but it changes '{argument}' in place"
    with pytest.raises(ValueError, match=message), th.inference_mode(inference):
        make(bounds)


def test_a_schedule_at_whose_end_it_fails_is_shown_with_its_value():
    def ramp(ratio, advantages, clip_range, *, width=0.1):
        return ((ratio - 1) / width).clamp(0, 1)

    with pytest.raises(ValueError, match=r"must be finite, but is \[nan.* for width=0.0 at 100% of training and ratio"):
        make(ramp, width="lin_0.2")
    with pytest.raises(ValueError, match=r"must be finite, but is .*\] for ratio"):
        make(ramp, width=0.0)


class Methods:
    """Of an object, what is called in training, or when it is saved."""

    def __call__(self, ratio, advantages, clip_range, *, width=0.1):
        return th.zeros_like(ratio)


class StopWithoutParameters(Methods):
    def stop(self, ratio):
        return False


class LearnsNothing(Methods):
    def end_update(self, *, width):
        pass


class SavedOnly(Methods):
    def state_dict(self):
        return {}


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (StopWithoutParameters, r"its method stop must take \(ratio\), and the parameters width as keywords, not \(ratio\)"),
        (LearnsNothing, r"its method end_update must take \(kl\), and the parameters width as keywords, not \(\*, width\)"),
        (SavedOnly, "needs both of state_dict and load_state_dict, or neither"),
    ],
)
def test_methods_that_could_not_be_called_are_refused(kind, message):
    with pytest.raises(TypeError, match=message):
        KLipPPO("MlpPolicy", "CartPole-v1", beta=kind())


def test_the_first_three_arguments_in_any_order():
    def backwards(clip_range, advantages, ratio, /, progress, *, scale=1.0):
        return (ratio - 1) * scale * clip_range + 0 * advantages

    ratio, advantages = th.tensor([2.0, 3.0]), th.tensor([5.0, 7.0])
    removal, _ = make(backwards, scale=3.0)(ratio, advantages, 0.5)
    th.testing.assert_close(removal, th.tensor([1.5, 3.0]))


def test_an_estimator_without_a_weight_is_refused():
    def forgetful(ratio, advantages, clip_range, *, estimator="k3"):
        return th.zeros_like(ratio)

    with pytest.raises(ValueError, match="returned no weight"):
        make(forgetful)


def test_an_unknown_estimator_is_refused_at_once():
    class Penalty:
        estimator = "analytical"

        def __call__(self, ratio, advantages, clip_range):
            return th.zeros_like(ratio), th.ones_like(ratio)

    message = "estimator='analytical' of .*Penalty' must be one of 'analytic', 'k1', 'k3'. Did you mean 'analytic'?"
    with pytest.raises(ValueError, match=message):
        make(Penalty())


class KeepsItToItself:
    """What it was made with could not be saved."""

    def __init__(self, depth, shown=1.0):
        self.shown = shown
        self._depth = depth

    def __call__(self, ratio, advantages, clip_range):
        return th.full_like(ratio, self._depth)


def test_an_object_that_could_not_be_made_again_is_refused():
    message = r"KeepsItToItself must keep the argument 'depth' of its constructor .* \(self\.depth = depth\)"
    with pytest.raises(TypeError, match=message):
        make(KeepsItToItself(0.5))
    with pytest.raises(TypeError, match="'depth'"):
        KLipPPO("MlpPolicy", "NoSuchEnvironment-v0", beta=KeepsItToItself(0.5))


@dataclass(slots=True)
class WithSlots:
    width: float = 0.1

    def __call__(self, ratio, advantages, clip_range):
        return th.full_like(ratio, self.width)


class Tuple(NamedTuple):
    width: float = 0.1

    def __call__(self, ratio, advantages, clip_range):
        return th.full_like(ratio, self.width)


@pytest.mark.parametrize("kind", [WithSlots, Tuple])
def test_objects_without_a_dict_and_without_init_are_made_again(kind, tmp_path):
    KLipPPO("MlpPolicy", "CartPole-v1", beta=kind(0.7)).save(tmp_path / "model")
    loaded = make(KLipPPO.load(tmp_path / "model").beta)
    assert loaded.parameters == {"width": 0.7}
    assert loaded(th.ones(1), th.ones(1), 0.2)[0].item() == pytest.approx(0.7)


def test_an_object_whose_constructor_names_no_arguments_is_refused():
    class PassesOn(KeepsItToItself):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)

    with pytest.raises(TypeError, match=r"constructor of PassesOn must name its arguments, and not take \*args or \*\*kwargs"):
        make(PassesOn(0.5))


def test_a_module_may_be_a_coefficient():
    class Zero(th.nn.Module):
        def forward(self, ratio, advantages, clip_range):
            return th.zeros_like(ratio)

        def __call__(self, ratio, advantages, clip_range):
            return super().__call__(ratio, advantages, clip_range)

    assert make(Zero()).parameters == {}


def test_trying_out_teaches_an_object_nothing():
    class Counting:
        calls = 0

        def __call__(self, ratio, advantages, clip_range):
            self.calls += 1
            return th.zeros_like(ratio)

    counting = Counting()
    assert make(counting).function.calls == counting.calls == 0


# -- how it is shown ---------------------------------------------------------------------------------------------------


class Described:
    """Says of itself what it is."""

    def __init__(self, depth):
        self.depth = depth

    def __call__(self, ratio, advantages, clip_range, *, scale=1.0):
        return th.full_like(ratio, scale)

    def __repr__(self):
        return f"<{self.depth} deep>"


def test_an_object_is_shown_in_its_own_words():
    assert repr(make(Described(3), scale=0.5)) == "<3 deep> with scale=0.5"
    assert repr(make("position", base=Described(3))).startswith("position(base=")


def test_what_was_learned_is_shown():
    coefficient = make("adaptive")
    assert repr(coefficient).endswith("estimator='analytic')")
    coefficient.end_update(1.0)
    assert repr(coefficient).endswith("estimator='analytic'), now value=2.0")


def test_the_last_rollout_goes_beyond_the_end():
    """The training of 100 steps has 128; SB3's remaining progress is then less than 0."""
    seen = []

    def shrinking(ratio, advantages, clip_range, progress, *, width=0.1):
        seen.append(progress)
        return th.full_like(ratio, math.sqrt(1 - progress) * width)

    beta_kwargs = {"width": lambda remaining: 0.1 * math.sqrt(remaining)}
    model = KLipPPO("MlpPolicy", "CartPole-v1", n_steps=64, n_epochs=1, beta=shrinking, beta_kwargs=beta_kwargs)
    model.learn(100)
    assert model._current_progress_remaining < 0
    assert seen[-1] == 1


class WithState:
    """A coefficient with all optional methods."""

    def __call__(self, ratio, advantages, clip_range):
        return th.zeros_like(ratio)

    def stop(self, ratio):
        return False

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


@pytest.mark.parametrize(
    ("method", "function", "error", "message"),
    [
        ("state_dict", lambda self: {"kl": self.k1}, AttributeError, "'Wrong' object has no attribute 'k1'"),
        ("state_dict", lambda self: [1], TypeError, r"the method state_dict of '.*Wrong' must return a dict, not \[1\]"),
        ("state_dict", lambda self: {"lock": threading.Lock()}, TypeError, "the state of beta='.*Wrong' cannot be saved"),
        ("load_state_dict", lambda self: None, TypeError, r"its method load_state_dict must take \(state\), not \(\)"),
        (
            "stop",
            lambda self, ratio: ratio > 2,
            ValueError,
            "method stop of '.*Wrong' must return True or False: Boolean value",
        ),
    ],
)
def test_optional_methods_are_tried_before_training(method, function, error, message):
    wrong = type("Wrong", (WithState,), {method: function})()
    with pytest.raises(error, match=message):
        KLipPPO("MlpPolicy", "CartPole-v1", n_steps=64, beta=wrong)


def test_what_learns_is_not_tried():
    """It may tell somebody of each update, whom only a training has."""
    learned = []
    telling = type("Telling", (WithState,), {"end_update": lambda self, kl: learned.append(kl)})()
    model = KLipPPO("MlpPolicy", "CartPole-v1", n_steps=64, n_epochs=1, beta=telling)
    assert not learned
    model.learn(64)
    assert len(learned) == 1


def test_a_method_without_a_signature():
    odd = type("Odd", (WithState,), {"load_state_dict": property(lambda self: self.__dict__.update)})()
    assert make(odd).state_dict() == {}


def test_a_quantity_with_a_default_is_refused():
    def attentive(ratio, advantages, clip_range, kl=None):
        return th.zeros_like(ratio)

    with pytest.raises(TypeError, match=r"'kl' is a quantity .* write it without a default; a parameter needs another name"):
        make(attentive)

    def fading(ratio, advantages, clip_range, progress):
        return th.full_like(ratio, progress)

    half = make(functools.partial(fading, progress=0.5))  # which is meant
    assert half(th.ones(2), th.ones(2), 0.2)[0].tolist() == [0.5, 0.5]


def test_annotations_that_cannot_be_evaluated():
    def odd(ratio, advantages, clip_range, *, width: "'float' | None" = 0.5):
        return th.full_like(ratio, width)

    assert make(odd, width=0.25)(th.ones(2), th.ones(2), 0.2)[0].tolist() == [0.25, 0.25]
    with pytest.raises(TypeError, match="must be written in Python, as its arguments are read"):
        make(th.zeros_like)
