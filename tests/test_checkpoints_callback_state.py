"""A resumed run goes on with what its callbacks remembered, and takes the steps that its call of ``learn`` had left."""

import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import gymnasium as gym
import numpy as np
import pandas as pd
import pytest
import torch as th
from helpers import assert_identical
from stable_baselines3.common import callbacks as sb3_callbacks
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, EvalCallback, EveryNTimesteps
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecEnvWrapper

from sb3_klip import CSVLogCallback, KLipPPO, ResumableCheckpointCallback
from sb3_klip.checkpoints import callback_state
from sb3_klip.checkpoints.callback_state import callbacks_of

SMALL: dict[str, Any] = {"n_steps": 32, "batch_size": 32, "n_epochs": 1, "seed": 0, "device": "cpu"}


def environments() -> DummyVecEnv:
    return make_vec_env("CartPole-v1", 1, seed=0)  # type: ignore[return-value]


def model(**kwargs: Any) -> KLipPPO:
    return KLipPPO("MlpPolicy", environments(), **{**SMALL, **kwargs})


def resumed(path: Path) -> KLipPPO:
    return KLipPPO.load(path, env=environments(), resume=True)


class Killed(Exception):  # noqa: N818
    """Ends a run in the middle."""


class KillAt(BaseCallback):
    """Ends a run after so many steps, as a kill would."""

    def __init__(self, steps: int):
        super().__init__()
        self.steps = steps

    def _on_step(self) -> bool:
        if self.num_timesteps == self.steps:
            raise Killed
        return True


def learn_until_killed(learner: KLipPPO, steps: int, callback: list[BaseCallback], **kwargs: Any) -> None:
    with pytest.raises(Killed):
        learner.learn(steps, callback=callback, **kwargs)


# -- steps that are left ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("again", [{"total_timesteps": 256, "reset_num_timesteps": False}, {"total_timesteps": 384}])
def test_the_same_call_ends_where_it_would_have_ended(again: dict[str, Any], tmp_path: Path) -> None:
    first = model().learn(128)
    learn_until_killed(first, 256, [ResumableCheckpointCallback(32, str(tmp_path)), KillAt(300)], reset_num_timesteps=False)
    second = resumed(tmp_path / "rl_model_288_steps.zip")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second.learn(**again)
    assert second.num_timesteps == 384


def test_it_may_be_killed_twice(tmp_path: Path) -> None:
    first = model().learn(128)
    learn_until_killed(first, 256, [ResumableCheckpointCallback(32, str(tmp_path)), KillAt(200)], reset_num_timesteps=False)
    second = resumed(tmp_path / "rl_model_192_steps.zip")
    learn_until_killed(second, 256, [ResumableCheckpointCallback(32, str(tmp_path)), KillAt(300)], reset_num_timesteps=False)
    third = resumed(tmp_path / "rl_model_288_steps.zip").learn(256, reset_num_timesteps=False)
    assert third.num_timesteps == 384


def test_a_finished_run_goes_on_with_the_next_call(tmp_path: Path) -> None:
    model().learn(128).save(tmp_path / "finished", resumable=True)
    assert resumed(tmp_path / "finished.zip").learn(128, reset_num_timesteps=False).num_timesteps == 256


# -- what callbacks remember -----------------------------------------------------------------------------------------------


class Remembers(BaseCallback):
    """A user's own, with data of many kinds."""

    def __init__(self, scale: float = 1.0, note: str = ""):
        super().__init__()
        self.scale, self.note = scale, note
        self.returns: list[float] = []
        self.table = {"seen": np.zeros(2)}
        self.thing: Any = None

    def _on_step(self) -> bool:
        self.returns.append(float(self.num_timesteps))
        self.table["seen"] = self.table["seen"] + 1
        self.scale *= 1.01
        return True


def test_an_own_callback_goes_on(tmp_path: Path) -> None:
    own = Remembers(2.0, note="first")
    learn_until_killed(model(), 256, [own, ResumableCheckpointCallback(32, str(tmp_path)), KillAt(100)])
    fresh = Remembers(2.0, note="second")
    resumed(tmp_path / "rl_model_96_steps.zip").learn(
        256, callback=[fresh, ResumableCheckpointCallback(32, str(tmp_path)), KillAt(-1)]
    )
    uninterrupted = Remembers(2.0)
    model().learn(256, callback=[uninterrupted, ResumableCheckpointCallback(32, str(tmp_path / "b")), KillAt(-1)])
    assert fresh.returns == uninterrupted.returns == [float(step) for step in range(1, 257)]
    assert fresh.n_calls == uninterrupted.n_calls
    assert fresh.table["seen"].tolist() == uninterrupted.table["seen"].tolist()
    assert fresh.scale == uninterrupted.scale  # an argument of the constructor, which the run has changed
    assert fresh.note == "second"  # one that it has not


LARGE = [[(0.5, 1)] * 30_000, dict.fromkeys(range(30_000)), np.zeros(200_000), th.zeros(400_000), "x" * 1_100_000]


@pytest.mark.parametrize("large", LARGE, ids=lambda large: type(large).__name__)
def test_large_data_is_not_read_at_the_start(large: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call of learn would take seconds. As an argument of a callback it is kept, since it may have changed."""
    read: list[Any] = []
    digest = callback_state._digest
    monkeypatch.setattr(callback_state, "_digest", lambda value: read.append(value) or digest(value))  # type: ignore[func-returns-value]
    own = Remembers(2.0, note=large)
    learner = model()
    learner.learn(32, own)
    assert any(value is own.returns for value in read)
    assert not any(value is large for value in read)
    assert learner._fingerprints is not None
    (kept,) = callback_state.remembered(own, learner._fingerprints)
    assert kept["state"]["note"] is large


class Holds(BaseCallback):
    """Holds callbacks in a list, and calls them."""

    def __init__(self, held: list[BaseCallback]):
        super().__init__()
        self.held = held

    def _init_callback(self) -> None:
        for each in self.held:
            each.init_callback(self.model)

    def _on_step(self) -> bool:
        return all(each.on_step() for each in self.held)


def test_callbacks_in_a_list_go_on(tmp_path: Path) -> None:
    learn_until_killed(model(), 256, [Holds([Remembers()]), ResumableCheckpointCallback(32, str(tmp_path)), KillAt(100)])
    own = Remembers()
    resumed(tmp_path / "rl_model_96_steps.zip").learn(
        256, callback=[Holds([own]), ResumableCheckpointCallback(32, str(tmp_path)), KillAt(-1)]
    )
    assert len(own.returns) == 256


class Level(gym.Wrapper):
    """Gives a larger reward at each level."""

    def __init__(self, env: gym.Env, shared: Any):
        super().__init__(env)
        self.shared = shared

    def step(self, action: Any) -> Any:
        obs, reward, *rest = self.env.step(action)
        return obs, float(reward) * self.shared["level"], *rest


class NextLevel(BaseCallback):
    def __init__(self, shared: Any):
        super().__init__()
        self.shared = shared

    def _on_rollout_start(self) -> None:
        self.shared["level"] += 1

    def _on_step(self) -> bool:
        return True


class Levels(dict):
    """No plain data, and an argument of the constructor."""


class CountsLevels(VecEnvWrapper):
    def __init__(self, venv: VecEnv, shared: Any):
        super().__init__(venv)
        self.levels = [shared]

    def reset(self) -> Any:
        return self.venv.reset()

    def step_wait(self) -> Any:
        self.levels[0]["level"] += 0.5
        return self.venv.step_wait()


@pytest.mark.parametrize("kind", [dict, Levels])
def test_what_callbacks_and_environments_share_stays_shared(kind: Any, tmp_path: Path) -> None:
    def environments(shared: Any) -> VecEnv:
        return CountsLevels(DummyVecEnv([lambda: Level(gym.make("CartPole-v1"), shared)]), shared)

    def learn(learner: KLipPPO, shared: Any, folder: Path, kill_at: int) -> None:
        learner.learn(256, callback=[NextLevel(shared), ResumableCheckpointCallback(32, str(folder)), KillAt(kill_at)])

    whole, cut, again = (kind(level=1) for _ in range(3))
    learner = KLipPPO("MlpPolicy", environments(whole), **SMALL)
    learn(learner, whole, tmp_path / "whole", -1)
    with pytest.raises(Killed):
        learn(KLipPPO("MlpPolicy", environments(cut), **SMALL), cut, tmp_path, 100)
    goes_on = KLipPPO.load(tmp_path / "rl_model_96_steps.zip", env=environments(again), resume=True)
    learn(goes_on, again, tmp_path, -1)
    assert_identical(goes_on, learner)


class BeginsAnew(Remembers):
    def _on_training_start(self) -> None:
        self.returns = []
        self.note = "again"


def test_what_a_callback_sets_at_the_start_is_named(tmp_path: Path) -> None:
    learn_until_killed(model(), 256, [BeginsAnew(), ResumableCheckpointCallback(32, str(tmp_path)), KillAt(100)])
    learner = resumed(tmp_path / "rl_model_96_steps.zip")
    with pytest.warns(UserWarning, match=r"had restored, so the run may differ: BeginsAnew\.returns$"):
        learner.learn(256, callback=[BeginsAnew(), ResumableCheckpointCallback(32, str(tmp_path)), KillAt(-1)])


def evaluation(folder: Path) -> EvalCallback:
    env = make_vec_env("CartPole-v1", 1, seed=5)
    stop = sb3_callbacks.StopTrainingOnNoModelImprovement(50)
    paths = {"log_path": str(folder), "best_model_save_path": str(folder)}
    return EvalCallback(env, callback_after_eval=stop, eval_freq=32, n_eval_episodes=2, verbose=0, **paths)


def test_evaluations_and_the_best_model_go_on(tmp_path: Path) -> None:
    callbacks = [evaluation(tmp_path), EveryNTimesteps(50, sb3_callbacks.CheckpointCallback(1, str(tmp_path / "other")))]
    learn_until_killed(model(), 320, [*callbacks, ResumableCheckpointCallback(64, str(tmp_path)), KillAt(200)])
    first = callbacks[0]
    first.best_mean_reward = 1e9  # no later model is better
    fresh = [evaluation(tmp_path), EveryNTimesteps(50, sb3_callbacks.CheckpointCallback(1, str(tmp_path / "other")))]
    path = tmp_path / "rl_model_192_steps.zip"
    second = resumed(path)
    remembered = second._resuming_from["callbacks"]  # as the file has it
    assert [each["type"] for each in remembered][:3] == ["CallbackList", "EvalCallback", "StopTrainingOnNoModelImprovement"]
    second.learn(320, callback=[*fresh, ResumableCheckpointCallback(64, str(tmp_path)), KillAt(-1)])
    with np.load(tmp_path / "evaluations.npz") as saved:
        assert saved["timesteps"].tolist() == [32 * i for i in range(1, 11)]
    assert fresh[0].best_mean_reward >= remembered[1]["state"]["best_mean_reward"] > -np.inf
    assert fresh[1].last_time_trigger == 300
    assert fresh[0].callback.last_best_mean_reward > -np.inf


def test_evaluations_are_of_the_same_episodes(tmp_path: Path) -> None:
    learn_until_killed(model(), 256, [evaluation(tmp_path / "a"), ResumableCheckpointCallback(64, str(tmp_path)), KillAt(200)])
    learner = resumed(tmp_path / "rl_model_128_steps.zip")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learner.learn(
            256, callback=[evaluation(tmp_path / "b"), ResumableCheckpointCallback(64, str(tmp_path / "c")), KillAt(-1)]
        )
    model().learn(256, callback=evaluation(tmp_path / "whole"))
    found = [np.load(tmp_path / folder / "evaluations.npz")["results"] for folder in ("b", "whole")]
    np.testing.assert_array_equal(*found)


def test_evaluations_of_other_episodes_are_told(tmp_path: Path) -> None:
    learn_until_killed(model(), 128, [evaluation(tmp_path), ResumableCheckpointCallback(32, str(tmp_path)), KillAt(70)])
    other = EvalCallback(make_vec_env("CartPole-v1", 2, seed=5), evaluation(tmp_path).callback, verbose=0)
    learner = resumed(tmp_path / "rl_model_64_steps.zip")
    with pytest.warns(
        UserWarning, match=r"EvalCallback\.eval_env begins anew, .* may differ: env must be made in the same way"
    ):
        learner.learn(128, callback=[other, ResumableCheckpointCallback(32, str(tmp_path)), KillAt(-1)])


def test_what_the_last_update_logged_is_written(tmp_path: Path) -> None:
    """It is written after the next rollout, which is after the checkpoint."""
    callbacks = [CSVLogCallback(tmp_path / "log.csv"), ResumableCheckpointCallback(64, str(tmp_path))]
    learn_until_killed(model(), 128, [*callbacks, KillAt(70)])
    callbacks[0].on_training_end()  # closes the file, as the end of a process does
    learner = resumed(tmp_path / "rl_model_64_steps.zip")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learner.learn(128, callback=[CSVLogCallback(tmp_path / "log.csv"), callbacks[1], KillAt(-1)])
    model().learn(128, callback=CSVLogCallback(tmp_path / "whole.csv"))
    found, expected = (pd.read_csv(tmp_path / name).filter(like="train/") for name in ("log.csv", "whole.csv"))
    pd.testing.assert_frame_equal(found, expected[found.columns])
    assert set(found) == set(expected)
    assert found.iloc[-2:].notna().all(axis=None)


def test_a_worse_model_does_not_replace_the_best(tmp_path: Path) -> None:
    class Lucky(Remembers):
        def __init__(self) -> None:
            super().__init__()
            self.best = -np.inf

        def _on_rollout_end(self) -> None:
            self.best = max(self.best, 1000.0 - self.num_timesteps)

    learn_until_killed(model(), 128, [Lucky(), ResumableCheckpointCallback(32, str(tmp_path)), KillAt(70)])
    fresh = Lucky()
    resumed(tmp_path / "rl_model_64_steps.zip").learn(
        128, callback=[fresh, ResumableCheckpointCallback(32, str(tmp_path)), KillAt(-1)]
    )
    assert fresh.best == 1000 - 32


def test_what_cannot_be_kept_is_named(tmp_path: Path) -> None:
    own = Remembers()
    own.thing = object()
    learn_until_killed(model(), 128, [own, ResumableCheckpointCallback(32, str(tmp_path)), KillAt(70)])
    learner = resumed(tmp_path / "rl_model_64_steps.zip")
    with pytest.warns(UserWarning, match=r"has not kept them: Remembers\.thing$"):
        learner.learn(128, callback=[Remembers(), ResumableCheckpointCallback(32, str(tmp_path)), KillAt(-1)])


def test_callbacks_that_are_missing_are_named(tmp_path: Path) -> None:
    learn_until_killed(model(), 128, [Remembers(), ResumableCheckpointCallback(32, str(tmp_path)), KillAt(70)])
    learner, other = resumed(tmp_path / "rl_model_64_steps.zip"), sb3_callbacks.StopTrainingOnMaxEpisodes(1000)
    with pytest.warns(UserWarning, match="what they remembered is lost: Remembers$"):
        learner.learn(128, callback=other)
    assert other.n_calls == 128  # as if it had been there


def test_callbacks_are_found_in_a_fixed_order() -> None:
    inner = Remembers()
    outer = CallbackList([EveryNTimesteps(5, inner), CallbackList([KillAt(1)])])
    assert [type(each).__name__ for each in callbacks_of(outer)] == [
        *("CallbackList", "EveryNTimesteps", "Remembers", "CallbackList", "KillAt")
    ]


# -- moments at which a run can be saved -----------------------------------------------------------------------------------


def test_checkpoints_inside_of_an_event_callback(tmp_path: Path) -> None:
    inner = ResumableCheckpointCallback(1, str(tmp_path))
    whole = model().learn(256, callback=EveryNTimesteps(70, inner))
    steps = [96, 160, 224]  # the first moments between rollouts after 70, 140 and 210 steps
    assert {path.name for path in tmp_path.iterdir()} == {f"rl_model_{each}_steps.zip" for each in steps}
    again = resumed(tmp_path / "rl_model_160_steps.zip").learn(
        256, callback=EveryNTimesteps(70, ResumableCheckpointCallback(1, str(tmp_path)))
    )
    for ours, theirs in zip(again.policy.parameters(), whole.policy.parameters(), strict=True):
        assert ours.equal(theirs)


class Interrupting(gym.Wrapper):
    """Ctrl-C inside of a step."""

    def __init__(self, env: gym.Env, step: int):
        super().__init__(env)
        self.left = step

    def step(self, action: Any) -> Any:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return super().step(action)


@pytest.mark.parametrize("step", [1, 5, 33])
def test_ctrl_c_inside_of_a_step_leaves_nothing_to_resume_from(step: int, tmp_path: Path) -> None:
    env = DummyVecEnv([lambda: Interrupting(gym.make("CartPole-v1"), step)])
    learner = KLipPPO("MlpPolicy", env, **SMALL)
    with pytest.raises(KeyboardInterrupt):
        learner.learn(128)
    with pytest.raises(ValueError, match="a moment between two rollouts"):
        learner.save(tmp_path / "half", resumable=True)
    assert not list(tmp_path.iterdir())
    learner.save(tmp_path / "whole")  # an ordinary checkpoint


@pytest.mark.parametrize("unwrapped", [False, True])
def test_environments_that_were_stepped_by_others(unwrapped: bool, tmp_path: Path) -> None:
    """Also if they are evaluated as the user made them, without the vectorized environments that the model has around them."""
    learner = model().learn(64)
    learner.save(tmp_path / "fine", resumable=True)
    env = learner.get_env()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there is no Monitor
        evaluate_policy(learner, env.envs[0].unwrapped if unwrapped else env, n_eval_episodes=1)
    with pytest.raises(ValueError, match=r"stepped or reset .* evaluate on separate environments"):
        learner.save(tmp_path / "stepped", resumable=True)
    learner.learn(32, reset_num_timesteps=False).save(tmp_path / "again", resumable=True)


# -- other machines --------------------------------------------------------------------------------------------------------


def test_another_processor_or_device_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sb3_klip.checkpoints import resuming

    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(resuming, "processor", lambda: "Another Processor 3000")
        original = resuming.read_generators
        elsewhere.setattr(resuming, "read_generators", lambda: {**original(), "cuda": ["the state of a GPU"]})
        model().learn(64).save(tmp_path / "elsewhere", resumable=True)
    with pytest.warns(UserWarning, match=r"processor Another Processor 3000 then, .* now.*on a GPU, and there is none now"):
        learner = resumed(tmp_path / "elsewhere.zip")
    assert learner.learn(128).num_timesteps == 128


@pytest.mark.parametrize(
    "value",
    [th.eye(3).to_sparse(), th.nn.UninitializedParameter(), mock.Mock(spec=dict), mock.Mock(spec=list), [0] * 2000],
    ids=["sparse", "lazy", "a mock of a dict", "a mock of a list", "a long list"],
)
def test_what_a_callback_may_hold(value: Any) -> None:
    callback = sb3_callbacks.ConvertCallback(lambda locals_, globals_: True)
    callback.held, callback.other = value, sb3_callbacks.StopTrainingOnMaxEpisodes(1000)  # type: ignore[attr-defined]
    assert len(callbacks_of(callback)) == 2
    assert model().learn(64, callback=callback).num_timesteps == 64
