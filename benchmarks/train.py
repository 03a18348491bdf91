"""
Time ``train()`` of PPO and KLipPPO on the same filled rollout buffer, in one process, alternating.

    python benchmarks/train.py                  # 64-64 networks, minibatch 64
    python benchmarks/train.py --net 256 --batch-size 32 --beta adaptive

Prints the median time of each, and the median and quartiles of the ratio of neighbouring pairs.
"""

import argparse
import copy
import statistics
import time

import torch as th
from stable_baselines3 import PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.logger import Logger

from sb3_klip import KLipPPO


def filled(algorithm: type[BaseAlgorithm], args: argparse.Namespace, **kwargs: object) -> BaseAlgorithm:
    """A model with a rollout, ready for ``train()``."""
    model = algorithm(
        "MlpPolicy",
        args.env,
        n_steps=args.n_steps,
        batch_size=args.batch_size,
        n_epochs=args.epochs,
        policy_kwargs={"net_arch": [args.net, args.net]},
        seed=0,
        device="cpu",
        **kwargs,
    )
    model.set_logger(Logger(None, []))
    _, callback = model._setup_learn(args.n_steps)
    model.collect_rollouts(model.env, callback, model.rollout_buffer, args.n_steps)
    return model


def timed(model: BaseAlgorithm, buffer: object) -> float:
    """Seconds of one ``train()`` on a copy of the rollout."""
    model.rollout_buffer = copy.deepcopy(buffer)
    start = time.perf_counter()
    model.train()
    return time.perf_counter() - start


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="Hopper-v4")
    parser.add_argument("--net", type=int, default=64, help="width of the two layers")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--n-steps", type=int, default=2048)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--beta", default="step")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    th.set_num_threads(args.threads)

    ppo, klip = filled(PPO, args), filled(KLipPPO, args, beta=args.beta)
    buffer = ppo.rollout_buffer
    timed(ppo, buffer), timed(klip, buffer)  # not counted: the first update allocates the optimizer's state
    pairs = [(timed(ppo, buffer), timed(klip, buffer)) for _ in range(args.repeats)]
    minibatches = args.epochs * -(-args.n_steps // args.batch_size)
    theirs, ours = (statistics.median(column) / minibatches * 1e6 for column in zip(*pairs, strict=True))
    low, middle, high = statistics.quantiles([a / b for a, b in pairs], n=4)
    print(f"{args.env}, {args.net}-{args.net}, minibatch {args.batch_size}, beta={args.beta}, {args.threads} thread(s)")
    print(f"PPO {theirs:.0f} µs, KLipPPO {ours:.0f} µs per minibatch; PPO / KLipPPO {middle:.2f} ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
