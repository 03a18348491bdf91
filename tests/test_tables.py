"""The tables of the documentation are made from the code: `make tables` has been run since the code has changed."""

import runpy
from pathlib import Path

import pytest

from sb3_klip.coefficients import registry

MADE = runpy.run_path(str(Path(__file__).parents[1] / "docs" / "tables.py"))
# By the path, as two pages have the name coefficients.md.
PAGES = {page.relative_to(MADE["ROOT"]).as_posix(): page.read_text(encoding="utf-8") for page in MADE["PAGES"]}


@pytest.mark.parametrize("name", PAGES)
def test_tables_of_a_page_are_up_to_date(name):
    assert MADE["filled"](PAGES[name]) == PAGES[name], "run `make tables`"


def test_every_table_stands_in_a_page():
    wanted = {region[2] for text in PAGES.values() for region in MADE["REGION"].finditer(text)}
    assert wanted == MADE["TABLES"].keys()
    # A misspelt mark is no region.
    for text in PAGES.values():
        assert text.count("<!-- table") == text.count("<!-- end -->") == len(MADE["REGION"].findall(text))


def test_own_coefficients_are_in_no_table(monkeypatch):
    monkeypatch.setattr(registry, "_WORDS", dict(registry._WORDS))
    registry.register("only_in_this_test")(lambda ratio, advantages, clip_range: 0 * ratio)
    assert "only_in_this_test" in registry.available()
    assert not any("only_in_this_test" in make() for make in MADE["TABLES"].values())
