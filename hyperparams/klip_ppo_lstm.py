"""What ``rl_zoo3.train --algo klip_ppo_lstm`` reads: the zoo's ``ppo_lstm.yml``, with ``klip_ppo_lstm.yml`` laid over it."""

from sb3_klip.zoo.hyperparams import protocol

__getattr__ = protocol(__file__, "ppo_lstm")
