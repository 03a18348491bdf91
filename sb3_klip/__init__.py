"""
KLip-PPO for Stable-Baselines3: PPO-Clip as a KL penalty with one coefficient per sample.

The names below are imported on first use: the RL Zoo hook, which runs when torch is imported, lives in this package, and
must not pull in Stable-Baselines3.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sb3_klip import coefficients, surrogate, zoo
    from sb3_klip.callbacks import BetaHistogramCallback, CSVLogCallback
    from sb3_klip.checkpoint import load_vecnormalize
    from sb3_klip.identity import IdentityCheckCallback
    from sb3_klip.klip_maskable_ppo import KLipMaskablePPO
    from sb3_klip.klip_ppo import KLipPPO
    from sb3_klip.klip_recurrent_ppo import KLipRecurrentPPO
    from sb3_klip.resume import ResumableCheckpointCallback

__version__ = "0.1.0"

# Name and module of each class and function.
_NAMES = {
    "BetaHistogramCallback": "callbacks",
    "CSVLogCallback": "callbacks",
    "IdentityCheckCallback": "identity",
    "KLipMaskablePPO": "klip_maskable_ppo",
    "KLipPPO": "klip_ppo",
    "KLipRecurrentPPO": "klip_recurrent_ppo",
    "ResumableCheckpointCallback": "resume",
    "load_vecnormalize": "checkpoint",
}

__all__ = [
    "BetaHistogramCallback",
    "CSVLogCallback",
    "IdentityCheckCallback",
    "KLipMaskablePPO",
    "KLipPPO",
    "KLipRecurrentPPO",
    "ResumableCheckpointCallback",
    "__version__",
    "coefficients",
    "load_vecnormalize",
    "surrogate",
    "zoo",
]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(f"sb3_klip.{_NAMES[name]}"), name)
    if name in __all__:
        return importlib.import_module(f"sb3_klip.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
