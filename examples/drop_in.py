"""KLipPPO in the place of PPO: the same arguments, the same policy at the end, bit for bit."""

import torch as th
from stable_baselines3 import PPO

from sb3_klip import KLipPPO

ppo = PPO("MlpPolicy", "CartPole-v1", seed=0, n_steps=1_800, batch_size=60, device="cpu").learn(10_000)
klip = KLipPPO("MlpPolicy", "CartPole-v1", seed=0, n_steps=1_800, batch_size=60, device="cpu").learn(10_000)

pairs = list(zip(ppo.policy.parameters(), klip.policy.parameters(), strict=True))
identical = all(th.equal(a, b) for a, b in pairs)
print(f"{sum(a.numel() for a, _ in pairs)} parameters after {ppo.num_timesteps} steps, identical: {identical}")
assert identical
