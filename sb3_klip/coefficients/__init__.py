"""
The coefficient β, one word each: how strongly each sample's gradient is taken back.

A coefficient is a function of detached per-sample tensors that returns the *removal* g in β = -w Â g, the share of the
gradient that is taken back: 0 leaves a sample alone, 1 removes its gradient, more than 1 pushes it back::

    from sb3_klip import KLipPPO
    from sb3_klip.coefficients import register
    from sb3_klip.surrogate import harmful_distance


    @register("late_ramp")
    def late_ramp(ratio, advantages, clip_range, progress, *, width=0.1):
        distance = harmful_distance(ratio, advantages, clip_range)
        return (distance / (width * (1 - progress) + 1e-6)).clamp(0, 1)


    model = KLipPPO("MlpPolicy", "Hopper-v4", beta="late_ramp", beta_kwargs={"width": 0.2})

Its arguments without a default are what it asks for (:data:`QUANTITIES`), its keyword-only arguments with a default are its
parameters. A coefficient of the KL-penalty family returns a pair: the removal, and a *weight* on the KL estimate that its
parameter or attribute ``estimator`` names.
"""

from sb3_klip.coefficients import clipping, penalties, position, pushing_back, reweighting, softening, state_kl
from sb3_klip.coefficients.coefficient import QUANTITIES, Coefficient, CoefficientLike
from sb3_klip.coefficients.position import Product
from sb3_klip.coefficients.registry import Entry, UnknownCoefficientError, available, entries, make, register
from sb3_klip.surrogate import ESTIMATORS

#: The modules of the family, in the order in which tables show them; the first line of each says what its members do.
FAMILY = (clipping, softening, pushing_back, reweighting, state_kl, penalties, position)

__all__ = [
    "ESTIMATORS",
    "FAMILY",
    "QUANTITIES",
    "Coefficient",
    "CoefficientLike",
    "Entry",
    "Product",
    "UnknownCoefficientError",
    "available",
    "clipping",
    "entries",
    "make",
    "penalties",
    "position",
    "pushing_back",
    "register",
    "reweighting",
    "softening",
    "state_kl",
]
