"""Checking whether a policy for one space can be used with another."""

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.preprocessing import is_image_space


def fit_space(saved: spaces.Space, actual: spaces.Space) -> bool:
    """
    Whether a policy made for one observation space sees the same in another, which differs in dtype or bounds only.

    :param saved: the space that the policy was made for
    :param actual: the space of the environment
    """
    if isinstance(saved, spaces.Dict) and isinstance(actual, spaces.Dict):
        return saved.keys() == actual.keys() and all(fit_space(saved[key], actual[key]) for key in saved.spaces)
    if isinstance(saved, spaces.Box) and isinstance(actual, spaces.Box):
        # Images are divided by 255 before the policy sees them, and other observations are not.
        return saved.shape == actual.shape and is_image_space(saved) == is_image_space(actual)
    return saved == actual


def fit_action_space(saved: spaces.Space, actual: spaces.Space) -> bool:
    """Whether actions for one space are actions for another; bounds matter here, as actions are clipped and scaled to them."""
    if isinstance(saved, spaces.Box) and isinstance(actual, spaces.Box):
        close = saved.shape == actual.shape and np.allclose(saved.low, actual.low) and np.allclose(saved.high, actual.high)
        return bool(close)
    return saved == actual
