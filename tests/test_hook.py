"""The hook in torch that makes RL Zoo know this package."""

import re
import sys

import pytest
from helpers import python

import _sb3_klip_zoo_hook as hook

SMALL = ("--eval-freq", -1, "-n", 64, "-params", "n_envs:1", "n_steps:64", "batch_size:32", "n_epochs:1")


def test_import_torch_stays_silent_and_light(tmp_path):
    silent = python("-c", "import torch", cwd=tmp_path, env={"PYTHONWARNINGS": "default::RuntimeWarning"})
    assert silent.stdout + silent.stderr == ""

    show = "import sys, torch; print(sorted(sys.modules)); print([type(finder).__name__ for finder in sys.meta_path])"
    completed = python("-X", "importtime", "-c", show, cwd=tmp_path)
    modules, finders = completed.stdout.splitlines()
    assert "'ZooWatch'" in finders  # otherwise this test would not say anything
    ours = {name for name in re.findall(r"'([^']+)'", modules) if name.split(".")[0] == "sb3_klip"}
    assert ours == set()
    for name in ("rl_zoo3", "stable_baselines3", "sb3_contrib", "gymnasium", "sb3_klip.zoo"):
        assert f"'{name}'" not in modules
        assert not re.search(rf"\| +{name}$", completed.stderr, re.MULTILINE)


@pytest.mark.slow
def test_rl_zoo_works_when_registering_fails(tmp_path):
    broken = "import runpy, sys; sys.modules['sb3_klip.zoo'] = None; runpy.run_module('rl_zoo3.train', run_name='__main__')"
    completed = python("-c", broken, "--algo", "ppo", "--env", "CartPole-v1", *SMALL, cwd=tmp_path)
    assert "RuntimeWarning: sb3-klip could not register with RL Zoo" in completed.stderr
    assert (tmp_path / "logs" / "ppo" / "CartPole-v1_1" / "CartPole-v1.zip").exists()


def test_no_module_of_rl_zoo_is_run_twice(tmp_path):
    # Registering imports exp_manager. Were that done while exp_manager is looked for, there would be two of its class.
    script = """
from rl_zoo3.exp_manager import ExperimentManager
import rl_zoo3.train, rl_zoo3.exp_manager
assert rl_zoo3.train.ExperimentManager is rl_zoo3.exp_manager.ExperimentManager is ExperimentManager
assert hasattr(ExperimentManager.read_hyperparameters, "sb3_klip_patch")
assert "klip_ppo" in rl_zoo3.ALGOS
"""
    python("-c", script, cwd=tmp_path)


def test_without_the_hook(tmp_path):
    off = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    command = ("--algo", "klip_ppo", "--env", "CartPole-v1", *SMALL)
    completed = python("-m", "rl_zoo3.train", *command, cwd=tmp_path, env=off, status=2)
    assert "invalid choice: 'klip_ppo'" in completed.stderr

    python("-m", "sb3_klip.zoo", "train", *command, cwd=tmp_path, env=off)
    assert (tmp_path / "logs" / "klip_ppo" / "CartPole-v1_1" / "CartPole-v1.zip").exists()


@pytest.fixture
def misleading(tmp_path):
    """A working directory with a file ``sb3_klip.py``, such as somebody's first experiment."""
    (tmp_path / "sb3_klip.py").write_text("print('not the package')\n")
    return tmp_path


def test_a_file_of_the_packages_name_does_not_break_torch(misleading):
    completed = python("-c", "import torch; print(torch.zeros(1).item())", cwd=misleading)
    assert (completed.stdout, completed.stderr) == ("0.0\n", "")


@pytest.mark.parametrize("ends", [False, True])
def test_a_file_of_the_packages_name_does_not_break_rl_zoo(misleading, ends):
    if ends:
        (misleading / "sb3_klip.py").write_text("raise SystemExit(3)\n")
    completed = python("-m", "rl_zoo3.train", "--algo", "ppo", "--env", "CartPole-v1", *SMALL, cwd=misleading)
    reason = "SystemExit(3)" if ends else f"(sb3_klip is {misleading / 'sb3_klip.py'})"
    assert f"could not register with RL Zoo{':' if ends else ''} {reason}" in completed.stderr
    assert "Traceback" not in completed.stderr
    assert (misleading / "logs" / "ppo" / "CartPole-v1_1" / "CartPole-v1.zip").exists()


def test_the_hook_imports_the_package_when_the_zoo_asks_and_not_before(tmp_path):
    script = """
import sys, torch
import rl_zoo3.utils, rl_zoo3.exp_manager
before = [name for name in sys.modules if name.split(".")[0] == "sb3_klip"]
import rl_zoo3.train
assert before == [], before
assert "sb3_klip.zoo" in sys.modules
assert not any(type(finder).__name__ == "ZooWatch" for finder in sys.meta_path)
"""
    python("-c", script, cwd=tmp_path)


def test_the_watch_finds_nothing_and_stands_there_once(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", [each for each in sys.meta_path if not isinstance(each, hook.ZooWatch)])
    before = list(sys.meta_path)
    hook.watch_for_zoo()
    hook.watch_for_zoo()
    watch, *others = sys.meta_path
    assert others == before
    assert [watch.find_spec(name) for name in ("rl_zoo3", "rl_zoo3.utils", "sb3_klip", "train")] == [None] * 4
    assert sys.meta_path == [watch, *before]
