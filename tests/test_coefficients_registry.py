"""Coefficients by name: aliases, parameters, and what is refused."""

import inspect
import math

import pytest
import torch as th

from sb3_klip.coefficients import FAMILY, Coefficient, available, entries, make, register, registry


@pytest.mark.parametrize(
    ("alias", "expected"),
    [
        ("ppo_clip", "step()"),
        ("espo", "none(ratio_deviation=0.25)"),
        ("dapo", "clip_higher(low=0.2, high=0.28)"),
        ("ppo_rb", "rollback(slope=0.3)"),
        ("tr_ppo", "trust_region(delta=0.035)"),
        ("truly_ppo", "truly(delta=0.03, alpha=5.0)"),
        ("spo", "quadratic()"),
        ("pspo", "smoothing(alpha=0.1)"),
        ("sapo", "soft_adaptive(tau_pos=1.0, tau_neg=1.05)"),
        ("dcpo", "dynamic_clip(low=0.16, high=0.2)"),
        ("dppo", "probability_clip(low=0.2, high=0.2)"),
        ("ce_gppo", "gradient_preserving(low=0.75, high=1.0)"),
        ("gppo", "gradient_preserving(low=1.0, high=1.0)"),
        ("dgpo", "decoupled_decay(n=1.0, m=2.0)"),
        ("maspo", "mass_adaptive(sigma=1.0, sigma_max=10.0, alpha=0.3, beta_pos=0.03, beta_neg=0.03)"),
        ("ano", "redescending(kappa_plus=10.0, kappa_minus=-1.5)"),
        ("bpo", "bounded_ratio(temperature=0.001)"),
        ("cispo", "truncated(low=1.0, high=4.0)"),
        ("topr", "tapered()"),
        ("vespo", "gamma_weighted(k_pos=2.0, lambda_pos=3.0, k_neg=3.0, lambda_neg=2.0)"),
        ("trgppo", "trust_region_guided(delta=None)"),
        ("ppo_kl", "fixed(value=1.0, estimator='analytic')"),
        ("ppo_adaptive_kl", "adaptive(initial=1.0, kl_target=0.02, factor=2.0, estimator='analytic')"),
    ],
)
def test_aliases_and_defaults(alias, expected):
    assert repr(make(alias)) == expected


def test_parameters_of_an_alias_can_be_changed():
    assert repr(make("espo", ratio_deviation=0.1)) == "none(ratio_deviation=0.1)"


def failing_to_decode(ratio, advantages, clip_range):
    """With an exception that is not made from a text."""
    return b"\xff".decode("ascii")


BAD = [
    ("stpe", {}, ValueError, r"'stpe'.*Did you mean 'step'.*Available: adaptive \(ppo_adaptive_kl\), asymmetric"),
    ("step", {"width": 1}, TypeError, "'step' has no parameter 'width'. It takes none"),
    ("linear_ramp", {"widht": 1}, TypeError, r"no parameter 'widht'\. Did you mean 'width'\?"),
    ("linear_ramp", {"width": -0.1}, ValueError, "width=-0.1 of 'linear_ramp' is out of range: 0 <= value"),
    ("linear_ramp", {"width": math.nan}, ValueError, "width=nan"),
    ("linear_ramp", {"width": math.inf}, ValueError, "width=inf"),
    ("linear_ramp", {"width": None}, TypeError, "must be a number, a schedule such as 'lin_0.1', or a function"),
    ("linear_ramp", {"width": "wide"}, TypeError, "'wide'"),
    ("linear_ramp", {"width": "lin_x"}, TypeError, "'lin_x'"),
    ("linear_ramp", {"width": "lin_-1"}, ValueError, "starts at -1"),
    ("linear_ramp", {"width": True}, TypeError, "True"),
    ("sigmoid", {"temperature": 0}, ValueError, "0 < value"),
    ("soft_min", {"temperature": -1}, ValueError, "0 < value"),
    ("asymmetric", {"width_down": -1}, ValueError, "width_down=-1"),
    ("clip_higher", {"low": 1}, ValueError, "0 <= value < 1"),
    ("clip_higher", {"high": -0.1}, ValueError, "high=-0.1"),
    ("dual_clip", {"bound": 1}, ValueError, "1 < value"),
    ("rollback", {"slope": -1}, ValueError, "slope=-1"),
    ("trust_region", {"delta": 0}, ValueError, "delta=0"),
    ("truly", {"alpha": -1}, ValueError, "alpha=-1"),
    ("smoothing", {"alpha": 1.5}, ValueError, "0 <= value <= 1"),
    ("soft_adaptive", {"tau_pos": 0}, ValueError, "tau_pos=0"),
    ("fixed", {"value": -1}, ValueError, "value=-1"),
    ("fixed", {"estimator": "k2"}, ValueError, "must be one of 'analytic', 'k1', 'k3'"),
    ("adaptive", {"initial": 1e5}, ValueError, "0.0001 <= value <= 10000"),
    ("adaptive", {"factor": 1}, ValueError, "factor=1"),
    ("adaptive", {"kl_target": 0}, ValueError, "kl_target=0"),
    ("none", {"ratio_deviation": -1}, ValueError, "ratio_deviation=-1"),
    ("position", {"base": "stpe"}, ValueError, "Did you mean 'step'"),
    ("position", {"base": "sigmoid", "base_kwargs": {"width": 1}}, TypeError, "'sigmoid' has no parameter 'width'"),
    ("position", {"horizon": 0}, ValueError, "horizon=0"),
    ("dynamic_clip", {"low": 0}, ValueError, "0 < value"),
    ("gradient_preserving", {"high": -1}, ValueError, "high=-1"),
    ("decoupled_decay", {"m": 0}, ValueError, "m=0"),
    ("mass_adaptive", {"sigma": 0}, ValueError, "sigma=0"),
    ("redescending", {"kappa_plus": 1}, ValueError, "1 < value"),
    ("redescending", {"kappa_minus": 0}, ValueError, "value < 0"),
    (
        "redescending",
        {"kappa_minus": -10},
        ValueError,
        "must be greater than -kappa_plus=-10",
    ),
    ("bounded_ratio", {"temperature": 0}, ValueError, "temperature=0"),
    ("truncated", {"low": 1.5}, ValueError, "0 <= value <= 1"),
    ("gamma_weighted", {"k_neg": 0.5}, ValueError, "1 <= value"),
    ("trust_region_guided", {"delta": 0}, ValueError, "delta=0"),
    (":step", {}, ValueError, "':step' is not a coefficient"),
    ("SAPO", {}, ValueError, "Did you mean 'sapo'.*soft_adaptive \\(sapo\\)"),
    (3, {}, TypeError, "beta must be the name of a coefficient.*not 3. .* give beta='fixed' and beta_kwargs={'value': 3}"),
    (None, {}, TypeError, "not None. .*beta='none'"),
    (True, {}, TypeError, "not True.$"),
    ("position", {"base": "position"}, ValueError, "base='position' is itself scaled by the position"),
    ("position", {"base": "stp"}, ValueError, "^base='stp' with base_kwargs=None of 'position'.*Did you mean 'step'"),
    ("position", {"base": failing_to_decode}, ValueError, "^base=<function .* of 'position': 'ascii' codec"),
    ("position", {"base_kwargs": 3}, TypeError, "^base='step' with base_kwargs=3 of 'position'"),
    ("position", {"base_kwargs": {"width": 1}}, TypeError, "^base='step' with base_kwargs={'width': 1}"),
    ("linear_ramp:width=0.2", {}, ValueError, "Parameters are given as beta_kwargs, and the name alone as beta='linear_ramp'"),
    ("linear_ramp", {"width": "1e-2"}, TypeError, "not '1e-2' \\(which YAML reads as text: write 0.01\\)$"),
    ("linear_ramp", {"width": "0.1"}, TypeError, "not '0.1'$"),
    ("linear_ramp", {"width": lambda progress: None}, TypeError, "width of 'linear_ramp' .* fails at 1: float"),
    ("linear_ramp", {"width": lambda: 1}, TypeError, "width of 'linear_ramp' .* fails at 1: .* takes 0 positional"),
]


@pytest.mark.parametrize(
    ("name", "parameters", "error", "message"), BAD, ids=lambda value: str(value).partition("<function")[0][:40]
)
def test_bad_input_is_refused(name, parameters, error, message):
    with pytest.raises(error, match=message):
        make(name, **parameters)


def test_a_name_is_taken_once():
    with pytest.raises(ValueError, match="'step' is already taken"):
        register("step")(lambda ratio, advantages, clip_range: ratio)
    with pytest.raises(ValueError, match="'spo' is already taken"):
        register("mine", "spo")(lambda ratio, advantages, clip_range: ratio)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((3,), ValueError, "the name of a coefficient must be a text without .* not 3"),
        (("mine", ""), ValueError, "must be a text without .* not ''"),
        (("module:function",), ValueError, "must be a text without colon, .* not 'module:function'"),
        ((lambda ratio, advantages, clip_range: ratio,), TypeError, "register needs a name: @register"),
    ],
)
def test_what_is_no_name(arguments, error, message):
    with pytest.raises(error, match=message):
        register(*arguments)


def test_ranges_are_of_parameters():
    class Limited:
        def __init__(self, limit):
            self.limit = limit

        def __call__(self, ratio, advantages, clip_range, *, width=0.1):
            return 0 * ratio

    for wrong, hint in (("wdth", ". Did you mean 'width'"), ("ratio", "."), ("self", ".")):
        with pytest.raises(
            TypeError, match=rf"search of the coefficient 'mine' has '{wrong}', which is no parameter of it\{hint}"
        ):
            register("mine", search={"limit": (1.0, 2.0), wrong: (0.1, 1.0)})(Limited)
    with pytest.raises(ValueError, match="'mine' is not a coefficient"):
        make("mine")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"saerch": {"width": (0.1, 1.0)}}, TypeError, "register has no argument 'saerch', .* Did you mean 'search'"),
        ({"sources": "a paper"}, TypeError, "register has no argument 'sources', .* Did you mean 'source'"),
        ({"other": 3}, TypeError, "register has no argument 'other', and a further name presets parameters by a dict"),
        ({"other": {"wdth": 1}}, TypeError, "other of the coefficient 'mine' has 'wdth', .* Did you mean 'width'"),
        ({"search": {"width": (1, 0)}}, ValueError, r"'width' must have \(low, high\) with 0 < low <= high, not \(1, 0\)"),
        ({"search": {"width": (0, 1)}}, ValueError, r"with 0 < low <= high, not \(0, 1\)"),
        ({"search": {"width": 3}}, ValueError, "with 0 < low <= high, not 3"),
        ({"search": {"width": ("0.3", "0.5")}}, ValueError, "with 0 < low <= high, not"),
        ({"search": {"width": (0.3, math.inf)}}, ValueError, "with 0 < low <= high, not"),
        ({"search": ["width"]}, TypeError, r"search of the coefficient 'mine' must be a dict of ranges, not \['width'\]"),
    ],
)
def test_declarations_that_are_wrong(arguments, error, message):
    def mine(ratio, advantages, clip_range, *, width=0.1):
        return 0 * ratio

    with pytest.raises(error, match=message):
        register("mine", **arguments)(mine)
    with pytest.raises(TypeError, match="the coefficient 'mine' must be a function or a class, not 3"):
        register("mine")(3)
    with pytest.raises(TypeError, match="coefficient 'mine' must be written in Python"):
        register("mine")(th.zeros_like)
    assert not {"mine", *arguments} & {*available()}


def test_registering_anew_leaves_nothing_of_before(monkeypatch):
    """As where a cell of a notebook is edited and run again."""
    monkeypatch.setattr(registry, "_WORDS", dict(registry._WORDS))
    for alias in ("before", "now"):

        @register("edited", alias)
        def edited(ratio, advantages, clip_range):
            return 0 * ratio

    assert [entry.aliases for entry in entries() if entry.name == "edited"] == [{"now": {}}]
    assert make("now").name == "edited"
    with pytest.raises(ValueError, match="'before' is not a coefficient"):
        make("before")


def test_making_of_a_coefficient_again():
    coefficient = make("linear_ramp", width=0.3)
    assert make(coefficient) is coefficient
    assert isinstance(coefficient, Coefficient)
    assert repr(make(coefficient, width=0.4)) == "linear_ramp(width=0.4)"


# -- what is known of each ---------------------------------------------------------------------------------------------


def test_every_coefficient_says_what_it_is_and_where_it_is_from():
    of_the_package = [entry for entry in entries() if entry.function.__module__.startswith("sb3_klip.")]
    assert {entry.name for entry in of_the_package} == set(available())
    for entry in of_the_package:
        assert entry.formula, entry.name
        assert entry.source, entry.name
        assert f"``{entry.formula}``. Source: {entry.source}." in inspect.getdoc(entry.function)
    # Each stands in one of the modules that tables go through.
    modules = [module.__name__ for module in FAMILY]
    assert {entry.function.__module__ for entry in of_the_package} == set(modules)
    assert all(inspect.getdoc(module).splitlines()[0] for module in FAMILY)


@pytest.mark.parametrize("entry", [entry for entry in entries() if entry.search], ids=lambda entry: entry.name)
def test_search_ranges_are_allowed(entry):
    for name, (low, high) in entry.search.items():
        assert 0 < low < high  # on a logarithmic scale
        for value in (low, high):
            assert make(entry.name, **{name: value}).values[name] == value


def test_aliases_belong_to_their_coefficient():
    for entry in entries():
        for alias, presets in entry.aliases.items():
            assert make(alias).parameters == make(entry.name, **presets).parameters


def test_a_coefficient_of_the_users_own_is_an_entry():
    @register("half", "mine", formula="1/2", source="me", search={"by": (0.1, 1.0)})
    def half(ratio, advantages, clip_range, *, by=0.5):
        """Half of it."""
        return th.full_like(ratio, by)

    (entry,) = (entry for entry in entries() if entry.name == "half")
    assert (entry.formula, entry.source, entry.search, entry.function) == ("1/2", "me", {"by": (0.1, 1.0)}, half)
    assert half.__doc__ == "Half of it.\n\nRemoval: ``1/2``. Source: me."
    assert make("mine").name == "half"


# -- classes, and objects ----------------------------------------------------------------------------------------------


class Counting:
    """Learns how many updates there were; made with a step."""

    def __init__(self, step, start=0):
        self.step, self.start = step, start
        self.count = start

    def __call__(self, ratio, advantages, clip_range, *, scale=1.0):
        return th.full_like(ratio, scale)

    def end_update(self, kl, *, scale):
        self.count += self.step

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


NAME = f"{Counting.__module__}:Counting"


def test_a_class_takes_arguments_of_its_constructor():
    coefficient = make(NAME, step=3, scale=0.5)
    assert coefficient.parameters == {"step": 3, "start": 0, "scale": 0.5}
    assert coefficient.values == {"scale": 0.5}
    coefficient.end_update(0.0)
    assert coefficient.state_dict() == {"count": 3}
    with pytest.raises(TypeError, match=r"needs 'step' in beta_kwargs, for the constructor of Counting"):
        make(NAME, scale=0.5)
    takes = r"It takes: step \(required\); start \(.*default 0\); scale \(.*\)"
    with pytest.raises(TypeError, match=f"no parameter 'stp'. Did you mean 'step'. {takes}"):
        make(NAME, step=3, stp=1)


def test_a_class_whose_defaults_do_not_work(monkeypatch):
    monkeypatch.setattr(registry, "_WORDS", dict(registry._WORDS))

    @register("needs_a_width")
    class Ramp:
        def __call__(self, ratio, advantages, clip_range, *, width=0.0):
            return (ratio - 1) / width

    assert make("needs_a_width", width=0.5).values == {"width": 0.5}
    with pytest.raises(ValueError, match="must be finite"):
        make("needs_a_width")


def test_a_module_may_have_the_name_of_a_coefficient(tmp_path, monkeypatch):
    (tmp_path / "adaptive.py").write_text("def mine(ratio, advantages, clip_range):\n    return 0 * ratio\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert make("adaptive:mine").name == "adaptive:mine"
    with pytest.raises(ValueError, match=r"'adaptive:yours' is not a coefficient. adaptive has no function yours"):
        make("adaptive:yours")


def test_a_factory_returns_a_coefficient(monkeypatch):
    monkeypatch.setattr(registry, "_WORDS", dict(registry._WORDS))
    register("made", factory=True)(lambda: lambda ratio, advantages, clip_range: 0 * ratio)
    with pytest.raises(TypeError, match="the factory of coefficient 'made' must return a Coefficient, not <function"):
        make("made")


def test_a_class_itself_is_no_coefficient():
    message = r"Counting is a class: give an instance, Counting\(…\), or its name, beta='.*:Counting'\. An instance is called"
    with pytest.raises(TypeError, match=message):
        make(Counting)


def test_other_parameters_keep_what_was_learned_and_leave_the_other_alone():
    first = make(NAME, step=2, scale=0.5)
    first.end_update(0.0)
    second = make(first, scale=0.25)
    assert (first.values, second.values) == ({"scale": 0.5}, {"scale": 0.25})
    second.end_update(0.0)
    assert (first.state_dict(), second.state_dict()) == ({"count": 2}, {"count": 4})
    third = make(first, step=10)  # an argument of the constructor
    third.end_update(0.0)
    assert third.parameters == {"step": 10, "start": 0, "scale": 0.5}
    assert (first.state_dict(), third.state_dict()) == ({"count": 2}, {"count": 12})


def test_an_object_is_copied():
    mine = Counting(1)
    coefficients = [make(mine), make(mine)]
    coefficients[0].end_update(0.0)
    assert [each.state_dict()["count"] for each in coefficients] == [1, 0]
    assert mine.count == 0
    assert coefficients[0].name == NAME
