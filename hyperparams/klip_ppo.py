"""What ``rl_zoo3.train --algo klip_ppo`` reads: the installed zoo's ``ppo.yml``, with ``klip_ppo.yml`` laid over it."""

from sb3_klip.zoo.hyperparams import protocol

__getattr__ = protocol(__file__, "ppo")
