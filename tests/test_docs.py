"""Each block of Python in the documentation runs as it stands, in the order of its page; of the README, those that can."""

import ast
import re
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs" / "api").glob("*.md"))]
#: Blocks of the README that need nothing but themselves, by a word of theirs; the others train for long or need files.
STANDING_ALONE = ("late_ramp", pytest.param("evaluate_policy", marks=pytest.mark.slow))


class Block(NamedTuple):
    """
    A block of Python in a page.

    :param place: page and line, as pytest shows it
    :param line: line of the page that it begins after
    :param code: the code
    """

    place: str
    line: int
    code: str

    def run(self, namespace: dict[str, object]) -> None:
        # Empty lines in front, so that a traceback has the lines of the page.
        exec(compile("\n" * self.line + self.code, self.place.partition(":")[0], "exec"), namespace)


def blocks(page: Path) -> list[Block]:
    """The blocks of Python of a page, from top to bottom."""
    text = page.read_text()
    found = []
    for match in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        line = text.count("\n", 0, match.start(1))
        found.append(Block(f"{page.relative_to(ROOT)}:{line + 1}", line, match[1]))
    return found


README, *DOCS = [blocks(page) for page in PAGES]
WITH_CODE = [page for page in DOCS if page]


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page[0].place.partition(":")[0])
def test_blocks_of_a_page_run_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in page:
        block.run(namespace)


@pytest.mark.parametrize("word", STANDING_ALONE)
def test_block_of_the_readme_runs(word, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (block,) = (block for block in README if word in block.code)
    block.run({"__name__": "__main__"})


@pytest.mark.parametrize("block", README, ids=lambda block: block.place)
def test_what_the_readme_imports_is_there(block):
    imports = [node for node in ast.parse(block.code).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    exec(compile(ast.Module(imports, []), block.place, "exec"), {})


def test_pages_are_found():
    assert {"docs/guide.md", "docs/index.md", "docs/mathematics.md"} <= {page[0].place.partition(":")[0] for page in WITH_CODE}
    assert len(README) >= 6
