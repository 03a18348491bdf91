"""
KLip-PPO for Stable-Baselines3: PPO-Clip as a KL penalty with one coefficient per sample.

The names below are imported on first use, so that ``sb3_klip.surrogate`` can be used without Stable-Baselines3.
"""

import importlib
from typing import TYPE_CHECKING, Any

from sb3_klip.variants import VARIANTS

if TYPE_CHECKING:
    from sb3_klip import coefficients, surrogate, zoo
    from sb3_klip.callbacks import BetaHistogramCallback as BetaHistogramCallback
    from sb3_klip.callbacks import CSVLogCallback as CSVLogCallback
    from sb3_klip.callbacks import IdentityCheckCallback as IdentityCheckCallback
    from sb3_klip.callbacks import ResumableCheckpointCallback as ResumableCheckpointCallback
    from sb3_klip.checkpoints.zoo_run import load_vecnormalize as load_vecnormalize
    from sb3_klip.klip_maskable_ppo import KLipMaskablePPO as KLipMaskablePPO
    from sb3_klip.klip_ppo import KLipPPO as KLipPPO
    from sb3_klip.klip_recurrent_ppo import KLipRecurrentPPO as KLipRecurrentPPO

__version__ = "0.2.0"

# Name and module of each class and function.
_NAMES = {
    "BetaHistogramCallback": "callbacks",
    "CSVLogCallback": "callbacks",
    "IdentityCheckCallback": "callbacks",
    "ResumableCheckpointCallback": "callbacks",
    "load_vecnormalize": "checkpoints.zoo_run",
    **{variant.name: variant.module for variant in VARIANTS},
}

__all__ = ["__version__", "coefficients", "surrogate", "zoo", *_NAMES]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(f"sb3_klip.{_NAMES[name]}"), name)
    if name in __all__:
        return importlib.import_module(f"sb3_klip.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
