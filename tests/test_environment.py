"""One list of dependencies: pyproject.toml against environment.yml and requirements.lock.

There is no conda where this runs: environment.yml is parsed here, not solved.
"""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
CONDA_NAMES = {"pytorch": "torch", "huggingface_hub": "huggingface-hub"}    # on conda-forge
# With nbconvert, jupyterlab, pytest and ipython.
COME_WITH_OTHERS = {"bleach", "httpx", "jupyter_client", "packaging", "pygments", "traitlets"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def read(name):
    """Return the text of a file of the repository."""
    return (ROOT / name).read_text("utf-8")


@pytest.fixture(scope="module")
def wanted():
    """{name: Requirement} of pyproject.toml."""
    return {line.name: line for line in map(Requirement, PROJECT["project"]["dependencies"])}


@pytest.fixture(scope="module")
def locked():
    """{name: version} of requirements.lock."""
    lines = read("requirements.lock").splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def test_conda_list_equals_the_projects(wanted):
    environment = yaml.safe_load(read("environment.yml"))
    assert environment["channels"] == ["conda-forge", "nodefaults"]
    *lines, pip = environment["dependencies"]
    listed = {CONDA_NAMES.get(line.name, line.name): str(line.specifier)
              for line in map(Requirement, lines)}
    assert pip == {"pip": ["-e ."]} and listed.pop("pip") == ""
    assert listed.pop("python") == PROJECT["project"]["requires-python"]
    assert listed == {name: str(line.specifier) for name, line in wanted.items()}


def test_lock_pins_every_dependency_within_its_range(wanted, locked):
    pinned = {re.sub(r"[-_.]+", "-", name).lower(): pin for name, pin in locked.items()}
    outside = {name: pinned[name] for name, line in wanted.items()
               if not line.specifier.contains(Version(pinned[name]))}
    assert not outside and locked["torch"] == "2.13.0"


def test_lock_names_no_path_host_or_local_build(locked):
    text = re.sub(r"^#.*", "", read("requirements.lock"), flags=re.M)
    assert not re.search(r"@|://|file:|^-|\+", text, re.M)
    assert all(re.fullmatch(r"[\w.-]+", name) and Version(pin) for name, pin in locked.items())


def test_what_the_package_and_its_tests_import_is_listed(wanted):
    names = set()
    for path in [*(ROOT / "editcore").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                names |= {name.name.partition(".")[0] for name in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names.add(node.module.partition(".")[0])
    projects = packages_distributions()
    for name in names - set(sys.stdlib_module_names):
        if name in projects and name not in {"editcore"} | COME_WITH_OTHERS:
            listed = {project.lower().replace("_", "-") for project in projects[name]}
            assert listed & set(wanted), f"{name} is imported and not listed"


def test_what_only_large_studies_need_is_no_dependency(wanted, locked):
    extra = [Requirement(line) for line in PROJECT["project"]["optional-dependencies"]["scale"]]
    assert extra and all(len(line.specifier) == 2 for line in extra), "a range each"
    assert not {line.name for line in extra} & (set(wanted) | set(locked))


def test_package_and_project_have_one_version():
    version = PROJECT["project"]["version"]
    assert re.search(rf'^__version__ = "{version}"$', read("editcore/__init__.py"), re.M)
    assert yaml.safe_load(read("CITATION.cff"))["version"] == version


def test_templates_of_the_report_are_packaged():
    kinds = set(PROJECT["tool"]["setuptools"]["package-data"]["*"])
    files = [path for path in (ROOT / "editcore/templates").rglob("*") if path.is_file()]
    assert {f"*{path.suffix}" for path in files} == kinds


def test_ci_runs_the_readmes_test_command():
    assert "make test" in read("README.md")
    assert re.search(r"^make test\b", read(".ci/run"), re.M)


@pytest.mark.parametrize("target", ["report", "study", "test", "publish", "clean"])
def test_make_knows_its_targets(target):
    answer = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True,
                            check=False)
    assert answer.returncode == 0, answer.stderr
