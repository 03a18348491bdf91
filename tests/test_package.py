"""What is installed: the wheel and the sdist, built from a copy of this project and used from somewhere else."""

import re
import shutil
import tarfile
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml
from helpers import config, python, zoo_train
from packaging.requirements import Requirement

import sb3_klip

ROOT = Path(__file__).parent.parent
LEFTOVERS = shutil.ignore_patterns(
    ".git", "*.egg-info", "build", "dist", "logs", "__pycache__", ".*_cache", ".hypothesis", "_build"
)


def leftovers(folder: str, names: list[str]) -> set[str]:
    """What working on the project leaves in it, virtual environments of any name included."""
    return {*LEFTOVERS(folder, names), *(name for name in names if Path(folder, name, "pyvenv.cfg").exists())}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the sdist of this project and the wheel built from that sdist."""
    folder = tmp_path_factory.mktemp("built")
    shutil.copytree(ROOT, folder / "source", ignore=leftovers)
    # Given neither --sdist nor --wheel, it builds the wheel from the sdist: what the sdist lacks, the wheel lacks too.
    python("-m", "build", "--no-isolation", "--outdir", folder, folder / "source", cwd=folder)
    return folder


@pytest.fixture(scope="module")
def wheel(built) -> Path:
    (wheel,) = built.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> dict[str, str]:
    """
    Environment variables with which Python finds the wheel, unpacked by pip, before any other installation.

    Its metadata is found first as well, so it is its own entry point that torch calls.
    """
    site = tmp_path_factory.mktemp("site")
    python("-m", "pip", "install", "--no-deps", "--target", site, wheel, cwd=site)
    return {"PYTHONPATH": str(site)}


def test_sdist_is_the_whole_project(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    top = {
        "LICENSE",
        "README.md",
        "CHANGELOG.md",
        "CITATION.cff",
        "Makefile",
        "constraints.txt",
        "setup.cfg",
        "pyproject.toml",
    }
    assert top <= names
    for folder in ("sb3_klip", "hyperparams", "tests"):
        here = {
            str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*.*") if path.suffix in (".py", ".yml", ".typed")
        }
        assert here
        assert here <= names
    assert not any("__pycache__" in name for name in names)


def test_wheel_has_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        entry_points = file.read(next(name for name in names if name.endswith("entry_points.txt"))).decode()
    assert {name.split("/")[0] for name in names} == {
        "_sb3_klip_zoo_hook.py",
        "sb3_klip",
        f"sb3_klip-{sb3_klip.__version__}.dist-info",
    }
    assert {
        "sb3_klip/py.typed",
        "sb3_klip/hyperparams/klip_ppo.yml",
        "sb3_klip/hyperparams/paper.yml",
        "sb3_klip/hyperparams/geppo.yml",
        "sb3_klip/hyperparams/wide.yml",
        "sb3_klip/hyperparams/fast.yml",
    } <= names
    modules = {f"sb3_klip/{path.relative_to(ROOT / 'sb3_klip')}" for path in (ROOT / "sb3_klip").rglob("*.py")}
    assert modules <= names
    # Nothing else may run when Python or torch starts.
    assert not any(name.endswith(".pth") for name in names)
    assert entry_points.split() == ["[torch.backends]", "sb3_klip", "=", "_sb3_klip_zoo_hook:watch_for_zoo"]


def test_wheel_is_found_with_its_data(installed, tmp_path):
    script = """
import importlib.metadata, importlib.resources, sb3_klip, sb3_klip.coefficients
files = importlib.resources.files("sb3_klip.hyperparams")
print(sb3_klip.__file__)
print(files)
print(importlib.metadata.version("sb3-klip") == sb3_klip.__version__)
print(all((files / name).is_file() for name in ("klip_ppo.yml", "paper.yml")))
print(sb3_klip.zoo.overlaid_hyperparams("ppo", "klip_ppo")["Hopper-v4"]["n_steps"])
"""
    package, data, *rest = python("-c", script, cwd=tmp_path, env=installed).stdout.splitlines()
    assert Path(package).parent.parent == Path(installed["PYTHONPATH"])
    assert Path(data).parent.parent == Path(installed["PYTHONPATH"])
    assert rest == ["True", "True", "512"]


@pytest.mark.slow
@pytest.mark.parametrize("conf", [(), ("-conf", "sb3_klip.hyperparams.paper")], ids=["tuned", "paper"])
def test_wheel_trains_through_rl_zoo(installed, tmp_path, conf):
    update = ("-params", "n_envs:1", "n_steps:64", "n_epochs:1")
    zoo_train("--env", "Hopper-v4", *conf, "--eval-freq", -1, "-n", 64, *update, cwd=tmp_path, env=installed)
    assert (tmp_path / "logs" / "klip_ppo" / "Hopper-v4_1" / "Hopper-v4.zip").exists()


# -- where commands are typed ------------------------------------------------------------------------------------------

UPDATE = ("--eval-freq", -1, "-n", 16, "-params", "n_envs:1", "n_steps:16", "batch_size:16", "n_epochs:1")


def assert_trains(cwd: Path, logs: Path, **kwargs: dict[str, str]) -> None:
    zoo_train("--env", "Hopper-v4", "-f", logs, *UPDATE, cwd=cwd, **kwargs)
    # The tuned hyperparameters were found.
    assert config(logs / "klip_ppo" / "Hopper-v4_1")["vf_coef"] == 0.835671


def test_the_wheel_works_in_a_clone(built, installed, tmp_path):
    """There the package of the clone is found first, by ``python -m``, and its hyperparameters are in another folder."""
    assert_trains(built / "source", tmp_path, env=installed)


def test_the_wheel_works_in_an_empty_folder(installed, tmp_path):
    (tmp_path / "empty").mkdir()
    assert_trains(tmp_path / "empty", tmp_path, env=installed)


def test_an_editable_installation_works_in_its_clone(tmp_path):
    assert_trains(ROOT, tmp_path)


def test_the_mathematics_need_no_sb3(tmp_path):
    modules = ", ".join(f"sb3_klip.{name}" for name in ("surrogate", "coefficients", "divergence"))
    code = f"import sys, {modules}; print(*{{name.split('.')[0] for name in sys.modules}})"
    imported = set(python("-c", code, cwd=tmp_path).stdout.split())
    assert "torch" in imported
    assert not {"stable_baselines3", "sb3_contrib", "rl_zoo3", "gymnasium"} & imported


# -- versions ----------------------------------------------------------------------------------------------------------


def test_versions_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    newest = re.search(r"^## \[(.+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert sb3_klip.__version__ == citation["version"] == newest[1]


def test_constraints_allow_what_the_package_asks_for():
    """A pin outside of the bounds in ``setup.cfg`` would make ``make`` fail, but on a fresh machine only."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {
        pin.name.lower().replace("_", "-"): pin for pin in (Requirement(line) for line in lines if line and line[0] != "#")
    }
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    wanted = setup["options"]["install_requires"].splitlines()
    wanted += [line for extra in setup["options.extras_require"].values() for line in extra.splitlines()]
    for requirement in (Requirement(line) for line in wanted if line and not line.startswith("#")):
        pin = pins[requirement.name.lower()]
        (version,) = (specifier.version for specifier in pin.specifier)
        assert version in requirement.specifier, f"{pin} is not {requirement}"
