"""
Write into the pages what the code knows: the tables of coefficients, algorithms, modules, timings. ``make tables`` runs this.

A table stands in a page between the lines ``<!-- table: NAME -->`` and ``<!-- end -->``, NAME being one of :data:`TABLES`.
"""

import ast
import csv
import inspect
import itertools
import json
import math
import re
import runpy
import statistics
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from scipy import stats

from sb3_klip.atlas import multiplier
from sb3_klip.coefficients import ESTIMATORS, FAMILY, QUANTITIES, Coefficient, Entry, entries, make
from sb3_klip.coefficients.parameters import Parameter
from sb3_klip.experiments import paper
from sb3_klip.experiments.results import read_result
from sb3_klip.variants import VARIANTS

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "docs/api").glob("*.md")),
]
REGION = re.compile(r"(<!-- table: ([a-z_]+) -->\n).*?(<!-- end -->)", re.DOTALL)

CONSTANTS = """```{{eval-rst}}
.. data:: QUANTITIES

   What a coefficient may ask for by naming it as an argument, beyond ``ratio``, ``advantages`` and ``clip_range``:

{quantities}

.. data:: ESTIMATORS

   Estimates of the KL divergence that a weight can be put on: {estimators} (:func:`sb3_klip.surrogate.kl_estimate`).
```"""
REFERENCE = """### {title}

```{{eval-rst}}
.. automodule:: {module}
   :members:
   :special-members: __call__
```"""


def filled(page: str) -> str:
    """The text of a page with all its tables made anew."""
    return REGION.sub(lambda region: f"{region[1]}\n{TABLES[region[2]]()}\n\n{region[3]}", page)


def coefficients() -> str:
    """Each coefficient: what it does, its parameters, other names and sources; and how many there are."""
    rows = [
        (f"`{e.name}`", _formula(e), ", ".join(map(_parameter, _parameters(e))), _aliases(e), _cell(e.source))
        for module in FAMILY
        for e in _members(module)
    ]
    header = ("`beta`", "removal g, or weight b", "`beta_kwargs`: default (range)", "also known as", "source")
    return f"{_table(header, rows)}\n\nThese are {len(rows)} coefficients."


def families() -> str:
    """The coefficients by what they do."""

    def named(entry: Entry) -> str:
        return f"`{entry.name}`" + (f" ({_code(entry.aliases)})" if entry.aliases else "")

    names = [", ".join(map(named, _members(module))) for module in FAMILY]
    summaries = [inspect.getdoc(module).splitlines()[0] for module in FAMILY]  # type: ignore[union-attr]
    return _table(("what they do", "`beta` (other names)"), zip(summaries, names, strict=True))


def references() -> str:
    """A section of the API reference for each module of coefficients."""
    names = [module.__name__ for module in FAMILY]
    titles = [name.rpartition(".")[2].replace("_", " ").capitalize() for name in names]
    return "\n\n".join(REFERENCE.format(title=title, module=name) for title, name in zip(titles, names, strict=True))


def quantities() -> str:
    """What a coefficient may ask for."""
    return _table(("argument", "what it is"), [(f"`{name}`", _cell(text)) for name, text in QUANTITIES.items()])


def constants() -> str:
    """The same for the API reference, with the estimators."""
    asked = "\n".join(f"   - ``{name}``: {text}" for name, text in QUANTITIES.items()).replace("|", "\\|")
    return CONSTANTS.format(quantities=asked, estimators=", ".join(f'``"{name}"``' for name in ESTIMATORS))


def policy_ratio() -> str:
    """The coefficients that need a ratio of two policies, in the order of their families."""
    members = [entry for module in FAMILY for entry in _members(module)]
    return textwrap.fill(_code(entry.name for entry in members if make(entry.name).needs_policy_ratio), 127)


def without_clip_range() -> str:
    """The coefficients for which the clip range makes no difference."""
    ratio = np.linspace(0.05, 1.95, 96)

    def differs(coefficient: Coefficient) -> bool:
        narrow, wide = ([multiplier(coefficient, ratio, sign, width) for sign in (-1, 1)] for width in (0.1, 0.3))
        return not np.array_equal(narrow, wide)

    names = [entry.name for module in FAMILY for entry in _members(module) if not differs(make(entry.name))]
    return textwrap.fill(_code(names), 127)


def variants() -> str:
    """The algorithms, and what they stand in for."""
    rows = [(f"`{v.name}`", f"`{v.base_package}.{v.base}`", f"`{v.zoo_name}`" if v.in_zoo else "-") for v in VARIANTS]
    return _table(("class", "drop-in for", "in RL Zoo"), rows)


def modules() -> str:
    """Where things are: each package and each module with the first sentence of its docstring."""
    return "\n".join(_listing(ROOT / "sb3_klip", "")).replace("``", "`")


def speed() -> str:
    """What was measured last, of PPO's time over ours."""
    return _timed("speed")


def memory() -> str:
    """Peak memory over PPO's."""
    return _timed("memory")


def sizes() -> str:
    """The speed of updates by size."""
    return _timed("sizes")


def times() -> str:
    """The speed of updates by coefficient."""
    return _timed("coefficients")


def against_paper() -> str:
    """The paper's table and ours."""
    return _reported("paper", "Against the paper")


def paper_gains() -> str:
    """What the intervals show of the paper's methods, by task."""
    return _reported("paper", "Gain over `step` at the end, by task")


def authors_trainer() -> str:
    """LunarLander-v3 with parts of the paper's trainer."""
    trainers = {"step": "nothing", "advantages": "the advantages", "value_loss": "the value loss", "both": "both"}
    return _by_trainer("LunarLander-v3", "step", trainers)


def authors_trainer_ant() -> str:
    """The same for Ant-v4 and ``adaptive``."""
    return _by_trainer("Ant-v4", "adaptive", {"adaptive": "nothing", "adaptive_both": "both"})


def _by_trainer(task: str, beta: str, trainers: dict[str, str]) -> str:
    """The final return of each run, by what of the trainer is the paper's."""
    runs = [run for run in (*_runs("paper"), *_runs("authors_trainer")) if run["task"] == task]
    rows = [
        (text, ", ".join(f"{run['final_return']:.0f}" for run in runs if run["method"] == method))
        for method, text in trainers.items()
    ]
    return _table(("what is the paper's", f"return of `{beta}` on {task}, each seed"), rows)


def other_coefficients() -> str:
    """Other coefficients under the paper's protocol."""
    return _reported("coefficients", "Return in the last 10 % of training")


def other_gains() -> str:
    """What their intervals show."""
    return _reported("coefficients", "Gain over `step`")


def wide_gains() -> str:
    """The same for the suite ``wide``."""
    rates = {rate: _reported("wide", f"Gain over `step` at learning rate {rate}") for rate in ("3e-4", "1e-3")}
    return "\n\n".join(f"Learning rate {rate}:\n\n{table}" for rate, table in rates.items())


def reuse_gains() -> str:
    """The same for sample reuse."""
    return _reported("reuse_long", "Gain over `step`")


def reuse() -> str:
    """Sample reuse: the final return of each run of 300 000 steps."""
    return _each_run("reuse")


def reuse_long() -> str:
    """The same for one million steps."""
    return _each_run("reuse_long")


def wide() -> str:
    """The suite ``wide``: the final return of each run."""
    finals = _finals("wide")
    names = [method.partition("@") for _, method in finals]
    methods = sorted({method for method, _, _ in names}, key=lambda method: (method != "step", method))
    rows = [
        (task, rate, *(finals[task, f"{method}@{rate}"] for method in methods))
        for task in _CHOSEN_ON
        for rate in sorted({rate for _, _, rate in names}, key=float)
    ]
    return f"{_table(('task', 'learning rate', *(_code([method]) for method in methods)), rows)}\n\n{_done('wide')}"


def seeds_needed() -> str:
    """How many seeds it takes to find a difference, by the spread of ``step`` under the paper's protocol."""
    rows = []
    for task in _CHOSEN_ON:
        finals = [run["final_return"] for run in _runs("paper") if (run["task"], run["method"]) == (task, "step")]
        spread = statistics.stdev(finals) / statistics.mean(finals)
        rows.append((task, *(str(_seeds_to_find(difference / spread)) for difference in (0.2, 0.5, 1.0))))
    return _table(("task", "20 %", "50 %", "100 %"), rows)


def _seeds_to_find(difference: float) -> int:
    """Seeds of each method, so that a t-test at 5 % finds a difference, in standard deviations, in 80 % of all cases."""
    for seeds in itertools.count(2):
        freedom, centre = 2 * seeds - 2, difference * math.sqrt(seeds / 2)
        bound = stats.t.ppf(0.975, freedom)
        if stats.nct.sf(bound, freedom, centre) + stats.nct.cdf(-bound, freedom, centre) >= 0.8:
            break
    return seeds


def search() -> str:
    """What was tried for the preset: the final return of each setting."""
    base = [run for run in _runs("wide") if run["method"] == "step@1e-3" and run["seed"] == 0]
    runs = [*base, *(run for name in ("preset_search", "preset_search2", "preset_search3") for run in _runs(name))]
    settings: dict[str, dict[str, str]] = {}
    for run in runs:
        given = {key: value for key, value in run["hyperparams"].items() if key not in ("beta", "learning_rate")}
        inner = given.pop("policy_kwargs", "dict()")[len("dict(") : -1]
        words = [*([inner] if inner else []), *(f"{key}={value}" for key, value in given.items())]
        settings.setdefault(f"`{', '.join(words)}`" if words else "none", {})[run["task"]] = f"{run['final_return']:.0f}"
    rows = [
        (name, *(found.get(task, "–") for task in _CHOSEN_ON))
        for name, found in sorted(settings.items(), key=lambda item: item[0].count("="))
    ]
    return _table(("change", *_CHOSEN_ON), rows)


def preset() -> str:
    """The preset's returns, those of its last agents, and published ones."""
    with (ROOT / "results/fast/evaluations.csv").open(encoding="utf-8", newline="") as file:
        evaluated = {(row["task"], int(row["seed"])): float(row["return"]) for row in csv.DictReader(file)}
    rows = []
    for task, published in paper.TIANSHOU.items():
        results = [read_result(path) for path in sorted(ROOT.glob(f"results/fast/results/{task}/step/*.csv"))]
        runs = [result.about for result in results]
        # Tianshou evaluates every 30 000 steps (three percent) for ten episodes, about as many as end in one percent.
        at_times = np.array([result.curve["return"][2::3] for result in results]).T
        best = max(at_times, key=np.mean)
        training, last = [run["final_return"] for run in runs], [evaluated[task, run["seed"]] for run in runs]
        minutes = statistics.median(run["seconds"] for run in runs) / 60
        means = (f"{np.mean(returns):.0f} ± {np.std(returns, ddof=1):.0f}" for returns in (training, last, best))
        rows.append((task, str(len(runs)), *means, published, f"{minutes:.0f}"))
    header = ("task", "seeds", "last 10 % of training", "last agent", "best of 33", "Tianshou's PPO, best of 33", "minutes")
    return _table(header, rows)


#: The tasks that the preset was chosen on.
_CHOSEN_ON = ("Hopper-v4", "HalfCheetah-v4", "Walker2d-v4")


def _runs(suite: str) -> list[dict[str, Any]]:
    """The first lines of the results of a suite, in the order of their seeds."""
    paths = sorted((ROOT / "results" / suite).glob("results/*/*/*.csv"), key=lambda path: (path.parent.parent, path.stem))
    return [json.loads(path.open(encoding="utf-8").readline()[1:]) for path in paths]


def _each_run(suite: str) -> str:
    """The final return of each run of a suite, and how many runs are done."""
    methods, finals = _suite(suite)["methods"], _finals(suite)
    rows = [(task, *(finals[task, method] for method in methods)) for task in _suite(suite)["tasks"]]
    return f"{_table(('task', *(_code([method]) for method in methods)), rows)}\n\n{_done(suite)}"


def _finals(suite: str) -> dict[tuple[str, str], str]:
    """The final returns of a suite's runs, by task and method, in the order of their seeds."""
    finals: dict[tuple[str, str], list[str]] = {
        (task, method): [] for task in _suite(suite)["tasks"] for method in _suite(suite)["methods"]
    }
    for run in _runs(suite):
        finals[run["task"], run["method"]].append(f"{run['final_return']:.0f}")
    return {cell: ", ".join(returns) or "–" for cell, returns in finals.items()}


def _done(suite: str) -> str:
    definition = _suite(suite)
    cells = math.prod(len(definition[each]) for each in ("tasks", "methods", "seeds"))
    seeds = [run["seed"] for run in _runs(suite)]
    done = sum(seed in definition["seeds"] for seed in seeds)
    more = f", and {len(seeds) - done} with further seeds" if done < len(seeds) else ""
    return f"{done} of the suite's {cells} runs are done{more}."


def _suite(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / f"sb3_klip/experiments/suites/{name}.yml").read_text(encoding="utf-8"))


def _reported(suite: str, title: str) -> str:
    """The first table below a title in the report of a suite."""
    text = (ROOT / f"results/{suite}/report.md").read_text(encoding="utf-8").partition(f"\n## {title}\n")[2]
    return re.search(r"^\|.*?(?=\n\n)", text, re.DOTALL | re.MULTILINE)[0]  # type: ignore[index]


def _timed(name: str) -> str:
    found = json.loads((ROOT / "timings/overview.json").read_text())["results"]
    return _table(*runpy.run_path(str(ROOT / "timings/overview.py"))["tables"](found)[name])


TABLES = {
    each.__name__: each
    for each in (
        *(coefficients, families, references, quantities, constants, policy_ratio, without_clip_range, variants, modules),
        *(speed, memory, sizes, times),
        *(against_paper, paper_gains, authors_trainer, authors_trainer_ant),
        *(other_coefficients, other_gains, wide, wide_gains, seeds_needed),
        *(reuse, reuse_long, reuse_gains, search, preset),
    )
}


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in (header, *rows)]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]])


def _cell(text: str) -> str:
    """A text as it stands in a table, with its papers as links."""
    return re.sub(r"arXiv (\d{4}\.\d{4,5})", r"[arXiv \1](https://arxiv.org/abs/\1)", text).replace("|", "\\|")


def _code(words: Iterable[str]) -> str:
    return ", ".join(f"`{word}`" for word in words)


def _members(module: object) -> list[Entry]:
    """The coefficients of a module, in its order; none that a program has registered by itself."""
    return [entry for entry in entries() if inspect.getmodule(entry.function) is module]


def _formula(entry: Entry) -> str:
    """What it does, with the names of its parameters as code."""
    names = "|".join(parameter.name for parameter in _parameters(entry))
    return _cell(re.sub(rf"\b({names})\b", r"`\1`", entry.formula) if names else entry.formula)


def _aliases(entry: Entry) -> str:
    """Its further names, with what they preset."""
    presets = [_code(f"{key}={value!r}" for key, value in given.items()) for given in entry.aliases.values()]
    return ", ".join(f"`{a}` with {given}" if given else f"`{a}`" for a, given in zip(entry.aliases, presets, strict=True))


def _parameters(entry: Entry) -> list[Parameter]:
    function = entry.function.__call__ if inspect.isclass(entry.function) else entry.function
    declared = inspect.signature(function, eval_str=True).parameters.values()
    return [Parameter.of(argument) for argument in declared if argument.kind is argument.KEYWORD_ONLY]


def _parameter(parameter: Parameter) -> str:
    """Its name and default, and the values that it may take."""
    shown = f"`{parameter.name}={parameter.default!r}`"
    if parameter.choices:
        return f"{shown} (or {_code(repr(choice) for choice in parameter.choices if choice != parameter.default)})"
    if (interval := parameter.interval) is None:
        return shown
    if math.isinf(interval.high):
        return f"{shown} ({'>' if interval.low_open else '≥'} {interval.low:g})"
    if math.isinf(interval.low):
        return f"{shown} ({'<' if interval.high_open else '≤'} {interval.high:g})"
    low, high = "(" if interval.low_open else "[", ")" if interval.high_open else "]"
    return f"{shown} ({low}{interval.low:g}, {interval.high:g}{high})"


def _listing(folder: Path, indent: str) -> Iterable[str]:
    yield f"{indent}- `{folder.name}/`: {_summary(folder / '__init__.py')}"
    for path in sorted(set(folder.glob("*.py")) - {folder / "__init__.py"}):
        yield f"{indent}  - `{path.name}`: {_summary(path)}"
    for package in sorted(path.parent for path in folder.glob("*/__init__.py")):
        yield from _listing(package, f"{indent}  ")


def _summary(module: Path) -> str:
    docstring = ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n\n")[0].replace("\n", " ")


if __name__ == "__main__":
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        if (made := filled(text)) != text:
            page.write_text(made, encoding="utf-8")
            print(f"{page.relative_to(ROOT)} has new tables")
