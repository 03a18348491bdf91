"""
RL Zoo: registration of the algorithms, their hyperparameters, trained agents and the tuner.

``register()`` is called automatically when a script of RL Zoo starts. If torch's autoloading is switched off, call it before
RL Zoo builds its argument parser, or use ``python -m sb3_klip.zoo train --algo klip_ppo …``.
"""

from sb3_klip.zoo.hyperparams import hyperparameters, overlaid_hyperparams, zoo_hyperparams
from sb3_klip.zoo.registration import ALGORITHMS, register

__all__ = ["ALGORITHMS", "hyperparameters", "overlaid_hyperparams", "register", "zoo_hyperparams"]
