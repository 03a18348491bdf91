"""Suites: those that come with the package, one of your own, and all mistakes in it at once."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import yaml
from small_suites import SUITE, TINY, write_suite

from sb3_klip.experiments.cell import Cell
from sb3_klip.experiments.suite import check_models, included, read_suite, select


def test_all_included_suites_can_be_run():
    assert included() == ["coefficients", "fast", "knobs", "paper", "reuse", "reuse_long", "smoke", "wide"]
    for name in included():
        suite = read_suite(name)
        check_models(suite, suite.cells)
        assert suite.name == name
        names = [cell.name for cell in suite.cells]
        assert len(set(names)) == len(names) == len({cell.result_file(Path()) for cell in suite.cells})


# -- a suite of your own -----------------------------------------------------------------------------------------------


def test_cells_of_a_suite(tmp_path):
    suite = read_suite(write_suite(tmp_path))
    assert suite.name == "mine"
    assert [(cell.seed, cell.method) for cell in suite.cells] == [(0, "ppo"), (0, "step"), (1, "ppo"), (1, "step")]
    assert suite.cells[1] == Cell(
        "CartPole-v1", "step", 0, "klip_ppo", SUITE["hyperparams"], 512, True, {"beta": "step", **TINY}
    )


def test_a_method_may_have_no_hyperparameters_of_its_own(tmp_path):
    assert [cell.hyperparams for cell in read_suite(write_suite(tmp_path, methods={"plain": {}}, seeds=[3])).cells] == [{}]


def test_selection(tmp_path):
    suite = read_suite(write_suite(tmp_path, tasks=["CartPole-v1", "Hopper-v4"]))

    def names(*selection: Sequence[Any]) -> list[str]:
        return [cell.name for cell in select(suite, *selection)]

    assert names([], [], []) == [cell.name for cell in suite.cells]
    assert names(["Hopper-v4"], ["ppo"], []) == ["Hopper-v4/ppo/seed-0", "Hopper-v4/ppo/seed-1"]
    assert names(["Hopper-v4"], ["ppo"], [7, 1]) == ["Hopper-v4/ppo/seed-7", "Hopper-v4/ppo/seed-1"]
    assert names(["Hopper-v4"], ["ppo"], [7, 7]) == ["Hopper-v4/ppo/seed-7"]
    assert len(names([], [], [5])) == 4


@pytest.mark.parametrize("task", ["CartPoleNoVel-v1", "BreakoutNoFrameskip-v4"])
def test_tasks_are_those_that_rl_zoo_knows(tmp_path, task):
    (tmp_path / "tuned.yml").write_text(
        "default: {policy: MlpPolicy, n_timesteps: 100}\natari: {policy: CnnPolicy, n_timesteps: 300}\n"
    )
    suite = read_suite(write_suite(tmp_path, hyperparams="tuned.yml", tasks=[task], timesteps=None))
    # RL Zoo has an entry for all Atari games.
    assert {cell.timesteps for cell in suite.cells} == {300 if "Breakout" in task else 100}


def test_a_slash_in_the_name_of_a_task_is_no_folder(tmp_path):
    gym.register("some/CartPole-v1", entry_point="gymnasium.envs.classic_control:CartPoleEnv")
    try:
        (cell, *_) = read_suite(write_suite(tmp_path, tasks=["some/CartPole-v1"])).cells
    finally:
        del gym.registry["some/CartPole-v1"]
    assert cell.result_file(tmp_path).parents[2] == tmp_path / "results"
    assert cell.command()[cell.command().index("--env") + 1] == "some/CartPole-v1"


def test_what_rl_zoo_takes_for_itself_may_be_of_a_method(tmp_path):
    method = {"env_kwargs": {"sutton_barto_reward": True}, "monitor_kwargs": {}, "n_envs": 2}
    assert read_suite(write_suite(tmp_path, methods={"own": method}, seeds=[0])).cells[0].hyperparams == method


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_all_mistakes_at_once(refused, tmp_path):
    methods = {
        "algorithm": {"algo": "klip_pppo"},
        "coefficient": {"beta": "stpe"},
        "parameter": {"beta": "linear_ramp", "beta_kwargs": {"widht": 0.1}},
        "value": {"beta": "linear_ramp", "beta_kwargs": {"width": -1}},
        "hyperparameter": {"learning_rat": 1},
        "plain": {"algo": "ppo", "beta": "step"},
        "taken": {"seed": 3},
        "number": 3,
        "fol/der": {},
        ".hidden": {},
        "end.": {},
        "clip:0.1": {},
        "right": {},
    }
    message = refused("--suite", write_suite(tmp_path, tasks=["Hoper-v4", "CartPole-v1"], methods=methods))
    first, *lines = message.splitlines()
    assert first == f"the suite {tmp_path / 'mine.yml'} cannot be run:"
    for line, expected in zip(
        lines,
        (
            "unknown task 'Hoper-v4'. Did you mean 'Hopper-v4'?",
            "method 'algorithm': algo='klip_pppo' must be one of ",
            "'stpe' is not a coefficient. Did you mean 'step'?",
            "'linear_ramp' has no parameter 'widht'. Did you mean 'width'?",
            "width=-1 of 'linear_ramp' is out of range",
            "klip_ppo has no hyperparameter 'learning_rat'. Did you mean 'learning_rate'?",
            "ppo has no hyperparameter 'beta'.",
            "klip_ppo has no hyperparameter 'seed'.",
            "method 'number' must be a mapping of hyperparameters, not 3",
            "method 'fol/der' names a folder",
            "method '.hidden' names a folder",
            "method 'end.' names a folder",
            "method 'clip:0.1' names a folder",
        ),
        strict=True,
    ):
        assert line.startswith("  - ")
        assert expected in line


def test_models_that_can_be_made(tmp_path):
    """As RL Zoo makes them, and without a change of what they are made with."""
    hyperparams = {"n_timesteps": 100, "policy": "MlpPolicy", "policy_kwargs": {"net_arch": [8]}}
    methods = {
        "a2c": {"algo": "a2c"},
        "own": {"policy": "stable_baselines3.common.policies.ActorCriticPolicy"},
        "falling": {"learning_rate": "lin_3e-4", "clip_range": "lin_0.2"},
        "wrapped": {"env_wrapper": "no.such.Wrapper"},
        "sac": {"algo": "sac", "buffer_size": 10},
    }
    (tmp_path / "tuned.yml").write_text(yaml.safe_dump({"default": hyperparams}))
    suite = read_suite(write_suite(tmp_path, hyperparams="tuned.yml", tasks=["Pendulum-v1"], methods=methods))
    before = copy.deepcopy((suite.cells, suite.definition))
    check_models(suite, suite.cells)
    assert (suite.cells, suite.definition) == before


def test_a_key_that_is_twice_in_the_hyperparameters(refused, tmp_path):
    suite = write_suite(tmp_path, hyperparams="tuned.yml")
    (tmp_path / "tuned.yml").write_text("default: {n_timesteps: 100, policy: MlpPolicy, gamma: 0.9, gamma: 0.8}\n")
    assert "hyperparams='tuned.yml' cannot be read: the key 'gamma' is there twice" in refused("--suite", suite)


def test_what_a_model_refuses_is_known_at_the_start(refused, tmp_path):
    methods = {
        "discrete": {"beta": "mass_adaptive"},
        "narrow": {"beta": "quadratic", "clip_range": 0},
        "large": {"reuse": 10**6},
        "recurrent": {"algo": "klip_ppo_lstm", "policy": "MlpLstmPolicy", "reuse": 2},
        "single": {"batch_size": 1},
        "falling": {"learning_rate": -1},
        "images": {"policy": "CnnPolicy"},
        "argument": {"policy_kwargs": "dict(net_arc=[64])"},
        "text": {"policy_kwargs": "dict(net_arch=[64"},
        "buffer": {"rollout_buffer_kwargs": "dict()"},
        "clip": {"clip_range_vf": -1},
        "right": {"n_envs": 8, "n_steps": 1, "batch_size": 8, "policy_kwargs": "dict(net_arch=[8], activation_fn=nn.ReLU)"},
    }
    suite = write_suite(tmp_path, tasks=["Pendulum-v1"], hyperparams="tuned.yml", methods=methods)
    (tmp_path / "tuned.yml").write_text("default: {n_timesteps: 100, policy: MlpPolicy}\n")
    lines = refused("--suite", suite).splitlines()[1:]
    for line, expected in zip(
        lines,
        (
            "'discrete' on Pendulum-v1: ValueError: beta=mass_adaptive",
            "'narrow' on Pendulum-v1: ValueError: clip_range=0 must be positive for beta=quadratic()",
            "'large' on Pendulum-v1: ValueError: ",
            "'recurrent' on Pendulum-v1: ",
            "'single' on Pendulum-v1: AssertionError: ",
            "'falling' on Pendulum-v1: ValueError: Invalid learning rate: -1",
            "'images' on Pendulum-v1: AssertionError: ",
            "'argument' on Pendulum-v1: TypeError: ",
            "'text' on Pendulum-v1: SyntaxError: ",
            "'buffer' on Pendulum-v1: TypeError: ",
            "'clip' on Pendulum-v1: AssertionError: ",
        ),
        strict=True,
    ):
        assert line.startswith(f"  - method {expected}")
    assert refused("--suite", suite, "--methods", "text", "right").count("  - ") == 1
    (tmp_path / "tuned.yml").write_text("default: {n_timesteps: 100}\n")
    suite = write_suite(tmp_path, hyperparams="tuned.yml", methods={"plain": {}})
    assert "'plain' on CartPole-v1: TypeError: KLipPPO.__init__() missing" in refused("--suite", suite)


def test_a_mistake_of_the_whole_hides_none_of_the_parts(refused, tmp_path):
    suite = write_suite(tmp_path, tasks=["CartPole-v1", "Nope-v1"], methods={"mine": {"beta": "stpe"}}, seeds=[0, -1])
    lines = refused("--suite", suite).splitlines()[1:]
    for line, expected in zip(lines, ("seeds must be", "unknown task 'Nope-v1'", "'stpe' is not a coefficient"), strict=True):
        assert expected in line


def test_all_mistakes_of_the_whole_at_once(refused, tmp_path):
    (tmp_path / "mine.yml").write_text("tsks: [CartPole-v1]\nseeds: [a]\nmethods: []\nhyperparams: 3\ntimesteps: -5\n")
    lines = refused("--suite", "mine.yml").splitlines()[1:]
    assert len(lines) == 6
    assert lines[0] == "  - unknown key 'tsks'. Did you mean 'tasks'?"
    assert lines[1] == "  - 'tasks' is missing"
    for key, line in zip(("hyperparams", "seeds", "methods", "timesteps"), lines[2:], strict=True):
        assert line.startswith(f"  - {key} must be ")


@pytest.mark.parametrize("key", ["hyperparams", "tasks", "seeds", "methods"])
def test_missing_keys(refused, tmp_path, key):
    assert refused("--suite", write_suite(tmp_path, **{key: None})).splitlines()[1:] == [f"  - {key!r} is missing"]


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("hyperparams", ["", 3, [1]]),
        ("tasks", ["x", [], {"CartPole-v1": 1}, [3], [["CartPole-v1"]], ["CartPole-v1", "CartPole-v1"]]),
        ("seeds", [3, "0", [], ["a"], [0.5], [True], [None], [-1], [2**32], [0, 1, 0]]),
        ("methods", [[], {}, "step", ["step"]]),
        # 1e5 is a text in YAML 1.1.
        ("timesteps", [0, -5, 1.5, 1e5, "1e5", True, [100]]),
    ],
)
def test_values_of_the_wrong_kind(refused, tmp_path, key, values):
    for value in values:
        lines = refused("--suite", write_suite(tmp_path, **{key: value})).splitlines()[1:]
        assert len(lines) == 1, value
        assert lines[0].startswith(f"  - {key} must be ")
        assert lines[0].endswith(f", not {value!r}")


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ("{3: {}}", "method 3 must be"),
        ("{on: {}}", "method True must be"),
        ("{a: }", "method 'a' must be a mapping"),
        ("{a: {algo: [ppo]}}", "method 'a': algo=['ppo'] must be one of "),
        ("{a: {algo: }}", "method 'a': algo=None must be one of "),
        ("{a: {3: 4}}", "klip_ppo has no hyperparameter 3"),
        ("{a: {algo: klip_pppo}}", ", klip_ppo, klip_ppo_lstm, ppo, "),
        ("{a: {algo: klip_pppo}}", "Did you mean 'klip_ppo'?"),
        ("{a: {callback: x}}", "'callback' cannot be set by a method: an experiment has one of its own"),
        ("{a: {n_timesteps: 5}}", "'n_timesteps' cannot be set by a method: it is that of the hyperparameters of the task"),
        ("{removal=step: {}}", "method 'removal=step': the text after '=' is the value of a parameter"),
        ("{width=inf: {}}", "so it must be a number above 0"),
        ("{width=0: {}}", "so it must be a number above 0"),
        ("{a@1e-3: {}}", "method 'a@1e-3': the number after '@' must equal its learning_rate, which is None"),
        (
            "{a@1e-3: {learning_rate: lin_3e-4}}",
            "method 'a@1e-3': the number after '@' must equal its learning_rate, which is 'lin_3e-4'",
        ),
        (
            "{a@fast: {learning_rate: fast}}",
            "method 'a@fast': the number after '@' must equal its learning_rate, which is 'fast'",
        ),
        ("{a: {}, A: {}}", "methods must differ in more than case"),
        ("{a: {beta: [1]}}", "method 'a': beta must be"),
        ("{a: {beta: 'no_such_module:f'}}", "method 'a': beta='no_such_module:f' is not a coefficient"),
        ("{a: {beta: step, beta_kwargs: [1]}}", "method 'a': "),
        # What the command line of RL Zoo cannot be told.
        ("{a: {target_kl: .inf}}", "method 'a': "),
        ("{a: {learning_rate: 3e-4}}", "method 'a': learning_rate='3e-4' must be a number, as 3.0e-4"),
        ("{a@3e-4: {learning_rate: 3e-4}}", "method 'a@3e-4': learning_rate='3e-4' must be a number, as 3.0e-4"),
        ("{a: {clip_range_vf: }}", "method 'a': clip_range_vf=None must be a number"),
        ("{a: {n_epochs: 0}}", "method 'a': n_epochs=0 must be a whole number, at least 1"),
        ("{a: {learning_rate: .nan}}", "method 'a': learning_rate=nan must be plain data without NaN and infinity"),
        ("{a: {compile: maybe}}", "method 'a': compile must be True, False or a dict"),
        ("{a: {policy: MlpPolcy}}", "method 'a': policy='MlpPolcy' must be one of MlpPolicy, CnnPolicy"),
        ("{a: {n_steps: 2026-01-01}}", "method 'a': "),
        ("{a: {ent_coef: 1e-3}}", "method 'a': ent_coef='1e-3' must be a number, as 1.0e-3 (for YAML, 1e-3 is a text)"),
        ("{a: {target_kl: '1e-2'}}", "method 'a': target_kl='1e-2' must be a number"),
        ("{a: {batch_size: 0}}", "method 'a': batch_size=0 must be a whole number above 0"),
        ("{a: {n_steps: 64.0}}", "method 'a': n_steps=64.0 must be a whole number above 0"),
        ("{a: {n_envs: '4'}}", "method 'a': n_envs='4' must be a whole number above 0"),
        ("{a: {gamma: true}}", "method 'a': gamma=True must be a number"),
        ("{a: {}, a: {beta: none}}", "is not YAML: the key 'a' is there twice"),
        ('{"a\\nb": {}}', "method 'a\\nb' names a folder, so it must have"),
        ("{a$b$: {}}", "method 'a$b$' names a folder, so it must have"),
        (f"{{{'a' * 101}: {{}}}}", "so it must have 1 to 100 characters"),
    ],
)
def test_wrong_methods(refused, tmp_path, methods, message):
    path = Path(write_suite(tmp_path, methods=None))
    path.write_text(f"{path.read_text()}methods: {methods}\n")
    assert message in refused("--suite", path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"tasks: [", "is not YAML"),
        (b"", "must be a mapping of hyperparams, tasks, seeds, methods, timesteps, not None"),
        (b"- a\n- b\n", "must be a mapping of"),
        (b"\xff\xfe\x00", "mine.yml"),
    ],
)
def test_files_that_are_no_suites(refused, tmp_path, content, message):
    (tmp_path / "mine.yml").write_bytes(content)
    assert message in refused("--suite", "mine.yml")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "smok",
            "--suite='smok' is none of coefficients, fast, knobs, paper, reuse, reuse_long, smoke, wide, and no YAML "
            "file. Did you mean 'smoke'?",
        ),
        ("missing.yml", "--suite: missing.yml cannot be read: "),
        ("folder.yml", "--suite: folder.yml cannot be read: "),
        ("mine.txt", "--suite='mine.txt' is none of "),
    ],
)
def test_suites_that_are_not_there(refused, tmp_path, name, message):
    (tmp_path / "folder.yml").mkdir()
    (tmp_path / "mine.txt").touch()
    assert refused("--suite", name).startswith(message)


@pytest.mark.parametrize(
    ("conf", "content", "message"),
    [
        ("missing.yml", None, "hyperparams='missing.yml' cannot be read: "),
        ("no_such_module", None, "hyperparams='no_such_module' cannot be read: "),
        ("sb3_klip.errors", None, "hyperparams='sb3_klip.errors' cannot be read: "),
        ("../mine", None, "hyperparams='../mine' cannot be read: "),
        ("tuned.yml", "a: [", "hyperparams='tuned.yml' cannot be read: "),
        ("tuned.yml", "", "tuned.yml"),
        ("tuned.yml", "[CartPole-v1]", "tuned.yml"),
        ("tuned.yml", "CartPole-v1: 3", "tuned.yml"),
        ("tuned.yml", "Hopper-v4: {n_timesteps: 100}", "tuned.yml has no entry for 'CartPole-v1', and none for 'default'"),
        ("tuned.yml", "default: {n_steps: 100}", "n_timesteps"),
        ("tuned.yml", "default: {n_timesteps: long}", "n_timesteps"),
        ("tuned.yml", "default: {n_timesteps: -5}", "no n_timesteps above 0 for 'CartPole-v1'"),
        ("tuned.yml", "default: {n_timesteps: 9, clip_range: 2e-1}", "tuned.yml, 'CartPole-v1': clip_range='2e-1' must be"),
        ("tuned.yml", "default: {n_timesteps: 9, beta: stpe}", "tuned.yml, 'CartPole-v1': ppo has no hyperparameter 'beta'"),
        (
            "tuned.yml",
            "default: {n_timesteps: 9, beta_kwargs: {widht: 1}}",
            "tuned.yml, 'CartPole-v1': coefficient 'step' has no parameter 'widht'",
        ),
        ("tuned.yml", "default: {n_timesteps: 9, learnin_rate: 1.0}", "no hyperparameter 'learnin_rate'. Did you mean"),
        ("tuned.yml", "default: {n_timesteps: 9, n_envs: '2'}", "tuned.yml, 'CartPole-v1': n_envs='2' must be"),
        ("tuned.yml", "{}", "must be a mapping of environments, not {}"),
        (
            "tuned.yml",
            "default: {n_timesteps: 9, callback: a.B}",
            "has a callback for 'CartPole-v1', and an experiment is given its own",
        ),
    ],
)
def test_wrong_hyperparameters(refused, tmp_path, conf, content, message):
    if content is not None:
        (tmp_path / "tuned.yml").write_text(content)
    # RL Zoo asks for n_timesteps when it is told another length, too.
    for timesteps in (None, 512):
        error = refused("--suite", write_suite(tmp_path, hyperparams=conf, timesteps=timesteps))
        assert error.startswith(f"the suite {tmp_path / 'mine.yml'} cannot be run:\n  - ")
        assert message in error
