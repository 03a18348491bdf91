"""``rl_zoo3.train -conf sb3_klip.hyperparams.geppo``: the protocol in ``geppo.yml``, for ``klip_ppo``."""

from pathlib import Path
from typing import Any

import yaml


def __getattr__(name: str) -> Any:
    # RL Zoo changes the dictionary that it is given, so each reading gets one of its own.
    if name == "hyperparams":
        return yaml.safe_load(Path(__file__).with_suffix(".yml").read_text())
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
