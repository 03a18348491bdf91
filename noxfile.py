"""
The tests under other versions than those of constraints.txt: ``nox -s lowest newest``, or ``nox -s tests-3.12 -- FILE …``.

``lowest`` and ``newest`` guard the identity with PPO against changes of Stable-Baselines3 and RL Zoo, within what setup.cfg
allows. Both take torch as constraints.txt has it, of which a CPU build may be at hand, unless the environment variable TORCH
names another: ``TORCH="torch==2.9.1" nox -s lowest``.
"""

import configparser
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import nox
from packaging.requirements import Requirement

ROOT = Path(__file__).parent
#: Where a change of what this package builds on shows first, and what these tests need; no Box2D, as that of gymnasium's older
#: releases has to be compiled.
IDENTITY = ("identity", "drop_in", "variants", "rl_zoo", "zoo_registration", "hook")
NEEDED = ("-e", ".[tests,plots]", "stable-baselines3[extra]")

#: Where `nox -s release` puts the wheel and the sdist.
DIST = ROOT / "dist"
#: What must run where only one of them is installed, in an empty folder: without extras, and with those that it asks for.
SCRIPT, NOTEBOOK = ROOT / "examples" / "drop_in.py", ROOT / "examples" / "tour.ipynb"

nox.options.sessions = ["lowest", "newest"]


def requirements(lines: Iterable[str]) -> Iterator[Requirement]:
    """The requirements of a list, without its comments."""
    return (Requirement(line) for line in lines if line.strip() and not line.startswith("#"))


def lowest_versions() -> list[str]:
    """What setup.cfg asks for, each at the lowest version that it allows, but for torch."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    wanted = requirements(setup["options"]["install_requires"].splitlines())
    bounds = [(each.name, bound) for each in wanted for bound in each.specifier if bound.operator == ">="]
    return [f"{name}=={bound.version}" for name, bound in bounds if name != "torch"]


def torch() -> str:
    """The torch of constraints.txt, or the one that was asked for."""
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return os.environ.get("TORCH") or next(str(pin) for pin in requirements(pins) if pin.name == "torch")


def pytest(session: nox.Session, *files: str) -> None:
    """Run the fast tests of these files, unless others are named, and show what they ran with."""
    session.run("python", "-m", "pip", "list")
    # Bit-for-bit comparisons need one thread count.
    session.run(
        "pytest",
        "-n",
        "auto",
        "--maxprocesses",
        "8",
        "-m",
        "not slow",
        *(session.posargs or files),
        env={"OMP_NUM_THREADS": "1"},
    )


@nox.session(python=["3.10", "3.11", "3.12", "3.13"])
def tests(session: nox.Session) -> None:
    """The fast tests under each Python, with the versions of constraints.txt."""
    session.install("-c", "constraints.txt", "torch")
    session.install("-c", "constraints.txt", "-e", ".[tests,experiments,plots,extra]")
    pytest(session)


@nox.session
def lowest(session: nox.Session) -> None:
    """The identity with the lowest versions that setup.cfg allows."""
    session.install(torch(), *lowest_versions(), *NEEDED)
    pytest(session, *(f"tests/test_{name}.py" for name in IDENTITY))


@nox.session
def newest(session: nox.Session) -> None:
    """The identity with the newest releases that setup.cfg allows."""
    session.install("--upgrade", "--upgrade-strategy", "eager", torch(), *NEEDED)
    pytest(session, *(f"tests/test_{name}.py" for name in IDENTITY))


@nox.session
def release(session: nox.Session) -> None:
    """The sdist and, from it, the wheel, as they would be uploaded."""
    shutil.rmtree(DIST, ignore_errors=True)
    session.install("build", "twine")
    session.run("python", "-m", "build", "--outdir", str(DIST))
    session.run("twine", "check", "--strict", *map(str, DIST.iterdir()))


@nox.session
@nox.parametrize("kind", ["wheel", "sdist"])
def installed(session: nox.Session, kind: str) -> None:
    """What a user has of the wheel or the sdist that `release` has built, in an environment and a folder of its own."""
    (file,) = DIST.glob({"wheel": "*.whl", "sdist": "*.tar.gz"}[kind])
    constraints = ("-c", str(ROOT / "constraints.txt"))
    # Where other processes keep the cores busy, threads wait for each other.
    session.env["OMP_NUM_THREADS"] = "1"
    session.install(*constraints, torch())
    session.install(*constraints, f"sb3-klip @ {file.as_uri()}")
    session.chdir(session.create_tmp())
    session.run("python", "-m", "sb3_klip.zoo", "versions")
    session.run("python", str(SCRIPT))
    session.run(
        "python", "-m", "rl_zoo3.train", "--algo", "klip_ppo", "--env", "CartPole-v1", "-n", "2000", "--eval-freq", "-1"
    )
    session.run("python", "-m", "sb3_klip.verify", "--env", "CartPole-v1", "-n", "4000")
    # A notebook runs in the folder that it lies in.
    shutil.copy(NOTEBOOK, ".")
    session.install(*constraints, f"sb3-klip[extra,plots] @ {file.as_uri()}", "nbclient", "ipykernel")
    session.run("jupyter", "execute", NOTEBOOK.name)
