"""``rl_zoo3.train -conf sb3_klip.hyperparams.fast``: the preset in ``fast.yml``, for ``ppo`` and ``klip_ppo``."""

from sb3_klip.zoo.hyperparams import protocol

__getattr__ = protocol(__file__)
