"""The figures of a report, from results that are made up here."""

import re

import pytest
from small_suites import made_up_result, write_results

from sb3_klip.experiments import report
from sb3_klip.experiments.__main__ import main


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch):
    """The bootstrap takes the time."""
    monkeypatch.setattr(report, "RESAMPLES", 200)


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


def test_many_methods_have_a_column_each_against_step(tmp_path):
    methods = ("step", "linear_ramp", "sigmoid", "soft_min", "asymmetric")
    results = [made_up_result(task, method, 0, 2000) for task in ("Hopper-v4", "Walker2d-v4") for method in methods]
    curves = write_results(tmp_path, results[:4], "coefficients") / "figures" / "learning_curves.svg"
    assert main(["report", str(curves.parents[1])]) == 0
    assert "method of the column" not in curves.read_text()
    folder = write_results(tmp_path, results[:-1], "coefficients")  # the last panel has step only
    assert main(["report", str(folder)]) == 0
    texts = re.findall("<!-- (.*) -->", curves.read_text())
    assert {"Hopper-v4", "Walker2d-v4", "method of the column", *methods} <= set(texts)
    assert all(texts.count(method) == 1 for method in methods)  # step in the legend, the others above their columns


def test_figures_of_sweeps(tmp_path):
    methods = ("clip_range=0.2", "clip_range=0.1", "fixed=0.3", "fixed=1")
    folder = write_results(
        tmp_path, [made_up_result("CartPole-v1", method, 0, 300 + i) for i, method in enumerate(methods)], "knobs"
    )
    assert main(["report", str(folder)]) == 0
    drawn = {path.stem for path in (folder / "figures").glob("*.svg")}
    assert {"sweep_of_clip_range", "sweep_of_fixed"} <= drawn
    assert not drawn & {"learning_curves", "partition", "beta"}  # no lines of step
