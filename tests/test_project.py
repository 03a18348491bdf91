"""What hosts read of this project, such as workflows and forms: it is read here, and what it names is there."""

import re
import runpy
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted(path for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.stem != "config")
MAKEFILE, NOXFILE = ((ROOT / name).read_text() for name in ("Makefile", "noxfile.py"))


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def setup_cfg() -> ConfigParser:
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    return setup


def made(command: str) -> set[str]:
    """What a line of a shell asks make for."""
    found = re.match(r"make ((?:[a-z-]+ ?)+)$", command)
    return set(found[1].split()) if found else set()


def commands(workflow: dict[str, Any]) -> list[str]:
    return [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows(path):
    workflow = read(path)
    assert workflow["name"]
    assert workflow[True]  # YAML takes the key "on" for a truth value
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert job.keys() <= {"runs-on", "timeout-minutes", "strategy", "steps", "needs", "environment", "permissions"}
        assert {"runs-on", "timeout-minutes", "steps"} <= job.keys()
        assert job.get("needs", next(iter(workflow["jobs"]))) in workflow["jobs"]
        variables = re.findall(r"\$\{\{ matrix\.(\w+) \}\}", str(job))
        assert set(variables) == set(job.get("strategy", {}).get("matrix", {}))
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step)
            assert step.keys() <= {"uses", "run", "with", "name"}
            assert re.fullmatch(r"[\w-]+/[\w-]+@(v\d+|release/v\d+)", step.get("uses", "actions/checkout@v4"))
    for command in commands(workflow):
        targets = made(command)
        assert not command.startswith("make") or targets
        assert all(re.search(rf"^{target}: ", MAKEFILE, re.MULTILINE) for target in targets)
        for module in re.findall(r"python -m (sb3_klip[\w.]*)", command):
            assert (ROOT / module.replace(".", "/") / "__main__.py").is_file()
        for script in re.findall(r"python ([\w/]+\.py)", command):
            assert (ROOT / script).is_file()


def test_the_workflows_do_what_ci_run_does():
    ci_run = (ROOT / ".ci" / "run").read_text().splitlines()
    wanted = set.union(*map(made, ci_run))
    assert wanted == {"test", "lint", "type", "docs", "test-slow"}
    done = set.union(*(made(command) for path in WORKFLOWS for command in commands(read(path))))
    assert wanted <= done
    # Its last line is what `make test-versions` runs.
    sessions = re.search(r"nox\S* .*-s ([\w ]+)$", ci_run[-1])[1]
    assert re.search(rf"^test-versions: .*\n\t\S*nox -s {sessions}$", MAKEFILE, re.MULTILINE)
    assert "test-versions" in done


def test_every_python_is_tested():
    classifiers = setup_cfg()["metadata"]["classifiers"]
    pythons = re.findall(r"Python :: (3\.\d+)", classifiers)
    assert read(ROOT / ".github" / "workflows" / "ci.yml")["jobs"]["test"]["strategy"]["matrix"]["python"] == pythons
    assert re.search(rf"python=\[{', '.join(f'.{python}.' for python in pythons)}\]", NOXFILE)


def test_a_tag_is_published_only_after_the_check_of_the_release():
    workflow = read(ROOT / ".github" / "workflows" / "publish.yml")
    assert workflow[True] == {"push": {"tags": ["v*"]}}
    build, publish = workflow["jobs"]["build"], workflow["jobs"]["publish"]
    assert "make release-check" in [step.get("run") for step in build["steps"]]
    assert (publish["needs"], publish["permissions"], publish["environment"]) == ("build", {"id-token": "write"}, "pypi")
    # The line that the tag is held against.
    assert re.search(r'^__version__ = "\d+\.\d+\.\d+"$', (ROOT / "sb3_klip" / "__init__.py").read_text(), re.MULTILINE)


def test_sessions_that_make_names_are_those_of_nox():
    names = set(re.findall(r"nox -s (.*)", MAKEFILE))
    assert names
    for name in re.findall(r"[a-z]+(?=$|\(| )", " ".join(names)):
        assert re.search(rf"^@nox\.session.*\n(?:@.*\n)?def {name}\(", NOXFILE, re.MULTILINE), name


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_forms(path):
    form = read(path)
    assert form["name"]
    assert form["description"]
    kinds = {"textarea", "input", "dropdown"}
    assert {field["type"] for field in form["body"]} <= kinds
    assert len({field["id"] for field in form["body"]}) == len(form["body"])
    for field in form["body"]:
        assert field["attributes"]["label"]
        assert ("options" in field["attributes"]) == (field["type"] == "dropdown")
        assert all(isinstance(option, str) for option in field["attributes"].get("options", []))
    required = {field["id"] for field in form["body"] if field.get("validations", {}).get("required")}
    assert (
        required >= {"bug": {"code", "versions"}, "question": {"question"}, "coefficient": {"paper", "objective"}}[path.stem]
    )


def test_the_form_for_bugs_names_a_command_that_is_there():
    from sb3_klip.zoo.__main__ import COMMANDS

    assert "python -m sb3_klip.zoo versions" in (ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text()
    assert "versions" in COMMANDS


def test_read_the_docs():
    settings = read(ROOT / ".readthedocs.yaml")
    assert (ROOT / settings["sphinx"]["configuration"]).is_file()
    assert settings["sphinx"]["fail_on_warning"]
    extras = set(setup_cfg()["options.extras_require"])
    (asked,) = re.findall(r'-e "\.\[(.*)\]"', " ".join(settings["build"]["jobs"]["install"]))
    assert set(asked.split(",")) <= extras


def test_the_citation():
    citation = read(ROOT / "CITATION.cff")
    assert {"cff-version", "message", "title", "authors", "version", "license", "preferred-citation"} <= citation.keys()
    assert citation["license"] == setup_cfg()["metadata"]["license"]


def test_the_tour_of_a_release_is_there():
    noxfile = runpy.run_path(str(ROOT / "noxfile.py"))
    assert noxfile["SCRIPT"].is_file()
    assert noxfile["NOTEBOOK"].is_file()
