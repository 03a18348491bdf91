"""Suites: reading and checking their tasks, methods and seeds."""

import copy
import importlib
import importlib.resources
import inspect
import json
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import yaml
from rl_zoo3 import exp_manager
from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.utils import ALGOS, get_class_by_name
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

from sb3_klip.arguments import check_arguments
from sb3_klip.checkpoints.arguments import SCHEDULES
from sb3_klip.checkpoints.zoo_run import zoo_schedule
from sb3_klip.coefficients.registry import make_beta
from sb3_klip.errors import did_you_mean
from sb3_klip.experiments.cell import Cell
from sb3_klip.zoo import ALGORITHMS, hyperparameters, register

#: Keys of a suite file; all but ``timesteps`` must be there.
KEYS = ("hyperparams", "tasks", "seeds", "methods", "timesteps")
#: The algorithm of a method that names none.
ALGO = "klip_ppo"
#: Seeds are below this: NumPy's generators take no others, and RL Zoo takes a negative one for "any".
SEEDS = 2**32
SEEDS_TEXT = "a list of whole numbers from 0 to 2**32 - 1, each once"
#: What the name of a folder cannot have, here or on Windows, or the label of a figure.
NOT_IN_FOLDERS = '/\\:*?"<>|$'
#: Whole numbers that are 1 or more.
SIZES = ("n_envs", "n_steps", "batch_size")
#: What is checked elsewhere.
CHECKED = {*SCHEDULES, "n_epochs", "reuse"}
#: Hyperparameters that are no method's, and why.
TAKEN = {
    "callback": "an experiment has one of its own",
    "n_timesteps": "it is that of the hyperparameters of the task, or the suite's timesteps",
}

#: A suite's own YAML file of hyperparameters, in its folder: trainings run there.
CONF = "hyperparams.yml"


class Suite(NamedTuple):
    """
    A suite of experiments.

    :param name: name of the file, without its suffix
    :param cells: one cell for each task, method and seed; seeds change slowest, so that complete tables are available early
    :param definition: hyperparameters that determine the numbers of a cell, by task and method
    :param conf: content of the suite's own file of hyperparameters, if it has one
    """

    name: str
    cells: list[Cell]
    definition: dict[str, Any]
    conf: str | None


def included() -> list[str]:
    """
    Names of the suites that come with this package.

    :return: the names, sorted
    """
    return sorted(path.name[:-4] for path in importlib.resources.files(__package__).joinpath("suites").iterdir())


class _Loader(yaml.SafeLoader):
    """Plain data; a key that is there twice is an error."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        names = [
            key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge"
        ]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice!r} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_suite(name: str) -> Suite:
    """
    Read a suite and check it completely.

    :param name: one of :func:`included`, or a YAML file
    :return: the suite
    :raises ValueError: if there are mistakes, with one line for each
    """
    if name in included():
        text = importlib.resources.files(__package__).joinpath(f"suites/{name}.yml").read_text(encoding="utf-8")
    elif Path(name).suffix in (".yml", ".yaml"):
        try:
            text = Path(name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--suite: {name} cannot be read: {error}") from error
    else:
        known = ", ".join(included())
        raise ValueError(f"--suite={name!r} is none of {known}, and no YAML file.{did_you_mean(name, included())}")
    try:
        content = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"the suite {name} is not YAML: {error}") from error
    register()
    mistakes, usable = _shape(content)
    if {"hyperparams", "tasks"} <= usable:
        protocol, conf = _protocol(content["hyperparams"], Path(name).parent, mistakes)
        for task in content["tasks"]:
            mistakes += _check_task(task, protocol, content["hyperparams"])
    if "methods" in usable:
        for method, settings in content["methods"].items():
            mistakes += _check_method(method, settings)
        if len({str(method).lower() for method in content["methods"]}) < len(content["methods"]):
            mistakes.append("methods must differ in more than case, as some systems do not tell such folders apart")
    if not mistakes:
        mistakes = _check_protocol(protocol, content)
    if mistakes:
        raise _refused(name, mistakes)
    return _made(Path(name).stem, content, protocol, conf)


def select(suite: Suite, tasks: Iterable[str], methods: Iterable[str], seeds: Sequence[int]) -> list[Cell]:
    """
    Some cells of a suite.

    :param suite: the suite
    :param tasks: those to keep; all, if there are none
    :param methods: likewise
    :param seeds: likewise; they need not be among those of the suite
    :return: the cells
    :raises ValueError: if a task or a method is not in the suite, or a seed is none
    """
    if not all(0 <= seed < SEEDS for seed in seeds):
        raise ValueError(f"--seeds={' '.join(map(str, seeds))}: each must be from 0 to 2**32 - 1")
    for option, names, known in (
        ("--tasks", tasks, dict.fromkeys(cell.task for cell in suite.cells)),
        ("--methods", methods, dict.fromkeys(cell.method for cell in suite.cells)),
    ):
        for name in names:
            if name not in known:
                known_names = ", ".join(known)
                raise ValueError(
                    f"{option}: {name!r} is not in the suite, which has {known_names}.{did_you_mean(name, known)}"
                )
    cells = [cell for cell in suite.cells if (not tasks or cell.task in tasks) and (not methods or cell.method in methods)]
    if not seeds:
        return cells
    first = min(cell.seed for cell in cells)
    return [replace(cell, seed=seed) for seed in dict.fromkeys(seeds) for cell in cells if cell.seed == first]


def check_models(suite: Suite, cells: Iterable[Cell]) -> None:
    """
    Make a model for each task and method, to know what the algorithms refuse before hours of training.

    :param suite: the suite
    :param cells: those that are to be run
    :raises ValueError: if a model cannot be made, or an environment that needs another package, with one line for each
    """
    mistakes = []
    for task in dict.fromkeys(cell.task for cell in cells):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of versions that are out of date, and sizes of minibatches
            try:
                env = gym.make(task)
            except gym.error.DependencyNotInstalled as error:
                mistakes.append(f"{task} cannot be made: {error}")
                continue
            except Exception:  # it may need arguments, which methods may give
                continue
            for method in dict.fromkeys(cell.method for cell in cells if cell.task == task):
                try:
                    _make_model(env, **suite.definition[f"{task}/{method}"])
                except Exception as error:  # whatever an algorithm, or a policy, may raise
                    in_one_line = " ".join(str(error).split())
                    mistakes.append(f"method {method!r} on {task}: {type(error).__name__}: {in_one_line}")
            env.close()
    if mistakes:
        raise _refused(suite.name, mistakes)


def _make_model(env: gym.Env, algo: str, **hyperparams: Any) -> None:
    """Make a model as RL Zoo would, in one environment, unless wrappers or arguments change what it sees."""
    changing = {"env_wrapper", "vec_env_wrapper", "frame_stack", "env_kwargs"}
    if not issubclass(ALGOS[algo], OnPolicyAlgorithm) or changing & {*hyperparams}:
        return
    arguments = inspect.signature(ALGOS[algo]).parameters
    # A copy: A2C writes into the dict of the arguments of its policy.
    given = copy.deepcopy({key: value for key, value in hyperparams.items() if key in arguments})
    if isinstance(given.get("policy_kwargs"), str):
        given["policy_kwargs"] = eval(given["policy_kwargs"], vars(exp_manager))
    if "." in given.get("policy", ""):
        given["policy"] = get_class_by_name(given["policy"])
    if "n_steps" in given:  # a rollout of all environments
        given["n_steps"] *= hyperparams.get("n_envs", 1)
    ALGOS[algo](env=env, device="cpu", **ExperimentManager._preprocess_schedules(given))


def _refused(name: str, mistakes: Iterable[str]) -> ValueError:
    return ValueError(f"the suite {name} cannot be run:\n" + "\n".join(f"  - {mistake}" for mistake in mistakes))


def _shape(content: Any) -> tuple[list[str], set[str]]:
    """What is wrong with the file as a whole, and the keys whose values can be looked into."""
    if not isinstance(content, dict):
        return [f"it must be a mapping of {', '.join(KEYS)}, not {content!r}"], set()
    usable = {*content}
    mistakes = [f"unknown key {key!r}.{did_you_mean(key, KEYS)}" for key in content if key not in KEYS]
    mistakes += [f"{key!r} is missing" for key in KEYS[:4] if key not in content]
    for key, is_right, what in (
        ("hyperparams", lambda value: isinstance(value, str) and value, "a module, or a YAML file beside this one"),
        ("tasks", lambda value: _are_distinct(value, str), "a list of environments, each once"),
        ("seeds", lambda value: _are_distinct(value, int) and all(0 <= seed < SEEDS for seed in value), SEEDS_TEXT),
        ("methods", lambda value: isinstance(value, dict) and value, "a mapping of methods"),
        ("timesteps", lambda value: type(value) is int and value > 0, "a whole number above 0"),
    ):
        if key in content and not is_right(content[key]):
            mistakes.append(f"{key} must be {what}, not {content[key]!r}")
            usable.remove(key)
    return mistakes, usable


def _are_distinct(value: Any, kind: type) -> bool:
    """Whether the value is a list of different elements of this type; True and False are no numbers here."""
    return isinstance(value, list) and {*map(type, value)} == {kind} and len({*value}) == len(value)


def _protocol(conf: str, beside: Path, mistakes: list[str]) -> tuple[Mapping[str, Any], str | None]:
    """Hyperparameters by task, and the content of their file, if it is one of YAML."""
    text = None
    try:
        if conf.endswith((".yml", ".yaml")):
            text = (beside / conf).read_text(encoding="utf-8")
            protocol = yaml.load(text, _Loader)
        else:
            protocol = importlib.import_module(conf).hyperparams
    except Exception as error:  # a module may raise anything
        mistakes.append(f"hyperparams={conf!r} cannot be read: {error}")
        return {}, None
    if not isinstance(protocol, dict) or not protocol:
        mistakes.append(f"hyperparams={conf!r} must be a mapping of environments, not {protocol!r}")
        return {}, None
    return protocol, text


def _default(task: str) -> str:
    """Where RL Zoo looks for the hyperparameters of a task that has none of its own."""
    return "atari" if ExperimentManager.is_atari(task) else "default"


def _entry(protocol: Mapping[str, Any], task: str) -> Any:
    """The hyperparameters of a task, or those for all tasks that have none of their own."""
    return protocol.get(task, protocol.get(_default(task)))


def _algo_and_own(settings: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The algorithm of a method, and its hyperparameters."""
    return settings.get("algo", ALGO), {key: value for key, value in settings.items() if key != "algo"}


def _check_task(task: str, protocol: Mapping[str, Any], conf: str) -> list[str]:
    if task not in gym.envs.registry:
        return [f"unknown task {task!r}.{did_you_mean(task, gym.envs.registry)}"]
    if not protocol:  # a mistake that is told already
        return []
    entry = _entry(protocol, task)
    if not isinstance(entry, dict):
        return [f"{conf} has no entry for {task!r}, and none for {_default(task)!r}"]
    if "callback" in entry:
        return [f"{conf} has a callback for {task!r}, and an experiment is given its own"]
    try:
        if int(entry["n_timesteps"]) > 0:
            return []
    except (KeyError, TypeError, ValueError):
        pass
    # RL Zoo asks for it even if it is told another length.
    return [f"{conf} has no n_timesteps above 0 for {task!r}"]


def _check_method(method: Any, settings: Any) -> list[str]:
    if not isinstance(method, str):
        return [f"method {method!r} must be a text; put it in quotes"]
    if not isinstance(settings, dict):
        return [f"method {method!r} must be a mapping of hyperparameters, not {settings!r}"]
    if (
        set(method) & set(NOT_IN_FOLDERS)
        or method.strip(". ") != method
        or not 1 <= len(method) <= 100
        or not method.isprintable()
    ):
        return [
            f"method {method!r} names a folder, so it must have 1 to 100 characters, none of {NOT_IN_FOLDERS} or line breaks, "
            "and no dot or blank at an end"
        ]
    if "=" in method and not _is_positive(method.partition("=")[2]):
        return [f"method {method!r}: the text after '=' is the value of a parameter, so it must be a number above 0"]
    if "@" in method and not _is_rate(method.partition("@")[2], settings.get("learning_rate")):
        rate = settings.get("learning_rate")
        return [f"method {method!r}: the number after '@' must equal its learning_rate, which is {rate!r}"]
    algo, own = _algo_and_own(settings)
    if not isinstance(algo, str) or algo not in ALGOS:
        known = ", ".join(sorted(ALGOS))
        return [f"method {method!r}: algo={algo!r} must be one of {known}.{did_you_mean(algo, ALGOS)}"]
    mistakes = [f"{key!r} cannot be set by a method: {why}" for key, why in TAKEN.items() if key in own]
    own = {key: value for key, value in own.items() if key not in TAKEN}
    mistakes += _check_hyperparameters(algo, own, hyperparameters(ALGOS[algo]))
    for key, value in settings.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            mistakes.append(f"{key}={value!r} must be plain data without NaN and infinity: {error}")
    return [f"method {method!r}: {mistake}" for mistake in mistakes]


def _check_protocol(protocol: Mapping[str, Any], content: Mapping[str, Any]) -> list[str]:
    """What is wrong with hyperparameters of the protocol, as the methods use them."""
    mistakes = []
    for task in content["tasks"]:
        for settings in content["methods"].values():
            algo, own = _algo_and_own(settings)
            wrong = _check_hyperparameters(algo, {**_entry(protocol, task), **own}, hyperparameters(ALGOS[algo]))
            mistakes += [f"{content['hyperparams']}, {task!r}: {mistake}" for mistake in wrong]
    return list(dict.fromkeys(mistakes))


def _check_hyperparameters(algo: str, settings: Mapping[str, Any], known: set[str]) -> list[str]:
    """What an algorithm would refuse, or fail on later."""
    unknown = [key for key in settings if key not in known]
    mistakes = [f"{algo} has no hyperparameter {key!r}.{did_you_mean(key, known)}" for key in unknown]
    mistakes += [*_check_schedules(settings), *_check_numbers(algo, settings)]
    if isinstance(policy := settings.get("policy"), str) and "." not in policy:
        policies = ALGOS[algo].policy_aliases
        if policy not in policies:
            hint = did_you_mean(policy, policies)
            mistakes.append(f"policy={policy!r} must be one of {', '.join(policies)}.{hint}")
    if algo in ALGORITHMS:
        try:
            make_beta(settings.get("beta", "step"), settings.get("beta_kwargs"))
            check_arguments(settings)
        except (ValueError, TypeError) as error:
            mistakes.append(str(error))
    return mistakes


def _check_numbers(algo: str, settings: Mapping[str, Any]) -> list[str]:
    """Numbers that are none, as ``1e-3`` in YAML, and sizes of which there must be one at least."""
    mistakes = []
    arguments = inspect.signature(ALGOS[algo]).parameters if issubclass(ALGOS[algo], OnPolicyAlgorithm) else {}
    defaults: dict[str, Any] = {name: argument.default for name, argument in arguments.items() if name not in CHECKED}
    if settings.get("target_kl") is not None:
        defaults["target_kl"] = 0.1
    for name, value in settings.items():
        default = 1 if name == "n_envs" else defaults.get(name)
        if type(default) is int and (type(value) is not int or (name in SIZES and value < 1)):
            mistakes.append(f"{name}={value!r} must be a whole number{' above 0' if name in SIZES else ''}")
        elif type(default) is float and type(value) not in (int, float):
            mistakes.append(f"{name}={value!r} must be a number, as 1.0e-3 (for YAML, 1e-3 is a text)")
    return mistakes


def _check_schedules(settings: Mapping[str, Any]) -> list[str]:
    return [
        f"{name}={settings[name]!r} must be a number, as 3.0e-4 (for YAML, 3e-4 is a text), or lin_x"
        for name in SCHEDULES
        if name in settings and zoo_schedule(settings[name]) is None
    ]


def _is_positive(text: str) -> bool:
    try:
        return 0 < float(text) < math.inf
    except ValueError:
        return False


def _is_rate(text: str, learning_rate: Any) -> bool:
    """Whether the text is the learning rate, or where a linear schedule of it begins."""
    return _is_positive(text) and str(learning_rate).removeprefix("lin_") in (text, str(float(text)))


def _made(name: str, content: dict[str, Any], protocol: Mapping[str, Any], conf: str | None) -> Suite:
    """The suite, once it is known to be right."""
    of_one_seed, definition = [], {}
    override = "timesteps" in content
    conf_file = content["hyperparams"] if conf is None else CONF
    for task in content["tasks"]:
        hyperparams = _entry(protocol, task)
        timesteps = int(content.get("timesteps") or hyperparams["n_timesteps"])
        for method, settings in content["methods"].items():
            algo, own = _algo_and_own(settings)
            of_one_seed.append(Cell(task, method, 0, algo, conf_file, timesteps, override, own))
            definition[f"{task}/{method}"] = {**hyperparams, **own, "algo": algo, "n_timesteps": timesteps}
    cells = [replace(cell, seed=seed) for seed in content["seeds"] for cell in of_one_seed]
    return Suite(name, cells, definition, conf)
