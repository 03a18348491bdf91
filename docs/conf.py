"""Settings of Sphinx. The build needs no network; the browser fetches MathJax when it shows a page with formulas."""

import inspect
import sys
import typing
from pathlib import Path
from typing import Any

# The documentation is of this checkout, whichever sb3-klip is installed.
sys.path.insert(0, str(Path(__file__).parents[1]))

from sb3_klip import __version__
from sb3_klip.variants import VARIANTS

project = "sb3-klip"
author = "The sb3-klip developers"
copyright = f"2026, {author}"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
# Light and dark, and readable on a telephone.
html_theme = "furo"
html_title = f"sb3-klip {version}"
html_static_path = ["static"]
html_css_files = ["figures.css"]

myst_enable_extensions = ["amsmath", "dollarmath"]
# Links to headings, as on GitHub.
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
# Types stand beside the parameters that they are of.
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"

nitpick_ignore_regex = [
    # Other packages: to find their pages would need their inventories, and thus the network. SB3 writes the last two names
    # without their module.
    (
        "py:.*",
        r"(collections\.abc|gymnasium|io|matplotlib|numpy|pandas|pathlib|stable_baselines3|sb3_contrib|torch)\..*"
        r"|BaseCallback|VecEnv",
    ),
    # An alias of a union, which has no page, where the signature names it without its module.
    ("py:class", "CoefficientLike"),
    # Type variables, which have no page.
    ("py:class", r"sb3_klip\..*\.(Self\w+|AnyFunction)"),
]


def plain_types(app: Any, function: Any, bound_method: bool) -> None:
    """Show the type of a coefficient's parameter without the range that stands beside it in the annotation."""
    if inspect.isfunction(function) and function.__module__.startswith("sb3_klip.coefficients."):
        function.__annotations__ = typing.get_type_hints(function)


def plain_formulas(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Show the bars of |w - 1| in the formula of a coefficient, which reStructuredText would take for a substitution."""
    lines[:] = [line.replace("|", r"\|") if line.startswith(("Removal: ", "Weight: ")) else line for line in lines]


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", plain_formulas)
    app.connect("autodoc-before-process-signature", plain_types)
    # Where an argument and an attribute share a name, Sphinx would show the type of the attribute for both.
    for variant in VARIANTS:
        variant.algorithm.__annotations__ = variant.algorithm.__init__.__annotations__
