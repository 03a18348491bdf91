"""What the identity tests of all variants share: train two algorithms from one seed, and compare every bit of their state."""

from collections.abc import Callable
from typing import Any

import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.utils import set_random_seed


class Recorder(KVWriter):
    """Keeps what each update logs."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def write(self, key_values: dict[str, Any], key_excluded: Any, step: int = 0) -> None:
        self.rows.append(dict(key_values))

    def close(self) -> None:
        pass

    def column(self, key: str) -> list[Any]:
        return [row[key] for row in self.rows if key in row]


def train(
    algorithm: type[BaseAlgorithm], policy: str | type, make_env: Callable[[], Any], steps: int, **kwargs: Any
) -> tuple[BaseAlgorithm, Recorder]:
    """Train from seed 0; returns the model and what it logged."""
    # Some of SB3's toy environments draw random numbers when they are made.
    set_random_seed(0)
    recorder = Recorder()
    model = algorithm(policy, make_env(), seed=0, device="cpu", **kwargs)
    model.set_logger(Logger(None, [recorder]))
    model.learn(steps)
    model.logger.dump()
    model.get_env().close()
    return model, recorder


def state_tensors(model: BaseAlgorithm) -> dict[str, th.Tensor]:
    """Every tensor that training changes: the policy's, buffers included, and the optimizer's."""
    tensors = {f"policy.{name}": tensor for name, tensor in model.policy.state_dict().items()}
    for index, state in model.policy.optimizer.state_dict()["state"].items():
        tensors.update({f"optimizer.{index}.{name}": tensor for name, tensor in state.items()})
    return tensors


def assert_identical(model: BaseAlgorithm, reference: BaseAlgorithm) -> None:
    """Compare the states of two models, with no tolerance."""
    ours, theirs = state_tensors(model), state_tensors(reference)
    assert list(ours) == list(theirs)
    assert any(name.startswith("optimizer") for name in ours)
    assert all(tensor.isfinite().all() for tensor in theirs.values())
    differing = [name for name in ours if not th.equal(ours[name], theirs[name])]
    assert not differing
    assert (model.num_timesteps, model._n_updates) == (reference.num_timesteps, reference._n_updates)
