"""KLipMaskablePPO on an environment in which some actions are invalid at each step."""

from sb3_contrib.common.envs import InvalidActionEnvDiscrete
from sb3_contrib.common.maskable.evaluation import evaluate_policy

from sb3_klip import KLipMaskablePPO

env = InvalidActionEnvDiscrete(dim=80, n_invalid_actions=60)
model = KLipMaskablePPO("MlpPolicy", env, gamma=0.4, seed=32, beta="trust_region")
model.learn(5_000)
mean, _ = evaluate_policy(model, env, n_eval_episodes=20, warn=False)
print(f"mean return {mean:.1f} of 100")
