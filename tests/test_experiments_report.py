"""The tables and statistics of a report, from results that are made up here."""

import contextlib
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rliable import metrics
from small_suites import made_up_result, write_results

from sb3_klip.experiments import report
from sb3_klip.experiments.__main__ import main
from sb3_klip.experiments.results import POINTS

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch, request):
    """The bootstrap takes the time, and no test but that of the committed reports looks at its last digits."""
    if request.node.get_closest_marker("slow") is None:
        monkeypatch.setattr(report, "RESAMPLES", 200)


def table(text: str, after: str) -> list[list[str]]:
    """The rows of the first table after some text, without its header."""
    rows = text[text.index(after) :].split("\n| ", 1)[1].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("| ").split(" | ")] for row in rows]


def test_means_and_standard_deviations(tmp_path, capsys):
    results = [made_up_result("Hopper-v4", "step", seed, final) for seed, final in enumerate((2000, 2400, 2800))]
    results += [made_up_result("Hopper-v4", "fixed", 0, 2616), made_up_result("CartPole-v1", "step", 0, 500)]
    folder = write_results(tmp_path, results)
    assert main(["report", str(folder)]) == 0
    text = (folder / "report.md").read_text()
    assert text in capsys.readouterr().out
    # One third of the squared deviations would be 327; seeds are a sample, so it is one half of them.
    assert table(text, "## Return in the last") == [
        ["Hopper-v4", "2400 ± 400 (3)", "2616 (1)"],
        ["CartPole-v1", "500 (1)", "–"],
    ]


def test_against_the_paper(tmp_path):
    hopper = [made_up_result("Hopper-v4", "step", seed, final) for seed, final in enumerate((2000, 2400, 2800))]
    ant = [made_up_result("Ant-v4", "fixed", seed, final) for seed, final in enumerate((100, 110))]
    folder = write_results(
        tmp_path,
        [*hopper, *ant, made_up_result("Walker2d-v4", "adaptive", 0, 4014), made_up_result("Walker2d-v4", "step", 0, 3000)],
    )
    main(["report", str(folder)])
    rows = table((folder / "report.md").read_text(), "## Against the paper")
    assert rows == [
        ["Hopper-v4", "step", "3", "2400 ± 400", "2598 ± 278", "yes"],
        ["Walker2d-v4", "step", "1", "3000", "3717 ± 425", "no"],
        ["Walker2d-v4", "adaptive", "1", "4014", "3639 ± 374", "no"],  # one more than the interval's end
        ["Ant-v4", "fixed", "2", "105 ± 7", "16 ± 16", "no"],
    ]


def test_peak_kill_fractions():
    frame = pd.DataFrame(
        {"task": ["Hopper-v4", "Hopper-v4", "CartPole-v1"], "method": "step", "peak_kill_fraction": [0.1, 0.2, 0.05]}
    )
    rows = report.kill_table(frame).to_numpy().tolist()
    assert rows == [["CartPole-v1", "0.050", "–"], ["Hopper-v4", "0.150", "0.107"]]


@pytest.mark.parametrize(("digest", "status", "verdict"), [("same", 0, "yes"), ("other", 1, "**no**")])
def test_identity_cell_by_cell(tmp_path, digest, status, verdict):
    cells = [made_up_result("Hopper-v4", "step", 0, 2000, "same"), made_up_result("Hopper-v4", "step", 1, 2000, "another")]
    folder = write_results(
        tmp_path, [*cells, made_up_result("Hopper-v4", "ppo", 0, 2000, digest), made_up_result("CartPole-v1", "ppo", 3, 500)]
    )
    assert main(["report", str(folder)]) == status
    # The seed that only step has run, and the task that only PPO has, are not compared.
    assert table((folder / "report.md").read_text(), "cell by cell") == [["Hopper-v4", "0", str(POINTS), verdict]]


def frame_of(finals: dict[tuple[str, str], list[float]], first: float = 0.0) -> pd.DataFrame:
    rows = [
        {"task": task, "method": method, "seed": seed, "final_return": final, "first_return": first}
        for (task, method), values in finals.items()
        for seed, final in enumerate(values)
    ]
    frame = pd.DataFrame(rows)
    return frame.assign(task=pd.Categorical(frame["task"]), method=pd.Categorical(frame["method"]))


def test_scores_are_zero_at_the_start_and_one_where_the_reference_ends():
    finals = {("A", "step"): [90.0, 110.0], ("A", "fixed"): [60.0, 160.0], ("B", "step"): [1000.0, 3000.0]}
    tasks, scores = report.score_matrices(frame_of({**finals, ("B", "fixed"): [2000.0, 10.0]}, first=10.0))
    assert tasks == ["A", "B"]
    np.testing.assert_allclose(scores["step"], [[80 / 90, 990 / 1990], [100 / 90, 2990 / 1990]])
    np.testing.assert_allclose(scores["fixed"], [[50 / 90, 1.0], [150 / 90, 0.0]])


def test_scores_take_the_seeds_that_a_method_has_on_every_task():
    finals = {("A", "step"): [1.0, 2.0, 3.0], ("A", "fixed"): [1.0, 2.0], ("B", "step"): [1.0, 2.0], ("B", "fixed"): [1.0]}
    tasks, scores = report.score_matrices(frame_of(finals))
    assert tasks == ["A"]
    assert {method: matrix.shape for method, matrix in scores.items()} == {"step": (3, 1), "fixed": (2, 1)}
    statistics = report.aggregate_table(scores, "step").set_index("method")
    assert dict(statistics["seeds"]) == {"step": 3, "fixed": 2}
    # Of the six pairs, one is won (2 > 1), and two are equal, which counts half.
    assert statistics.loc["fixed", "probability of improvement over step"].startswith("0.33 [")
    _, scores = report.score_matrices(frame_of({**finals, ("B", "fixed"): [1.0, 5.0, 6.0]}))
    assert {matrix.shape for matrix in scores.values()} == {(2, 2)}


def test_no_scores_where_the_reference_learns_nothing():
    finals = {(task, method): [50.0, 60.0] for task in ("A", "B") for method in ("step", "fixed")}
    frame = frame_of(finals, first=10.0)
    frame.loc[frame["task"] == "A", "first_return"] = 100.0
    assert report.score_matrices(frame)[0] == ["B"]
    frame["first_return"] = np.nan
    assert report.score_matrices(frame) == ([], {})


def test_runs_without_a_final_return_are_left_out_of_the_statistics():
    frame = frame_of({("A", "step"): [np.nan, 2.0, 3.0], ("A", "fixed"): [1.0, np.nan, 2.0]})
    _, scores = report.score_matrices(frame)
    np.testing.assert_allclose(scores["fixed"][:, 0], np.array([1.0, 2.0]) / 2.5)
    assert "nan" not in report._by_task(frame)


def test_no_statistics_of_single_seeds(tmp_path):
    assert report.score_matrices(frame_of({("A", "step"): [1.0], ("A", "fixed"): [2.0]})) == ([], {})
    folder = write_results(
        tmp_path, [made_up_result("Hopper-v4", "step", 0, 2000), made_up_result("Hopper-v4", "fixed", 0, 2616)]
    )
    assert main(["report", str(folder)]) == 0
    text = (folder / "report.md").read_text()
    assert "No cell has more than one seed yet." in text
    assert "confidence" not in text


def test_aggregates_are_rliables():
    generator = np.random.default_rng(0)
    scores = {"step": generator.normal(1.0, 0.1, (5, 3)), "better": generator.normal(2.0, 0.1, (5, 3))}
    rows = {row[0]: row[1:] for row in report.aggregate_table(scores, "step").to_numpy().tolist()}
    assert rows["step"][2] == "–"
    assert rows["better"][2] == "1.00 [1.00, 1.00]"
    point, interval = rows["better"][1].split(" ", 1)
    assert float(point) == round(float(metrics.aggregate_iqm(scores["better"])), 2)
    low, high = json.loads(interval)
    assert low <= float(point) <= high
    assert low < high


def test_only_ppo(tmp_path):
    folder = write_results(tmp_path, [made_up_result("Hopper-v4", "ppo", 0, 2000)])
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert main(["report", str(folder)]) == 0
    assert "| Hopper-v4 | 2000 (1) |" in said.getvalue()


def test_a_run_without_episodes_in_its_last_tenth(tmp_path):
    unfinished = made_up_result("Hopper-v4", "step", 0, 2000)
    unfinished.about["final_return"] = None
    unfinished.curve.loc[POINTS // 2 :, "return"] = np.nan
    folder = write_results(
        tmp_path, [unfinished, made_up_result("Hopper-v4", "fixed", 0, 1000), made_up_result("Hopper-v4", "step", 1, 3000)]
    )
    assert main(["report", str(folder)]) == 0
    assert table((folder / "report.md").read_text(), "## Return in the last") == [["Hopper-v4", "3000 (1)", "1000 (1)"]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("suite", "in_report", "in_docs"),
    [
        ("paper", "## Against the paper", "## The paper's table"),
        ("coefficients", "## Return in the last", "## Beyond the paper's coefficients"),
        ("knobs", None, None),
    ],
)
def test_committed_report_and_the_documentation_are_of_the_committed_results(tmp_path, suite, in_report, in_docs):
    committed = ROOT / "results" / suite
    folder = shutil.copytree(committed, tmp_path / suite, ignore=shutil.ignore_patterns("runs", "figures"))
    assert main(["report", str(folder)]) == 0
    text = (folder / "report.md").read_text()
    assert text == (committed / "report.md").read_text()
    if in_docs:
        assert table((ROOT / "docs/results.md").read_text(), in_docs) == table(text, in_report)


def test_refuses_what_is_no_suite(tmp_path, capsys):
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    assert "is not the folder of a suite" in capsys.readouterr().err
    folder = write_results(tmp_path, [])
    assert main(["report", str(folder)]) == 2
    assert "no finished cells yet" in capsys.readouterr().err
    damaged = folder / "results" / "Hopper-v4" / "step" / "seed-0.csv"
    damaged.parent.mkdir(parents=True)
    damaged.write_text("# {not json\n")
    assert main(["report", str(folder)]) == 2
    assert str(damaged) in capsys.readouterr().err


@pytest.mark.parametrize("content", ["{not json", "{}", "3"])
def test_refuses_a_damaged_description(tmp_path, capsys, content):
    folder = write_results(tmp_path, [made_up_result("Hopper-v4", "step", 0, 2000)])
    (folder / "suite.json").write_text(content)
    assert main(["report", str(folder)]) == 2
    assert f"{folder / 'suite.json'} is damaged: " in capsys.readouterr().err


def test_only_trainings_on_one_kind_of_processor_are_compared():
    """Others round differently, so that a difference says nothing."""
    cells = [
        {"task": "Hopper-v4", "method": method, "seed": seed, "processor": processor, "episodes": 3, "episodes_sha256": digest}
        for method, seed, processor, digest in (
            ("ppo", 0, "one", "a"),
            ("step", 0, "one", "a"),
            ("ppo", 1, "one", "b"),
            ("step", 1, "another", "c"),
            ("ppo", 2, "one", "d"),
            ("step", 2, "one", "e"),
        )
    ]
    table = report.identity_table(pd.DataFrame(cells))
    assert table[["seed", "identical"]].values.tolist() == [[0, "yes"], [2, "**no**"]]


def test_committed_results_are_read_and_identical():
    """What the documentation shows is made from these."""
    for folder in sorted(Path(__file__).parents[1].glob("results/*/suite.json")):
        manifest, results = report.read_folder(folder.parent)
        assert manifest["suite"] == folder.parent.name
        frame = report._frame(manifest["definition"], results)
        assert report.identity_table(frame)["identical"].eq("yes").all()
