"""
The coefficients by name: which share of each sample's gradient is removed.

A coefficient is a function of detached tensors with one number per sample. It returns the *removal* g in β = -w Â g: the share
of the gradient that is removed. With g = 0 the gradient is unchanged, with g = 1 it is zero, with g > 1 it is reversed::

    from sb3_klip import KLipPPO
    from sb3_klip.coefficients import register
    from sb3_klip.surrogate import harmful_distance


    @register("late_ramp")
    def late_ramp(ratio, advantages, clip_range, progress, *, width=0.1):
        distance = harmful_distance(ratio, advantages, clip_range)
        return (distance / (width * (1 - progress) + 1e-6)).clamp(0, 1)


    model = KLipPPO("MlpPolicy", "Hopper-v4", beta="late_ramp", beta_kwargs={"width": 0.2})

Further arguments without a default request quantities (:data:`QUANTITIES`). Keyword-only arguments with a default are the
parameters. A penalty returns a pair: the removal, and a *weight* on an estimate of the KL divergence. Its parameter or
attribute ``estimator`` names the estimate.
"""

from sb3_klip.coefficients import clipping, penalties, position, pushing_back, reweighting, softening, state_kl
from sb3_klip.coefficients.coefficient import QUANTITIES, Coefficient, CoefficientLike
from sb3_klip.coefficients.position import Product
from sb3_klip.coefficients.registry import Entry, UnknownCoefficientError, available, entries, make, register
from sb3_klip.surrogate import ESTIMATORS

#: The modules of coefficients, in the order of the tables; the first line of each says what its coefficients do.
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
