"""The figures of a report, from results that are made up here."""

import itertools
import re

import numpy as np
import pytest
from matplotlib.figure import Figure
from small_suites import made_up_result, write_results

from sb3_klip.experiments import figures, statistics
from sb3_klip.experiments.__main__ import main


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch):
    """The bootstrap takes the time."""
    monkeypatch.setattr(statistics, "RESAMPLES", 200)


@pytest.mark.slow
def test_figures_of_the_paper_suite(tmp_path):
    results = [
        made_up_result(task, "step", seed, 2000 + 97 * seed**2) for task in ("Hopper-v4", "Ant-v4") for seed in range(5)
    ]
    results += [made_up_result(task, "fixed", seed, 1000 * seed) for task in ("Hopper-v4", "Ant-v4") for seed in range(5)]
    results.append(made_up_result("Hopper-v4", "ppo", 0, 2000))
    folder = write_results(tmp_path, results)
    assert main(["report", str(folder)]) == 0
    names = {"learning_curves", "ppo_and_klipppo", "partition", "beta", "performance_profiles"}
    files = {path.name: path.read_bytes() for path in (folder / "figures").iterdir()}
    assert set(files) == {f"{name}.{suffix}" for name in names for suffix in ("svg", "png")}
    for name in names:
        assert f"(figures/{name}.svg)" in (folder / "report.md").read_text()
    # The same results give the same files.
    before = (folder / "report.md").read_bytes()
    assert main(["report", str(folder)]) == 0
    assert (folder / "report.md").read_bytes() == before
    assert {path.name: path.read_bytes() for path in (folder / "figures").iterdir()} == files


def test_ppo_beside_step_only_where_both_are(tmp_path):
    results = [made_up_result(task, "step", 0, 2000) for task in ("Hopper-v4", "Ant-v4")]
    folder = write_results(
        tmp_path, [*results, made_up_result("Ant-v4", "ppo", 0, 2000, "other"), made_up_result("Hopper-v4", "ppo", 1, 2000)]
    )
    assert main(["report", str(folder)]) == 1
    assert "Where PPO was not run" not in (folder / "report.md").read_text()
    svg = (folder / "figures" / "ppo_and_klipppo.svg").read_text()
    assert "<!-- Ant-v4 -->" in svg
    assert "<!-- Hopper-v4 -->" not in svg


def test_many_methods_have_a_row_each_against_step(tmp_path):
    methods = ("step", "linear_ramp", "sigmoid", "soft_min", "asymmetric")
    results = [made_up_result(task, method, 0, 2000) for task in ("Hopper-v4", "Walker2d-v4") for method in methods]
    curves = write_results(tmp_path, results[:4], "coefficients") / "figures" / "learning_curves.svg"

    def texts() -> list[str]:
        assert main(["report", str(curves.parents[1])]) == 0
        return re.findall("<!-- (.*) -->", curves.read_text())

    few = texts()  # in one panel, each line with its name
    assert [few.count(name) for name in ("Hopper-v4", *methods[:4])] == [1] * 5
    write_results(tmp_path, results[:-1], "coefficients")  # one panel has step only
    many = texts()
    assert [many.count(name) for name in ("Hopper-v4", "Walker2d-v4", *methods)] == [1, 1, 4, 1, 1, 1, 0]


def test_runs_without_any_episode_have_no_line(tmp_path):
    runs = [made_up_result("Hopper-v4", "step", seed, 2000) for seed in range(2)]
    # Each has one episode, and not in the same part of training: there is no mean.
    for run, part in zip(runs, (40, 60), strict=True):
        run.curve.loc[run.curve.index != part, "return"] = np.nan
    folder = write_results(tmp_path, [*runs, made_up_result("Hopper-v4", "fixed", 0, 1000)])
    assert main(["report", str(folder)]) == 0
    assert "fixed" in (folder / "figures" / "learning_curves.svg").read_text()


def test_names_of_lines_do_not_overlap():
    axes = Figure().subplots()
    for name, values in (("a", [0, 1]), ("b", [0, 1.02]), ("c", [0, np.nan]), ("d", [5, 10])):
        axes.plot(values, label=name)
    figures._label_ends(axes, gap=0.1)
    places = {text.get_text(): text.get_position()[1] for text in axes.texts}
    assert sorted(places, key=places.__getitem__) == ["c", "a", "b", "d"]
    heights = sorted(places.values())
    assert min(high - low for low, high in itertools.pairwise(heights)) >= 0.1 - 1e-9
    assert heights[-1] <= 1  # not above the panel
    assert axes.get_legend_handles_labels() == ([], [])


def test_a_band_is_the_interval_of_the_mean():
    axes = Figure().subplots()
    runs = [made_up_result("Hopper-v4", "step", seed, final) for seed, final in enumerate((1000, 2000, 3000))]
    figures._curve(axes, runs, "step", color="black")
    band = axes.collections[0].get_datalim(axes.transData)
    assert (band.y0, band.y1) == (0, 3000)  # all three draws are the lowest run in 1 of 27, which is more than 2.5 %
    figures._curve(axes, [made_up_result("Hopper-v4", "step", seed, seed) for seed in range(5)], "step", color="black")
    assert axes.collections[1].get_datalim(axes.transData).y1 < 4


@pytest.mark.slow
def test_figures_at_each_learning_rate(tmp_path):
    methods = [f"{name}@{rate}" for name in ("step", "rollback") for rate in ("3e-4", "1e-3")]
    folder = write_results(tmp_path, [made_up_result("Hopper-v4", method, 0, 9) for method in methods], "wide")
    assert main(["report", str(folder)]) == 0
    for name in ("learning_curves", "partition", "beta"):
        for rate in ("3e-4", "1e-3"):
            file = f"figures/{name}_at_learning_rate_{rate}.svg"
            assert (folder / file).exists()
            assert f"({file})" in (folder / "report.md").read_text()


def test_figures_of_sweeps(tmp_path):
    methods = ("clip_range=0.2", "clip_range=0.1", "fixed=0.3", "fixed=1")
    folder = write_results(
        tmp_path, [made_up_result("CartPole-v1", method, 0, 300 + i) for i, method in enumerate(methods)], "knobs"
    )
    assert main(["report", str(folder)]) == 0
    drawn = {path.stem for path in (folder / "figures").glob("*.svg")}
    assert {"sweep_of_clip_range", "sweep_of_fixed"} <= drawn
    assert not drawn & {"learning_curves", "partition", "beta"}  # no lines of step
