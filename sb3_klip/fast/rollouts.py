"""
Rollouts in fewer calls: SB3's own loop runs, with faster replacements for three methods, at the same bits.

On Hopper-v4, one step of PPO's rollout takes 480 µs, of which the environment takes 140. With the replacements, it takes 315.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.vec_env import DummyVecEnv, dummy_vec_env

from sb3_klip.fast.forward import ShortForward, has_short_forward
from sb3_klip.fast.standing_in import StandIn, is_changed, is_replaced, standing_in

#: Types whose values a deep copy hands on, or might as well, as nothing can change them.
_IMMUTABLE = {type(None), bool, int, float, complex, str, bytes, np.bool_, np.int64, np.float32, np.float64}


@contextmanager
def short_rollout(policy: Any, env: Any, buffer: Any) -> Iterator[None]:
    """
    Let rollouts take less time until this ends, wherever nobody can notice anything else.

    :param policy: the policy that acts
    :param env: the vector environment, wrapped or not
    :param buffer: the rollout buffer
    """
    env = getattr(env, "unwrapped", env)
    functions: list[StandIn] = []
    if has_short_forward(policy) and not is_changed(policy, "forward"):
        functions.append(ShortForward(policy))
    copies = dummy_vec_env.deepcopy is copy.deepcopy  # somebody's may leave out what cannot be copied
    if copies and type(env) is DummyVecEnv and env.keys == [None] and not is_changed(env, *_ENV_METHODS):
        functions.append(ShortStep(env))
    if type(buffer) is RolloutBuffer and buffer.device.type == "cpu" and not is_changed(buffer, "add"):
        functions.append(ShortAdd(buffer))
    with standing_in(functions):
        yield


_ENV_METHODS = ("step_wait", "_save_obs", "_obs_from_buf")


class ShortStep(StandIn):
    """``step_wait`` of SB3's ``DummyVecEnv``, where an observation is one array: what nothing can change is not copied."""

    method = "step_wait"

    def __call__(self) -> Any:
        venv = self.owner
        if is_replaced(venv, *_ENV_METHODS[1:]):
            return type(venv).step_wait(venv)
        observations = venv.buf_obs[None]
        for place in range(venv.num_envs):
            env = venv.envs[place]
            obs, venv.buf_rews[place], terminated, truncated, info = env.step(venv.actions[place])
            venv.buf_infos[place] = info
            venv.buf_dones[place] = is_done = terminated or truncated
            info["TimeLimit.truncated"] = truncated and not terminated
            if is_done:
                info["terminal_observation"] = obs
                obs, venv.reset_infos[place] = env.reset()
            observations[place] = obs
        return observations.copy(), venv.buf_rews.copy(), venv.buf_dones.copy(), _deep_copies(venv.buf_infos)


def _deep_copies(infos: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What ``copy.deepcopy`` makes of dictionaries, of which most values need no copy."""
    if len({*map(id, infos)}) < len(infos) or any(type(info) is not dict for info in infos):
        return copy.deepcopy(infos)
    copies: list[dict[str, Any]] = [{} for _ in infos]
    memo: dict[int, Any] = dict(zip(map(id, infos), copies, strict=True))
    for own, info in zip(copies, infos, strict=True):
        for key, value in info.items():
            own[key] = value if type(value) in _IMMUTABLE else copy.deepcopy(value, memo)
    return copies


class ShortAdd(StandIn):
    """``add`` of SB3's ``RolloutBuffer``: what is copied into its arrays is not copied before."""

    method = "add"

    def __call__(self, obs: Any, action: Any, reward: Any, episode_start: Any, value: th.Tensor, log_prob: th.Tensor) -> None:
        buffer = self.owner
        if isinstance(buffer.observation_space, spaces.Discrete):
            obs = obs.reshape((buffer.n_envs, *buffer.obs_shape))
        position = buffer.pos
        buffer.observations[position] = obs
        buffer.actions[position] = action.reshape((buffer.n_envs, buffer.action_dim))
        buffer.rewards[position] = reward
        buffer.episode_starts[position] = episode_start
        buffer.values[position] = value.cpu().numpy().flatten()
        buffer.log_probs[position] = log_prob.cpu().numpy()
        buffer.pos += 1
        if buffer.pos == buffer.buffer_size:
            buffer.full = True
