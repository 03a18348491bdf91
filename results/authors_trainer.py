"""
RL Zoo with the two places where the paper's trainer differs from Stable-Baselines3, together and one by one.

    python results/authors_trainer.py both --env LunarLander-v3 --seed 0

It trains under the paper's protocol and writes ``results/authors_trainer/results/LunarLander-v3/both/seed-0.csv``, or with
``--beta adaptive`` that of ``adaptive_both``. It serves to attribute a difference between the paper's numbers and ours; what
remains is the version of MuJoCo.
"""

import argparse
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch as th
from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER
from rl_zoo3.train import train
from rl_zoo3.utils import ALGOS
from sb3_klip.hyperparams.paper import hyperparams

from sb3_klip import KLipPPO
from sb3_klip.experiments.cell import commit
from sb3_klip.experiments.results import read_episodes, summarize, write_result
from sb3_klip.reproducibility import processor, versions

#: What each method changes in ``hyperparams/paper.yml``; the larger value loss has a factor of 1/2, which SB3's has not.
METHODS: dict[str, dict[str, Any]] = {
    "both": {"vf_coef": 0.5},
    "value_loss": {"vf_coef": 0.5, "rollout_advantages": False},
    "advantages": {"larger_value_loss": False},
}
FOLDER = Path(__file__).with_suffix("") / "results"


class AuthorsPPO(KLipPPO):
    """
    KLipPPO with the advantage normalisation and the value loss of the paper's trainer.

    :param rollout_advantages: normalise advantages over the rollout, and not over each minibatch
    :param larger_value_loss: half of the larger one of the clipped and the unclipped squared error, and not the unclipped one
    """

    def __init__(self, *args: Any, rollout_advantages: bool = True, larger_value_loss: bool = True, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.rollout_advantages = rollout_advantages
        self.larger_value_loss = larger_value_loss
        self.normalize_advantage = not rollout_advantages

    def train(self) -> None:
        """Normalise the rollout's advantages, then update."""
        if self.rollout_advantages:
            advantages = self.rollout_buffer.advantages
            self.rollout_buffer.advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        super().train()

    def _minibatch_loss(self, rollout_data: Any, *args: Any) -> Any:
        self._old_values = rollout_data.old_values
        return super()._minibatch_loss(rollout_data, *args)

    def _value_function_loss(self, returns: th.Tensor, values: th.Tensor, mask: th.Tensor | None) -> th.Tensor:
        if not self.larger_value_loss:
            return super()._value_function_loss(returns, values, mask)
        clipped = self._old_values + (values - self._old_values).clamp(-0.2, 0.2)
        return 0.5 * th.max((values - returns).square(), (clipped - returns).square()).mean()


def main() -> None:
    """Train one run, and write its result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("--env", required=True, choices=[task for task in hyperparams if task != "default"])
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--beta", choices=("step", "fixed", "adaptive"), default="step")
    options = parser.parse_args()
    env, seed, changes = options.env, options.seed, METHODS[options.method]
    method = options.method
    if options.beta != "step":
        method, changes = f"{options.beta}_{method}", {**changes, "beta": options.beta}
    for known, value in ((ALGOS, AuthorsPPO), *((of, of["ppo"]) for of in (HYPERPARAMS_SAMPLER, HYPERPARAMS_CONVERTER))):
        known["authors_ppo"] = value
    command, started = shlex.join(["python", "results/authors_trainer.py", *sys.argv[1:]]), time.time()
    with tempfile.TemporaryDirectory() as logs:
        sys.argv[1:] = [
            *("--algo", "authors_ppo", "--env", env, "--seed", str(seed), "--conf-file", "sb3_klip.hyperparams.paper"),
            *("--num-threads", "1", "--eval-freq", "-1", "--verbose", "0", "-f", logs),
            *("-params", *(f"{key}:{value!r}" for key, value in changes.items())),
        ]
        train()
        episodes = read_episodes(list(Path(logs).glob("authors_ppo/*_1/*.monitor.csv")))
    timesteps = int(hyperparams[env]["n_timesteps"])
    result = summarize(episodes, pd.DataFrame({"time/total_timesteps": []}), timesteps, episodes["timesteps"].max())
    about = {"task": env, "method": method, "seed": seed, "hyperparams": changes, **result.about, "command": command}
    about |= {"versions": versions(), "commit": commit(), "processor": processor(), "seconds": round(time.time() - started)}
    write_result(FOLDER / env / method / f"seed-{seed}.csv", result._replace(about=about))


if __name__ == "__main__":
    main()
