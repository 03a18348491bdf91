"""RL Zoo by name: its own commands, with nothing of ours on the command line but ``--algo klip_ppo``."""

import importlib
import importlib.resources
import json
import re
import sys
from pathlib import Path
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import pytest
import rl_zoo3
import rl_zoo3.train
import torch as th
import yaml
from commands import config, python, run, train
from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.hyperparams_opt import HYPERPARAMS_SAMPLER
from rl_zoo3.utils import ALGOS
from stable_baselines3 import PPO
from stable_baselines3.common.save_util import load_from_zip_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sb3_klip import KLipPPO, zoo

PAPER_YML = Path(str(importlib.resources.files("sb3_klip.hyperparams"))) / "paper.yml"
MUJOCO = ("Hopper-v4", "HalfCheetah-v4", "Walker2d-v4", "Ant-v4", "Humanoid-v4")

# One small rollout and a short update: these tests are about the way there.
SMALL = ("--eval-freq", -1, "-n", 64)
SMALL_UPDATE = ("n_envs:1", "n_steps:64", "batch_size:32", "n_epochs:1")

# A user's own coefficient, in a module of the working directory.
GATES_PY = """
from sb3_klip.coefficients.parameters import Positive

def ramp(ratio, advantages, clip_range, *, width: Positive = 0.1):
    return ((ratio - 1).abs() / width).clamp(0, 1)
"""


# -- the commands ------------------------------------------------------------------------------------------------------


class Trained(NamedTuple):
    """A training run, and what it printed."""

    cwd: Path
    folder: Path
    output: str


@pytest.fixture(scope="module")
def hopper(tmp_path_factory) -> Trained:
    """One run with every option that writes or prints something: starting RL Zoo takes longer than training."""
    cwd = tmp_path_factory.mktemp("hopper")
    options = ("-P", "--eval-freq", 128, "--eval-episodes", 1, "--save-freq", 128, "--tensorboard-log", "tb")
    update = ("-params", "n_steps:64", "n_epochs:2")
    completed = train("--env", "Hopper-v4", "--seed", 0, "-n", 256, *options, *update, cwd=cwd)
    return Trained(cwd, cwd / "logs" / "klip_ppo" / "Hopper-v4_1", completed.stdout)


def test_train_uses_the_tuned_hyperparameters_of_ppo(hopper):
    tuned = yaml.safe_load((Path(rl_zoo3.__file__).parent / "hyperparams" / "ppo.yml").read_text())["Hopper-v4"]
    asked_for = {"n_steps": 64, "n_epochs": 2}
    assert config(hopper.folder) == {**tuned, **asked_for, "beta": "step", "beta_kwargs": {}}

    model = KLipPPO.load(hopper.folder / "Hopper-v4.zip")
    assert model.num_timesteps == 256
    assert (model.batch_size, model.gamma, model.vf_coef) == (32, 0.999, 0.835671)
    assert model.beta.name == "step"
    assert (hopper.folder / "Hopper-v4" / "vecnormalize.pkl").exists()


def test_progress_bar(hopper):
    assert re.search(r"100% .*256/256", hopper.output)


def test_eval_freq(hopper):
    assert np.load(hopper.folder / "evaluations.npz")["timesteps"].tolist() == [128, 256]
    assert KLipPPO.load(hopper.folder / "best_model.zip").num_timesteps in (128, 256)


def test_save_freq(hopper):
    for steps in (128, 256):
        assert KLipPPO.load(hopper.folder / f"rl_model_{steps}_steps.zip").num_timesteps == steps


def test_tensorboard_log(hopper):
    events = EventAccumulator(str(hopper.cwd / "tb" / "Hopper-v4" / "KLipPPO_1")).Reload()
    ours = {"kill_fraction", "pass_fraction", "beta_mean", "beta_abs_max", "kl_penalty", "klip_loss"}
    dashboards_of_ppo = {"approx_kl", "clip_fraction", "entropy_loss", "explained_variance", "policy_gradient_loss"}
    assert {f"train/{key}" for key in ours | dashboards_of_ppo} <= set(events.Tags()["scalars"])


def test_enjoy(hopper):
    # As many steps as the longest episode has, so that one ends.
    options = ("--algo", "klip_ppo", "--env", "Hopper-v4", "-f", "logs", "--no-render", "-n", 1000)
    completed = python("-m", "rl_zoo3.enjoy", *options, cwd=hopper.cwd)
    assert "Loading logs/klip_ppo/Hopper-v4_1/Hopper-v4.zip" in completed.stdout
    assert re.search(r"Mean reward: -?\d+", completed.stdout)


def test_vec_env_subproc(tmp_path):
    update = ("-params", "n_envs:2", *SMALL_UPDATE[1:])
    length = ("--seed", 0, "-n", 512, "--eval-freq", -1)
    train("--env", "CartPole-v1", "--vec-env", "subproc", *length, *update, cwd=tmp_path)
    folder = tmp_path / "logs" / "klip_ppo" / "CartPole-v1_1"
    # One log per environment, each with the header and at least one episode.
    for number in (0, 1):
        assert len((folder / f"{number}.monitor.csv").read_text().splitlines()) > 2


def test_beta_from_the_command_line_stays_with_the_checkpoint(tmp_path):
    update = ("-params", *SMALL_UPDATE, "learning_rate:0.0")
    command = ("--env", "CartPole-v1", *SMALL)
    logs = tmp_path / "logs" / "klip_ppo"
    train(*command, *update, "beta:'none'", cwd=tmp_path)
    first = KLipPPO.load(logs / "CartPole-v1_1" / "CartPole-v1.zip")
    assert first.beta.name == "none"
    assert config(logs / "CartPole-v1_1")["beta"] == "none"

    checkpoint = ("-i", "logs/klip_ppo/CartPole-v1_1/CartPole-v1.zip")
    train(*command, *checkpoint, *update, cwd=tmp_path)
    train(*command, *checkpoint, *update, "beta:'step'", cwd=tmp_path)
    kept, changed = (KLipPPO.load(logs / f"CartPole-v1_{number}" / "CartPole-v1.zip") for number in (2, 3))
    assert kept.beta.name == "none"
    assert changed.beta.name == "step"
    assert config(logs / "CartPole-v1_3")["beta"] == "step"
    # With a learning rate of 0, that the parameters are still those of the checkpoint shows that it was loaded.
    for model in (kept, changed):
        assert model.num_timesteps == 64
        assert all(map(th.equal, first.policy.state_dict().values(), model.policy.state_dict().values()))


@pytest.mark.parametrize("algo", ["ppo", "klip_ppo"])
@pytest.mark.parametrize("conf", [PAPER_YML, "sb3_klip.hyperparams.paper"], ids=["file", "module"])
def test_paper_protocol(tmp_path, algo, conf):
    train("--env", "CartPole-v1", "-conf", conf, "--eval-freq", -1, "-n", 512, algo=algo, cwd=tmp_path)
    model = ALGOS[algo].load(tmp_path / "logs" / algo / "CartPole-v1_1" / "CartPole-v1.zip")
    assert (model.n_envs, model.n_steps, model.vf_coef, model.ent_coef) == (4, 128, 0.25, 0.0)
    assert model.learning_rate(1.0) == 3e-4
    assert model.learning_rate(0.5) == 1.5e-4


def test_console_script(tmp_path):
    script = Path(sys.executable).with_name("rl_zoo3")
    update = ("-params", *SMALL_UPDATE)
    run(script, "train", "--algo", "klip_ppo", "--env", "CartPole-v1", *SMALL, *update, cwd=tmp_path)
    assert (tmp_path / "logs" / "klip_ppo" / "CartPole-v1_1" / "CartPole-v1.zip").exists()


@pytest.mark.slow
def test_optimize_hyperparameters(tmp_path):
    search = ("-optimize", "--n-trials", 2, "--n-jobs", 1, "--sampler", "random", "--pruner", "none")
    study = ("--storage", "study.log", "--study-name", "study")
    command = ("--env", "CartPole-v1", "-n", 64, "--seed", 0, *study)
    # What is not searched for is taken from the command line, the coefficient included.
    completed = train(*command, *search, "--no-optim-plots", "-params", "n_envs:1", "beta:'none'", cwd=tmp_path)
    assert "Number of finished trials:  2" in completed.stdout
    assert len(list((tmp_path / "logs" / "klip_ppo").glob("report_*.csv"))) == 1

    train(*command, "--eval-freq", -1, "--trial-id", 1, cwd=tmp_path)
    # The trials left a folder of their own, with no model in it.
    (model,) = (tmp_path / "logs" / "klip_ppo").glob("*/CartPole-v1.zip")
    assert {"gae_lambda", "max_grad_norm", "policy_kwargs"} <= set(config(model.parent))


# -- the identity, through RL Zoo --------------------------------------------------------------------------------------


@pytest.mark.parametrize("env_id", ["CartPoleNoVel-v1", pytest.param("PendulumNoVel-v1", marks=pytest.mark.slow)])
def test_recurrent_training_and_playing(tmp_path, env_id):
    train("--env", env_id, *SMALL, "-params", "n_steps:64", "n_epochs:1", cwd=tmp_path, algo="klip_ppo_lstm")
    play = ("--algo", "klip_ppo_lstm", "--env", env_id, "-f", "logs", "--no-render", "-n", 250)
    assert "Mean reward" in python("-m", "rl_zoo3.enjoy", *play, cwd=tmp_path).stdout
    written = config(tmp_path / "logs" / "klip_ppo_lstm" / f"{env_id}_1")
    tuned = yaml.safe_load((Path(rl_zoo3.__file__).parent / "hyperparams" / "ppo_lstm.yml").read_text())[env_id]
    changed = {"n_steps": 64, "n_epochs": 1, "beta": "step", "beta_kwargs": {}}
    assert written == {**tuned, **changed}


@pytest.mark.slow
def test_atari(tmp_path):
    """The zoo's Atari hyperparameters and preprocessing, with fewer environments."""
    arguments = ("--env", "BreakoutNoFrameskip-v4", "--eval-freq", -1, "-n", 300, "-params", "n_envs:2")
    for algo in ("ppo", "klip_ppo"):
        train(*arguments, "--seed", 0, "--num-threads", 1, cwd=tmp_path, algo=algo)
    ours, theirs = (
        load_from_zip_file(tmp_path / "logs" / algo / "BreakoutNoFrameskip-v4_1" / "BreakoutNoFrameskip-v4.zip")[1]["policy"]
        for algo in ("klip_ppo", "ppo")
    )
    assert all(th.equal(ours[name], theirs[name]) for name in theirs)
    assert "features_extractor.cnn.0.weight" in theirs


@pytest.mark.slow
@pytest.mark.parametrize("env_id", ["CartPoleNoVel-v1", "PendulumNoVel-v1"])
def test_recurrent_tuning(tmp_path, env_id):
    tuning = (
        "-optimize",
        "--n-trials",
        2,
        "--sampler",
        "random",
        "--pruner",
        "none",
        "--no-optim-plots",
        "--eval-episodes",
        1,
    )
    small = ("-n", 200, "--n-evaluations", 1, "-params", "beta:'search'", "n_envs:1")
    output = train("--env", env_id, *tuning, *small, cwd=tmp_path, algo="klip_ppo_lstm").stdout
    assert "beta: " in output


def assert_same_training(cwd: Path, env_id: str, steps: int) -> None:
    """Train ``ppo`` and ``klip_ppo`` from one seed; every episode, parameter and optimizer state must be equal."""
    for algo in ("ppo", "klip_ppo"):
        options = ("--seed", 0, "--num-threads", 1, "--eval-freq", -1)
        train("--env", env_id, "-n", steps, *options, algo=algo, cwd=cwd)
    theirs, ours = (cwd / "logs" / algo / f"{env_id}_1" for algo in ("ppo", "klip_ppo"))

    # The third column is wall-clock time.
    their_episodes, our_episodes = (
        [line.split(",")[:2] for line in (folder / "0.monitor.csv").read_text().splitlines()[1:]] for folder in (theirs, ours)
    )
    assert their_episodes[0] == ["r", "l"]
    assert len(their_episodes) > 2
    assert our_episodes == their_episodes

    (_, their_state, _), (_, our_state, _) = (
        load_from_zip_file(folder / f"{env_id}.zip", device="cpu") for folder in (theirs, ours)
    )
    assert their_state.keys() == our_state.keys() == {"policy", "policy.optimizer"}
    assert their_state["policy"].keys() == our_state["policy"].keys()
    for name, tensor in their_state["policy"].items():
        assert th.equal(tensor, our_state["policy"][name]), name
    their_moments, our_moments = (state["policy.optimizer"]["state"] for state in (their_state, our_state))
    assert their_moments.keys() == our_moments.keys()
    assert len(their_moments) > 0
    for index, moments in their_moments.items():
        for name, tensor in moments.items():
            assert th.equal(tensor, our_moments[index][name]), (index, name)


def test_hopper_is_ppo_bit_for_bit(tmp_path):
    assert_same_training(tmp_path, "Hopper-v4", 4096)
    model = KLipPPO.load(tmp_path / "logs" / "klip_ppo" / "Hopper-v4_1" / "Hopper-v4.zip")
    assert model._n_updates == 8 * model.n_epochs


@pytest.mark.slow
@pytest.mark.parametrize("env_id", [env_id for env_id in MUJOCO if env_id != "Hopper-v4"])
def test_mujoco_tasks_are_ppo_bit_for_bit(tmp_path, env_id):
    assert_same_training(tmp_path, env_id, 2048)


# -- hyperparameters ---------------------------------------------------------------------------------------------------


@pytest.fixture
def train_here(tmp_path, monkeypatch):
    """``rl_zoo3.train`` in this process, in an empty folder that has a module with a coefficient of its own."""
    (tmp_path / "gates.py").write_text(GATES_PY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    zoo.register()

    def train_here(*arguments: object) -> Path:
        command = ("rl_zoo3.train", "--algo", "klip_ppo", "--env", "CartPole-v1", *SMALL, *arguments)
        monkeypatch.setattr(sys, "argv", [str(word) for word in command])
        rl_zoo3.train.train()
        return max((tmp_path / "logs" / "klip_ppo").glob("CartPole-v1_*"))

    yield train_here
    sys.modules.pop("gates", None)


def test_our_file_changes_nothing_as_shipped():
    zoos = yaml.safe_load((Path(rl_zoo3.__file__).parent / "hyperparams" / "ppo.yml").read_text())
    assert "Hopper-v4" in zoos
    assert zoo.overlaid_hyperparams("ppo", "klip_ppo") == zoos


def test_our_file_is_merged_key_by_key(tmp_path, monkeypatch):
    zoos = zoo.overlaid_hyperparams("ppo", "klip_ppo")
    overlay = "Hopper-v4:\n  beta: none\n  n_epochs: 7\nMyTask-v0:\n  beta: none\n"
    (tmp_path / "klip_ppo.yml").write_text(overlay)
    monkeypatch.setattr(importlib.resources, "files", lambda package: tmp_path)
    merged = zoo.overlaid_hyperparams("ppo", "klip_ppo")
    assert merged.pop("Hopper-v4") == {**zoos.pop("Hopper-v4"), "beta": "none", "n_epochs": 7}
    assert merged.pop("MyTask-v0") == {**zoos["default"], "beta": "none"}
    assert merged == zoos


@pytest.mark.parametrize("name", ["klip_ppo", "paper"])
def test_each_reading_of_a_module_gives_a_new_dictionary(name):
    # RL Zoo deletes keys from what it is given, so that a second training in one process would find them gone.
    module = importlib.import_module(f"sb3_klip.hyperparams.{name}")
    before = json.dumps(module.hyperparams)
    module.hyperparams["Hopper-v4"].clear()
    module.hyperparams.clear()
    assert json.dumps(module.hyperparams) == before


def test_two_trainings_in_one_process(train_here):
    for _ in range(2):
        folder = train_here("-conf", "sb3_klip.hyperparams.paper", "-params", *SMALL_UPDATE)
    assert folder.name == "CartPole-v1_2"


def test_paper_protocol_covers_the_tasks_of_the_paper():
    protocol = yaml.safe_load(PAPER_YML.read_text())
    assert set(protocol) == {"default", *MUJOCO, "CartPole-v1", "LunarLander-v3"}
    for env_id in MUJOCO:
        assert protocol[env_id] == protocol["default"]
        assert protocol[env_id]["n_steps"] * protocol[env_id]["n_envs"] == 2048
        assert protocol[env_id]["normalize"] is True
    # SB3's clipping of the value function passes no gradient where it clips; the file says why it is left out.
    assert not any("clip_range_vf" in entry for entry in protocol.values())
    for env_id in set(protocol) - {"default"}:
        gym.spec(env_id)


def test_beta_kwargs_as_a_python_expression_in_a_file(train_here, tmp_path):
    entry = {
        "n_timesteps": 64,
        "policy": "MlpPolicy",
        "n_steps": 64,
        "beta": "gates:ramp",
        "beta_kwargs": "dict(width=0.2)",
    }
    (tmp_path / "mine.yml").write_text(yaml.safe_dump({"CartPole-v1": entry}))
    folder = train_here("-conf", "mine.yml")
    assert KLipPPO.load(folder / "CartPole-v1.zip").beta.parameters == {"width": 0.2}
    assert config(folder)["beta_kwargs"] == {"width": 0.2}


def test_beta_kwargs_as_a_mapping_in_a_file(train_here, tmp_path):
    entry = {
        "n_timesteps": 64,
        "policy": "MlpPolicy",
        "n_steps": 64,
        "beta": "gates:ramp",
        "beta_kwargs": {"width": "lin_0.2"},
    }
    (tmp_path / "mine.yml").write_text(yaml.safe_dump({"CartPole-v1": entry}))
    folder = train_here("-conf", "mine.yml")
    assert KLipPPO.load(folder / "CartPole-v1.zip").beta.parameters == {"width": "lin_0.2"}


def test_beta_kwargs_alone_are_for_the_coefficient_of_the_checkpoint(train_here):
    update = ("-params", *SMALL_UPDATE)
    folder = train_here(*update, "beta:'gates:ramp'", "beta_kwargs:dict(width=0.2)")
    checkpoint = folder / "CartPole-v1.zip"
    folder = train_here("-i", checkpoint, *update, "beta_kwargs:dict(width=0.3)")
    beta = KLipPPO.load(folder / "CartPole-v1.zip").beta
    assert (beta.name, beta.parameters) == ("gates:ramp", {"width": 0.3})
    assert (config(folder)["beta"], config(folder)["beta_kwargs"]) == ("gates:ramp", {"width": 0.3})
    with pytest.raises(TypeError, match=r"coefficient 'gates:ramp' has no parameter 'widht'. Did you mean 'width'\?"):
        train_here("-i", checkpoint, *update, "beta_kwargs:dict(widht=0.3)")


def test_a_checkpoint_of_ppo_can_be_trained_further(train_here):
    PPO("MlpPolicy", "CartPole-v1", n_steps=64).save("ppo.zip")
    folder = train_here("-i", "ppo.zip", "-params", *SMALL_UPDATE, "beta_kwargs:{}")
    assert KLipPPO.load(folder / "CartPole-v1.zip").beta.name == "step"


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "error", "message"),
    [
        (["beta:'stpe'"], ValueError, r"'stpe' is not a coefficient. Did you mean 'step'\? Available: .*none.*step"),
        (["beta:3"], TypeError, "beta must be the name of a coefficient.*3"),
        (["beta_kwargs:dict(width=1)"], TypeError, "'step' has no parameter 'width'"),
        (["beta:'gates:ramp'", "beta_kwargs:dict(widht=1)"], TypeError, r"'widht'. Did you mean 'width'\?"),
        (
            ["beta:'gates:ramp'", "beta_kwargs:dict(width=-1)"],
            ValueError,
            "width=-1 of 'gates:ramp' is out of range: 0 < value",
        ),
        (
            ["beta:'gates:ramp'", "beta_kwargs:dict(width='wide')"],
            TypeError,
            "width of 'gates:ramp' must be a number.*'wide'",
        ),
        (["compile:dict(bakend='eager')"], TypeError, r"'bakend', which is not .* Did you mean 'backend'\?"),
        (["compile:3"], TypeError, "compile must be True, False or a dict"),
        (["beta_kwargs:[1]"], TypeError, r"beta_kwargs must be a dict.*\[1\]"),
        (["beta_kwargs:'3'"], TypeError, "beta_kwargs must be a dict.*3"),
        (["beta_kwargs:'dict(width='"], ValueError, r"beta_kwargs must be a dict.*'dict\(width='"),
        (["beta_kwargs:'open(1)'"], ValueError, r"beta_kwargs must be a dict.*'open\(1\)'"),
    ],
)
def test_bad_coefficients_are_refused_before_anything_is_made(train_here, tmp_path, parameters, error, message):
    with pytest.raises(error, match=message):
        train_here("-params", *parameters)
    assert [path.name for path in tmp_path.iterdir() if path.name != "__pycache__"] == ["gates.py"]


def test_compile_is_a_hyperparameter(train_here):
    folder = train_here("-params", *SMALL_UPDATE, "compile:{'backend': 'aot_eager'}")
    assert config(folder)["compile"] == {"backend": "aot_eager"}
    (path,) = folder.glob("*.zip")
    assert KLipPPO.load(path).compile == {"backend": "aot_eager"}


def test_a_typo_on_the_command_line(tmp_path):
    completed = train("--env", "Hopper-v4", "-params", "beta:'stpe'", cwd=tmp_path, status=1)
    assert "Did you mean 'step'?" in completed.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


# -- the hook ----------------------------------------------------------------------------------------------------------


def test_registering_twice_changes_nothing():
    zoo.register()
    read_hyperparameters, others = ExperimentManager.read_hyperparameters, {**ALGOS}
    zoo.register()
    assert ExperimentManager.read_hyperparameters is read_hyperparameters
    assert others == ALGOS
    assert ALGOS["klip_ppo"] is KLipPPO
    assert ALGOS["ppo"] is PPO
    assert HYPERPARAMS_SAMPLER["klip_ppo"] is HYPERPARAMS_SAMPLER["ppo"]


def test_import_torch_stays_silent_and_light(tmp_path):
    silent = python("-c", "import torch", cwd=tmp_path, env={"PYTHONWARNINGS": "default::RuntimeWarning"})
    assert silent.stdout + silent.stderr == ""

    show = "import sys, torch; print(sorted(sys.modules)); print([type(finder).__name__ for finder in sys.meta_path])"
    completed = python("-X", "importtime", "-c", show, cwd=tmp_path)
    modules, finders = completed.stdout.splitlines()
    assert "'ZooWatch'" in finders  # otherwise this test would not say anything
    ours = {name for name in re.findall(r"'([^']+)'", modules) if name.split(".")[0] == "sb3_klip"}
    assert ours == {"sb3_klip", "sb3_klip._zoo_hook"}
    for name in ("rl_zoo3", "stable_baselines3", "sb3_contrib", "gymnasium", "sb3_klip.zoo"):
        assert f"'{name}'" not in modules
        assert not re.search(rf"\| +{name}$", completed.stderr, re.MULTILINE)


def test_rl_zoo_works_when_registering_fails(tmp_path):
    broken = "import runpy, sys; sys.modules['sb3_klip.zoo'] = None; runpy.run_module('rl_zoo3.train', run_name='__main__')"
    update = ("-params", *SMALL_UPDATE)
    completed = python("-c", broken, "--algo", "ppo", "--env", "CartPole-v1", *SMALL, *update, cwd=tmp_path)
    assert "RuntimeWarning: sb3-klip could not register with RL Zoo" in completed.stderr
    assert (tmp_path / "logs" / "ppo" / "CartPole-v1_1" / "CartPole-v1.zip").exists()


def test_no_module_of_rl_zoo_is_run_twice(tmp_path):
    # Registering imports exp_manager. Were that done while exp_manager is looked for, there would be two of its class.
    script = """
from rl_zoo3.exp_manager import ExperimentManager
import rl_zoo3.train, rl_zoo3.exp_manager
assert rl_zoo3.train.ExperimentManager is rl_zoo3.exp_manager.ExperimentManager is ExperimentManager
assert hasattr(ExperimentManager.read_hyperparameters, "__wrapped__")
assert "klip_ppo" in rl_zoo3.ALGOS
"""
    python("-c", script, cwd=tmp_path)


def test_without_the_hook(tmp_path):
    off = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    command = ("--algo", "klip_ppo", "--env", "CartPole-v1", *SMALL, "-params", *SMALL_UPDATE)
    completed = python("-m", "rl_zoo3.train", *command, cwd=tmp_path, env=off, status=2)
    assert "invalid choice: 'klip_ppo'" in completed.stderr

    python("-m", "sb3_klip.zoo", "train", *command, cwd=tmp_path, env=off)
    assert (tmp_path / "logs" / "klip_ppo" / "CartPole-v1_1" / "CartPole-v1.zip").exists()


def test_unknown_script(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sb3_klip.zoo", "trian"])
    with pytest.raises(SystemExit, match=r"unknown script 'trian'. Did you mean 'train'\?"):
        zoo.main()
