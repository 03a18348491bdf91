"""``rl_zoo3.train -conf sb3_klip.hyperparams.geppo``: the protocol in ``geppo.yml``, for ``klip_ppo``."""

from sb3_klip.zoo.hyperparams import protocol

__getattr__ = protocol(__file__)
