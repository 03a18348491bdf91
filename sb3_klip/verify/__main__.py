"""
``python -m sb3_klip.verify``: train PPO and KLipPPO side by side from one seed, and compare every gradient, bit for bit.

Each algorithm trains in its own process, with the same environment, wrappers and hyperparameters as in RL Zoo. Both send the
gradients of each update to the main process, which compares them.
"""

import argparse
import importlib
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import gymnasium as gym
import torch as th
import yaml
from rich.console import Console
from rich.live import Live
from rl_zoo3.utils import StoreDict
from stable_baselines3.common.preprocessing import is_image_space

from sb3_klip import zoo
from sb3_klip.arguments import check_arguments
from sb3_klip.coefficients.registry import make_beta
from sb3_klip.errors import did_you_mean
from sb3_klip.verify.comparison import Comparison
from sb3_klip.verify.training import PAIRS, Training

HYPERPARAMS = ("zoo", "paper", "default")

EPILOG = """\
examples:
  python -m sb3_klip.verify --env Hopper-v4
  python -m sb3_klip.verify --env MyEnv-v0 --gym-packages my_package --hyperparams default -n 50000
  python -m sb3_klip.verify --env Hopper-v4 -params batch_size:60 n_epochs:3
  python -m sb3_klip.verify --env Hopper-v4 --estimator analytic     # shows why the identity needs the sampled KL
  python -m sb3_klip.verify --env Hopper-v4 --beta linear_ramp       # is not PPO, so it reports a difference

exit status: 0 identical, 1 different, 2 could not be compared, 130 interrupted
"""


def parser() -> argparse.ArgumentParser:
    """Options of the command line; those that RL Zoo has as well mean the same."""
    made = argparse.ArgumentParser(
        prog="python -m sb3_klip.verify",
        description="Train PPO and KLipPPO side by side from one seed, and compare every gradient and parameter, bit for bit. "
        "Differences are given in ulp, units in the last place of a float32.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--env", required=True, help="id of a registered environment")
    algorithms = "PPO, or sb3-contrib's RecurrentPPO (lstm) or MaskablePPO (mask) (default: %(default)s)"
    made.add_argument("--algo", choices=PAIRS, default="ppo", help=algorithms)
    made.add_argument("-n", "--n-timesteps", type=int, default=20_000, help="steps of each training (default: %(default)s)")
    made.add_argument("--seed", type=int, default=0, help="random seed of both (default: %(default)s)")
    made.add_argument(
        "--hyperparams",
        choices=HYPERPARAMS,
        default="zoo",
        help="RL Zoo's tuned hyperparameters, the paper's protocol, or SB3's defaults (default: %(default)s)",
    )
    made.add_argument(
        *("-params", "--params"), nargs="+", action=StoreDict, default={}, help="hyperparameters to override, as in RL Zoo"
    )
    made.add_argument("--env-kwargs", nargs="+", action=StoreDict, default={}, help="arguments of the environment")
    made.add_argument("--gym-packages", nargs="+", default=[], help="modules that register environments")
    made.add_argument("--beta", default="step", help="coefficient of KLipPPO (default: step, which is PPO-Clip)")
    made.add_argument(
        "--estimator",
        choices=("sampled", "analytic"),
        default="sampled",
        help="KL estimate that is penalised; with the analytic one, there is no identity (default: %(default)s)",
    )
    made.add_argument("--num-threads", type=int, default=1, help="threads of torch in each training (default: %(default)s)")
    made.add_argument(
        *("-o", "--output"),
        type=Path,
        default=Path("difference.pt"),
        help="file for the first difference, if there is one (default: %(default)s)",
    )
    return made


def _scope(options: argparse.Namespace) -> str:
    """What the verdict holds for."""
    kernels = th.backends.cpu.get_cpu_capability()
    threads = f"{options.num_threads} thread{'s' if options.num_threads > 1 else ''}"
    return f"This holds for torch {th.__version__} on this machine's CPU ({kernels} kernels) with {threads}."


def _check(options: argparse.Namespace) -> None:
    """
    Refuse what can be known to be wrong.

    :raises ValueError: naming the argument
    """
    for package in options.gym_packages:
        try:
            importlib.import_module(package)
        except Exception as error:
            raise ValueError(f"--gym-packages: {package} cannot be imported: {type(error).__name__}: {error}") from error
    if options.env not in gym.envs.registry:
        raise ValueError(f"--env={options.env!r} is not registered.{did_you_mean(options.env, gym.envs.registry)}")
    for name in ("n_timesteps", "num_threads"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')}={getattr(options, name)} must be at least 1")
    if not options.output.absolute().parent.is_dir():
        raise ValueError(f"--output={options.output}: the folder does not exist")
    if options.output.is_dir():
        raise ValueError(f"--output={options.output} is a folder")
    try:
        tempfile.TemporaryFile(dir=options.output.absolute().parent).close()
    except OSError as error:
        raise ValueError(f"--output={options.output}: the folder cannot be written to ({error})") from error
    if not 0 <= options.seed < 2**32:
        raise ValueError(f"--seed={options.seed} must be from 0 to 2**32 - 1")
    _check_hyperparams(options)


def _check_hyperparams(options: argparse.Namespace) -> None:
    if "beta" in options.params:
        raise ValueError(f"-params beta:{options.params['beta']!r}: here the coefficient is given by --beta")
    known = zoo.hyperparameters(PAIRS[options.algo].algorithm)
    for name in options.params:
        if name not in known:
            raise ValueError(f"-params: there is no hyperparameter {name!r}.{did_you_mean(name, known)}")
    if options.estimator == "analytic" and options.beta != "step":
        raise ValueError(f"--estimator=analytic shows what is left of --beta=step, not of {options.beta!r}")
    make_beta(options.beta, options.params.get("beta_kwargs"))
    check_arguments(options.params)


def _write_conf(options: argparse.Namespace, folder: Path) -> str:
    """Hyperparameters for both, where RL Zoo finds them."""
    if options.hyperparams == "paper":
        return "sb3_klip.hyperparams.paper"
    if options.hyperparams == "zoo":
        file = zoo.zoo_hyperparams() / ("ppo_lstm.yml" if options.algo == "lstm" else "ppo.yml")
        # The zoo's default for ppo_lstm has a policy that is none of its policies.
        if options.algo == "lstm" and options.env not in yaml.safe_load(file.read_text(encoding="utf-8")):
            raise ValueError(f"RL Zoo has no hyperparameters of ppo_lstm for {options.env}; try --hyperparams default")
        return str(file)
    try:
        env = gym.make(options.env, **options.env_kwargs)
    except Exception as error:
        raise ValueError(f"{options.env} cannot be made: {error}") from error
    space = env.observation_space
    env.close()
    kind = "MultiInput" if isinstance(space, gym.spaces.Dict) else "Cnn" if is_image_space(space) else "Mlp"
    policy = f"{kind}{'Lstm' if options.algo == 'lstm' else ''}Policy"
    conf = folder / "hyperparams.yml"
    conf.write_text(yaml.safe_dump({options.env: {"policy": policy, "n_timesteps": options.n_timesteps}}))
    return str(conf)


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Run the command.

    :param arguments: of the command line
    :return: exit status: 0 identical, 1 different, 2 could not be compared, 130 interrupted
    """
    zoo.register()  # -params then reads a coefficient's name without its quotes
    try:
        options = parser().parse_args(arguments)
    except Exception as error:  # RL Zoo evaluates the values as Python
        form = "write NAME:VALUE with the value in Python, as in batch_size:60 or policy:\"'MlpPolicy'\""
        print(f"-params or --env-kwargs: {form}; {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    th.set_num_threads(1)  # the cores are for the two trainings
    console = Console()
    comparison, pair = Comparison(options), PAIRS[options.algo]
    try:
        _check(options)
        with tempfile.TemporaryDirectory() as folder:
            conf = _write_conf(options, Path(folder))
            names = f"{pair.zoo_base} and {pair.zoo_name}"
            print(f"Training {names}, {options.n_timesteps:,} steps each, on {options.env}", flush=True)
            base, ours = (Training(options, algo, folder, conf) for algo in (pair.zoo_base, pair.zoo_name))
            try:
                with Live(comparison.table(), console=console, transient=True) as live:
                    verdict = comparison.run(base, ours, live)
            finally:
                base.end()
                ours.end()
        if comparison.updates > 0:
            console.print(comparison.table())
    except (ValueError, TypeError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"Interrupted after {comparison.minibatches} minibatches, {comparison.steps} steps; no verdict.")
        return 130
    if options.estimator == "analytic" and verdict.identical is False:
        print(comparison.why())
    print(verdict.text, file=sys.stderr if verdict.identical is None else sys.stdout)
    if verdict.identical is not None:
        print(_scope(options))
    return {True: 0, False: 1, None: 2}[verdict.identical]


if __name__ == "__main__":
    sys.exit(main())
