"""The minibatches of a rollout, and the position of each sample in its episode."""

import numpy as np
import pytest
import torch as th
from helpers import FAST, assert_identical, pendulum, train
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.env_util import make_vec_env

from sb3_klip import KLipPPO, rollout
from sb3_klip.rollout import episode_positions, indexed_minibatches


def test_positions_by_hand():
    starts = np.array([[1, 0], [0, 0], [0, 1], [1, 0]])
    positions, carried = episode_positions(starts, np.array([9, 4]))
    assert positions.T.tolist() == [[0, 1, 2, 0], [4, 5, 0, 1]]
    assert carried.tolist() == [1, 2]


def test_a_buffer_that_keeps_its_indices_to_itself():
    class OwnSamples(RolloutBuffer):
        def get(self, batch_size=None):
            for samples in list(super().get(batch_size)):
                yield samples._replace()

    class OwnGet(RolloutBuffer):
        def get(self, batch_size=None):
            other = RolloutBuffer(self.buffer_size, self.observation_space, self.action_space, self.device)
            vars(other).update({key: value for key, value in vars(self).items() if key != "_get_samples"})
            yield from other.get(batch_size)

    for beta in ("step", "position", "trust_region"):
        KLipPPO("MlpPolicy", pendulum(), **FAST, rollout_buffer_class=OwnSamples, beta=beta).learn(64)
    KLipPPO("MlpPolicy", pendulum(), **FAST, rollout_buffer_class=OwnGet).learn(64)
    for beta in ("position", "trust_region"):
        with pytest.raises(ValueError, match=r"OwnGet\.get does not take its samples from _get_samples"):
            KLipPPO("MlpPolicy", pendulum(), **FAST, rollout_buffer_class=OwnGet, beta=beta).learn(64)


def test_positions_after_loading_with_other_environments(tmp_path):
    model = KLipPPO("MlpPolicy", make_vec_env("CartPole-v1", 3), **FAST, beta="position").learn(192)
    model.save(tmp_path / "model")
    KLipPPO.load(tmp_path / "model", env=make_vec_env("CartPole-v1", 2)).learn(128)


@pytest.mark.parametrize("beta", ["step", "position"])
def test_a_users_own_get_samples_on_the_buffer_is_called_and_stays(beta):
    model = KLipPPO("MlpPolicy", pendulum(), seed=0, **FAST, beta=beta)
    buffer, places = model.rollout_buffer, []
    original = buffer._get_samples

    def watching(batch_inds, env=None):
        places.append(batch_inds)
        return original(batch_inds, env)

    buffer._get_samples = watching
    model.learn(64)
    assert len(places) == FAST["n_epochs"] * 2
    assert sorted(np.concatenate(places[:2])) == list(range(64))
    assert buffer._get_samples is watching
    model.learn(64)
    assert len(places) == 2 * FAST["n_epochs"] * 2


@pytest.mark.parametrize("batch_size", [16, 50, 64, 192, None])
@pytest.mark.parametrize("block", [0, 3000, 1_000_000])
def test_minibatches_of_sb3s_buffer_are_its_own(batch_size, block, monkeypatch):
    """What is read from its arrays at once is what it hands out itself, with the same random numbers."""
    monkeypatch.setattr(rollout, "_BLOCK", block)
    model = KLipPPO("MlpPolicy", make_vec_env("CartPole-v1", 3, seed=0), seed=0, **FAST).learn(192)
    buffer = model.rollout_buffer
    np.random.seed(0)
    theirs = list(buffer.get(batch_size))
    np.random.seed(0)
    ours = list(indexed_minibatches(buffer, batch_size))
    for samples, (found, indices) in zip(theirs, ours, strict=True):
        assert type(found) is type(samples)
        for name in samples._fields:
            assert th.equal(getattr(found, name), getattr(samples, name)), name
        assert th.equal(th.from_numpy(buffer.values.flatten())[indices], samples.old_values)
        # Where a tensor begins elsewhere than at a cache line, products of matrices may be rounded otherwise.
        assert all(value.data_ptr() % 64 == 0 for value in found)


@pytest.mark.parametrize("kind", [np.int64, np.int32])
def test_minibatches_of_a_size_of_numpy(kind):
    ours, theirs = (
        train(algorithm, "MlpPolicy", pendulum, 128, **{**FAST, "batch_size": kind(24)})[0] for algorithm in (KLipPPO, PPO)
    )
    assert_identical(ours, theirs)


@pytest.mark.parametrize("beta", ["step", "position"])
@pytest.mark.parametrize(
    "taken",
    [np.ndarray.tolist, th.from_numpy, lambda places: places[::-1], lambda places: slice(places.min(), places.min() + 8)],
    ids=["list", "tensor", "reversed", "slice"],
)
def test_a_buffer_may_take_its_samples_by_any_index(beta, taken):
    class OwnBuffer(RolloutBuffer):
        def get(self, batch_size=None):
            next(iter(super().get(batch_size)))  # brings the arrays into their order
            for places in np.random.permutation(self.buffer_size * self.n_envs).reshape(-1, batch_size):
                yield self._get_samples(batch_inds=taken(places)) if beta == "step" else self._get_samples(taken(places))

    def trained(algorithm, **kwargs):
        return train(algorithm, "MlpPolicy", pendulum, 128, **FAST, rollout_buffer_class=OwnBuffer, **kwargs)[0]

    if beta == "step":
        assert_identical(trained(KLipPPO), trained(PPO))
        return
    model = trained(KLipPPO, beta=beta)
    (samples, places), *_ = indexed_minibatches(model.rollout_buffer, 32)
    assert th.equal(samples.returns, th.as_tensor(model.rollout_buffer.returns).flatten()[places])


def test_an_index_that_only_the_buffer_understands():
    class OwnBuffer(RolloutBuffer):
        def get(self, batch_size=None):
            next(iter(super().get(batch_size)))
            yield self._get_samples("the first")

        def _get_samples(self, batch_inds, env=None):
            return super()._get_samples(np.arange(8) if isinstance(batch_inds, str) else batch_inds, env)

    ours, theirs = (
        train(algorithm, "MlpPolicy", pendulum, 128, **FAST, rollout_buffer_class=OwnBuffer)[0] for algorithm in (KLipPPO, PPO)
    )
    assert_identical(ours, theirs)
