"""One list of dependencies: pyproject.toml against environment.yml and requirements.lock.

There is no conda where this runs: environment.yml is parsed here, not solved.
"""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
CONDA_NAMES = {"pytorch": "torch", "huggingface_hub": "huggingface-hub"}


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def wanted():
    """{name: Requirement} of pyproject.toml."""
    lines = tomllib.loads(read("pyproject.toml"))["project"]["dependencies"]
    return {line.name: line for line in map(Requirement, lines)}


@pytest.fixture(scope="module")
def locked():
    """{name: version text} of requirements.lock."""
    lines = read("requirements.lock").splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def test_conda_list_equals_the_projects(wanted):
    environment = yaml.safe_load(read("environment.yml"))
    assert environment["channels"] == ["conda-forge", "nodefaults"]
    lines = [line for line in environment["dependencies"] if isinstance(line, str)]
    listed = {CONDA_NAMES.get(line.name, line.name): str(line.specifier)
              for line in map(Requirement, lines)}
    python = tomllib.loads(read("pyproject.toml"))["project"]["requires-python"]
    assert listed.pop("python") == python and listed.pop("pip") == ""
    assert listed == {name: str(line.specifier) for name, line in wanted.items()}
    assert environment["dependencies"][-1] == {"pip": ["-e ."]}


def test_lock_pins_every_dependency_within_its_range(wanted, locked):
    names = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in locked.items()}
    for name, requirement in wanted.items():
        assert requirement.specifier.contains(Version(names[name])), f"{name} {names[name]}"
    assert locked["torch"] == "2.13.0"


def test_lock_names_no_path_host_or_local_build(locked):
    text = read("requirements.lock")
    assert not re.search(r"@|://|file:|^-|\+", re.sub(r"^#.*", "", text, flags=re.M), re.M)
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+", name) for name in locked)
    assert all(map(Version, locked.values()))


def test_what_only_large_studies_need_is_no_dependency(wanted, locked):
    lines = tomllib.loads(read("pyproject.toml"))["project"]["optional-dependencies"]["scale"]
    extra = [Requirement(line) for line in lines]
    assert extra and all(len(line.specifier) == 2 for line in extra), "a range each"
    assert not {line.name for line in extra} & (set(wanted) | set(locked))


def test_package_and_project_have_one_version():
    project = tomllib.loads(read("pyproject.toml"))["project"]
    assert re.search(rf'^__version__ = "{project["version"]}"$', read("editcore/__init__.py"), re.M)
    assert yaml.safe_load(read("CITATION.cff"))["version"] == project["version"]


def test_templates_of_the_report_are_packaged():
    kinds = tomllib.loads(read("pyproject.toml"))["tool"]["setuptools"]["package-data"]["*"]
    files = [path for path in (ROOT / "editcore/templates").rglob("*") if path.is_file()]
    assert {f"*{path.suffix}" for path in files} == set(kinds)


def test_ci_runs_the_readmes_test_command():
    assert "make test" in read("README.md") and re.search(r"^make test\b", read(".ci/run"), re.M)


def test_make_knows_its_targets():
    for target in ("report", "study", "test", "publish", "clean"):
        answer = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
        assert answer.returncode == 0, answer.stderr
