"""The algorithms: one line for each, which everything reads that has to know them."""

import importlib
from typing import Any, NamedTuple


class Variant(NamedTuple):
    """
    An algorithm of this package.

    :param name: its class, in the module of :mod:`sb3_klip` that ``module`` names
    :param module: that module
    :param base: the class that it is a drop-in for
    :param base_package: where that one is imported from
    :param zoo_name: what RL Zoo calls it
    :param zoo_base: RL Zoo's algorithm whose hyperparameters and agents it takes
    :param in_zoo: whether RL Zoo can train it: the zoo passes no action masks when it evaluates
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
