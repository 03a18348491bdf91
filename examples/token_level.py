"""Token-level policy optimisation (as in LLM fine-tuning) with a per-sample KL coefficient, without SB3."""

import torch as th

from sb3_klip.coefficients import make
from sb3_klip.surrogate import per_sample_kl_loss

th.manual_seed(0)
vocabulary, length, group = 16, 12, 32
policy = th.nn.Sequential(th.nn.Embedding(vocabulary, 64), th.nn.Tanh(), th.nn.Linear(64, vocabulary))
optimizer = th.optim.Adam(policy.parameters(), lr=3e-3)
coefficient = make("step")


def log_probs(tokens):
    """log π of each token given the previous token, shape (group, length)."""
    return policy(tokens[:, :-1]).log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)


for step in range(60):
    tokens = th.zeros(group, 1, dtype=th.long)
    with th.no_grad():
        for _ in range(length):
            tokens = th.cat([tokens, th.multinomial(policy(tokens[:, -1]).softmax(-1), 1)], dim=1)
        old = log_probs(tokens)
    ended = (tokens[:, 1:] == 0).long().cumsum(1) - (tokens[:, 1:] == 0).long()
    mask = ended == 0  # up to and including the end-of-sequence token 0
    rewards = ((tokens[:, 1:] > tokens[:, :-1]) & mask).sum(1).float()  # ascending tokens are good
    advantages = ((rewards - rewards.mean()) / (rewards.std() + 1e-6))[:, None].expand_as(old)  # GRPO's group baseline
    for _ in range(4):
        loss = per_sample_kl_loss(log_probs(tokens), old, advantages, coefficient, mask=mask, reduction="sequence_mean")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if step % 10 == 9:
        print(f"step {step + 1}: mean reward {rewards.mean():.2f}")
