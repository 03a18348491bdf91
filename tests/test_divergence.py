"""The closed form of the KL divergence, and the rollout policy that it is taken from."""

import pytest
import torch as th
from helpers import FAST, cartpole, pendulum, train
from hypothesis import given
from hypothesis import strategies as st
from stable_baselines3.common.envs import IdentityEnvMultiBinary, IdentityEnvMultiDiscrete
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.utils import set_random_seed
from torch.distributions import Categorical, kl_divergence

from sb3_klip import KLipPPO, KLipRecurrentPPO
from sb3_klip.divergence import bernoulli_kl, categorical_kl


@given(st.lists(st.floats(-8, 8), min_size=2, max_size=2), st.lists(st.floats(-8, 8), min_size=2, max_size=2))
def test_bernoulli_divergence(old, new):
    old, new = th.tensor([old], dtype=th.float64), th.tensor([new], dtype=th.float64)
    expected = kl_divergence(th.distributions.Bernoulli(logits=old), th.distributions.Bernoulli(logits=new)).sum(-1)
    th.testing.assert_close(bernoulli_kl((old,), (new,)), expected, rtol=1e-9, atol=1e-9)


def test_divergences_of_several_variables_add_up():
    generator = th.Generator().manual_seed(0)
    old, new = ([th.randn(5, k, generator=generator) for k in (2, 3)] for _ in range(2))
    parts = [kl_divergence(Categorical(logits=a), Categorical(logits=b)) for a, b in zip(old, new, strict=True)]
    th.testing.assert_close(categorical_kl(tuple(old), tuple(new)), sum(parts))


def test_impossible_actions_add_nothing():
    """As torch has it; a policy may mask actions by logits of -inf. No gradient is NaN."""
    old, new = th.tensor([[0.0, 1.0, -th.inf]]), th.tensor([[0.5, 0.2, -th.inf]], requires_grad=True)
    divergence = categorical_kl((old,), (new,))
    th.testing.assert_close(divergence, kl_divergence(Categorical(logits=old), Categorical(logits=new)))
    divergence.sum().backward()
    assert new.grad[0, :2].abs().min() > 0
    assert new.grad[0, 2] == 0
    impossible = th.tensor([[-th.inf, th.inf, 0.5]])
    expected = bernoulli_kl((impossible[:, 2:],), (impossible[:, 2:] + 1,))
    assert th.equal(bernoulli_kl((impossible,), (impossible + 1,)), expected)


GSDE = {"use_sde": True, "sde_sample_freq": 1}
LSTM = {"policy_kwargs": {"lstm_hidden_size": 8, "net_arch": [8]}}


def parts_of(policy):
    """The distributions that a policy holds, one for each action dimension or variable that has its own."""
    held = getattr(policy.action_dist, "distributions", None) or policy.action_dist.distribution
    return held if isinstance(held, list | tuple) else [held]


@pytest.mark.parametrize(
    ("algorithm", "make_env", "kwargs"),
    [
        (KLipPPO, pendulum, {}),
        (KLipPPO, pendulum, GSDE),
        (KLipPPO, pendulum, {**GSDE, "policy_kwargs": {"squash_output": True}}),
        (KLipPPO, cartpole, {}),
        (KLipPPO, lambda: IdentityEnvMultiDiscrete(3), {}),
        (KLipPPO, lambda: IdentityEnvMultiBinary(3), {}),
        (KLipRecurrentPPO, cartpole, LSTM),
    ],
)
def test_what_is_logged_is_the_divergence_of_the_policy_that_acted_from_the_one_that_learned(algorithm, make_env, kwargs):
    """As torch has it for the two distributions, in each state of the rollout; without the padding of sequences."""
    policy = "MlpLstmPolicy" if algorithm is KLipRecurrentPPO else "MlpPolicy"
    model, logs = train(algorithm, policy, make_env, 64, **FAST, log_kl=True, **kwargs)
    set_random_seed(0)
    acted = algorithm(policy, make_env(), seed=0, device="cpu", **FAST, **kwargs)
    data = next(model.rollout_buffer.get())
    held = []
    with th.no_grad():
        for each in (acted, model):
            each._evaluate_actions(data, model._taken_actions(data))
            held.append(parts_of(each.policy))
    kl = sum(kl_divergence(*pair).reshape(len(data.old_log_prob), -1).sum(dim=1) for pair in zip(*held, strict=True))
    error = 1e-4
    if algorithm is KLipRecurrentPPO:
        assert not data.mask.all()
        kl = kl[data.mask > 0]
        error = 1e-2  # each minibatch begins with the states of the rollout, and these are other minibatches
    assert len(kl) == 64
    assert logs.column("train/kl")[-1] == pytest.approx(kl.mean().item(), rel=error)


def test_a_policy_that_does_not_refresh_its_distribution_is_refused():
    class SecretivePolicy(ActorCriticPolicy):
        def evaluate_actions(self, obs, actions):
            held = self.action_dist.distribution
            result = super().evaluate_actions(obs, actions)
            self.action_dist.distribution = held
            return result

    model = KLipPPO(SecretivePolicy, pendulum(), **FAST, beta="fixed")
    with pytest.raises(ValueError, match="evaluate_actions"):
        model.learn(64)
