"""KLipRecurrentPPO on a task that needs memory: CartPole without its velocities."""

import gymnasium as gym
import numpy as np
from rl_zoo3.wrappers import MaskVelocityWrapper
from stable_baselines3.common.env_util import make_vec_env

from sb3_klip import KLipRecurrentPPO

env = make_vec_env("CartPole-v1", n_envs=8, seed=0, wrapper_class=MaskVelocityWrapper)
model = KLipRecurrentPPO(
    "MlpLstmPolicy",
    env,
    n_steps=128,
    n_epochs=5,
    batch_size=256,
    learning_rate=3e-3,
    policy_kwargs={"lstm_hidden_size": 32, "enable_critic_lstm": False, "shared_lstm": True},
    seed=0,
    device="cpu",
)
model.learn(20_000)

# To play, the policy needs its LSTM state of the previous step.
task = MaskVelocityWrapper(gym.make("CartPole-v1"))
observation, _ = task.reset(seed=0)
memory, begins, total, over = None, True, 0.0, False
while not over:
    action, memory = model.predict(observation, state=memory, episode_start=np.array([begins]), deterministic=True)
    observation, reward, terminated, truncated, _ = task.step(int(action))
    total, begins, over = total + float(reward), False, terminated or truncated
print(f"return of an episode {total:.0f}")
