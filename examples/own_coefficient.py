"""A coefficient of your own: a function of per-sample tensors that returns the removal g in β = -w Â g."""

from sb3_klip import KLipPPO
from sb3_klip.coefficients import register
from sb3_klip.surrogate import harmful_distance


@register("late_ramp")
def late_ramp(ratio, advantages, clip_range, progress, *, width=0.1):
    """A linear ramp past the harmful bound that narrows to a step as training goes on."""
    distance = harmful_distance(ratio, advantages, clip_range)
    return (distance / (width * (1 - progress) + 1e-6)).clamp(0, 1)


model = KLipPPO("MlpPolicy", "CartPole-v1", beta="late_ramp", beta_kwargs={"width": 0.2}, seed=0, verbose=1)
model.learn(20_000)
model.save("late_ramp")
print(KLipPPO.load("late_ramp").beta)
