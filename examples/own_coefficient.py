"""A coefficient of your own: a function of per-sample tensors that returns the removal g in β = -w Â g."""

import tempfile

from sb3_klip import KLipPPO
from sb3_klip.coefficients import register
from sb3_klip.surrogate import partition


@register("clip_by_age")
def clip_by_age(ratio, advantages, clip_range, age, *, halflife=2.0):
    """PPO-Clip with a smaller clip range for older samples: half of it after ``halflife`` updates."""
    kill, _, _ = partition(ratio, advantages, clip_range * 0.5 ** (age / halflife))
    return kill.to(ratio.dtype)


model = KLipPPO("MlpPolicy", "CartPole-v1", beta="clip_by_age", beta_kwargs={"halflife": 1.0}, reuse=3, seed=0, verbose=1)
model.learn(20_000)
with tempfile.TemporaryDirectory() as folder:
    model.save(f"{folder}/clip_by_age")
    print(KLipPPO.load(f"{folder}/clip_by_age").beta)
