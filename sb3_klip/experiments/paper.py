"""Published numbers for comparison: from R. Colletti and R. Holzinger, arXiv 2606.23932, unless another source is named."""

#: Mean and standard deviation over five seeds of the return in the last 10 % of training, by task and method.
#: PPO's own are those of ``step``.
RETURNS: dict[str, dict[str, tuple[float, float]]] = {
    "Hopper-v4": {"step": (2598, 278), "fixed": (2616, 208), "adaptive": (2236, 365)},
    "HalfCheetah-v4": {"step": (1955, 312), "fixed": (2111, 1066), "adaptive": (2207, 1117)},
    "Walker2d-v4": {"step": (3717, 425), "fixed": (3995, 402), "adaptive": (3639, 374)},
    "Ant-v4": {"step": (2193, 361), "fixed": (16, 16), "adaptive": (159, 86)},
    "Humanoid-v4": {"step": (660, 70), "fixed": (342, 31), "adaptive": (553, 22)},
    "CartPole-v1": {"step": (478, 18), "fixed": (484, 23), "adaptive": (492, 9)},
    "LunarLander-v3": {"step": (107, 8), "fixed": (121, 12), "adaptive": (125, 20)},
}

#: Seeds of each.
SEEDS = 5

#: Largest kill fraction of an update of PPO-Clip, by task.
PEAK_KILL_FRACTION = {
    "Hopper-v4": 0.107,
    "Walker2d-v4": 0.164,
    "HalfCheetah-v4": 0.188,
    "Ant-v4": 0.254,
    "Humanoid-v4": 0.572,
}

#: Score at the learning rate 1e-3 as a share of that at 3e-4, on MuJoCo: 0.9, 6.6 and 54.5 % are lost (ANO, arXiv 2605.02320).
ROBUSTNESS = {"redescending": 0.991, "quadratic": 0.934, "step": 0.455}

#: Returns of Tianshou's PPO in one million steps: thu-ml/tianshou, examples/mujoco/README.md; version 3 of the tasks, ten
#: seeds, the largest mean of their evaluations, which sample actions (``mujoco_ppo.py`` does not set ``deterministic_eval``).
TIANSHOU = {
    "Hopper-v4": "2609 ± 701",
    "HalfCheetah-v4": "5784 ± 1244",
    "Walker2d-v4": "3588 ± 757",
    "Ant-v4": "3258 ± 1079",
    "Humanoid-v4": "787 ± 194",
    "Swimmer-v4": "67 ± 99",
}
