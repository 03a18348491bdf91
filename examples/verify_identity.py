"""
Check that each update of a training is equal to that of PPO, bit for bit.

On the command line, for any environment:

    python -m sb3_klip.verify --env Hopper-v5 --hyperparams default
"""

from sb3_klip import IdentityCheckCallback, KLipPPO

check = IdentityCheckCallback()
model = KLipPPO("MlpPolicy", "Pendulum-v1", n_steps=512, learning_rate=1e-3, seed=0, device="cpu")
model.learn(5_000, callback=check)
print(
    f"{check.minibatches} minibatches compared with PPO's, largest difference {check.difference.ulps} units in the last place"
)
assert check.identical
