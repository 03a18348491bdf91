"""
Train an agent of RL Zoo further, with another coefficient and under the next version of its environment.

The first argument is a zip file that RL Zoo has saved, such as one of rl-trained-agents, with its statistics beside it.
Without it, a small one is trained with PPO first. On the command line:

    python -m rl_zoo3.train --algo klip_ppo --env Hopper-v5 -i agent.zip -params beta:soft_min
"""

import subprocess
import sys
from pathlib import Path

from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_klip import KLipPPO, load_vecnormalize

if len(sys.argv) > 1:
    agent = Path(sys.argv[1])
else:
    command = "-m rl_zoo3.train --algo ppo --env Hopper-v4 -n 20000 --seed 0 --eval-freq -1 --num-threads 1 -f logs/continue"
    subprocess.run([sys.executable, *command.split()], check=True, stdout=subprocess.DEVNULL)
    agent = Path("logs/continue/ppo/Hopper-v4_1/Hopper-v4.zip")

env = make_vec_env("Hopper-v5")
env = load_vecnormalize(agent.with_suffix("") / "vecnormalize.pkl", env)
model = KLipPPO.load(agent, env=env, beta="soft_min", device="cpu", verbose=0)


def mean_return() -> float:
    """Of ten episodes, with the statistics as they are."""
    env.training = env.norm_reward = False
    mean, _ = evaluate_policy(model, env, n_eval_episodes=10)
    env.training = env.norm_reward = True
    return float(mean)


before = mean_return()
model.learn(10_000, reset_num_timesteps=False)
print(f"{model.beta!r}: mean return {before:.0f} before, {mean_return():.0f} after {model.num_timesteps} steps")
