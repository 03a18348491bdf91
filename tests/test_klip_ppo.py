"""KLipPPO alone: its constructor, its documentation, and that it learns."""

import inspect

import numpy as np
import pytest
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.utils import LinearSchedule

from sb3_klip import KLipPPO


def test_constructor_is_that_of_ppo_and_five_arguments():
    ours = list(inspect.signature(KLipPPO.__init__).parameters.values())
    theirs = list(inspect.signature(PPO.__init__).parameters.values())
    shared = ours[: len(theirs)]
    assert [(p.name, p.default) for p in shared] == [(p.name, p.default) for p in theirs]
    added = {p.name: p.default for p in ours[len(theirs) :]}
    assert added == {"beta": "step", "beta_kwargs": None, "log_kl": False, "compile": False, "reuse": 1}
    assert KLipPPO.policy_aliases == PPO.policy_aliases
    assert inspect.signature(KLipPPO.learn).parameters["tb_log_name"].default == "KLipPPO"


def test_every_argument_is_documented():
    for name in list(inspect.signature(KLipPPO.__init__).parameters)[1:]:
        assert f":param {name}:" in KLipPPO.__doc__


@pytest.mark.slow
def test_learning():
    """CartPole, solved by the zoo's standard: the mean return of the last 100 episodes."""
    model = KLipPPO("MlpPolicy", make_vec_env("CartPole-v1", 8, seed=0), n_steps=32, batch_size=256, n_epochs=20,
                    gae_lambda=0.8, gamma=0.98, learning_rate=LinearSchedule(1e-3, 0, 1), clip_range=0.2, seed=0)  # fmt: skip
    model.learn(40_000)
    assert np.mean([episode["r"] for episode in model.ep_info_buffer]) > 300
