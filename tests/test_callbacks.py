"""Callbacks: the log as CSV, histograms of β, checkpoints to resume from, and the comparison with PPO."""

import gc
import math
import re
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pandas as pd
import pytest
import rl_zoo3.import_envs  # noqa: F401  # registers the environments without velocities
import torch as th
from helpers import (
    SABOTAGE,
    Recorder,
    assert_identical,
    assert_same_generators,
    cartpole,
    collected,
    nothing,
    pendulum,
    sabotage,
    zoo_here,
)
from sb3_contrib.common.envs import InvalidActionEnvDiscrete
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback, ConvertCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import SimpleMultiObsEnv
from stable_baselines3.common.logger import CSVOutputFormat, Logger, configure
from stable_baselines3.common.utils import LinearSchedule, set_random_seed
from stable_baselines3.common.vec_env import VecNormalize
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sb3_klip import (
    BetaHistogramCallback,
    IdentityCheckCallback,
    KLipMaskablePPO,
    KLipPPO,
    KLipRecurrentPPO,
    ResumableCheckpointCallback,
)
from sb3_klip.callbacks import CSVLogCallback
from sb3_klip.fast import optimizer
from sb3_klip.reproducibility import read_generators
from sb3_klip.verify.bits import Difference

# -- the log as CSV ----------------------------------------------------------------------------------------------------


class Formats(BaseCallback):
    """Keeps the CSV files that the logger writes to during training."""

    def _init_callback(self) -> None:
        self.seen: list[CSVOutputFormat] = []

    def _on_step(self) -> bool:
        self.seen += [each for each in self.logger.output_formats if isinstance(each, CSVOutputFormat)]
        return True


TINY_MODEL: dict[str, Any] = {"n_steps": 64, "batch_size": 32, "n_epochs": 2, "seed": 0}


@pytest.mark.parametrize("algorithm", [PPO, KLipPPO])
def test_csv_log(tmp_path, algorithm):
    model = algorithm("MlpPolicy", "CartPole-v1", **TINY_MODEL)
    path, formats = tmp_path / "deep" / "er" / "progress.csv", Formats()
    model.learn(192, callback=[CSVLogCallback(path), formats])

    log = pd.read_csv(path)
    assert log["time/total_timesteps"].tolist() == [64, 128, 192]
    ours = {"train/kill_fraction", "train/beta_mean", *(f"train/beta_p{level:02}" for level in (1, 5, 25, 50, 75, 95, 99))}
    assert {"rollout/ep_rew_mean", "train/clip_fraction", "train/approx_kl"} <= set(log)
    assert (ours <= set(log)) == (algorithm is KLipPPO)
    # A row comes before the update.
    assert log["train/clip_fraction"].isna().tolist() == [True, False, False]

    # Nothing is left of it.
    assert len({*formats.seen}) == 1
    assert formats.seen[0].file.closed
    assert not any(isinstance(each, CSVOutputFormat) for each in model.logger.output_formats)


def test_csv_log_of_two_trainings(tmp_path):
    model, callback = PPO("MlpPolicy", "CartPole-v1", **TINY_MODEL), CSVLogCallback(tmp_path / "progress.csv")

    def steps() -> list[int]:
        return pd.read_csv(tmp_path / "progress.csv")["time/total_timesteps"].tolist()

    model.learn(128, callback=callback)
    assert steps() == [64, 128]
    model.learn(128, callback=callback, reset_num_timesteps=False)
    assert steps() == [64, 128, 192, 256]
    # One that begins replaces the file.
    model.learn(64, callback=callback)
    assert steps() == [64]


def test_csv_log_keeps_rows_without_steps(tmp_path):
    class Extra(BaseCallback):
        def _on_step(self):
            if self.n_calls % 32 == 0:
                self.logger.record("extra/number", self.n_calls)
                self.logger.dump(self.num_timesteps)
            return True

    model, path = PPO("MlpPolicy", "CartPole-v1", **TINY_MODEL), tmp_path / "progress.csv"
    model.learn(128, callback=[Extra(), CSVLogCallback(path)])
    before = pd.read_csv(path)
    assert before["time/total_timesteps"].isna().any()
    model.learn(64, callback=CSVLogCallback(path), reset_num_timesteps=False)
    pd.testing.assert_frame_equal(pd.read_csv(path)[before.columns].head(len(before)), before)


def test_histograms_of_a_training_of_its_own(tmp_path):
    model, shown = KLipPPO("MlpPolicy", "CartPole-v1", **TINY_MODEL).learn(64), []

    class Shown(BetaHistogramCallback):
        def _on_rollout_start(self):
            super()._on_rollout_start()
            shown.append("train/beta" in self.logger.name_to_value)

    model.learn(128, callback=Shown())
    assert shown == [False, True]


def test_csv_log_after_an_exception(tmp_path):
    """With a logger of the user's, which is the same in the next training."""

    class Broken(Exception):  # noqa: N818
        pass

    def break_off(local, world):
        if local["self"].num_timesteps == 100:
            raise Broken
        return True

    model = KLipPPO("MlpPolicy", "CartPole-v1", n_steps=32, batch_size=32, n_epochs=1, seed=0)
    model.set_logger(configure(None, []))
    callback = CSVLogCallback(tmp_path / "progress.csv")
    with pytest.raises(Broken):
        model.learn(256, callback=[callback, ConvertCallback(break_off)])
    model.learn(128, callback=callback, reset_num_timesteps=False)
    assert model.logger.output_formats == []
    steps = pd.read_csv(tmp_path / "progress.csv")["time/total_timesteps"]
    assert steps.tolist() == sorted(set(steps))
    assert steps.iloc[-1] == model.num_timesteps


def test_csv_log_whose_last_row_was_cut_off(tmp_path):
    model, callback = PPO("MlpPolicy", "CartPole-v1", **TINY_MODEL), CSVLogCallback(tmp_path / "progress.csv")
    model.learn(192, callback=callback)
    text = (tmp_path / "progress.csv").read_text()
    (tmp_path / "progress.csv").write_text(text[:-3])
    model.learn(64, callback=callback, reset_num_timesteps=False)
    assert pd.read_csv(tmp_path / "progress.csv")["time/total_timesteps"].tolist() == [64, 128, 256]
    # Some other file is replaced.
    (tmp_path / "progress.csv").write_text("a,b\n1,2\n")
    model.learn(64, callback=callback, reset_num_timesteps=False)
    assert pd.read_csv(tmp_path / "progress.csv")["time/total_timesteps"].tolist() == [320]


def test_csv_log_of_a_continuation_that_is_killed(tmp_path):
    """In its first rollout, nothing of its own is there to be written."""
    model, path = PPO("MlpPolicy", "CartPole-v1", **TINY_MODEL), tmp_path / "progress.csv"
    model.learn(128, callback=CSVLogCallback(path))
    before, seen, inode = path.read_text(), [], path.stat().st_ino

    def look(_locals, _globals):
        seen.append(path.read_text())
        return True

    model.learn(64, callback=[CSVLogCallback(path), ConvertCallback(look)], reset_num_timesteps=False)
    assert seen == [before] * 64
    assert path.read_text().startswith(before)
    assert path.stat().st_ino == inode  # a program that follows the file goes on reading


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"time/total_timesteps,a\n32,1\n64,1,5,6\n", r"progress\.csv is damaged: a row has more values than keys"),
        (b"time/total_timesteps,\xff\n32,1\n", r"progress\.csv is no log to continue: 'utf-8'"),
    ],
)
def test_a_csv_log_that_cannot_be_continued_is_left_as_it_is(tmp_path, content, message):
    model, path = PPO("MlpPolicy", "CartPole-v1", **TINY_MODEL).learn(64), tmp_path / "progress.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        model.learn(64, callback=CSVLogCallback(path), reset_num_timesteps=False)
    assert path.read_bytes() == content


def test_paths_and_flags_of_callbacks(tmp_path):
    with pytest.raises(TypeError, match=r"^path=None must be a text or a path"):
        CSVLogCallback(None)
    with pytest.raises(TypeError, match=r"^save_path=3 must be a text or a path"):
        ResumableCheckpointCallback(10, 3)
    with pytest.raises(TypeError, match=r"^save_vecnormalize='no' must be True or False"):
        ResumableCheckpointCallback(10, tmp_path, save_vecnormalize="no")


def test_csv_log_of_a_training_that_did_not_begin(tmp_path):
    """RL Zoo ends the training of its first callback in any case; that must not hide what went wrong."""
    CSVLogCallback(tmp_path / "progress.csv").on_training_end()
    assert list(tmp_path.iterdir()) == []


# -- checkpoints to resume from ----------------------------------------------------------------------------------------


def test_the_callback_refuses_at_the_start(tmp_path: Path) -> None:
    for frequency in (0, math.nan, "10"):
        with pytest.raises(ValueError, match=f"save_freq={frequency!r} must be a number above 0"):
            ResumableCheckpointCallback(frequency, str(tmp_path))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="for the algorithms of sb3-klip, not for PPO"):
        PPO("MlpPolicy", "CartPole-v1", **TINY_MODEL).learn(64, callback=ResumableCheckpointCallback(1, str(tmp_path)))
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        KLipPPO("MlpPolicy", "CartPole-v1", **TINY_MODEL).learn(
            64, callback=ResumableCheckpointCallback(1, str(tmp_path / "file"))
        )


def test_the_end_of_a_training_that_has_not_begun(tmp_path: Path) -> None:
    """RL Zoo calls it then, and an error would hide the one for which training did not begin."""
    ResumableCheckpointCallback(1, str(tmp_path)).on_training_end()
    assert not list(tmp_path.iterdir())


# -- histograms of β ---------------------------------------------------------------------------------------------------


def histograms(folder):
    return EventAccumulator(str(folder), size_guidance={"histograms": 0, "scalars": 0}).Reload()


@pytest.mark.parametrize("algorithm", [KLipPPO, KLipRecurrentPPO])
def test_a_histogram_of_each_update(tmp_path, algorithm):
    recurrent = algorithm is KLipRecurrentPPO
    model = algorithm(
        "MlpLstmPolicy" if recurrent else "MlpPolicy",
        make_vec_env("CartPole-v1", 3, seed=0),
        n_steps=32,
        batch_size=40,
        n_epochs=1,
        learning_rate=0.05,
        tensorboard_log=str(tmp_path),
        seed=0,
        device="cpu",
    )
    model.learn(5 * 96, callback=BetaHistogramCallback())
    (folder,) = tmp_path.iterdir()
    events = histograms(folder)
    found = events.Histograms("train/beta")
    # Like all that an update logs, with the rollout that follows it.
    assert (
        [event.step for event in found] == [event.step for event in events.Scalars("train/beta_mean")] == [192, 288, 384, 480]
    )
    largest = [event.value for event in events.Scalars("train/beta_abs_max")]
    means = [event.value for event in events.Scalars("train/beta_mean")]
    for event, peak, mean in zip(found, largest, means, strict=True):
        values = event.histogram_value
        assert values.num == 3 * 32
        assert max(-values.min, values.max) == pytest.approx(peak, rel=1e-6)
        assert np.sign(values.sum) == np.sign(mean)
    assert max(largest) > 0


def test_the_histogram_is_for_tensorboard_only(tmp_path, capsys):
    model = KLipPPO("MlpPolicy", "CartPole-v1", n_steps=64, batch_size=64, n_epochs=2, seed=0, device="cpu")
    model.set_logger(configure(str(tmp_path), ["stdout", "log", "json", "csv", "tensorboard"]))
    model.learn(192, callback=BetaHistogramCallback())
    model.logger.close()
    assert [event.histogram_value.num for event in histograms(tmp_path).Histograms("train/beta")] == [64, 64]
    for text in (capsys.readouterr().out, (tmp_path / "log.txt").read_text()):
        assert re.search(r"\| +beta_mean +\|", text)
        assert not re.search(r"\| +beta +\|", text)
    for name in ("progress.json", "progress.csv"):
        text = (tmp_path / name).read_text()
        assert re.search(r"train/beta_mean\b", text)
        assert not re.search(r"train/beta\b", text)


def test_histograms_go_on_with_the_training(tmp_path):
    model = KLipPPO(
        "MlpPolicy", "CartPole-v1", n_steps=64, batch_size=64, n_epochs=2, seed=0, device="cpu", tensorboard_log=str(tmp_path)
    )
    model.learn(128, callback=BetaHistogramCallback(), tb_log_name="run")
    model.learn(128, callback=BetaHistogramCallback(), tb_log_name="run", reset_num_timesteps=False)
    steps = [event.step for event in histograms(tmp_path / "run_1").Histograms("train/beta")]
    assert steps == sorted(set(steps))
    assert steps[-1] == 256
    assert all(event.histogram_value.num == 64 for event in histograms(tmp_path / "run_1").Histograms("train/beta"))


# -- the comparison with PPO -------------------------------------------------------------------------------------------


# Large steps, so that samples are clipped; every case asserts that some are.
FAST = {"learning_rate": 1e-2, "n_steps": 128, "batch_size": 60, "n_epochs": 3}
LSTM = {"policy": "MlpLstmPolicy", "policy_kwargs": {"lstm_hidden_size": 8, "net_arch": [8]}}
CASES = {
    "box": (KLipPPO, pendulum, {}),
    "discrete": (KLipPPO, cartpole, {"batch_size": 64}),
    "dictionary": (
        KLipPPO,
        SimpleMultiObsEnv,
        {"policy": "MultiInputPolicy", "ent_coef": 0.01, "n_steps": 32, "batch_size": 20, "n_epochs": 2},
    ),
    "gsde": (KLipPPO, pendulum, {"use_sde": True, "sde_sample_freq": 4}),
    "squashed_gsde": (KLipPPO, pendulum, {"use_sde": True, "ent_coef": 0.01, "policy_kwargs": {"squash_output": True}}),
    "value_clipping": (KLipPPO, pendulum, {"clip_range_vf": 0.2}),
    "target_kl": (KLipPPO, pendulum, {"target_kl": 0.005, "n_epochs": 8}),
    "schedules": (
        KLipPPO,
        cartpole,
        {"learning_rate": LinearSchedule(1e-2, 1e-3, 1.0), "clip_range": LinearSchedule(0.2, -0.05, 1.0)},
    ),
    "sgd": (KLipPPO, pendulum, {"policy_kwargs": {"optimizer_class": th.optim.SGD}, "learning_rate": 3.0}),
    "vec_normalize": (KLipPPO, lambda: VecNormalize(make_vec_env("Pendulum-v1", 3, seed=0)), {"n_steps": 50}),
    "measured": (KLipPPO, pendulum, {"log_kl": True}),
    "recurrent": (KLipRecurrentPPO, lambda: gym.make("PendulumNoVel-v1"), {**LSTM, "n_steps": 64, "batch_size": 50}),
    "recurrent_discrete": (
        KLipRecurrentPPO,
        lambda: make_vec_env("CartPoleNoVel-v1", 2, seed=0),
        {**LSTM, "learning_rate": 5e-2, "n_steps": 32, "batch_size": 50},
    ),
    "maskable": (KLipMaskablePPO, lambda: InvalidActionEnvDiscrete(dim=20, n_invalid_actions=10), {}),
}


def make(case, **changes):
    algorithm, make_env, kwargs = CASES[case]
    set_random_seed(0)
    model = algorithm(env=make_env(), seed=0, device="cpu", **{"policy": "MlpPolicy", **FAST, **kwargs, **changes})
    model.set_logger(Logger(None, [Recorder()]))
    return model


def logged(model):
    model.logger.dump()
    return model.logger.output_formats[0]


def not_ppos(caught):
    return [str(warning.message) for warning in caught if "is not PPO's" in str(warning.message)]


@pytest.mark.parametrize("case", CASES)
def test_the_callback_finds_no_difference_and_makes_none(case):
    check, models, generators = IdentityCheckCallback(), [], []
    for callback in (check, None):
        model = make(case)
        steps = 2 * model.n_steps * model.n_envs + 1  # three updates
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.learn(steps, callback=callback)
        assert not_ppos(caught) == []
        models.append(model)
        generators.append(read_generators())
    assert check.identical
    assert check.difference == Difference(0, "")
    # Every step of the optimizer was compared: Adam counts them.
    epochs, size = models[0].n_epochs, models[0].n_steps * models[0].n_envs
    steps = [int(state["step"]) for state in models[1].policy.optimizer.state.values() if "step" in state]
    assert {check.minibatches} == (set(steps) or {3 * epochs * -(-size // models[0].batch_size)})
    if case == "target_kl":
        assert check.minibatches < 3 * epochs * -(-size // models[0].batch_size)

    logs = logged(models[0])
    assert max(logs.column("train/kill_fraction")) > 0
    assert set(logs.column("identity/ulps")) == {0}
    assert len(logs.column("identity/minibatches")) == 3
    assert logs.column("identity/minibatches")[-1] == check.minibatches
    assert logs.column("train/loss") == logged(models[1]).column("train/loss")
    assert logged(models[1]).column("identity/ulps") == []

    assert_same_generators(*generators)
    if case != "sgd":  # which has no state
        assert_identical(*models)
    for model in models:
        set_random_seed(1)  # the two have drawn from the same generators, one after the other
        model.learn(model.n_steps * model.n_envs, reset_num_timesteps=False)
    ours, theirs = (model.policy.state_dict() for model in models)
    assert all(th.equal(ours[name], theirs[name]) for name in theirs)
    assert not any(parameter._post_accumulate_grad_hooks for parameter in models[0].policy.parameters())


def test_two_trainings_with_one_callback():
    check, model = IdentityCheckCallback(), make("box")
    model.learn(256, callback=check)
    counted = check.minibatches
    model.learn(128, callback=check, reset_num_timesteps=False)
    assert (counted, check.minibatches) == (2 * 9, 3 * 9)
    assert check.identical


def test_before_anything_is_compared_nothing_is_claimed():
    assert not IdentityCheckCallback().identical


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        ("box", {"beta": "linear_ramp"}),
        ("discrete", {"beta": "sigmoid"}),
        ("box", {"beta": "fixed"}),
        ("recurrent", {"beta": "none"}),
        ("maskable", {"beta": "linear_ramp"}),
    ],
)
def test_another_coefficient_is_found_to_be_another(case, changes):
    check, model = IdentityCheckCallback(), make(case, **changes)
    name = r"(the gradient of [a-z_.0-9]+ in minibatch \d+|[a-z_.0-9]+)"
    with pytest.warns(UserWarning, match="is not PPO's") as caught:
        model.learn(256, callback=check)
    (message,) = not_ppos(caught)  # and not one for each update
    found = re.fullmatch(
        rf"The update after (128|256) steps is not PPO's: {name} differs by (\d+) units in the last place", message
    )
    assert found
    assert any(parameter in found[2] for parameter in model.policy.state_dict())
    assert int(found[3]) > 0
    assert not check.identical
    assert check.difference.ulps >= int(found[3])
    assert logged(model).column("identity/ulps")[-1] == check.difference.ulps


@pytest.mark.parametrize("action", SABOTAGE)
@pytest.mark.parametrize("minibatch", [0, 4, 8])
def test_the_last_bit_in_one_minibatch_is_found(monkeypatch, action, minibatch):
    # The second of three updates, of nine minibatches each.
    with monkeypatch.context() as patch:
        sabotage(patch, 9 + minibatch + 1, nothing)
        check = IdentityCheckCallback()
        make("box").learn(384, callback=check)
        assert check.identical

    sabotage(monkeypatch, 9 + minibatch + 1, action)
    check, model = IdentityCheckCallback(), make("box")
    with pytest.warns(UserWarning, match="The update after 256 steps is not PPO's") as caught:
        model.learn(384, callback=check)
    assert len(not_ppos(caught)) == 1
    assert check.minibatches == 3 * 9
    # What is compared next begins at the same state again, and is the same.
    assert logged(model).column("identity/ulps") == [0, check.difference.ulps, check.difference.ulps]
    assert check.difference.ulps > 0


def test_what_differs_but_the_gradients_is_found(monkeypatch):
    """An optimizer that does something else, which shows in the parameters; in the gradients only afterwards."""
    honest = optimizer.adam

    def adam(*args, lr, **kwargs):
        honest(*args, lr=lr * (1 + 1e-6), **kwargs)

    monkeypatch.setattr(optimizer, "adam", adam)
    check, model = IdentityCheckCallback(), make("box", batch_size=128, n_epochs=1)
    with pytest.warns(UserWarning, match=r"is not PPO's: (?!the gradient)[a-z_.0-9]+ differs by"):
        model.learn(128, callback=check)
    assert check.difference.name in model.policy.state_dict()
    assert check.minibatches == 1


def test_moments_that_differ_are_found(monkeypatch):
    honest = optimizer.adam

    def adam(parameters, gradients, averages, squares, *args, **kwargs):
        honest(parameters, gradients, averages, squares, *args, **kwargs)
        squares[0].mul_(1 + 1e-6)

    monkeypatch.setattr(optimizer, "adam", adam)
    check, model = IdentityCheckCallback(), make("box", batch_size=128, n_epochs=1)
    with pytest.warns(UserWarning, match=r"is not PPO's: optimizer\.\d+\.exp_avg_sq differs by"):
        model.learn(128, callback=check)


@pytest.mark.parametrize(("log", "is_told"), [(False, True), (True, False)])
def test_histograms_that_nobody_sees(tmp_path, log, is_told):
    model = KLipPPO("MlpPolicy", "CartPole-v1", **TINY_MODEL, tensorboard_log=str(tmp_path) if log else None)
    with collected() as messages:
        model.learn(32, callback=[CSVLogCallback(tmp_path / "progress.csv"), BetaHistogramCallback()])
    assert any("nowhere to show its histograms" in message for message in messages) == is_told


def test_a_full_disk_names_the_log(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(CSVOutputFormat, "write", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*progress\.csv'"):
        PPO("MlpPolicy", "CartPole-v1", **TINY_MODEL).learn(64, callback=CSVLogCallback(tmp_path / "progress.csv"))


@pytest.mark.parametrize("callback", [IdentityCheckCallback, BetaHistogramCallback])
def test_for_the_algorithms_of_this_package_only(callback):
    model = PPO("MlpPolicy", "CartPole-v1", n_steps=32, batch_size=32, n_epochs=1, device="cpu")
    with pytest.raises(ValueError, match=f"{callback.__name__} is for the algorithms of sb3-klip, not for PPO"):
        model.learn(32, callback=callback())
    assert model.num_timesteps == 0


def test_a_compiled_update_is_not_the_same_bits():
    check = IdentityCheckCallback()
    model = make("discrete", compile={"backend": "eager"})
    with pytest.warns(UserWarning, match="is not PPO's"):
        model.learn(128, callback=check)
    assert check.difference.ulps > 0
    assert check.minibatches == 6


def test_early_stopping_is_announced_once(capsys):
    """The second update that is made to compare with speaks for nobody."""
    model = make("target_kl", verbose=1)
    model.learn(128, callback=IdentityCheckCallback())
    with_check = capsys.readouterr().out.count("Early stopping")
    model = make("target_kl", verbose=1)
    model.learn(128)
    assert with_check == capsys.readouterr().out.count("Early stopping") == 1


class StoppedError(Exception):
    """Raised in the middle of an update."""


def raise_at(monkeypatch, call, error=StoppedError):
    def action(policy):
        raise error

    sabotage(monkeypatch, call, action)


def test_an_update_that_was_broken_off_is_not_compared(monkeypatch):
    check, model = IdentityCheckCallback(), make("box")
    with monkeypatch.context() as patch, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        raise_at(patch, 9 + 5)
        with pytest.raises(StoppedError):
            model.learn(384, callback=check)
    assert check.minibatches == 9
    with warnings.catch_warnings(record=True) as caught_later:
        warnings.simplefilter("always")
        model.learn(128, callback=check, reset_num_timesteps=False)
    assert not_ppos([*caught, *caught_later]) == []
    assert check.difference == Difference(0, "")
    assert check.minibatches == 2 * 9


def tensors_alive():
    gc.collect()
    return sum(type(each) is th.Tensor for each in gc.get_objects())


def test_after_an_exception_training_goes_on_without_the_callback(monkeypatch):
    check, models = IdentityCheckCallback(), []
    for callback in (check, None):
        model = make("box")
        with monkeypatch.context() as patch:
            raise_at(patch, 9 + 5)
            with pytest.raises(StoppedError):
                model.learn(384, callback=callback)
        set_random_seed(1)
        model.learn(128, reset_num_timesteps=False)
        before = tensors_alive()
        model.learn(256, reset_num_timesteps=False)
        models.append(model)
        # No gradients are kept that nobody will compare: 18 minibatches of 13 parameters.
        assert tensors_alive() - before < 50
    assert_identical(*models)
    assert check.minibatches == 9


class Interrupt(BaseCallback):
    def _on_step(self):
        if self.num_timesteps == 300:
            raise StoppedError
        return True


def test_a_run_that_is_resumed(tmp_path):
    reference = make("box").learn(512)
    check = IdentityCheckCallback()
    callbacks = [check, ResumableCheckpointCallback(128, str(tmp_path)), Interrupt()]
    with pytest.raises(StoppedError):
        make("box").learn(512, callback=callbacks)
    assert check.minibatches == 2 * 9

    model = KLipPPO.load(tmp_path / "rl_model_256_steps.zip", env=pendulum(), device="cpu", resume=True)
    again = IdentityCheckCallback()
    model.learn(512, callback=[ResumableCheckpointCallback(128, str(tmp_path)), again])
    assert again.identical
    assert again.minibatches == 4 * 9  # it goes on with what the other has counted
    assert_identical(model, reference)


ZOO = ("n_envs:2", "normalize:True", "n_steps:64", "batch_size:60", "n_epochs:2", "learning_rate:0.01")
CHECK = "callback:['sb3_klip.IdentityCheckCallback', {'sb3_klip.CSVLogCallback': {'path': 'progress.csv'}}]"


@pytest.fixture
def train_here(tmp_path, monkeypatch):
    """``rl_zoo3.train`` in this process, in an empty folder; returns the warnings of another update than PPO's."""
    monkeypatch.chdir(tmp_path)

    def train_here(*arguments):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            zoo_here("train", "--eval-freq", -1, "--seed", 0, *arguments, cwd=tmp_path)
        return not_ppos(caught)

    return train_here


@pytest.mark.parametrize(("algo", "env"), [("klip_ppo", "Pendulum-v1"), ("klip_ppo_lstm", "CartPoleNoVel-v1")])
def test_in_the_hyperparameters_of_rl_zoo(train_here, algo, env):
    command = ("--algo", algo, "--env", env, "-n", 384, "-params", *ZOO, CHECK)
    assert train_here(*command) == []
    header, *rows = [line.split(",") for line in Path("progress.csv").read_text().splitlines()]
    last = dict(zip(header, rows[-1], strict=True))
    assert float(last["identity/minibatches"]) == 2 * 2 * 3  # the third update comes after the last row
    assert float(last["identity/ulps"]) == 0
    assert float(last["train/kill_fraction"]) > 0


def test_another_coefficient_in_rl_zoo(train_here):
    (message,) = train_here(
        "--algo", "klip_ppo", "--env", "Pendulum-v1", "-n", 128, "-params", *ZOO, CHECK, "beta:'linear_ramp'"
    )
    assert message.startswith("The update after 128 steps is not PPO's")


def test_interrupted_in_rl_zoo(train_here, monkeypatch):
    """Ctrl-C in the middle of an update, after which RL Zoo ends the training of its first callback, and saves."""
    raise_at(monkeypatch, 6 + 3, KeyboardInterrupt)
    assert train_here("--algo", "klip_ppo", "--env", "Pendulum-v1", "-n", 384, "-params", *ZOO, CHECK) == []
    assert len(list(Path("logs").glob("klip_ppo/Pendulum-v1_1/Pendulum-v1.zip"))) == 1
