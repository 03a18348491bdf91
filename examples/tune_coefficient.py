"""
Search for a coefficient and its parameters, together with all other hyperparameters, with RL Zoo and Optuna.

This example runs five short trials. For a real search, use RL Zoo's default of ``--n-trials`` or more.
"""

import subprocess
import sys

command = (
    "-m rl_zoo3.train --algo klip_ppo --env CartPole-v1 -optimize --n-trials 5 --n-startup-trials 2 --n-evaluations 1 "
    "-n 5000 --seed 0 --num-threads 1 --no-optim-plots -f logs/tune -params beta:'search'"
)
# RL Zoo also tries minibatches that are larger than a rollout; Stable-Baselines3 then shows a warning.
quiet = ["-W", "ignore:You have specified a mini-batch size"]
run = subprocess.run([sys.executable, *quiet, *command.split()], check=True, stdout=subprocess.PIPE, text=True)
print(run.stdout[run.stdout.index("Number of finished trials") :])
