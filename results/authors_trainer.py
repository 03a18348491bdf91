"""
RL Zoo with the two places where the paper's trainer differs from Stable-Baselines3, each of which can be switched off.

    python results/authors_trainer.py --env HalfCheetah-v4 --seed 0 -conf sb3_klip.hyperparams.paper \
        --num-threads 1 --eval-freq -1 -f logs/authors -params vf_coef:0.5
    python results/authors_trainer.py … -params vf_coef:0.5 rollout_advantages:False
    python results/authors_trainer.py … -params larger_value_loss:False      # vf_coef 0.25, as the factor 1/2 goes with it

All other arguments are those of ``rl_zoo3.train``; the algorithm is called ``authors_ppo``. It serves to attribute a
difference between the paper's numbers and ours; what remains is the version of MuJoCo.
"""

import sys
from typing import Any

import torch as th
from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER
from rl_zoo3.train import train
from rl_zoo3.utils import ALGOS

from sb3_klip import KLipPPO


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

    def _loss(self, rollout_data: Any, *args: Any) -> Any:
        self._old_values = rollout_data.old_values
        return super()._loss(rollout_data, *args)

    def _value_loss(self, returns: th.Tensor, values: th.Tensor, mask: th.Tensor | None) -> th.Tensor:
        if not self.larger_value_loss:
            return super()._value_loss(returns, values, mask)
        clipped = self._old_values + (values - self._old_values).clamp(-0.2, 0.2)
        return 0.5 * th.max((values - returns).square(), (clipped - returns).square()).mean()


if __name__ == "__main__":
    ALGOS["authors_ppo"] = AuthorsPPO
    HYPERPARAMS_SAMPLER["authors_ppo"] = HYPERPARAMS_SAMPLER["ppo"]
    HYPERPARAMS_CONVERTER["authors_ppo"] = HYPERPARAMS_CONVERTER["ppo"]
    sys.argv[1:1] = ["--algo", "authors_ppo"]
    train()
