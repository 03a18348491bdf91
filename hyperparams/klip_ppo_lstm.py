"""What ``rl_zoo3.train --algo klip_ppo_lstm`` reads: the zoo's ``ppo_lstm.yml``, with ``klip_ppo_lstm.yml`` laid over it."""

from typing import Any

from sb3_klip.zoo.hyperparams import overlaid_hyperparams


def __getattr__(name: str) -> Any:
    # RL Zoo changes the dictionary that it is given, so each reading gets one of its own.
    if name == "hyperparams":
        return overlaid_hyperparams("ppo_lstm", "klip_ppo_lstm")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
