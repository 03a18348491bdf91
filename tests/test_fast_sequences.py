"""The LSTM over sequences in fewer calls: the same bits, and nobody's own loop is passed over."""

from typing import Any

import gymnasium as gym
import pytest
import torch as th
from helpers import assert_identical, train
from sb3_contrib import RecurrentPPO
from sb3_contrib.ppo_recurrent import MlpLstmPolicy

from sb3_klip import KLipRecurrentPPO
from sb3_klip.fast.sequences import ShortSequences, short_sequences

SMALL: dict[str, Any] = {"n_steps": 64, "batch_size": 32, "n_epochs": 2, "learning_rate": 3e-3}


def a_policy() -> Any:
    return KLipRecurrentPPO("MlpLstmPolicy", "CartPole-v1", n_steps=8, batch_size=8, device="cpu").policy


@pytest.mark.parametrize("n_seq", [1, 3])
@pytest.mark.parametrize("starts", [(), (0,), (0, 5), (3,), (0, 1, 2, 3, 4, 5, 6)])
def test_outputs_states_and_gradients_have_the_same_bits(n_seq: int, starts: tuple[int, ...]) -> None:
    th.manual_seed(0)
    policy, length = a_policy(), 7
    episode_starts = th.zeros(n_seq, length)
    for place in starts:
        episode_starts[place % n_seq, place] = 1.0  # of one sequence only, so that the others' states go on
    features = th.randn(n_seq * length, policy.lstm_actor.input_size)
    states = th.randn(2, 1, n_seq, policy.lstm_actor.hidden_size)

    def results() -> list[th.Tensor]:
        inputs = [each.clone().requires_grad_() for each in (features, *states)]
        output, last = policy._process_sequence(inputs[0], (inputs[1], inputs[2]), episode_starts.flatten(), policy.lstm_actor)
        weighted = sum((each * th.linspace(-1, 1, each.numel()).view(each.shape)).sum() for each in (output, *last))
        return [output, *last, *th.autograd.grad(weighted, [*inputs, *policy.lstm_actor.parameters()])]  # type: ignore[arg-type]

    theirs = results()
    with short_sequences(policy):
        assert isinstance(policy._process_sequence, ShortSequences)
        ours = results()
    assert "_process_sequence" not in vars(policy)
    assert all(a.equal(b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("policy_kwargs", [{}, {"enable_critic_lstm": False, "shared_lstm": True}, {"n_lstm_layers": 2}])
def test_the_training_is_that_of_recurrent_ppo(policy_kwargs: dict[str, Any]) -> None:
    large = {"learning_rate": 3e-2, "clip_range": 0.05}  # so that samples are clipped
    kwargs = {**SMALL, **large, "policy_kwargs": {"lstm_hidden_size": 16, **policy_kwargs}}
    ours, theirs = (
        train(each, "MlpLstmPolicy", lambda: gym.make("CartPole-v1"), 192, **kwargs)[0]
        for each in (KLipRecurrentPPO, RecurrentPPO)
    )
    assert_identical(ours, theirs)


def test_a_loop_of_the_users_own_is_called() -> None:
    calls: list[int] = []

    class Own(MlpLstmPolicy):
        @staticmethod
        def _process_sequence(features: Any, lstm_states: Any, episode_starts: Any, lstm: Any) -> Any:
            calls.append(len(features))
            return MlpLstmPolicy._process_sequence(features, lstm_states, episode_starts, lstm)

    kwargs = {**SMALL, "policy_kwargs": {"lstm_hidden_size": 16}}
    model = KLipRecurrentPPO(Own, "CartPole-v1", seed=0, device="cpu", **kwargs)
    model.learn(64)
    assert max(calls) >= 32  # the minibatches'

    model = KLipRecurrentPPO("MlpLstmPolicy", "CartPole-v1", seed=0, device="cpu", **kwargs)
    model.policy._process_sequence = Own._process_sequence
    calls.clear()
    model.learn(64)
    assert max(calls) >= 32
