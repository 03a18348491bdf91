"""Training that is interrupted and resumed ends as if nothing had happened."""

import functools
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from helpers import assert_identical
from sb3_contrib.common.envs import InvalidActionEnvDiscrete
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.utils import FloatSchedule
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecEnvWrapper, VecFrameStack, VecNormalize

from sb3_klip import KLipMaskablePPO, KLipPPO, KLipRecurrentPPO, ResumableCheckpointCallback
from sb3_klip.checkpoints import resuming

STEPS = 64
SMALL = {"n_steps": STEPS, "batch_size": 32, "n_epochs": 2, "seed": 3, "device": "cpu"}


class InterruptError(Exception):
    """Raised in the middle of a rollout."""


class Interrupt(BaseCallback):
    def __init__(self, at: int):
        super().__init__()
        self.at = at

    def _on_step(self) -> bool:
        if self.num_timesteps >= self.at:
            raise InterruptError
        return True


def checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("rl_model_*_steps.zip"), key=lambda path: int(path.stem.split("_")[2]))


def make(env_id: str, n_envs: int = 2, **kwargs: Any) -> Callable[[], VecEnv]:
    return lambda: VecNormalize(make_vec_env(env_id, n_envs, **kwargs), gamma=0.98)


def interrupted(make_env: Callable[[], VecEnv], total: int, folder: Path, algorithm: Any = KLipPPO, **kwargs: Any) -> Path:
    """Train until the middle of the fourth rollout, and return the last checkpoint."""
    env = make_env()
    kwargs = {"policy": "MlpPolicy", **SMALL, **kwargs}
    model = algorithm(env=env, **kwargs)
    callbacks = [ResumableCheckpointCallback(STEPS, str(folder)), Interrupt(int(3.5 * STEPS * env.num_envs))]
    with pytest.raises(InterruptError):
        model.learn(total, callback=callbacks)
    env.close()
    return checkpoints(folder)[-1]


MASKABLE = {"algorithm": KLipMaskablePPO}
RECURRENT = {"algorithm": KLipRecurrentPPO, "policy": "MlpLstmPolicy", "policy_kwargs": {"lstm_hidden_size": 8}}


@pytest.mark.parametrize(
    ("make_env", "kwargs"),
    [
        *(
            (make(env_id), {})
            for env_id in ("Hopper-v4", "HalfCheetah-v4", "Walker2d-v4", "Ant-v4", "Humanoid-v4", "Hopper-v5")
        ),
        *((make(env_id), {}) for env_id in ("Acrobot-v1", "MountainCar-v0", "MountainCarContinuous-v0", "Pendulum-v1")),
        (lambda: make_vec_env("CartPole-v1", 3), {}),
        (make("Hopper-v4"), {"use_sde": True, "sde_sample_freq": 4}),
        (lambda: VecFrameStack(make("CartPole-v1")(), 3), {}),
        (make("CartPole-v1"), {"beta": "adaptive"}),
        (make("Hopper-v4"), {"reuse": 3}),
        (lambda: make_vec_env("Pendulum-v1", 2), {"reuse": [0.4, 0.3, 0.2, 0.1], "beta": "position"}),
        (make("CartPole-v1"), {"beta": "position", "clip_range": lambda progress: 0.3 * progress}),
        (make("CartPole-v1"), RECURRENT),
        (lambda: DummyVecEnv([lambda: InvalidActionEnvDiscrete(dim=20, n_invalid_actions=5)]), MASKABLE),
    ],
)
def test_equals_the_uninterrupted_run(make_env: Callable[[], VecEnv], kwargs: dict[str, Any], tmp_path: Path) -> None:
    total = 6 * STEPS * make_env().num_envs
    arguments = {"policy": "MlpPolicy", **SMALL, **kwargs}
    reference = arguments.pop("algorithm", KLipPPO)(env=make_env(), **arguments).learn(total)
    last = interrupted(make_env, total, tmp_path, **kwargs)

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The run goes on")
        model = type(reference).load(last, env=make_env(), device="cpu", resume=True)
    assert model.num_timesteps == total // 2
    # What a program draws between loading and learning does not matter.
    random.random(), np.random.rand(3), th.rand(3)
    model.learn(total)

    assert_identical(model, reference)
    episodes = [[(episode["r"], episode["l"]) for episode in each.ep_info_buffer] for each in (model, reference)]
    assert episodes[0] == episodes[1]
    if (statistics := model.get_vec_normalize_env()) is not None:
        expected = reference.get_vec_normalize_env()
        np.testing.assert_array_equal(statistics.obs_rms.mean, expected.obs_rms.mean)
        np.testing.assert_array_equal(statistics.returns, expected.returns)
        assert statistics.ret_rms.var == expected.ret_rms.var
    np.testing.assert_array_equal(model._last_obs, reference._last_obs)


class Change(BaseCallback):
    """Changes the model once, at an early step."""

    def __init__(self, change: Callable[[Any], Any]):
        super().__init__()
        self.change = change

    def _on_step(self) -> bool:
        if self.num_timesteps == STEPS // 2:
            self.change(self.model)
        return True


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model, "lr_schedule", FloatSchedule(1e-5)),
        lambda model: setattr(model, "gamma", 0.5),
        lambda model: model.policy.mlp_extractor.requires_grad_(False),
    ],
    ids=["lr_schedule", "gamma", "frozen"],
)
def test_what_a_callback_has_changed_stays_changed(change: Callable[[Any], Any], tmp_path: Path) -> None:
    make_env = make("CartPole-v1", 1)
    whole = KLipPPO("MlpPolicy", make_env(), **SMALL).learn(6 * STEPS, callback=Change(change))
    callbacks = [Change(change), ResumableCheckpointCallback(STEPS, str(tmp_path)), Interrupt(200)]
    with pytest.raises(InterruptError):
        KLipPPO("MlpPolicy", make_env(), **SMALL).learn(6 * STEPS, callback=callbacks)
    resumed = KLipPPO.load(checkpoints(tmp_path)[-1], env=make_env(), resume=True)
    assert_identical(resumed.learn(6 * STEPS, callback=Change(change)), whole)


def test_what_the_user_gives_counts(tmp_path: Path) -> None:
    path = interrupted(make("CartPole-v1", 1), 400, tmp_path)
    model = KLipPPO.load(path, env=make("CartPole-v1", 1)(), resume=True, learning_rate=0.5, gamma=0.25)
    assert (model.lr_schedule(1), model.rollout_buffer.gamma, model.rollout_buffer.gae_lambda) == (0.5, 0.25, 0.95)


SCRIPT = """
import enum, sys
import gymnasium as gym
from sb3_klip import KLipPPO

class Side(enum.Enum):
    LEFT = 0
    RIGHT = 1

class Sides(gym.Wrapper):
    side = Side.LEFT

    def step(self, action):
        self.side = Side.RIGHT if self.side == Side.LEFT else Side.LEFT
        obs, reward, *rest = self.env.step(action)
        return obs, reward * (self.side is Side.LEFT), *rest

env, kind, path = Sides(gym.make("CartPole-v1")), sys.argv[1], sys.argv[2]
if kind == "save":
    model = KLipPPO("MlpPolicy", env, n_steps=32, batch_size=32, seed=0, device="cpu").learn(32)
    model.save(path, resumable=True)
else:
    model = KLipPPO.load(path, env=env, resume=True, device="cpu")
model.learn(32, reset_num_timesteps=False)
print(model.policy.state_dict()["value_net.weight"].sum().item())
"""


def test_a_state_of_classes_of_the_script(tmp_path: Path) -> None:
    """Members of an enumeration, say, are those of the class that the script defines again."""
    (tmp_path / "script.py").write_text(SCRIPT)

    def run(kind: str) -> str:
        command = [sys.executable, str(tmp_path / "script.py"), kind, str(tmp_path / "model.zip")]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    assert run("save") == run("resume")


def test_any_rollout_boundary_will_do(tmp_path: Path) -> None:
    """Also the first, the last, and one that was itself reached after resuming."""
    make_env, total = make("Hopper-v4"), 6 * STEPS * 2
    reference = KLipPPO("MlpPolicy", make_env(), **SMALL)
    reference.learn(total, callback=ResumableCheckpointCallback(1, str(tmp_path)))
    assert [path.stem for path in checkpoints(tmp_path)] == [f"rl_model_{n * 2 * STEPS}_steps" for n in range(1, 7)]
    for position, path in enumerate(checkpoints(tmp_path)):
        again = tmp_path / str(position)
        model = KLipPPO.load(path, env=make_env(), device="cpu", resume=True)
        model.learn(total, callback=ResumableCheckpointCallback(1, str(again)))
        assert_identical(model, reference)
        # Nothing is saved twice, and nothing that the reference did not save.
        assert [path.name for path in checkpoints(again)] == [path.name for path in checkpoints(tmp_path)[position + 1 :]]
        if position == 0:
            twice = KLipPPO.load(checkpoints(again)[0], env=make_env(), device="cpu", resume=True).learn(total)
            assert_identical(twice, reference)


def test_save_after_learning_resumes_into_a_longer_run(tmp_path: Path) -> None:
    make_env = make("CartPole-v1")
    short = KLipPPO("MlpPolicy", make_env(), **SMALL).learn(4 * STEPS)
    short.save(tmp_path / "short", resumable=True)
    # A constant learning rate and clip range: nothing depends on the total.
    with pytest.warns(
        UserWarning,
        match=r"total_timesteps=512 ends this run at 512 steps, and the run that is resumed would have ended at 256: ",
    ):
        longer = KLipPPO.load(tmp_path / "short", env=make_env(), device="cpu", resume=True).learn(8 * STEPS)
    assert_identical(longer, KLipPPO("MlpPolicy", make_env(), **SMALL).learn(8 * STEPS))


@pytest.mark.parametrize("total", [4 * STEPS, 4 * STEPS - 10], ids=["whole rollouts", "rounded up"])
def test_a_finished_run_has_nothing_left_to_do(total: int, tmp_path: Path) -> None:
    """As after a kill between the last checkpoint and what a script does at its end: SB3 rounds up to whole rollouts."""
    make_env = make("CartPole-v1")
    model = KLipPPO("MlpPolicy", make_env(), **SMALL).learn(total)
    model.save(tmp_path / "end", resumable=True)
    again = KLipPPO.load(tmp_path / "end", env=make_env(), device="cpu", resume=True).learn(total, progress_bar=True)
    assert_identical(again, model)


def test_callbacks_go_on_at_the_same_steps(tmp_path: Path) -> None:
    make_env, total = make("CartPole-v1"), 6 * STEPS * 2

    def evaluation(folder: str) -> EvalCallback:
        env = VecNormalize(make_vec_env("CartPole-v1", 1), training=False, norm_reward=False)
        return EvalCallback(env, n_eval_episodes=1, eval_freq=50, log_path=str(tmp_path / folder), verbose=0)

    KLipPPO("MlpPolicy", make_env(), **SMALL).learn(total, callback=evaluation("whole"))
    last = interrupted(make_env, total, tmp_path)
    KLipPPO.load(last, env=make_env(), device="cpu", resume=True).learn(total, callback=[evaluation("rest")])
    whole, rest = (np.load(tmp_path / folder / "evaluations.npz")["timesteps"] for folder in ("whole", "rest"))
    assert list(rest) == [step for step in whole if step > total // 2]


class Opaque(gym.Wrapper):
    """Holds what cannot be pickled, as environments written in other languages do."""

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.handle = (each for each in ())


def opaque() -> VecEnv:
    return VecNormalize(make_vec_env("CartPole-v1", 2, wrapper_class=Opaque))


def subprocesses() -> VecEnv:
    return VecNormalize(make_vec_env("CartPole-v1", 2, vec_env_cls=SubprocVecEnv, vec_env_kwargs={"start_method": "fork"}))


class OpaqueVecEnv(VecEnvWrapper):
    """A wrapper that cannot be read."""

    def __init__(self, venv: VecEnv):
        super().__init__(venv)
        self.handle = (each for each in ())

    def reset(self) -> Any:
        return self.venv.reset()

    def step_wait(self) -> Any:
        return self.venv.step_wait()


@pytest.mark.parametrize(
    ("make_env", "reason"),
    [
        (lambda: OpaqueVecEnv(make("CartPole-v1")()), "the state of OpaqueVecEnv cannot be read"),
        (make("LunarLander-v3"), "LunarLander.*SwigPyObject"),
        (opaque, "cannot pickle 'generator' object"),
        (subprocesses, "the environments of a SubprocVecEnv are not in this process"),
    ],
)
def test_where_an_environment_cannot_be_restored_an_episode_begins(
    make_env: Callable[[], VecEnv], reason: str, tmp_path: Path
) -> None:
    total = 6 * STEPS * 2
    with pytest.warns(UserWarning, match=f"will go on at the start of an episode, as .*{reason}"):
        last = interrupted(make_env, total, tmp_path)
    with pytest.warns(UserWarning, match=f"goes on at the start of an episode, and not exactly .*{reason}"):
        model = KLipPPO.load(last, env=make_env(), device="cpu", resume=True)
    saved = model.get_vec_normalize_env().obs_rms.count
    assert saved > total // 2  # the statistics are those of the run
    model.learn(total)
    assert model.num_timesteps == total
    model.env.close()


def test_an_environment_that_cannot_be_restored_keeps_its_generator(tmp_path: Path) -> None:
    last = interrupted(opaque, 6 * STEPS * 2, tmp_path)
    with pytest.warns(UserWarning, match="not exactly"):
        models = [KLipPPO.load(last, env=opaque(), device="cpu", resume=True) for _ in range(2)]
    starts = [model.env.reset() for model in models]
    fresh = opaque()
    fresh.seed(SMALL["seed"])
    np.testing.assert_array_equal(*starts)
    assert not np.allclose(models[0].env.get_original_obs(), fresh.venv.reset())


def test_environments_within_attributes_are_not_taken_for_state(tmp_path: Path) -> None:
    """Their pickle would be a recipe for a new one."""

    class Twin(gym.Wrapper):
        def __init__(self, env: gym.Env):
            super().__init__(env)
            self.other = gym.make("CartPole-v1").unwrapped

    state = resuming.EnvState.read(make_vec_env("CartPole-v1", 1, wrapper_class=Twin))
    assert "holds another environment, a CartPoleEnv" in state.problem


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    return interrupted(make("CartPole-v1"), 6 * STEPS * 2, folder)


def test_it_is_an_ordinary_checkpoint_too(checkpoint: Path) -> None:
    env = make("CartPole-v1")()
    for algorithm in (PPO, KLipPPO):
        model = algorithm.load(checkpoint, env=env, device="cpu")
        assert model.num_timesteps == 3 * STEPS * 2
        model.learn(STEPS)
        assert model.num_timesteps == 2 * STEPS  # begins anew, as always in SB3


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({}, "resume=True needs env"),
        ({"env": make("CartPole-v1", 1)}, r"as many environments: it is VecNormalize > DummyVecEnv > Monitor"),
        ({"env": lambda: make_vec_env("CartPole-v1", 2)}, "with the same wrappers"),
        ({"env": subprocesses}, "with the same wrappers"),
        ({"env": make("CartPole-v1"), "trusted": False}, "resume=True needs trusted=True"),
    ],
)
def test_what_cannot_be_resumed_is_refused(checkpoint: Path, kwargs: dict[str, Any], message: str) -> None:
    if "env" in kwargs:
        kwargs = {**kwargs, "env": kwargs["env"]()}
    with pytest.raises(ValueError, match=message):
        KLipPPO.load(checkpoint, device="cpu", resume=True, **kwargs)
    if "env" in kwargs:
        kwargs["env"].close()


def test_a_checkpoint_without_state_is_refused(tmp_path: Path) -> None:
    KLipPPO("MlpPolicy", "CartPole-v1", **SMALL).save(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"plain.zip' has nothing to resume from"):
        KLipPPO.load(tmp_path / "plain", env=make("CartPole-v1")(), resume=True)


def test_other_versions_are_named(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = {**resuming.conditions(th.device("cpu")), "torch": "99.0", "torch threads": "7"}
    monkeypatch.setattr(resuming, "conditions", lambda device: now)
    with pytest.warns(UserWarning, match=r"torch \S+ then, 99.0 now; torch threads 1 then, 7 now"):
        KLipPPO.load(checkpoint, env=make("CartPole-v1")(), device="cpu", resume=True)


class SaveAt(BaseCallback):
    """Saves a resumable checkpoint at a moment that is not between two rollouts."""

    def __init__(self, path: Path, moment: str):
        super().__init__()
        self.path, self.moment = path, moment

    def _on_step(self) -> bool:
        if self.moment == "step":
            self.model.save(self.path, resumable=True)
        return True

    def _on_rollout_end(self) -> None:
        self.model.save(self.path, resumable=True)


@pytest.mark.parametrize("moment", ["step", "rollout end", "before"])
def test_only_between_rollouts(moment: str, tmp_path: Path) -> None:
    model = KLipPPO("MlpPolicy", "CartPole-v1", **SMALL)
    save = functools.partial(model.save, tmp_path / "no", resumable=True)
    learn = functools.partial(model.learn, STEPS, callback=SaveAt(tmp_path / "no", moment))
    with pytest.raises(ValueError, match="a moment between two rollouts"):
        save() if moment == "before" else learn()
    assert not (tmp_path / "no.zip").exists()


def test_an_interrupted_update_is_not_a_boundary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = KLipPPO("MlpPolicy", "CartPole-v1", **SMALL)

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "_end_update", interrupt)
    with pytest.raises(KeyboardInterrupt):
        model.learn(STEPS)
    with pytest.raises(ValueError, match="between two rollouts"):
        model.save(tmp_path / "no", resumable=True)


def example(folder: Path) -> subprocess.Popen[bytes]:
    """The example, which goes on from the last checkpoint in a folder."""
    script = Path(__file__).parent.parent / "examples" / "resume.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, str(script), str(folder)], env=environment, stdout=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert example(folder).wait(300) == 0
    return folder / "final.zip"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(int(os.environ.get("KILLED_RUNS", "3"))))
def test_killed_at_random_moments(seed: int, uninterrupted: Path, tmp_path: Path) -> None:
    """SIGKILL a random time after one of the next checkpoints, and a new start, until the run comes to its end."""
    chance, kills = random.Random(seed), 0
    while kills < 20:
        # Counted, not timed: on a busy machine a start alone takes longer than a whole run on an idle one.
        awaited = len(list(tmp_path.glob("rl_model_*"))) + chance.randint(1, 6)
        process = example(tmp_path)
        while process.poll() is None and len(list(tmp_path.glob("rl_model_*"))) < awaited:
            time.sleep(0.01)
        try:
            status = process.wait(chance.uniform(0, 0.5))
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            status = process.wait()
        if status != -signal.SIGKILL:
            break
        kills += 1
    assert status == 0
    assert kills > 0
    print(f"killed {kills} times")
    ours, theirs = (KLipPPO.load(path, device="cpu") for path in (tmp_path / "final.zip", uninterrupted))
    assert_identical(ours, theirs)


def test_a_generator_that_cannot_be_pickled() -> None:
    class Sequence(np.random.bit_generator.ISeedSequence):
        def generate_state(self, n_words: int, dtype: Any = np.uint32) -> np.ndarray:
            return np.arange(n_words, dtype=dtype)

    models = []
    for algorithm in (KLipPPO, PPO):
        env = gym.make("CartPole-v1")
        env.reset(seed=0)
        env.unwrapped._np_random = np.random.Generator(np.random.PCG64(Sequence()))
        models.append(algorithm("MlpPolicy", DummyVecEnv([lambda env=env: env]), **{**SMALL, "seed": None}))  # type: ignore
    models[0].set_parameters(models[1].get_parameters())
    for model in models:
        th.manual_seed(0)
        np.random.seed(0)
        model.learn(2 * STEPS)
    assert_identical(*models)
