"""What an update logs: stored per minibatch, reduced some epochs at a time, and read from the device once per update."""

import math
from typing import Any, NamedTuple

import torch as th

from sb3_klip.replay import Replayed
from sb3_klip.surrogate import PerSampleKL, clip_objective, masked_mean, partition, per_sample_beta

#: Percentiles of β that are logged, as ``beta_p01`` and so on.
PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
#: Samples in the minibatches that are kept until they are reduced together, in fewer calls; more would take more memory.
_PENDING = 25_000


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
        """The ratio, moved so that it is 1 at the start of the update: w - c + 1; shape (B,)."""
        return self.terms.ratio if self.replayed is None else self.terms.ratio - self.replayed.centre + 1

    def policy_ratio(self) -> th.Tensor:
        """The ratio of the policy to that at the start of the update: w / c; shape (B,)."""
        return self.terms.ratio if self.replayed is None else self.terms.ratio / self.replayed.centre

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


def _number(weight: Any) -> float:
    """A weight of the loss, which may be a tensor."""
    return weight.item() if isinstance(weight, th.Tensor) else weight


def _percentiles(values: th.Tensor) -> th.Tensor:
    """As ``torch.quantile``, which refuses more than 16 million numbers."""
    ordered = values.sort().values
    places = [level / 100 * (len(values) - 1) for level in PERCENTILES]
    low, high = ordered[list(map(math.floor, places))], ordered[list(map(math.ceil, places))]
    return low.lerp(high, ordered.new_tensor([place % 1 for place in places]))


def _one_dimensional(minibatch: Minibatch) -> Minibatch:
    """The same with one value per element of the loss, where a policy's log-probabilities of shape (B, 1) make it (B, B)."""
    shape = minibatch.terms.ratio.shape
    if len(shape) == 1:
        return minibatch

    def flat(tensor: th.Tensor | None) -> Any:
        return None if tensor is None else tensor.expand(shape).reshape(-1)

    terms, replayed = PerSampleKL(*map(flat, minibatch.terms)), minibatch.replayed
    return minibatch._replace(
        terms=terms,
        advantages=flat(minibatch.advantages),
        mask=None if minibatch.mask is None else flat(minibatch.mask[:, None]),
        replayed=None if replayed is None else type(replayed)(*map(flat, replayed)),
    )


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
        self._epochs = 0
        # Minibatches of whole epochs that are not reduced yet, and what has become of the others.
        self._pending: list[Minibatch] = []
        self._samples = 0
        self._reduced: list[dict[str, th.Tensor]] = []
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
        return self._epochs, index, problem

    def end_epoch(self) -> None:
        """Take over the epoch's minibatches."""
        self._epochs += 1
        if not self.minibatches:  # a buffer of the user's own may hand out none
            return
        self._pending += map(_one_dimensional, self.minibatches)
        self._counts.append(len(self.minibatches))
        self._samples += sum(minibatch.terms.ratio.numel() for minibatch in self.minibatches)
        if self._samples > _PENDING:
            self._reduce()

    def _reduce(self) -> None:
        """Reduce minibatches to the sum over minibatches of each one's mean, as SB3 weighs them."""
        minibatches, self._pending, self._samples = self._pending, [], 0
        self._last = minibatches[-1]
        terms = [minibatch.terms for minibatch in minibatches]
        keep = None if self._last.mask is None else th.cat([m.mask for m in minibatches])  # type: ignore[misc]

        def join(tensors: list[th.Tensor]) -> th.Tensor:
            return th.cat(tensors) if keep is None else th.cat(tensors)[keep]

        ratio, log_ratio = join([t.ratio for t in terms]), join([t.log_ratio for t in terms])
        removal, loss = join([t.removal for t in terms]), join([t.loss for t in terms])
        advantages = join([m.advantages for m in minibatches])
        weight = estimate = None
        if self.estimator is not None:
            weight, estimate = join([t.weight for t in terms]), join([t.estimate for t in terms])  # type: ignore[misc]

        shifted, weights, centre = ratio, None, None
        if self._last.replayed is not None:
            shifted = join([m.shifted_ratio() for m in minibatches])
            weights, centre = (th.cat(column) for column in zip(*(m.replayed for m in minibatches), strict=True))
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
        approx_kl = (ratio - 1) - log_ratio if weights is None else join([m.kl_estimates() for m in minibatches])
        per_sample = {
            "policy_gradient_loss": policy_loss,
            "clip_fraction": ((shifted - 1).abs() > self.clip_range).to(ratio.dtype),
            "approx_kl": approx_kl,
            "kill_fraction": kill.to(ratio.dtype),
            "pass_fraction": passed.to(ratio.dtype),
            "beta_mean": beta,
            "kl_penalty": kl_penalty,
            "klip_loss": loss,
        }
        if weight is not None:
            per_sample["beta_scalar"] = weight
        sizes = th.tensor([m.advantages.numel() if m.mask is None else int(m.mask.sum()) for m in minibatches])
        share = sizes.to(ratio.dtype).reciprocal().repeat_interleave(sizes).to(ratio.device)
        sums = {name: (values * share).sum() for name, values in per_sample.items()}
        sums["value_loss"] = th.stack([m.value_loss for m in minibatches]).sum()
        sums["entropy_loss"] = th.stack([m.entropy_loss for m in minibatches]).sum()
        sums["beta_abs_max"] = beta.abs().max()
        epoch = int(sizes[-self._counts[-1] :].sum())
        sums["last_approx_kl"] = (approx_kl * share)[-epoch:].sum() / self._counts[-1]
        sums["last_policy_loss"] = policy_loss[-int(sizes[-1]) :].mean()
        self.last_beta = beta[-epoch:].clone()
        self._reduced.append(sums)

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
        if self._pending:
            self._reduce()
        if not self._reduced:
            raise ValueError("the update had no minibatch: the rollout buffer handed out none, or n_epochs is 0")
        names = list(self._reduced[0])
        table = th.stack([th.stack(list(sums.values())) for sums in self._reduced]).tolist()
        rows = [dict(zip(names, row, strict=True)) for row in table]
        logs = {name: sum(row[name] for row in rows) / sum(self._counts) for name in names if not name.startswith("last_")}
        logs["approx_kl"] = rows[-1]["last_approx_kl"]
        logs["beta_abs_max"] = max(row["beta_abs_max"] for row in rows)
        losses = th.stack([self._last.entropy_loss, self._last.value_loss])
        entropy_loss, value_loss, *quantiles = th.cat([losses, _percentiles(self.last_beta)]).tolist()
        logs["loss"] = rows[-1]["last_policy_loss"] + _number(ent_coef) * entropy_loss + _number(vf_coef) * value_loss
        logs.update((f"beta_p{level:02}", value) for level, value in zip(PERCENTILES, quantiles, strict=True))
        return logs
