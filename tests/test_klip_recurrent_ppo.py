"""KLipRecurrentPPO: memory."""

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3.common.env_util import make_vec_env

from sb3_klip import KLipRecurrentPPO


@pytest.mark.slow
def test_recurrent_learning_and_prediction():
    """CartPole without velocities, which a policy without memory cannot balance; RecurrentPPO's own test and budget."""

    def make_env():
        return gym.wrappers.TimeLimit(gym.make("CartPoleNoVel-v1"), 100)

    architecture = {"net_arch": {"vf": [64], "pi": []}, "lstm_hidden_size": 64, "ortho_init": False}
    model = KLipRecurrentPPO(
        "MlpLstmPolicy",
        make_vec_env(make_env, n_envs=8),
        n_steps=128,
        learning_rate=0.0007,
        batch_size=256,
        seed=1,
        max_grad_norm=1,
        gae_lambda=0.98,
        policy_kwargs=architecture,
    )
    model.learn(50_000)
    env, returns = make_env(), []
    for seed in range(10):
        observation, _ = env.reset(seed=seed)
        states, start, done, total = None, np.ones(1, dtype=bool), False, 0.0
        while not done:
            action, states = model.predict(observation, state=states, episode_start=start, deterministic=True)
            observation, reward, terminated, truncated, _ = env.step(int(action))
            start, done, total = np.zeros(1, dtype=bool), terminated or truncated, total + reward
        returns.append(total)
    assert np.mean(returns) > 90
