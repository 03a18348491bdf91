"""The closed form of the KL divergence, and the rollout policy that it is taken from."""

import pytest
import torch as th
from helpers import FAST, cartpole, pendulum, train
from hypothesis import given
from hypothesis import strategies as st
from stable_baselines3.common.envs import IdentityEnvMultiBinary, IdentityEnvMultiDiscrete
from stable_baselines3.common.policies import ActorCriticPolicy
from torch.distributions import Categorical, kl_divergence

from sb3_klip import KLipPPO
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


@pytest.mark.parametrize(
    ("make_env", "kwargs"),
    [
        (pendulum, {}),
        (pendulum, {"use_sde": True, "sde_sample_freq": 1}),
        (pendulum, {"use_sde": True, "sde_sample_freq": 1, "policy_kwargs": {"squash_output": True}}),
        (cartpole, {}),
        (lambda: IdentityEnvMultiDiscrete(3), {}),
        (lambda: IdentityEnvMultiBinary(3), {}),
    ],
)
def test_divergence_is_that_of_the_two_policies(make_env, kwargs):
    """Against the estimate from actions drawn from the rollout policy, which needs no closed form."""
    model, logs = train(
        KLipPPO, "MlpPolicy", make_env, 4096, **{**FAST, "n_steps": 4096, "batch_size": 512}, log_kl=True, **kwargs
    )
    with th.no_grad():
        data = next(model.rollout_buffer.get())
        _, log_prob, _ = model.policy.evaluate_actions(data.observations, model._actions(data))
    log_ratio = log_prob - data.old_log_prob
    sampled = log_ratio.expm1() - log_ratio
    error = sampled.std() / len(sampled) ** 0.5
    assert logs.column("train/kl")[-1] > 0
    assert abs(logs.column("train/kl")[-1] - sampled.mean()) < 4 * error


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
