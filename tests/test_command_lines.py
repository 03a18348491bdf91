"""The command lines as they are typed: help, exit statuses, wrong arguments and Ctrl-C."""

import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from helpers import OWN_ENV_PY, eventually, python, zoo_train
from small_suites import run_suite, write_suite
from verify_results import DEFAULT, OWN_ENV, UPDATES, Result, assert_identical_result, assert_one_message, found_difference

import sb3_klip
from sb3_klip import plot
from sb3_klip.experiments.__main__ import main as experiments
from sb3_klip.verify import __main__ as verify_command
from sb3_klip.zoo.__main__ import main as zoo

# -- sb3_klip.verify ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--env", "Hoper-v4"), r"--env='Hoper-v4' is not registered\. Did you mean 'Hopper-v4'\?"),
        (("--env", "Own-v0"), "--env='Own-v0' is not registered"),
        ((*DEFAULT, "--beta", "stpe"), r"'stpe' is not a coefficient\. Did you mean 'step'\?"),
        ((*DEFAULT, "--beta", "own_env:nothing"), "'own_env:nothing' is not a coefficient"),
        (
            (*DEFAULT, "--beta", "linear_ramp", "-params", "beta_kwargs:dict(widht=1)"),
            r"no parameter 'widht'\. Did you mean 'width'\?",
        ),
        ((*DEFAULT, "--beta", "linear_ramp", "-params", "beta_kwargs:dict(width=-1)"), "width=-1 .* out of range"),
        ((*DEFAULT, "--beta", "linear_ramp", "-params", "beta_kwargs:3"), "beta_kwargs must be a dict"),
        ((*DEFAULT, "-params", "policy:MlpPolicy"), "name 'MlpPolicy' is not defined"),
        ((*DEFAULT, "-params", "learnin_rate:0.1"), r"no hyperparameter 'learnin_rate'\. Did you mean 'learning_rate'\?"),
        ((*DEFAULT, "-params", "beta:'linear_ramp'"), "-params beta:'linear_ramp': .* --beta"),
        ((*DEFAULT, "--beta", "linear_ramp", "--estimator", "analytic"), "--estimator=analytic .*'linear_ramp'"),
        ((*DEFAULT, "--beta", "broken:f"), "beta='broken:f' is not a coefficient. broken cannot be imported: NameError"),
        ((*DEFAULT, "-params", "n_epochs:0"), "n_epochs=0 must be a whole number, at least 1"),
        ((*DEFAULT, "-params", "log_kl:3"), "log_kl=3 must be True or False"),
        ((*DEFAULT, "--seed", -1), "--seed=-1 must be from 0"),
        ((*DEFAULT, "-n", 0), "--n-timesteps=0 must be at least 1"),
        ((*DEFAULT, "-n", -5), "--n-timesteps=-5 must be at least 1"),
        ((*DEFAULT, "--num-threads", 0), "--num-threads=0 must be at least 1"),
        ((*DEFAULT, "-o", "no/where.pt"), r"--output=no.where\.pt: the folder does not exist"),
        ((*DEFAULT, "-o", ".", *UPDATES), r"--output=\. is a folder"),
        ((*DEFAULT, "--gym-packages", "no_such_package"), "no_such_package cannot be imported: .*No module named"),
        ((*DEFAULT, "--gym-packages", "own_env", "broken"), "broken cannot be imported: .*NameError"),
        ((*DEFAULT, "--env-kwargs", "gravity:1"), "CartPole-v1 cannot be made: .*gravity"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_wrong_arguments_of_verify(verify, arguments, message):
    """Before any training begins."""
    Path("broken.py").write_text("nonsense")
    assert_one_message(verify(*arguments), message)


def test_an_output_of_verify_that_cannot_be_written(verify, monkeypatch):
    """Known before the trainings, and not after them."""

    def refused(dir):
        raise PermissionError(13, "Permission denied", str(dir))

    monkeypatch.setattr(verify_command.tempfile, "TemporaryFile", refused)
    assert_one_message(
        verify(*DEFAULT, "-o", "x.pt"), r"--output=x\.pt: the folder cannot be written to \(.*Permission denied"
    )


def test_help_of_verify(capsys):
    with pytest.raises(SystemExit) as exit_:
        verify_command.main(["--help"])
    assert exit_.value.code == 0
    shown = capsys.readouterr().out
    assert "exit status: 0 identical, 1 different, 2 could not be compared, 130 interrupted" in shown
    for option in vars(verify_command.parser().parse_args(["--env", "x"])):
        assert f"--{option.replace('_', '-')}" in shown


@pytest.mark.parametrize(
    "arguments",
    [(), ("--env",), ("--env", "x", "--algo", "dqn"), ("--env", "x", "-n", "many"), ("--env", "x", "--env-kwargs", "length:")],
)
def test_usage_of_verify(capsys, arguments):
    with pytest.raises(SystemExit) as exit_:
        verify_command.main(list(arguments))
    assert exit_.value.code == 2
    assert "usage: python -m sb3_klip.verify" in capsys.readouterr().err


def typed(*arguments, **kwargs):
    completed = python("-m", "sb3_klip.verify", *arguments, env={"COLUMNS": "160"}, **kwargs)
    # That Hopper-v4 is out of date.
    err = re.sub(r".*DeprecationWarning: .*is out of date.*\n.*\n", "", completed.stderr)
    return Result(completed.returncode, completed.stdout, err)


@pytest.mark.slow
def test_verify_as_it_is_typed(tmp_path):
    assert_identical_result(typed(*DEFAULT, *UPDATES, cwd=tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_verify_different_as_it_is_typed(tmp_path):
    result = typed(*DEFAULT, "--beta", "linear_ramp", "-o", tmp_path / "d.pt", *UPDATES, cwd=tmp_path, status=1)
    found_difference(result, tmp_path / "d.pt")
    assert result.err == ""  # no process has left anything behind


@pytest.mark.slow
def test_wrong_arguments_of_verify_as_it_is_typed(tmp_path):
    assert_one_message(typed("--env", "Hoper-v4", cwd=tmp_path, status=2), "Did you mean 'Hopper-v4'")


@pytest.mark.slow
@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1", "Hopper-v4"])
@pytest.mark.parametrize("hyperparams", ["zoo", "paper", "default"])
def test_whole_updates_as_they_are_typed(tmp_path, env, hyperparams):
    result = typed("--env", env, "--hyperparams", hyperparams, "-n", 4000, "--seed", 1, cwd=tmp_path)
    assert assert_identical_result(result) > 50


@pytest.mark.slow
@pytest.mark.parametrize("algo", ["ppo", "lstm", "mask"])
def test_an_environment_of_the_users_own_as_it_is_typed(tmp_path, algo):
    """In a module on PYTHONPATH, which the two processes import by themselves."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "own_env.py").write_text(OWN_ENV_PY)
    completed = python(
        *("-m", "sb3_klip.verify", *OWN_ENV, "--algo", algo, *UPDATES, "batch_size:32"),
        cwd=tmp_path,
        env={"COLUMNS": "160", "PYTHONPATH": os.pathsep.join([str(tmp_path / "modules"), os.environ.get("PYTHONPATH", "")])},
    )
    assert_identical_result(Result(0, completed.stdout, completed.stderr))


def running(pid):
    """Whether a process is there; one that has ended and waits for its parent is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def endless(tmp_path):
    """The command, training for long in a process group of its own."""
    (tmp_path / "own_env.py").write_text(f"{OWN_ENV_PY}\nPath(f'{{os.getpid()}}.imported').touch()\n")
    arguments = (*OWN_ENV, "--env-kwargs", "trouble:'tell'", "after:200", "-n", 10**7, "-params", "n_steps:64")
    process = subprocess.Popen(
        [sys.executable, "-m", "sb3_klip.verify", *map(str, arguments)],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    yield process
    with process:
        process.kill()


def pids(folder, suffix):
    return {int(path.stem) for path in folder.glob(f"*.{suffix}")}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds out in Linux's /proc whether a process is still there")
@pytest.mark.parametrize("seconds", [0.1, 0.5, 1, 2, None])
def test_verify_interrupted(endless, tmp_path, seconds):
    """While the two processes start, and are importing what they need; or train."""
    if seconds is None:
        eventually(lambda: len(pids(tmp_path, "pid")) == 2)
    else:
        eventually(lambda: len(pids(tmp_path, "imported")) == 1)
        children = Path(f"/proc/{endless.pid}/task/{endless.pid}/children")
        eventually(lambda: len(children.read_text().split()) >= 2)
        time.sleep(seconds)
    group = {int(path.name) for path in Path("/proc").glob("[0-9]*") if in_group(path, endless.pid)}
    assert len(group) >= 3
    os.killpg(endless.pid, signal.SIGINT)
    out, err = endless.communicate(timeout=60)
    assert endless.returncode == 130
    assert err == ""
    found = re.search(r"^Interrupted after (\d+) minibatches, (\d+) steps; no verdict\.$", out, re.MULTILINE)
    assert (int(found[2]) >= 128) == (seconds is None)
    eventually(lambda: not any(map(running, group)), 10)


def in_group(process, group):
    try:
        return int((process / "stat").read_text().rpartition(")")[2].split()[2]) == group
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds out in Linux's /proc whether a process is still there")
@pytest.mark.parametrize("number", ["SIGTERM", "SIGKILL"])
def test_the_two_trainings_end_with_the_command(endless, tmp_path, number):
    eventually(lambda: len(pids(tmp_path, "pid")) == 2)
    assert all(map(running, pids(tmp_path, "pid")))
    endless.send_signal(getattr(signal, number))
    endless.wait(60)
    eventually(lambda: not any(map(running, pids(tmp_path, "pid"))), 30)


# -- sb3_klip.plot -----------------------------------------------------------------------------------------------------


def test_an_interrupt_of_plot_is_quiet(monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(plot, "gradient", interrupted)
    assert plot.main(["gradient"]) == 130
    assert capsys.readouterr() == ("", "")


def test_plot_as_it_is_typed(tmp_path):
    completed = python("-m", "sb3_klip.plot", "gradient", "step", "--size", "column", cwd=tmp_path)
    assert (completed.stdout.split(), completed.stderr) == (["gradient.svg", "gradient.png"], "")


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_plot_names_the_missing_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "seaborn", None)
    monkeypatch.delitem(sys.modules, "sb3_klip.figures")
    monkeypatch.delattr(sb3_klip, "figures")
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("sb3_klip.plot", run_name="__main__")
    assert ended.value.code == 2
    expected = 'Figures need seaborn, which is not installed: pip install "sb3-klip[plots]"\n'
    assert capsys.readouterr() == ("", expected)


# -- sb3_klip.zoo ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_typo_on_the_command_line(tmp_path):
    completed = zoo_train("--env", "Hopper-v4", "-params", "beta:'stpe'", cwd=tmp_path, status=1)
    assert "Did you mean 'step'?" in completed.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_script_of_the_zoo(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sb3_klip.zoo", "trian"])
    with pytest.raises(SystemExit, match=r"unknown script 'trian'. Did you mean 'train'\?"):
        zoo()


# -- sb3_klip.experiments ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "CartPole-v1", "Hopper-v4"], "--tasks: 'Hopper-v4' is not in the suite, which has CartPole-v1."),
        (["--methods", "stpe"], "--methods: 'stpe' is not in the suite, which has ppo, step. Did you mean 'step'?"),
        (["--seeds", "0", "-1"], "--seeds"),
        (["--seeds", str(2**32)], "--seeds"),
        (["--workers", "0"], "--workers=0 must be at least 1"),
        (["--workers", "-2"], "--workers=-2 must be at least 1"),
        (["--workers", "2", "--scheduler", "tcp://localhost:8786"], "--workers starts workers here"),
    ],
)
def test_wrong_options_of_experiments(refused, tmp_path, options, message):
    assert refused("--suite", write_suite(tmp_path), "-f", "out", *options).startswith(message)


@pytest.mark.parametrize("options", [["--seeds", "a"], ["--seeds"], ["--workers", "2.5"], ["--tasks"], ["--wrkers", "2"]])
def test_options_that_experiments_do_not_have(tmp_path, capsys, options):
    with pytest.raises(SystemExit) as error:
        experiments(["run", "--suite", write_suite(tmp_path), "-f", str(tmp_path / "out"), *options])
    assert error.value.code == 2
    assert options[0] in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ModuleNotFoundError("No module named 'dask'")])
def test_experiments_interrupted_or_incomplete_before_anything_starts(tmp_path, capsys, monkeypatch, error):
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr("sb3_klip.experiments.suite.read_suite", fail)
    try:
        status = experiments(["run", "--suite", write_suite(tmp_path), "-f", str(tmp_path / "out")])
    except KeyboardInterrupt:  # it would end pytest
        pytest.fail("a traceback")
    assert status == (130 if error is KeyboardInterrupt else 2)
    missing = "No module named 'dask': experiments need more packages: pip install \"sb3-klip[experiments]\"\n"
    assert capsys.readouterr().err == ("" if error is KeyboardInterrupt else missing)


@pytest.mark.slow
def test_a_scheduler_that_does_not_answer_from_the_command_line(tmp_path):
    options = run_suite("--suite", write_suite(tmp_path), "-f", "out", "--scheduler", "tcp://127.0.0.1:9")
    completed = python(*options, cwd=tmp_path, status=2)
    assert completed.stderr.startswith("--scheduler='tcp://127.0.0.1:9' does not answer: ")
    assert "Traceback" not in completed.stderr


def test_a_coefficient_that_trainings_would_not_find(tmp_path):
    (tmp_path / "ramps.py").write_text("def ramp(ratio, advantages, clip_range):\n    return 0 * ratio\n")
    suite = write_suite(tmp_path, methods={"own": {"beta": "ramps:ramp"}})
    completed = python(*run_suite("--suite", suite, "-f", "out"), cwd=tmp_path, status=2)
    assert "'ramps:ramp' is not a coefficient" in completed.stderr
    assert "Traceback" not in completed.stderr
    assert not (tmp_path / "out").exists()
