"""Figures of coefficients and of runs."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from stable_baselines3.common.logger import TensorBoardOutputFormat

from sb3_klip import KLipPPO, figures, plot
from sb3_klip.callbacks import CSVLogCallback
from sb3_klip.coefficients import make
from sb3_klip.plot import atlas, beta, distribution, gradient, gradient_multiplier, landscape, main, read_coefficient, read_log

OWN = """
def half(ratio, advantages, clip_range, progress, *, strength=0.5):
    return strength * (ratio - 1).abs().clamp(max=1)
"""
SOME = ["step", "fixed:value=1,estimator=k3", "linear_ramp", "quadratic"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a real run of three rollouts, the log below it."""
    folder = tmp_path_factory.mktemp("run")
    model = KLipPPO("MlpPolicy", "CartPole-v1", n_steps=64, batch_size=32, n_epochs=4, learning_rate=0.01, seed=0)
    model.learn(192, callback=CSVLogCallback(folder / "deep" / "er" / "progress.csv"))
    return folder


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    plt.close("all")


@pytest.fixture
def own(tmp_path):
    """A coefficient of the user's own."""
    (tmp_path / "own_module.py").write_text(OWN)


def logged(rows, **columns):
    """A log like :func:`read_log`'s: β between -3 and 3, twice as wide in each row as in the one before."""
    data = {"time/total_timesteps": 2048 * np.arange(1, rows + 1), "train/kill_fraction": 0.2, "train/pass_fraction": 0.1}
    for level, name in zip(range(-3, 4), plot.BETAS, strict=True):
        data[name] = level * np.arange(1, rows + 1.0)
    return pd.DataFrame({**data, **columns}, index=range(rows))


@pytest.mark.parametrize(
    ("text", "ratio", "advantage", "expected"),
    [
        ("step", 1.5, 1, 0.0),  # killed
        ("step", 0.5, -1, 0.0),
        ("step", 1.5, -1, 1.5),  # passes
        ("step", 0.5, 1, 0.5),
        ("step", 1.1, -2, 1.1),  # inside
        ("fixed:value=2,estimator=k3", 1.5, 1, 0.5),  # (1.5 - 2 * 0.5) / 1
        ("fixed:value=2,estimator=k3", 1.5, -1, 2.5),  # (-1.5 - 2 * 0.5) / -1
        ("fixed:value=2,estimator=k3", 0.5, -2, 0.0),  # (-1 + 2 * 0.5) / -2
        ("fixed:value=1,estimator=k1", 1.5, -2, 1.0),  # (-3 + 1) / -2
        ("quadratic", 1.1, 1, 0.55),  # 1.1 (1 - 0.1 / 0.2)
        ("quadratic", 1.4, 3, -1.4),  # 1.4 (1 - 0.4 / 0.2)
        ("quadratic", 1.1, -1, 1.65),  # 1.1 (1 + 0.1 / 0.2)
        ("quadratic", 0.5, -2, -0.75),  # 0.5 (1 - 0.5 / 0.2)
        ("rollback:slope=1", 1.5, 1, -1.5),  # 1.5 (1 - 2)
    ],
)
def test_multiplier_by_hand(text, ratio, advantage, expected):
    _, coefficient = read_coefficient(text)
    ratio, advantage = np.full((2, 3), ratio), np.full((2, 3), float(advantage))
    np.testing.assert_allclose(gradient_multiplier(coefficient, ratio, advantage), np.full((2, 3), expected), atol=1e-6)


def test_clip_range_moves_the_band():
    _, step = read_coefficient("step")
    ratio, advantages = np.array([1.15, 1.25]), np.array([2.0, 2.0])
    np.testing.assert_allclose(beta(step, ratio, advantages), [0, -2.5])
    np.testing.assert_allclose(beta(step, ratio, advantages, 0.1), [-2.3, -2.5])
    np.testing.assert_allclose(beta(step, ratio, advantages, 0.3), [0, 0])


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    ("text", "label", "name", "parameters"),
    [
        ("step", "step", "step", {}),
        ("espo", "espo", "none", {"ratio_deviation": 0.25}),
        ("sigmoid:temperature=1e-2", "sigmoid (temperature=1e-2)", "sigmoid", {"temperature": 0.01}),
        ("linear_ramp:width=lin_0.1", "linear_ramp (width=lin_0.1)", "linear_ramp", {"width": "lin_0.1"}),
        (
            "ppo_kl:value=3,estimator=k1",
            "ppo_kl (value=3, estimator=k1)",
            "fixed",
            {"value": 3.0, "estimator": "k1"},
        ),
        ("own_module:half", "own_module:half", "own_module:half", {"strength": 0.5}),
        ("own_module:half:strength=1", "own_module:half (strength=1)", "own_module:half", {"strength": 1.0}),
    ],
)
def test_coefficients_as_they_are_written(text, label, name, parameters):
    read_as, coefficient = read_coefficient(text)
    assert (read_as, coefficient.name, coefficient.parameters) == (label, name, parameters)


def test_functions_of_one_name_are_all_drawn():
    def scaled(share):
        def own(ratio, advantages, clip_range):
            return share * (ratio - 1).abs().clamp(max=1)

        return own

    figure = gradient(scaled(0.1), scaled(0.9))
    one, other = (line.get_ydata() for line in figure.axes[0].get_lines()[1:])
    assert not np.allclose(one, other)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["own", "own"]


def test_landscape_has_the_values_in_their_places():
    figure = landscape("step", "quadratic")
    panel = figure.axes[0]
    (image,) = panel.images
    values = np.asarray(image.get_array())
    assert (panel.get_title(), image.origin, image.get_extent()) == ("step", "lower", [0, 2, -2, 2])
    assert values[-1, -1] == pytest.approx(-4, abs=0.05)  # w = 2, Â = 2
    assert values[0, 100] == pytest.approx(1, abs=0.01)  # w = 0.5, Â = -2
    assert np.count_nonzero(values[:, 161:239]) == 0  # inside the band
    assert image.norm.vmin == -image.norm.vmax
    assert {line.get_xdata()[0] for line in panel.get_lines()} == {0.8, 1.2}


def test_sign_shows_without_colour():
    figure = landscape("quadratic")
    (contours,) = figure.axes[0].collections
    assert {(level > 0, line) for level, line in zip(contours.levels, contours.linestyles, strict=True)} == {
        (True, "-"),
        (False, "--"),
    }


@pytest.mark.parametrize("count", [1, 3, 4, 6])
def test_panels_that_are_used_are_all_labelled(count):
    names = ["step", "none", "quadratic", "rollback", "sigmoid", "soft_min"][:count]
    figure = landscape(*names)
    figure.canvas.draw()
    panels = [axis for axis in figure.axes if axis.images]
    assert [panel.get_title() for panel in panels] == names
    lowest = [panel for panel in panels if panel.xaxis.get_tick_params()["labelbottom"]]
    assert len(lowest) == min(count, 3)


def test_gradient_lines_can_be_told_apart_without_colour():
    figure = gradient(*SOME)
    for panel in figure.axes:
        lines = [line for line in panel.get_lines() if len(line.get_xdata()) > 2]
        assert len({line.get_linestyle() for line in lines}) == len(SOME)
        lightness = [np.dot(to_rgb(line.get_color()), (0.299, 0.587, 0.114)) for line in lines]
        assert np.diff(lightness).min() > 0.05
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [read_coefficient(text)[0] for text in SOME]


def test_gradient_shows_both_signs_of_the_advantage():
    positive, negative = gradient("step").axes
    for panel, killed in ((positive, 1.5), (negative, 0.5)):
        line = panel.get_lines()[-1]
        ratio, multiplier = line.get_data()
        assert np.interp(killed, ratio, multiplier) == pytest.approx(0, abs=1e-6)
        assert np.interp(2 - killed, ratio, multiplier) == pytest.approx(2 - killed)
    assert (positive.get_title(), negative.get_title()) == ("Â = +1", "Â = −1")


@pytest.mark.parametrize(("text", "low", "high"), [("quadratic", -1.5, 3.0), ("fixed:value=10,estimator=k1", -9.3, 11.3)])
def test_gradient_shows_the_band_whole_and_no_more_than_is_legible(text, low, high):
    assert gradient("step", text).axes[0].get_ylim() == pytest.approx((low, high), abs=0.15)


def test_a_run_is_drawn_as_it_was_logged(run):
    log = read_log(run)
    assert len(log) == 2  # the first rollout is logged before there is an update
    assert log["train/kill_fraction"].max() > 0
    left, right = distribution(log).axes
    steps = [128, 192]
    np.testing.assert_array_equal(left.get_lines()[0].get_data(), [steps, log["train/beta_p50"]])
    for line, key in zip(right.get_lines(), ("kill", "pass"), strict=True):
        np.testing.assert_array_equal(line.get_data(), [steps, log[f"train/{key}_fraction"]])
        assert line.get_label() == f"{key} fraction"
    assert len({line.get_linestyle() for line in right.get_lines()}) == 2
    assert read_log(run / "deep" / "er" / "progress.csv").equals(log)


def test_a_table_that_is_no_log_is_refused():
    with pytest.raises(ValueError, match=r"run has no time/total_timesteps, .*: it is no log of KLip-PPO"):
        distribution(pd.DataFrame({"train/kill_fraction": [0.1]}))


def test_a_log_for_tensorboard_is_read_as_the_csv_file_is(run, tmp_path):
    log = read_log(run)
    folder = tmp_path / "runs" / "KLipPPO_1"
    writer = TensorBoardOutputFormat(str(folder))
    for row in log.to_dict("records"):
        step = int(row.pop("time/total_timesteps"))
        writer.write(row, dict.fromkeys(row, ()), step)
    writer.close()
    expected = log.reset_index(drop=True)
    pd.testing.assert_frame_equal(read_log(tmp_path), expected, check_like=True, rtol=1e-6)
    (file,) = folder.iterdir()
    pd.testing.assert_frame_equal(read_log(file), read_log(str(folder)))


def test_coefficients_as_python_has_them():
    def halved(ratio, advantages, clip_range):
        return 0.5 * (ratio > 1)

    drawn = gradient("linear_ramp:width=0.2", make("sigmoid", temperature=0.1), halved)
    labels = [text.get_text() for text in drawn.legends[0].get_texts()]
    assert labels == ["linear_ramp (width=0.2)", "sigmoid(temperature=0.1)", "halved"]
    ratio, multiplier = drawn.axes[0].get_lines()[-1].get_data()
    np.testing.assert_allclose(multiplier, np.where(ratio > 1, 0.5, 1) * ratio, rtol=1e-6)
    assert len([axis for axis in landscape().axes if axis.images]) == len(plot.DEFAULTS["landscape"])


def in_states(ratio, advantages, clip_range, kl):
    """A coefficient that is in no atlas."""
    return 0 * kl


@pytest.mark.parametrize("draw", [gradient, distribution])
def test_a_figure_from_python_is_that_of_the_command_line(draw, run, tmp_path):
    given = (run,) if draw is distribution else ()
    assert main([draw.__name__, *map(str, given), "--size", "column"]) == 0
    with figures.style("column"):
        figures.save(draw(*given, size="column"), tmp_path / "python")
    assert (tmp_path / "python.svg").read_bytes() == (tmp_path / f"{draw.__name__}.svg").read_bytes()


@pytest.mark.parametrize(
    ("draw", "error", "message"),
    [
        (
            lambda: gradient(3),
            TypeError,
            "3 is no coefficient: give a name, as 'linear_ramp:width=0.2', a Coefficient or a func",
        ),
        (lambda: landscape("step", None), TypeError, "None is no coefficient"),
        (lambda: gradient("stp"), ValueError, "Did you mean 'step'"),
        (lambda: gradient("step", clip_range=2), ValueError, "clip_range=2 must be a number between 0 and 1"),
        (lambda: gradient("step", clip_range="a"), ValueError, "clip_range='a' must be a number between 0 and 1"),
        (
            lambda: gradient("linear_ramp(width=0.1)"),
            ValueError,
            "'linear_ramp.width=0.1.' is not a coefficient. Did you mean",
        ),
        (lambda: gradient("linear_ramp:width=1,b"), ValueError, "'b' has no value; write NAME:parameter=value"),
        (lambda: gradient(make("fixed")), ValueError, "Its estimates can be: 'fixed:estimator=k3', or k1"),
        (lambda: gradient("position"), ValueError, "it also depends on position; the atlas has it"),
        (lambda: gradient(in_states), ValueError, "it also depends on kl$"),
        (lambda: atlas("step"), ValueError, "clip_range='step' must be a number"),
        (lambda: atlas(size="colum"), ValueError, "size='colum' must be one of readme, column. Did you mean 'column'"),
        (lambda: atlas(0.0), ValueError, "clip_range=0.0"),
        (lambda: distribution(3), TypeError, "run must be the path of a progress.csv, of a TensorBoard log or of a folder"),
        (lambda: distribution("nowhere"), ValueError, "run 'nowhere' does not exist"),
    ],
)
def test_python_is_told_what_to_give(draw, error, message):
    with pytest.raises(error, match=message):
        draw()


def test_bands_lie_between_their_percentiles():
    log = logged(3)
    panel = distribution(log).axes[0]
    assert [band.get_label() for band in panel.collections] == ["1–99 %", "5–95 %", "25–75 %"]
    for band, outermost in zip(panel.collections, (3, 2, 1), strict=True):
        (path,) = band.get_paths()
        last = path.vertices[path.vertices[:, 0] == 3 * 2048, 1]
        assert (last.min(), last.max()) == (-3 * outermost, 3 * outermost)


def test_means_of_many_updates():
    log = logged(250)
    figure = distribution(log)
    steps, upper = figure.axes[0].collections[0].get_paths()[0].vertices[1:85].T
    assert steps[0] == 2048 * 2
    assert upper[0] in (6, -6)
    assert len(figure.axes[1].get_lines()[0].get_xdata()) == 84
    assert figure.get_supxlabel() == "environment steps (means of 3 updates)"
    assert distribution(logged(100)).get_supxlabel() == "environment steps"


def test_weight_is_drawn_where_there_is_no_beta():
    weights = [1.0, 2.0, 4.0]
    log = logged(3, **{"train/beta_scalar": weights}, **dict.fromkeys(plot.BETAS, 0.0))
    panel = distribution(log).axes[0]
    np.testing.assert_array_equal(panel.get_lines()[0].get_ydata(), weights)
    assert panel.get_ylabel() == "b"
    # An estimate has a β of its own, and `none` has one that is 0.
    assert distribution(logged(3, **{"train/beta_scalar": weights})).axes[0].get_ylabel() == "β"
    assert distribution(logged(3, **dict.fromkeys(plot.BETAS, 0.0))).axes[0].get_ylabel() == "β"


@pytest.mark.parametrize(
    ("figure", "size"),
    [
        pytest.param(figure, size, marks=pytest.mark.slow if (figure, size) == ("atlas", "column") else ())
        for figure in plot.COMMANDS
        for size in figures.SIZES
    ],
)
def test_files(figure, size, run, tmp_path, capsys):
    arguments = [figure, *([str(run)] if figure == "distribution" else []), "--size", size]
    assert main(arguments) == 0
    assert capsys.readouterr().out.splitlines() == [f"{figure}.svg", f"{figure}.png"]
    with figures.style(size) as (width, _):
        pixels = width * plt.rcParams["savefig.dpi"]
    assert plt.imread(f"{figure}.png").shape[1] == pytest.approx(pixels, abs=1)
    assert main([*arguments, "-o", "again/and_again"]) == 0
    for suffix in ("svg", "png"):
        again = (tmp_path / "again" / f"and_again.{suffix}").read_bytes()
        assert (tmp_path / f"{figure}.{suffix}").read_bytes() == again


@pytest.mark.parametrize(("output", "stem"), [("b.c", "b.c"), ("c.png", "c"), (".", "gradient")])
def test_output(output, stem, capsys, tmp_path):
    assert main(["gradient", "step", "-o", output]) == 0
    expected = [tmp_path / f"{stem}.{suffix}" for suffix in ("svg", "png")]
    assert [tmp_path / line for line in capsys.readouterr().out.splitlines()] == expected
    assert all(path.stat().st_size > 0 for path in expected)


ERRORS = [
    ("landscap", ["FIGURE: 'landscap'", "landscape, gradient, atlas, distribution", "Did you mean 'landscape'?"]),
    ("landscape stp", ["beta='stp'", "Did you mean 'step'?", "quadratic"]),
    ("gradient no_module:function", ["beta='no_module:function'", "module:function"]),
    ("gradient sigmoid:temp=1", ["'sigmoid' has no parameter 'temp'", "Did you mean 'temperature'?"]),
    ("gradient sigmoid:temperature=hot", ["temperature of 'sigmoid'", "'hot'", "number"]),
    ("gradient sigmoid:temperature=0", ["temperature=0.0 of 'sigmoid'", "0 < value"]),
    ("gradient sigmoid:temperature=1,", ["'sigmoid' has no parameter ''", "temperature"]),
    ("gradient fixed:estimator=k2", ["estimator='k2'", "'k1', 'k3'", "Did you mean 'k3'?"]),
    ("gradient fixed", ["'fixed'", "analytic KL", "fixed:estimator=k3", "k1"]),
    ("landscape step ppo_adaptive_kl:initial=2", ["'ppo_adaptive_kl:initial=2'", "ppo_adaptive_kl:estimator=k3"]),
    ("landscape truly", ["'truly'", "analytic KL"]),
    ("landscape trust_region", ["'trust_region'", "also depends on kl", "the atlas has it"]),
    ("gradient trgppo", ["'trgppo'", "also depends on least_ratio and greatest_ratio"]),
    ("atlas step", ["unrecognized arguments: step"]),
    ("atlas --clip-range 1", ["clip_range=1.0", "between 0 and 1"]),
    ("landscape position", ["'position'", "also depends on position"]),
    ("gradient --clip-range 1", ["clip_range=1.0", "between 0 and 1"]),
    ("gradient --clip-range nan", ["clip_range=nan", "between 0 and 1"]),
    ("gradient --clip-range wide", ["--clip-range", "'wide'"]),
    ("gradient --size colum", ["--size: 'colum'", "readme, column", "Did you mean 'column'?"]),
    ("gradient --output a_file/figure", ["--output: 'a_file", "cannot be written"]),
    ("gradient -o figure.pdf", ["--output: 'figure.pdf'", "of another format than .svg and .png"]),
    ("distribution", ["RUN"]),
    ("distribution a_fil", ["run 'a_fil' does not exist", "progress.csv", "Did you mean 'a_file'?"]),
    ("distribution empty", ["run 'empty'", "none", "CSVLogCallback"]),
    ("distribution two", ["run 'two'", "exactly one", "one", "progress.csv", "other"]),
    (
        "distribution tensorboard",
        ["run 'tensorboard'", "no train/kill_fraction, ", "no log of KLip-PPO"],
    ),
    ("distribution a_file", ["run 'a_file'", "no train/kill_fraction, ", "no log of KLip-PPO"]),
    ("distribution header", ["run 'header'", "no complete row", "no update yet"]),
    ("distribution words", ["run 'words'", "no log in CSV", "high"]),
    ("distribution nothing", ["run 'nothing'", "no log in CSV"]),
    ("distribution binary", ["run 'binary'", "no log in CSV"]),
]


@pytest.mark.parametrize(("arguments", "parts"), ERRORS)
def test_errors_say_what_to_write_instead(arguments, parts, tmp_path, capsys):
    for path in ("empty", "two/one", "two/other", "tensorboard"):
        (tmp_path / path).mkdir(parents=True)
    (tmp_path / "tensorboard" / "events.out.tfevents.1").touch()
    logged(1).to_csv("two/one/progress.csv")
    logged(1).to_csv("two/other/progress.csv")
    logged(1)[:0].to_csv("header")
    logged(1, **{"train/beta_p50": "high"}).to_csv("words")
    (tmp_path / "a_file").write_text("time/total_timesteps,train/loss\n1,2\n")
    (tmp_path / "nothing").touch()
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    before = set(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as ended:
        main(arguments.split())
    captured = capsys.readouterr()
    assert (ended.value.code, captured.out) == (2, "")
    usage, _, message = captured.err.partition("error: ")
    assert usage.startswith("usage: python -m sb3_klip.plot")
    for part in parts:
        assert part in message
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.usefixtures("own")
def test_help_has_examples_that_work(capsys, run, monkeypatch):
    monkeypatch.setattr(figures, "save", lambda figure, path: [path])  # which takes the time
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert text.isascii()
    examples = [line.split()[3:] for line in text.splitlines() if line.startswith("  python -m sb3_klip.plot ")]
    assert {example[0] for example in examples} == set(plot.COMMANDS)
    replaced = {"my_run": str(run), "my_package.my_module:my_function": "own_module:half"}
    for example in examples:
        assert main([replaced.get(word, word) for word in example]) == 0
