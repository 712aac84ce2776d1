"""The house rules that a program can check: sizes, imports that point one way, no print, notebooks without outputs."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from editcore import report

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "editcore").rglob("*.py"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

# Reading order, which is also the order of imports: a module imports only from those before it.
LAYERS = ["files", "slots", "progress", "facts", "records", "instructions", "writers", "model", "tokens", "generate",
          "trace", "tail", "delta", "versions", "patch", "stats", "contexts", "logprob", "editors", "serial", "tasks",
          "metrics", "rowwise", "taskscores", "branches", "hyperloss", "hyper", "downstream", "causal", "inputs",
          "checkpoint", "lab", "results", "study", "analysis", "merits", "claims", "grid", "plan", "examples",
          "systems", "lineups", "contenders", "orderings", "wording", "directions", "separation", "atlas", "parting",
          "mixtures", "disabling", "depth", "foresight", "alarms", "jumps", "delay", "measures", "checkup", "bench",
          "scorebench", "look", "portraits", "figures", "figures_disabling", "figures_depth", "figures_delay",
          "figures_measures", "figures_tasks", "figures_instructions", "figures_directions", "figures_mixtures",
          "pages", "publish", "report", "data", "runners", "commands", "__main__"]


def name(path):
    return str(path.relative_to(ROOT))


def layer(path):
    """A module's name in LAYERS; those of a folder share the folder's."""
    return path.relative_to(ROOT / "editcore").parts[0].removesuffix(".py")


def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def functions(path):
    """(name, lines, arguments) of every function of a module."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    for node in (node for node in ast.walk(tree(path)) if isinstance(node, kinds)):
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        yield node.name, node.end_lineno - node.lineno + 1, [a.arg for a in arguments if a.arg not in ("self", "cls")]


def imported(path):
    """Names of the package's modules that a module imports, at its top or inside a function."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == "editcore"):
            depth = len(path.relative_to(ROOT / "editcore").parts) - 1
            inside = node.level == 1 and depth == 1     # from .x inside a folder: the folder itself
            module = (node.module or "").removeprefix("editcore").lstrip(".")
            found = [module] if module else [alias.name for alias in node.names]
            yield from ([layer(path)] if inside else [one.split(".")[0] for one in found])
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("editcore."))


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_module_is_small_and_opens_with_a_sentence(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 300
    first = (ast.get_docstring(tree(path)) or "").split("\n\n")[0]
    assert first.endswith((".", ":")), "a module opens with one sentence: what comes in, what goes out"
    for function, lines, arguments in functions(path):
        assert lines <= 50, f"{function} has {lines} lines"
        assert len(arguments) <= 6, f"{function} has {len(arguments)} arguments"


def test_nine_functions_in_ten_have_at_most_thirty_lines():
    lines = [lines for path in MODULES for _, lines, _ in functions(path)]
    assert sum(count <= 30 for count in lines) >= 0.9 * len(lines)


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_layers_imports_point_one_way(path):
    here = layer(path)
    if here == "__init__":
        return
    assert here in LAYERS, f"{here} has no place in the reading order"
    known = [module for module in imported(path) if module != "__version__"]
    backward = [module for module in known if LAYERS.index(module) > LAYERS.index(here)]
    assert not backward, f"{here} imports {backward}, which come after it"


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_package_does_not_print_or_change_state_at_import(path):
    module = tree(path)
    calls = [ast.unparse(node.func) for node in ast.walk(module) if isinstance(node, ast.Call)]
    assert path.name == "__main__.py" or "print" not in calls
    assert not any(isinstance(node, ast.Global) for node in ast.walk(module))
    classes = [node for node in module.body if isinstance(node, ast.ClassDef)]
    bases = {(node.name, ast.unparse(base)) for node in classes for base in node.bases}
    own = [pair for pair in bases if not pair[1].startswith(("Exception", "torch.", "nn."))]    # where Python or torch
    assert not own, f"no inheritance: {own}"                                                    # ask for one
    bare = [node for node in module.body if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)]
    assert not bare, f"line {bare[0].lineno} does something at import"


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_cuda_is_named_in_one_module_and_randomness_is_owned(path):
    text = path.read_text(encoding="utf-8")
    assert path.name == "model.py" or "cuda" not in text
    assert not re.search(r"torch\.manual_seed\(|np\.random\.seed\(|(?<![.\w])random\.seed\(", text)


def test_repository_names_no_machine_path():
    texts = [*MODULES, *NOTEBOOKS, *(ROOT / "tests").glob("*.py"), *(ROOT / name for name in (
        "README.md", "Makefile", "pyproject.toml", "environment.yml", "requirements.lock", ".ci/run"))]
    for path in texts:
        found = re.search(r"/(?:home|root|Users|work|tmp)/\w+", path.read_text(encoding="utf-8"))
        assert not found or path.name == Path(__file__).name, f"{name(path)} names {found.group()}"


def test_readmes_tree_is_the_reading_order():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = text[text.index("\neditcore/"):text.index("\nnotebooks/")]
    named = re.findall(r"(?<![/.\w])(\w+)(?:\.py|/)(?= )", tree)
    assert named[1:] == LAYERS and {layer(path) for path in MODULES} - {"__init__"} <= set(LAYERS)


def test_ruff_finds_nothing():
    words = [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format=concise", "."]
    found = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


def test_readme_is_short_and_its_links_lead_somewhere():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 200
    links = re.findall(r"\]\((?!#)([^)]+)\)", text)
    published = (ROOT / "docs").is_dir()
    assert [link for link in links if not (ROOT / link).exists() and (published or not link.startswith("docs"))] == []
    assert all(alt.strip() for alt in re.findall(r"!\[([^\]]*)\]", text))


@pytest.fixture(params=NOTEBOOKS, ids=name)
def cells(request):
    """The cells of one notebook."""
    return nbformat.read(request.param, as_version=4).cells


def test_notebook_is_stored_without_outputs(cells):
    for cell in cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None, cell.source[:60]
            assert set(cell.metadata) <= {"tags"}, cell.metadata


def test_notebook_has_few_short_cells_and_more_prose_than_code(cells):
    code = [cell.source for cell in cells if cell.cell_type == "code"]
    assert len(code) <= 12
    assert len([cell for cell in cells if cell.cell_type == "markdown"]) >= len(code)
    for source in code:
        assert len(source.splitlines()) <= 12, source
        assert not re.search(r"^\s*(def|class|%%?\w|!)", source, re.M), f"no function, class or magic here:\n{source}"
        assert max(map(len, source.splitlines()), default=0) <= 120


def test_notebook_reads_offline(cells):
    for cell in cells:
        assert not re.search(r"https?://", cell.source), "a paper is cited by its arXiv number"
        assert cell.cell_type != "markdown" or "$" not in cell.source, "formulas are plain Unicode"
    assert cells[0].cell_type == "markdown" and re.match(r"# .+\?", cells[0].source), "the title is a question"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_notebook_parameters_are_typed_and_commented(path):
    notebook = nbformat.read(path, as_version=4)
    assert notebook.metadata.kernelspec.name == "python3"
    tagged = [cell.source for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    lines = ast.parse(tagged[0]).body
    assert all(isinstance(node, ast.AnnAssign) for node in lines), "every parameter has a type"
    found = report.parameters(path)
    assert set(found) == {node.target.id for node in lines}, "papermill reads every parameter"
    for parameter in found.values():
        assert parameter.help, f"{parameter.name} needs a comment"
        assert report.fits(parameter.default, parameter.type), f"the default of {parameter.name} fits its type"
