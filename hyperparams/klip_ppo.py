"""What ``rl_zoo3.train --algo klip_ppo`` reads: the installed zoo's ``ppo.yml``, with ``klip_ppo.yml`` laid over it."""

from typing import Any

from sb3_klip.zoo.hyperparams import overlaid_hyperparams


def __getattr__(name: str) -> Any:
    # RL Zoo changes the dictionary that it is given, so each reading gets one of its own.
    if name == "hyperparams":
        return overlaid_hyperparams("ppo", "klip_ppo")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
