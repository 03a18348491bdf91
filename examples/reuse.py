"""Sample reuse: each update learns from the last three rollouts, so each rollout can be shorter."""

from stable_baselines3.common.evaluation import evaluate_policy

from sb3_klip import KLipPPO

for reuse, n_steps in ((1, 768), (3, 256)):  # the same number of samples per update
    model = KLipPPO("MlpPolicy", "CartPole-v1", n_steps=n_steps, reuse=reuse, seed=0, device="cpu")
    model.learn(12_288)
    updates = model.num_timesteps // n_steps
    mean, std = evaluate_policy(model, model.get_env(), 10)
    print(f"reuse={reuse}: {updates} updates over {reuse * n_steps} samples, return {mean:.0f} +/- {std:.0f}")
