"""
A training that resumes after it was killed: start this script again.

The final policy is the same, bit for bit, as without an interruption. The first argument is the folder for the checkpoints.
"""

import sys
from pathlib import Path

from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from sb3_klip import KLipPPO, ResumableCheckpointCallback

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "logs/resume")
env = VecNormalize(make_vec_env("Hopper-v5", n_envs=2))

checkpoints = sorted(folder.glob("rl_model_*_steps.zip"), key=lambda path: int(path.stem.split("_")[2]))
if checkpoints:
    model = KLipPPO.load(checkpoints[-1], env=env, resume=True)
    print(f"Resuming at step {model.num_timesteps}", flush=True)
else:
    model = KLipPPO("MlpPolicy", env, n_steps=512, n_epochs=5, seed=0, device="cpu")

# The same call each time: it runs the remaining steps.
model.learn(20_000, callback=ResumableCheckpointCallback(save_freq=512, save_path=str(folder)))
model.save(folder / "final")
print(f"Trained for {model.num_timesteps} steps; the policy is in {folder / 'final.zip'}")
