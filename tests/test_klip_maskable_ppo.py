"""KLipMaskablePPO: masks, and what they forbid."""

import numpy as np
import pytest
import torch as th
from helpers import Counter, train
from sb3_contrib.common.envs import InvalidActionEnvDiscrete, InvalidActionEnvMultiDiscrete
from sb3_contrib.common.maskable.callbacks import MaskableEvalCallback
from sb3_contrib.common.maskable.evaluation import evaluate_policy
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_klip import KLipMaskablePPO

FAST = {"learning_rate": 1e-2, "n_steps": 128, "batch_size": 32, "n_epochs": 4}


def discrete():
    return InvalidActionEnvDiscrete(dim=20, n_invalid_actions=10)


def test_divergence_is_over_allowed_actions():
    """Against a sum over the actions that the masks of the rollout allow, written out."""
    model, logs = train(KLipMaskablePPO, "MlpPolicy", discrete, 128, **FAST, log_kl=True)
    fresh = KLipMaskablePPO("MlpPolicy", discrete(), seed=0, **FAST)  # the policy that acted in the only rollout
    data = next(model.rollout_buffer.get())
    with th.no_grad():
        probabilities = []
        for policy in (fresh.policy, model.policy):
            inner = policy.get_distribution(data.observations).distribution
            allowed = inner.probs * data.action_masks
            probabilities.append(allowed / allowed.sum(dim=1, keepdim=True))
        old, new = probabilities
        expected = th.where(old > 0, old * (old / new).log(), 0.0).nan_to_num().sum(dim=1).mean()
    assert logs.column("train/kl")[-1] == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.slow
def test_masked_learning_prediction_and_evaluation(tmp_path):
    """The example of sb3-contrib's documentation, with its budget and its threshold."""
    env = InvalidActionEnvDiscrete(dim=80, n_invalid_actions=60)
    callback = MaskableEvalCallback(env, eval_freq=2048, n_eval_episodes=2, best_model_save_path=str(tmp_path), verbose=0)
    model = KLipMaskablePPO("MlpPolicy", env, gamma=0.4, seed=32)
    model.learn(5_000, callback=callback)
    assert (tmp_path / "best_model.zip").exists()
    evaluate_policy(model, env, n_eval_episodes=20, reward_threshold=90, warn=False)
    observation, _ = env.reset()
    for _ in range(20):
        masks = env.action_masks()
        action, _ = model.predict(observation, action_masks=masks)
        assert masks[action]


class Forbidding(Counter):
    """Allows nothing from the third step on."""

    def action_masks(self):
        return np.full(2, self.step_count < 3)


class ForbiddingOneDimension(InvalidActionEnvMultiDiscrete):
    def action_masks(self):
        return np.array([True] * 3 + [False] * 4)


def test_masks_that_forbid_every_action():
    with pytest.raises(ValueError, match=r"of environment 0 forbids every action$"):
        KLipMaskablePPO("MlpPolicy", Forbidding(), **FAST).learn(64)
    env = ForbiddingOneDimension(dims=[3, 4], n_invalid_actions=2)
    with pytest.raises(ValueError, match="forbids every action in dimension 1"):
        KLipMaskablePPO("MlpPolicy", env, **FAST).learn(64)


class OneTooMany(Counter):
    def action_masks(self):
        return np.full(3, True)


def test_masks_of_another_size():
    for number in (1, 2):  # of two environments, 6 masks would do for three
        env = DummyVecEnv([OneTooMany] * number)
        with pytest.raises(ValueError, match=rf"must have 2 entries .* environments have the shape \({number}, 3\)"):
            KLipMaskablePPO("MlpPolicy", env, **FAST).learn(64)


def test_masks_may_be_a_tensor():
    class Asks(BaseCallback):
        def _on_step(self):
            masks = th.as_tensor(np.stack(self.training_env.env_method("action_masks")))
            observation, _ = self.model.policy.obs_to_tensor(self.locals["new_obs"])
            self.actions = self.model.policy(observation, action_masks=masks)[0]
            return True

    callback = Asks()
    KLipMaskablePPO("MlpPolicy", Counter(), **FAST).learn(64, callback=callback)
    assert callback.actions.shape == (1,)


def test_environment_without_masks():
    with pytest.raises(ValueError, match="ActionMasker"):
        KLipMaskablePPO("MlpPolicy", "CartPole-v1", **FAST).learn(64)
    KLipMaskablePPO("MlpPolicy", "CartPole-v1", **FAST).learn(64, use_masking=False)
