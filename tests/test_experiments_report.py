"""The tables and statistics of a report, from results that are made up here."""

import contextlib
import io
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from small_suites import made_up_result, write_results

from sb3_klip.experiments import paper, report, statistics
from sb3_klip.experiments.__main__ import main
from sb3_klip.experiments.results import POINTS

ROOT = Path(__file__).parents[1]
GAINS = "## Gain over `step`"


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch, request):
    """
    The bootstrap and the figures take the time.

    No test here looks at the figures, and none but that of the committed reports at the bootstrap's last digits.
    """
    if request.node.get_closest_marker("slow") is None:
        monkeypatch.setattr(statistics, "RESAMPLES", 200)
        monkeypatch.setattr(report, "save_all", lambda *arguments: {})


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
    folder = write_results(tmp_path, [*hopper, *ant, made_up_result("Walker2d-v4", "step", 0, 3000)])
    main(["report", str(folder)])
    assert table((folder / "report.md").read_text(), "## Against the paper") == [
        # Variances of the means: 400²/3 and 278²/5, so 3.2 degrees of freedom and a quantile of 3.08.
        ["Hopper-v4", "step", "3", "2400 ± 400", "2598 ± 278", "-198 [-1005, +609]", "no"],
        ["Walker2d-v4", "step", "1", "3000", "3717 ± 425", "-717", "–"],  # one seed has no interval
        ["Ant-v4", "fixed", "2", "105 ± 7", "16 ± 16", "+89 [+66, +112]", "yes"],
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


def test_two_learning_rates(tmp_path):
    """Each has its own tables; what is lost at the larger one is told beside what is published."""
    finals = {"step@3e-4": 2000.0, "quadratic@3e-4": 1500.0, "step@1e-3": 1000.0, "quadratic@1e-3": 1500.0}
    results = [
        made_up_result("Hopper-v4", method, seed, final + spread)
        for method, final in finals.items()
        for seed, spread in enumerate((-100, 0, 100))
    ]
    folder = write_results(tmp_path, results, "wide")
    assert main(["report", str(folder)]) == 0
    text = (folder / "report.md").read_text()
    at = " at learning rate {}".format
    assert table(text, f"## Return in the last 10 % of training{at('3e-4')}") == [
        ["Hopper-v4", "2000 ± 100 (3)", "1500 ± 100 (3)"]
    ]
    assert table(text, f"## Return in the last 10 % of training{at('1e-3')}") == [
        ["Hopper-v4", "1000 ± 100 (3)", "1500 ± 100 (3)"]
    ]
    # Half of it: the return rises in a line, from 0 as good as.
    assert table(text, f"## Mean return over all of training{at('1e-3')}") == [["Hopper-v4", "500 ± 50 (3)", "750 ± 50 (3)"]]
    # One scale a learning rate, that of its own step; all runs of one method are above all of the other.
    (step, quadratic) = table(text, f"## All tasks together{at('3e-4')}")
    assert (step[0], step[2].split()[0], step[3], step[5]) == ("step", "1.00", "–", "–")
    assert (quadratic[2].split()[0], quadratic[3], quadratic[5]) == ("0.75", "0.00 [0.00, 0.00]", "0.00 [0.00, 0.00]")
    assert table(text, f"## All tasks together{at('1e-3')}")[1][3] == "1.00 [1.00, 1.00]"
    # Welch: of the quotient, 1500 / 2000 and 1500 / 1000, both with a standard deviation of 100: √(1 + r²) 100/√3.
    assert table(text, GAINS + at("3e-4"))[0] == ["quadratic", "**-25 [-35, -15]**", "**-13 [-18, -7]**"]
    assert table(text, GAINS + at("1e-3"))[0] == ["quadratic", "**+50 [+19, +81]**", "**+25 [+10, +40]**"]
    shares = table(text, "## Robustness: 1e-3 against 3e-4")
    assert [(row[0], row[1], row[2].split()[0], row[3]) for row in shares] == [
        ("step", "3", "0.50", "0.455"),
        ("quadratic", "3", "1.00", "0.934"),
    ]


def test_what_the_data_exclude(tmp_path):
    finals = {"step": (1000.0, 1200.0), "sigmoid": (1010.0, 1210.0)}
    results = [
        made_up_result("Hopper-v4", method, i, final) for method, both in finals.items() for i, final in enumerate(both)
    ]
    folder = write_results(tmp_path, results, "coefficients")
    assert main(["report", str(folder)]) == 0
    # 141.4 and two degrees of freedom: 4.30 × 141.4 of 1100 are 55 %, and a little more, as the gain is above 0.
    text = (folder / "report.md").read_text()
    assert table(text, GAINS) == [["sigmoid", "+1 [-55, +56]", "+0 [-27, +28]"]]
    assert table(text, f"{GAINS} at the end, by task") == [["Hopper-v4", "+1 [-55, +56]"]]
    # Two seeds are too few for a bootstrap's interval. Of four pairs, three are won.
    assert table(text, "## All tasks together")[1][2:4] == ["1.01", "0.75"]
    assert table(text, "## Interquartile means, by task") == [["Hopper-v4", "1100", "1110"]]


def test_gains_by_task(tmp_path):
    """A loss on one task is shown where the mean over tasks shows none, on that task's own scale."""
    finals = {
        ("Hopper-v4", "step"): 1000.0,
        ("Hopper-v4", "fixed"): 1000.0,
        ("Ant-v4", "step"): 100.0,
        ("Ant-v4", "fixed"): 50.0,
    }
    results = [
        made_up_result(task, method, seed, final * (1 + spread))
        for (task, method), final in finals.items()
        for seed, spread in enumerate((-0.1, 0, 0.1) if task == "Ant-v4" else (-0.5, 0, 0.5))
    ]
    folder = write_results(tmp_path, results)
    assert main(["report", str(folder)]) == 0
    text = (folder / "report.md").read_text()
    assert table(text, f"{GAINS}\n")[0][1].startswith("-25 [-")  # not in bold
    # Welch, Hopper-v4: √(1 + 1) 50/√3 and four degrees of freedom. Ant-v4: √(5² + (0.5 · 10)²)/√3, four as well.
    assert table(text, f"{GAINS} at the end, by task") == [
        ["Hopper-v4", "+0 [-113, +113]"],
        ["Ant-v4", "**-50 [-61, -39]**"],
    ]


def test_samples_with_reuse(tmp_path):
    results = [made_up_result("Hopper-v4", method, 0, final) for method, final in (("step", 1000), ("uniform", 2000))]
    results += [made_up_result("Walker2d-v4", "step", seed, 1000) for seed in (0, 1, 2)]
    results += [made_up_result("Walker2d-v4", "optimal", seed, 500) for seed in (0, 1, 2)]
    folder = write_results(tmp_path, results, "reuse")
    assert main(["report", str(folder)]) == 0
    assert table((folder / "report.md").read_text(), "## Samples to reach the final return of `step`") == [
        ["Hopper-v4", "100", "53", "–"],
        ["Walker2d-v4", "100 [100, 100]", "–", "> 100 [> 100, > 100]"],
    ]


def test_no_statistics_of_single_seeds(tmp_path):
    folder = write_results(
        tmp_path, [made_up_result("Hopper-v4", "step", 0, 2000), made_up_result("Hopper-v4", "fixed", 0, 2616)]
    )
    assert main(["report", str(folder)]) == 0
    text = (folder / "report.md").read_text()
    assert "No cell has more than one seed yet." in text
    assert "All tasks together" not in text


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


def test_runs_without_any_episode(tmp_path):
    without = made_up_result("Hopper-v4", "step", 0, 2000)
    without.about["final_return"] = None
    without.curve["return"] = np.nan
    folder = write_results(tmp_path, [without, made_up_result("Hopper-v4", "fixed", 0, 1000)])
    assert main(["report", str(folder)]) == 0
    text = (folder / "report.md").read_text()
    assert table(text, "## Return in the last") == [["Hopper-v4", "–", "1000 (1)"]]
    assert "nan" not in text


def test_parts_in_which_no_episode_ends_are_bridged(tmp_path):
    result = made_up_result("Hopper-v4", "step", 0, 2000)
    result.curve["return"] = np.linspace(0, 990, POINTS)
    result.curve.loc[50:98, "return"] = np.nan
    folder = write_results(tmp_path, [result])
    assert main(["report", str(folder)]) == 0
    assert table((folder / "report.md").read_text(), "## Mean return over all of training") == [["Hopper-v4", "495 (1)"]]


def test_a_task_whose_first_episodes_are_long_is_compared(tmp_path):
    """With episodes of 1000 steps, none ends in the first 1 % of less than 100 000 steps."""
    results = [made_up_result("Hopper-v4", method, seed, 2000.0 + seed) for method in ("step", "fixed") for seed in range(3)]
    for result in results:
        result.curve.loc[:4, "return"] = np.nan
    folder = write_results(tmp_path, results)
    assert main(["report", str(folder)]) == 0
    assert "## All tasks together\n\nTasks: Hopper-v4." in (folder / "report.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("suite", "in_report", "in_docs"),
    [
        ("paper", "## Against the paper", "## The paper's table"),
        ("coefficients", "## Return in the last", "## Beyond the paper's coefficients"),
        ("knobs", None, None),
        ("reuse", None, None),
        ("reuse_long", None, None),
        ("wide", None, None),
        ("fast", None, None),
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


def test_a_report_that_cannot_be_written(tmp_path, capsys):
    folder = write_results(tmp_path, [made_up_result("Hopper-v4", "step", 0, 2000)])
    (folder / "report.md").mkdir()
    assert main(["report", str(folder)]) == 2
    assert f"the report of {folder} cannot be written: " in capsys.readouterr().err


@pytest.mark.parametrize("content", ["{not json", "{}", "3", '{"suite": "a", "versions": {}, "definition": {}}'])
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
        table = report.identity_table(frame)
        assert table["identical"].eq("yes").all()
        if manifest["suite"] == "paper":  # no other has PPO beside `step`
            assert len(table) == 9  # each of the seven tasks, and two of them with a second seed
            assert set(table["task"]) == set(paper.RETURNS)
