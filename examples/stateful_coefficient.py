"""A coefficient with parameters and a state: PPO-Clip with a clip range that adapts to the KL divergence."""

import tempfile

from sb3_klip import KLipPPO
from sb3_klip.coefficients import register
from sb3_klip.coefficients.clipping import step


@register("clip_by_kl")
class ClipByKL:
    """PPO-Clip with a factor on the clip range, which decreases while the KL divergence is too large, and else increases."""

    def __init__(self, kl_target=0.01, rate=1.1):
        # Checkpoints need each argument in an attribute of the same name.
        self.kl_target = kl_target
        self.rate = rate
        self.factor = 1.0

    def __call__(self, ratio, advantages, clip_range):
        return step(ratio, advantages, clip_range * self.factor)

    def end_update(self, kl):
        """Receives the KL divergence after each update."""
        self.factor *= 1 / self.rate if kl > self.kl_target else self.rate

    def state_dict(self):
        return {"factor": self.factor}

    def load_state_dict(self, state):
        self.factor = state["factor"]


model = KLipPPO("MlpPolicy", "CartPole-v1", beta="clip_by_kl", beta_kwargs={"kl_target": 0.005}, n_steps=512, seed=0)
model.learn(10_000)
with tempfile.TemporaryDirectory() as folder:
    model.save(f"{folder}/clip_by_kl")
    loaded = KLipPPO.load(f"{folder}/clip_by_kl")
print(f"{loaded.beta}: the clip range is now {loaded.beta.function.factor:.3f} times as wide")
