"""
Each block of Python in the documentation runs as it stands, in the order of its page.

The README's blocks and those that are marked ``py`` train for long or need files: what they import is there.
"""

import ast
import re
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs" / "api").glob("*.md"))]


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


def blocks(page: Path, language: str = "python") -> list[Block]:
    """The blocks of Python of a page that are marked with this word, from top to bottom."""
    text = page.read_text()
    found = []
    for match in re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        line = text.count("\n", 0, match.start(1))
        found.append(Block(f"{page.relative_to(ROOT)}:{line + 1}", line, match[1]))
    return found


README, *DOCS = [blocks(page) for page in PAGES]
WITH_CODE = [page for page in DOCS if page]
NOT_RUN = README + [block for page in PAGES for block in blocks(page, "py")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_that_begins_ends(page):
    fences = re.findall(r"^ *```(.*)$", page.read_text(), re.MULTILINE)
    assert all(fences[::2]), "a block has no language, or text between two blocks is shown as code"
    assert not any(fences[1::2])
    assert len(fences) % 2 == 0


#: Pages whose code trains for more than a few seconds.
LONG = ("docs/coefficients.md", "docs/guide.md", "docs/how_do_i.md")


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=name, marks=pytest.mark.slow if name in LONG else ())
        for page in WITH_CODE
        for name in [page[0].place.partition(":")[0]]
    ],
)
def test_blocks_of_a_page_run_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in page:
        block.run(namespace)


@pytest.mark.parametrize("block", NOT_RUN, ids=lambda block: block.place)
def test_what_is_imported_is_there(block):
    imports = [node for node in ast.parse(block.code).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    exec(compile(ast.Module(imports, []), block.place, "exec"), {})


def test_pages_are_found():
    pages = {page[0].place.partition(":")[0] for page in WITH_CODE}
    assert {"docs/how_do_i.md", "docs/guide.md", "docs/coefficients.md", "docs/mathematics.md"} <= pages
    assert {block.place.partition(":")[0] for block in NOT_RUN} == {"README.md", "docs/checkpoints.md", "docs/drop_in.md"}


def test_the_readme_is_short():
    """What is not needed at first stands in the pages of docs/."""
    assert len((ROOT / "README.md").read_text().splitlines()) <= 220


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_to_files_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []
