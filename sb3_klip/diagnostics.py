"""What an update logs: stored per minibatch, reduced once per epoch, and read from the device once per update."""

from typing import NamedTuple

import torch as th

from sb3_klip.replay import Replayed
from sb3_klip.surrogate import PerSampleKL, clip_objective, masked_mean, partition, per_sample_beta

#: Percentiles of β that are logged, as ``beta_p01`` and so on.
PERCENTILES = (1, 5, 25, 50, 75, 95, 99)


class Minibatch(NamedTuple):
    """
    The detached tensors of one minibatch of B samples.

    :param terms: what the surrogate computed, shape (B,)
    :param advantages: advantage Â as the loss saw it, shape (B,)
    :param mask: samples that count, shape (B,), or None for all
    :param value_loss: scalar
    :param entropy_loss: scalar
    :param replayed: weights and clip centres, shape (B,), of an update that learns from more than the last rollout
    """

    terms: PerSampleKL
    advantages: th.Tensor
    mask: th.Tensor | None
    value_loss: th.Tensor
    entropy_loss: th.Tensor
    replayed: Replayed | None = None

    def shifted_ratio(self) -> th.Tensor:
        """The ratio as the coefficient sees it; shape (B,)."""
        return self.terms.ratio if self.replayed is None else self.terms.ratio - self.replayed.centre + 1

    def kl_estimates(self) -> th.Tensor:
        """The k3 estimates of KL(π_old ‖ π_new), or KL(π_k ‖ π_new) if π_old is of an earlier update; shape (B,)."""
        if self.replayed is None:
            return (self.terms.ratio - 1) - self.terms.log_ratio
        centre = self.replayed.centre
        return self.replayed.weights * (self.terms.ratio - centre - centre * (self.terms.log_ratio - centre.log()))

    def approx_kl(self) -> th.Tensor:
        """SB3's ``train/approx_kl``, the mean of these; scalar."""
        return masked_mean(self.kl_estimates(), self.mask)

    def non_finite(self) -> str | None:
        """The first quantity that is NaN or infinite, in the order of their computation, and its value."""
        terms = self.terms
        # A ratio that overflowed does no harm where the coefficient removes the sample.
        let_through = terms.ratio.masked_fill(terms.removal == 1, 1.0)
        for name, tensor in (
            ("an advantage", self.advantages),
            ("the log of an importance ratio", terms.log_ratio),
            ("the removal of the coefficient", terms.removal),
            ("the weight of the coefficient", terms.weight),
            ("the KL estimate", terms.estimate),
            ("the importance ratio of a sample that the coefficient lets through", let_through),
            ("the value loss", self.value_loss),
            ("the entropy loss", self.entropy_loss),
        ):
            if tensor is not None:
                counted = tensor if self.mask is None or tensor.ndim == 0 else tensor[self.mask]
                bad = counted[~counted.isfinite()]
                if bad.numel() > 0:
                    return f"{name} is {bad[0].item()}"
        return None


class UpdateLog:
    """
    The diagnostics of one ``train()``.

    While minibatches run, no number is read back from the device.

    :param clip_range: half-width ε in force
    :param estimator: the KL estimate that the coefficient puts a weight on, if any
    """

    def __init__(self, clip_range: float, estimator: str | None):
        self.clip_range = clip_range
        self.estimator = estimator
        self.minibatches: list[Minibatch] = []
        self.gradient_norms: list[th.Tensor] = []
        self._epochs: list[dict[str, th.Tensor]] = []
        self._counts: list[int] = []

    def begin_epoch(self) -> None:
        """Forget the minibatches of the last epoch."""
        self.minibatches, self.gradient_norms = [], []

    def is_finite(self) -> bool:
        """Whether the gradients of all steps of the epoch are."""
        return not self.gradient_norms or bool(th.stack(self.gradient_norms).isfinite().all())

    def first_non_finite(self) -> tuple[int, int, str]:
        """
        The first step of the epoch whose gradient is NaN or infinite; there must be one.

        :return: the epoch, the index of its minibatch, and what went wrong
        """
        index, norm = next((i, norm) for i, norm in enumerate(self.gradient_norms) if not norm.isfinite())
        problem = self.minibatches[index].non_finite() or f"the norm of the gradient is {norm.item()}"
        return len(self._epochs), index, problem

    def end_epoch(self) -> None:
        """Reduce the epoch's minibatches to the sum over minibatches of each one's mean, as SB3 weighs them."""
        if not self.minibatches:  # a buffer of the user's own may hand out none
            return
        self._last = self.minibatches[-1]
        terms = [minibatch.terms for minibatch in self.minibatches]
        keep = None if self.minibatches[0].mask is None else th.cat([m.mask for m in self.minibatches])  # type: ignore[misc]

        def join(tensors: list[th.Tensor]) -> th.Tensor:
            return th.cat(tensors) if keep is None else th.cat(tensors)[keep]

        ratio, log_ratio = join([t.ratio for t in terms]), join([t.log_ratio for t in terms])
        removal, loss = join([t.removal for t in terms]), join([t.loss for t in terms])
        advantages = join([m.advantages for m in self.minibatches])
        weight = estimate = None
        if self.estimator is not None:
            weight, estimate = join([t.weight for t in terms]), join([t.estimate for t in terms])  # type: ignore[misc]

        shifted, weights, centre = ratio, None, None
        if self.minibatches[0].replayed is not None:
            shifted = join([m.shifted_ratio() for m in self.minibatches])
            weights, centre = (th.cat(column) for column in zip(*(m.replayed for m in self.minibatches), strict=True))
        kill, passed, _ = partition(shifted, advantages, self.clip_range)
        beta = per_sample_beta(ratio, advantages, removal)
        kl_penalty = -beta * log_ratio
        if weight is not None and estimate is not None:
            kl_penalty = kl_penalty + weight * estimate
            beta = per_sample_beta(ratio, advantages, removal, weight, self.estimator, centre)

        policy_loss = -clip_objective(shifted, advantages, self.clip_range)
        if weights is not None and centre is not None:
            policy_loss = weights * (policy_loss - (centre - 1) * advantages)
            loss = weights * loss
        per_sample = {
            "policy_gradient_loss": policy_loss,
            "clip_fraction": ((shifted - 1).abs() > self.clip_range).to(ratio.dtype),
            "approx_kl": (ratio - 1) - log_ratio if weights is None else join([m.kl_estimates() for m in self.minibatches]),
            "kill_fraction": kill.to(ratio.dtype),
            "pass_fraction": passed.to(ratio.dtype),
            "beta_mean": beta,
            "kl_penalty": kl_penalty,
            "klip_loss": loss,
        }
        if weight is not None:
            per_sample["beta_scalar"] = weight
        sizes = th.tensor([len(m.advantages) if m.mask is None else int(m.mask.sum()) for m in self.minibatches])
        share = sizes.to(ratio.dtype).reciprocal().repeat_interleave(sizes).to(ratio.device)
        epoch = dict(zip(per_sample, (th.stack(list(per_sample.values())) * share).sum(dim=1), strict=True))
        epoch["value_loss"] = th.stack([m.value_loss for m in self.minibatches]).sum()
        epoch["entropy_loss"] = th.stack([m.entropy_loss for m in self.minibatches]).sum()
        epoch["beta_abs_max"] = beta.abs().max()
        self._last_policy_loss = policy_loss[-int(sizes[-1]) :].mean()
        self.last_beta = beta
        self._epochs.append(epoch)
        self._counts.append(len(self.minibatches))

    def summary(self, ent_coef: float, vf_coef: float) -> dict[str, float]:
        """
        Read the diagnostics.

        As in SB3, ``approx_kl`` is that of the last epoch and ``loss`` that of the last minibatch. The percentiles of β are
        those of the last epoch, too; all else is a mean over the minibatches of the update.

        :param ent_coef: entropy coefficient
        :param vf_coef: value function coefficient
        :return: value by logger key, without the ``train/`` prefix
        :raises ValueError: if there was no minibatch
        """
        if not self._epochs:
            raise ValueError("the update had no minibatch: the rollout buffer handed out none, or n_epochs is 0")
        names = list(self._epochs[0])
        table = th.stack([th.stack([epoch[name] for name in names]) for epoch in self._epochs]).tolist()
        total = sum(self._counts)
        logs = {name: sum(column) / total for name, column in zip(names, zip(*table, strict=True), strict=True)}
        last_epoch = dict(zip(names, table[-1], strict=True))
        logs["approx_kl"] = last_epoch["approx_kl"] / self._counts[-1]
        logs["beta_abs_max"] = max(row[names.index("beta_abs_max")] for row in table)
        last = self._last
        losses = th.stack([self._last_policy_loss, last.entropy_loss, last.value_loss])
        levels = th.tensor(PERCENTILES, dtype=losses.dtype, device=losses.device) / 100
        policy_loss, entropy_loss, value_loss, *quantiles = th.cat([losses, self.last_beta.quantile(levels)]).tolist()
        logs["loss"] = policy_loss + ent_coef * entropy_loss + vf_coef * value_loss
        logs.update((f"beta_p{level:02}", value) for level, value in zip(PERCENTILES, quantiles, strict=True))
        return logs
