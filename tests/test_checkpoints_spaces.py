"""Environments whose spaces differ from those that a policy was made for."""

import numpy as np
import pytest
from checkpoint_files import VECTOR, Task, content, load, small
from gymnasium import spaces
from helpers import assert_identical, collected
from stable_baselines3 import PPO

ACTIONS = spaces.Box(-1, 1, (2,))


def box(low, high, shape, dtype=np.float32):
    return spaces.Box(low, high, shape, dtype)


IMAGE, NO_IMAGE = (
    box(0, 255, (1, 36, 36), np.uint8),
    box(0, 1, (1, 36, 36)),
)  # the channel comes first already, so no wrapper turns it


@pytest.mark.parametrize("trusted", [True, False])
@pytest.mark.parametrize(
    ("saved", "actual"),
    [
        (box(-1, 1, (3,)), box(-1, 1, (3,), np.float64)),
        (box(-1, 1, (3,)), box(-2, 3, (3,))),
        (spaces.Dict({"a": box(-1, 1, (3,))}), spaces.Dict({"a": box(-np.inf, np.inf, (3,), np.float64)})),
    ],
    ids=["dtype", "bounds", "in a dictionary"],
)
def test_other_dtype_or_bounds(saved, actual, trusted):
    model = small(PPO, Task(saved, ACTIONS)).learn(32)
    with collected() as messages:
        loaded = load(content(model), env=Task(actual, ACTIONS), trusted=trusted)
    (message,) = messages
    assert str(saved) in message
    assert str(actual) in message
    assert loaded.observation_space == loaded.get_env().observation_space == actual
    assert loaded.observation_space is not loaded.get_env().observation_space  # whose generator is the environment's
    assert_identical(loaded, model)
    loaded.learn(32, reset_num_timesteps=False)
    assert loaded.num_timesteps == 64
    with collected() as messages:
        load(content(loaded), env=Task(actual, ACTIONS))
    assert messages == []


@pytest.mark.parametrize(
    ("saved", "actual"),
    [
        ((box(-1, 1, (3,)), ACTIONS), (box(-1, 1, (4,)), ACTIONS)),
        ((box(-1, 1, (3,)), ACTIONS), (spaces.Discrete(3), ACTIONS)),
        ((spaces.Discrete(3), ACTIONS), (spaces.Discrete(4), ACTIONS)),
        ((IMAGE, ACTIONS), (NO_IMAGE, ACTIONS)),
        ((NO_IMAGE, ACTIONS), (IMAGE, ACTIONS)),
        ((spaces.Dict({"a": VECTOR}), ACTIONS), (spaces.Dict({"b": VECTOR}), ACTIONS)),
        ((spaces.Dict({"a": VECTOR, "i": IMAGE}), ACTIONS), (spaces.Dict({"a": VECTOR, "i": NO_IMAGE}), ACTIONS)),
        ((VECTOR, ACTIONS), (VECTOR, spaces.Box(-2, 2, (2,)))),
        ((VECTOR, ACTIONS), (VECTOR, spaces.Box(-1, 1, (3,)))),
        ((VECTOR, ACTIONS), (VECTOR, spaces.Discrete(2))),
        ((VECTOR, spaces.Discrete(2)), (VECTOR, spaces.Discrete(3))),
    ],
    ids=[
        "shape", "kind", "number", "image", "no image", "keys", "image in a dictionary", "action bounds", "action shape",
        "action kind", "actions",
    ],
)  # fmt: skip
def test_other_spaces_are_refused(saved, actual):
    checkpoint = content(small(PPO, Task(*saved)))
    for trusted in (True, False):
        with pytest.raises(ValueError, match="does not fit env") as error:
            load(checkpoint, env=Task(*actual), trusted=trusted)
        different = 0 if saved[0] != actual[0] else 1
        assert ("observation_space", "action_space")[different] in str(error.value)
        assert str(saved[different]) in str(error.value)
        assert str(actual[different]) in str(error.value)
