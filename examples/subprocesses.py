"""Four environments in subprocesses, with normalized observations and rewards, evaluations and a progress bar."""

from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import SubprocVecEnv, VecNormalize

from sb3_klip import KLipPPO

if __name__ == "__main__":  # the processes import this file
    env = VecNormalize(make_vec_env("Pendulum-v1", n_envs=4, seed=0, vec_env_cls=SubprocVecEnv), gamma=0.9)
    # EvalCallback copies the statistics of the training environment. Rewards are not normalized here.
    eval_env = VecNormalize(make_vec_env("Pendulum-v1", seed=1), training=False, norm_reward=False)
    evaluation = EvalCallback(eval_env, eval_freq=2_000, best_model_save_path="logs/subprocesses", verbose=0)

    model = KLipPPO("MlpPolicy", env, n_steps=512, gamma=0.9, learning_rate=1e-3, beta="linear_ramp", seed=0, device="cpu")
    model.learn(20_000, callback=evaluation, progress_bar=True)
    env.save("logs/subprocesses/vecnormalize.pkl")
    env.close()
    print(f"best mean return {evaluation.best_mean_reward:.0f}; the agent is in logs/subprocesses/best_model.zip")
