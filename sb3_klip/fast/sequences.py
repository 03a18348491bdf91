"""
The LSTM over the sequences of a minibatch, in fewer calls and at the same bits.

If an episode starts anywhere in a minibatch, ``RecurrentPPO`` calls the LSTM once for each time step. Before each call, it
multiplies the LSTM's states by 0 in sequences where an episode starts, and by 1 in the others. At time steps where no episode
starts, all factors are 1, and the products are left out here. This changes no bit, neither of the states nor of gradients.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch as th
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy

from sb3_klip.fast.standing_in import StandIn, is_changed, standing_in


@contextmanager
def short_sequences(policy: Any) -> Iterator[None]:
    """
    Let the sequences of minibatches take less time until this ends, if the policy has sb3-contrib's own loop.

    :param policy: the policy that is updated
    """
    own = isinstance(policy, RecurrentActorCriticPolicy) and not is_changed(policy, ShortSequences.method)
    with standing_in([ShortSequences(policy)] if own else []):
        yield


class ShortSequences(StandIn):
    """``_process_sequence`` of sb3-contrib's recurrent policies; shapes as there."""

    method = "_process_sequence"

    def __call__(
        self, features: th.Tensor, lstm_states: tuple[th.Tensor, th.Tensor], episode_starts: th.Tensor, lstm: th.nn.LSTM
    ) -> tuple[th.Tensor, tuple[th.Tensor, th.Tensor]]:
        n_seq = lstm_states[0].shape[1]
        starts = episode_starts.reshape(n_seq, -1).swapaxes(0, 1)
        at_steps = (starts != 0).any(dim=1).tolist()
        if not any(at_steps):
            return type(self.owner)._process_sequence(features, lstm_states, episode_starts, lstm)
        outputs = []
        steps = features.reshape(n_seq, -1, lstm.input_size).swapaxes(0, 1)
        for step, start, is_start in zip(steps, starts, at_steps, strict=True):
            if is_start:
                keep = (1.0 - start).view(1, n_seq, 1)
                lstm_states = (keep * lstm_states[0], keep * lstm_states[1])
            output, lstm_states = lstm(step.unsqueeze(dim=0), lstm_states)
            outputs.append(output)
        return th.cat(outputs).transpose(0, 1).flatten(0, 1), lstm_states
