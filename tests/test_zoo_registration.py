"""What RL Zoo is told, and its functions that are wrapped: in this process."""

import argparse
import functools
import sys
from pathlib import Path

import pytest
import yaml
from helpers import config, zoo_here
from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.hyperparams_opt import HYPERPARAMS_SAMPLER
from rl_zoo3.utils import ALGOS
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import CheckpointCallback

from sb3_klip import KLipPPO, ResumableCheckpointCallback, zoo
from sb3_klip.replay import optimal_weights
from sb3_klip.zoo.registration import PATCHES

# One small rollout and a short update: these tests are about the way there.
SMALL = ("--eval-freq", -1, "-n", 64)
SMALL_UPDATE = ("n_envs:1", "n_steps:64", "batch_size:32", "n_epochs:1")
# A user's own coefficient, in a module of the working directory.
RAMPS_PY = """
from sb3_klip.coefficients.parameters import Positive

def ramp(ratio, advantages, clip_range, *, width: Positive = 0.1):
    return ((ratio - 1).abs() / width).clamp(0, 1)

class Deep:
    def __init__(self, depth):
        self.depth = depth

    def __call__(self, ratio, advantages, clip_range):
        return ratio * 0 + self.depth
"""


@pytest.fixture
def train_here(tmp_path, monkeypatch):
    """``rl_zoo3.train`` in this process, in an empty folder that has a module with a coefficient of its own."""
    (tmp_path / "ramps.py").write_text(RAMPS_PY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    def train_here(*arguments: object) -> Path:
        zoo_here("train", "--algo", "klip_ppo", "--env", "CartPole-v1", *SMALL, *arguments, cwd=tmp_path)
        return max((tmp_path / "logs" / "klip_ppo").glob("CartPole-v1_*"))

    yield train_here
    sys.modules.pop("ramps", None)


def test_registering_twice_changes_nothing():
    zoo.register()
    read_hyperparameters, others = ExperimentManager.read_hyperparameters, {**ALGOS}
    zoo.register()
    assert ExperimentManager.read_hyperparameters is read_hyperparameters
    assert others == ALGOS
    assert ALGOS["klip_ppo"] is KLipPPO
    assert ALGOS["ppo"] is PPO
    assert HYPERPARAMS_SAMPLER["klip_ppo"] is HYPERPARAMS_SAMPLER["ppo"]


@pytest.mark.parametrize(
    ("algo", "expected"),
    [
        ("klip_ppo", ResumableCheckpointCallback),
        ("klip_ppo_lstm", ResumableCheckpointCallback),
        ("ppo", CheckpointCallback),
        ("ppo_lstm", CheckpointCallback),
        ("a2c", CheckpointCallback),
        ("sac", CheckpointCallback),
    ],
)
def test_callbacks_of_the_manager(tmp_path, algo, expected):
    zoo.register()
    env_id = "Pendulum-v1" if algo == "sac" else "CartPole-v1"
    manager = ExperimentManager(
        argparse.Namespace(), algo, env_id, str(tmp_path), eval_freq=-1, save_freq=100, hyperparams={"n_envs": 4}
    )
    hyperparams, _ = manager.read_hyperparameters()
    _, _, manager.callbacks, _ = manager._preprocess_hyperparams(hyperparams)
    users = CheckpointCallback(10, str(tmp_path))
    manager.callbacks = [users]
    manager.create_callbacks()
    first, second = manager.callbacks
    assert first is users
    assert type(second) is expected
    # As RL Zoo asks for: every so many steps of all environments together.
    assert (second.save_freq, second.save_path, second.name_prefix) == (25, manager.save_path, "rl_model")
    assert second.save_vecnormalize is (expected is ResumableCheckpointCallback)


def test_two_trainings_in_one_process(train_here):
    for _ in range(2):
        folder = train_here("-conf", "sb3_klip.hyperparams.paper", "-params", *SMALL_UPDATE)
    assert folder.name == "CartPole-v1_2"


def test_reuse_among_the_hyperparameters(train_here):
    folder = train_here("-params", *SMALL_UPDATE, "reuse:3")
    assert KLipPPO.load(folder / "CartPole-v1.zip").reuse == 3
    folder = train_here("-conf", "sb3_klip.hyperparams.geppo", "-params", *SMALL_UPDATE)
    assert KLipPPO.load(folder / "CartPole-v1.zip").reuse == config(folder)["reuse"] == pytest.approx(optimal_weights(2))


def test_a_mistake_in_reuse_is_refused_before_anything_is_made(tmp_path):
    with pytest.raises(ValueError, match="reuse=0 must be a whole number from 1 to 1000000"):
        zoo_here("train", "--algo", "klip_ppo", "--env", "CartPole-v1", "-params", "reuse:0", cwd=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "wrong"),
    [
        (("beta:linear_ramp", "beta_kwargs:dict(width=0.1"), "dict(width=0.1"),
        (("beta:linear_ramp", "beta_kwargs:width=0.1"), "width=0.1"),
        (("beta=step",), "beta=step"),
        (("learning_rate:",), "learning_rate:"),
    ],
)
def test_what_is_no_python_is_named(tmp_path, capsys, words, wrong):
    with pytest.raises(SystemExit):
        zoo_here("train", "--algo", "klip_ppo", "--env", "CartPole-v1", "-params", *words, cwd=tmp_path)
    assert f"-params/--hyperparams: {wrong!r} is no value in Python. Write NAME:VALUE" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("learnin_rate:0.1",), r"klip_ppo has no hyperparameter 'learnin_rate'\. Did you mean 'learning_rate'\?"),
        (("beta:stpe", "learnin_rate:0.1"), r"no hyperparameter 'learnin_rate'\. Did you mean 'learning_rate'\?"),
        (("beta:linear_ramp", "width:0.1"), r"no hyperparameter 'width'\. It is a .* beta_kwargs:\"dict\(width=0\.1\)\""),
    ],
)
def test_a_misspelt_hyperparameter_is_refused_before_anything_is_made(tmp_path, words, message):
    with pytest.raises(ValueError, match=message):
        zoo_here("train", "--algo", "klip_ppo", "--env", "CartPole-v1", "-params", *words, cwd=tmp_path)
    assert not list(tmp_path.iterdir())


def test_beta_kwargs_as_a_python_expression_in_a_file(train_here, tmp_path):
    entry = {
        "n_timesteps": 64,
        "policy": "MlpPolicy",
        "n_steps": 64,
        "beta": "ramps:ramp",
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
        "beta": "ramps:ramp",
        "beta_kwargs": {"width": "lin_0.2"},
    }
    (tmp_path / "mine.yml").write_text(yaml.safe_dump({"CartPole-v1": entry}))
    folder = train_here("-conf", "mine.yml")
    assert KLipPPO.load(folder / "CartPole-v1.zip").beta.parameters == {"width": "lin_0.2"}


def test_arguments_of_a_class_on_the_command_line(train_here):
    folder = train_here("-params", *SMALL_UPDATE, "beta:ramps:Deep", "beta_kwargs:dict(depth=0.7)")
    assert (config(folder)["beta"], config(folder)["beta_kwargs"]) == ("ramps:Deep", {"depth": 0.7})
    (path,) = folder.glob("*.zip")
    assert KLipPPO.load(path).beta.function.depth == 0.7


def test_beta_kwargs_alone_are_for_the_coefficient_of_the_checkpoint(train_here):
    update = ("-params", *SMALL_UPDATE)
    folder = train_here(*update, "beta:'ramps:ramp'", "beta_kwargs:dict(width=0.2)")
    checkpoint = folder / "CartPole-v1.zip"
    folder = train_here("-i", checkpoint, *update, "beta_kwargs:dict(width=0.3)")
    beta = KLipPPO.load(folder / "CartPole-v1.zip").beta
    assert (beta.name, beta.parameters) == ("ramps:ramp", {"width": 0.3})
    assert (config(folder)["beta"], config(folder)["beta_kwargs"]) == ("ramps:ramp", {"width": 0.3})
    with pytest.raises(TypeError, match=r"coefficient 'ramps:ramp' has no parameter 'widht'. Did you mean 'width'\?"):
        train_here("-i", checkpoint, *update, "beta_kwargs:dict(widht=0.3)")


def test_a_checkpoint_of_ppo_can_be_trained_further(train_here):
    PPO("MlpPolicy", "CartPole-v1", n_steps=64).save("ppo.zip")
    folder = train_here("-i", "ppo.zip", "-params", *SMALL_UPDATE, "beta_kwargs:{}")
    assert KLipPPO.load(folder / "CartPole-v1.zip").beta.name == "step"


@pytest.mark.parametrize(
    ("parameters", "error", "message"),
    [
        (["beta:'stpe'"], ValueError, r"'stpe' is not a coefficient. Did you mean 'step'\? Available: .*none.*step"),
        (["beta:3"], TypeError, "beta must be the name of a coefficient.*3"),
        (["beta_kwargs:dict(width=1)"], TypeError, "'step' has no parameter 'width'"),
        (["beta:'ramps:ramp'", "beta_kwargs:dict(widht=1)"], TypeError, r"'widht'. Did you mean 'width'\?"),
        (
            ["beta:'ramps:ramp'", "beta_kwargs:dict(width=-1)"],
            ValueError,
            "width=-1 of 'ramps:ramp' is out of range: 0 < value",
        ),
        (
            ["beta:'ramps:ramp'", "beta_kwargs:dict(width='wide')"],
            TypeError,
            "width of 'ramps:ramp' must be a number.*'wide'",
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
    assert [path.name for path in tmp_path.iterdir() if path.name != "__pycache__"] == ["ramps.py"]


def test_compile_is_a_hyperparameter(train_here):
    folder = train_here("-params", *SMALL_UPDATE, "compile:{'backend': 'aot_eager'}")
    assert config(folder)["compile"] == {"backend": "aot_eager"}
    (path,) = folder.glob("*.zip")
    assert KLipPPO.load(path).compile == {"backend": "aot_eager"}


def test_functions_that_another_package_has_wrapped_are_wrapped_as_well(monkeypatch):
    """It may have used functools.wraps, which leaves the same traces as ours does."""
    zoo.register()
    called = []
    for patch in PATCHES:
        original = getattr(patch.owner, patch.name).__wrapped__  # RL Zoo's own

        @functools.wraps(original)
        def theirs(*args, original=original, name=patch.name, **kwargs):
            called.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(patch.owner, patch.name, theirs)
    zoo.register()
    for patch in PATCHES:
        assert getattr(patch.owner, patch.name).sb3_klip_patch is patch
        assert patch.reason
    before = {patch.name: getattr(patch.owner, patch.name) for patch in PATCHES}
    zoo.register()
    assert before == {patch.name: getattr(patch.owner, patch.name) for patch in PATCHES}
    manager = ExperimentManager(argparse.Namespace(), "klip_ppo", "CartPole-v1", "logs", hyperparams={"beta": "none"})
    assert manager.read_hyperparameters()[1]["beta"] == "none"
    assert called == ["read_hyperparameters"]
