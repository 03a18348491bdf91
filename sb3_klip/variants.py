"""The table of the algorithms: one line for each."""

import importlib
from typing import Any, NamedTuple


class Variant(NamedTuple):
    """
    An algorithm of this package.

    :param name: name of its class
    :param module: module of :mod:`sb3_klip` that contains the class
    :param base: name of the class that it is a drop-in for
    :param base_package: package of the base class
    :param zoo_name: its name in RL Zoo
    :param zoo_base: RL Zoo's algorithm whose hyperparameters and agents it uses
    :param in_zoo: whether RL Zoo can train it; RL Zoo passes no action masks during evaluation
    """

    name: str
    module: str
    base: str
    base_package: str
    zoo_name: str
    zoo_base: str
    in_zoo: bool

    @property
    def algorithm(self) -> Any:
        """The class."""
        return getattr(importlib.import_module(f"sb3_klip.{self.module}"), self.name)

    @property
    def base_algorithm(self) -> Any:
        """The class that it is a drop-in for."""
        return getattr(importlib.import_module(self.base_package), self.base)


VARIANTS = (
    Variant("KLipPPO", "klip_ppo", "PPO", "stable_baselines3", "klip_ppo", "ppo", True),
    Variant("KLipRecurrentPPO", "klip_recurrent_ppo", "RecurrentPPO", "sb3_contrib", "klip_ppo_lstm", "ppo_lstm", True),
    Variant("KLipMaskablePPO", "klip_maskable_ppo", "MaskablePPO", "sb3_contrib", "klip_ppo_mask", "ppo_mask", False),
)
