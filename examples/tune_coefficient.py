"""
Search for a coefficient and its parameters, together with all other hyperparameters, with Optuna through RL Zoo.

Five short trials here; for a real search, leave ``--n-trials`` at RL Zoo's default or higher.
"""

import subprocess
import sys

command = (
    "-m rl_zoo3.train --algo klip_ppo --env CartPole-v1 -optimize --n-trials 5 --n-startup-trials 2 --n-evaluations 1 "
    "-n 5000 --seed 0 --num-threads 1 --no-optim-plots -f logs/tune -params beta:'search'"
)
# RL Zoo also tries minibatches that are larger than a rollout, of which Stable-Baselines3 warns.
quiet = ["-W", "ignore:You have specified a mini-batch size"]
run = subprocess.run([sys.executable, *quiet, *command.split()], check=True, stdout=subprocess.PIPE, text=True)
print(run.stdout[run.stdout.index("Number of finished trials") :])
