"""The house rules that a program can check: folders, sizes, no print, notebooks without outputs."""

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
TESTS = sorted((ROOT / "tests").rglob("*.py"))
SOURCES = [*MODULES, *sorted((ROOT / "data").rglob("*.py")), *TESTS]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# Layers: a module imports from its own and those before it.
LAYERS = {
    "base": {"files", "outputs", "progress", "processes", "web", "facts", "folders", "fit",
             "gguf", "model", "tokens", "hooks", "suffix", "likelihood", "generate", "delta",
             "moments", "templates"},
    "editors": {"editors"},
    "measuring": {"metrics", "fewshot", "causal", "disabling", "knowledge"},
    "study": {"study"},
    "instructedit": {"instructedit"},
    "front": {"analysis", "figures", "site", "safety", "planning", "pages", "report", "commands",
              "cli", "__main__"},
}
RANKS = {module: rank for rank, layer in enumerate(LAYERS.values()) for module in layer}


def name(path):
    """Return a file's name in the repository."""
    return str(path.relative_to(ROOT))


def module(path):
    """Return the first part of a module's name below the package."""
    return path.relative_to(ROOT / "editcore").parts[0].removesuffix(".py")


def tree(path):
    """Return a file's syntax tree."""
    return ast.parse(path.read_text("utf-8"))


def imports(path):
    """Return the modules of the package that a module imports, first parts of their names."""
    modules = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom) and node.module == "editcore":
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("editcore."):
            modules.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[1] for alias in node.names
                        if alias.name.startswith("editcore.")}
    return modules


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_imports_go_down_the_layers(path):
    here = module(path)
    if here == "__init__":
        return
    assert here in RANKS, f"{here} belongs to no layer"
    above = {other for other in imports(path) if RANKS.get(other, 0) > RANKS[here]}
    assert not above, f"{here} imports {above}, which build on it"


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_lines_and_files_and_functions_are_short(path):
    lines = path.read_text("utf-8").splitlines()
    wide = [number for number, line in enumerate(lines, 1) if len(line) > 100]
    assert not wide, f"lines {wide} have more than 100 columns"
    if path not in MODULES:
        return
    assert len(lines) <= 400
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef):
            length = node.end_lineno - node.lineno + 1
            hidden = len(node.args.posonlyargs) + len(node.args.args)
            assert length <= 60, f"{node.name} has {length} lines"
            if path.name != "cli.py":       # whose arguments are options
                assert hidden <= 8, f"{node.name} has {hidden} arguments that need no name"


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_module_opens_with_a_sentence_and_does_nothing_at_import(path):
    nodes = tree(path)
    first = (ast.get_docstring(nodes) or "").split("\n\n")[0]
    assert re.fullmatch(r"[A-Z].+[.:]", first, re.S) and not re.search(r" in[;,].* out\b", first)
    calls = {ast.unparse(node.func) for node in ast.walk(nodes) if isinstance(node, ast.Call)}
    assert "print" not in calls
    assert not any(isinstance(node, ast.Global) for node in ast.walk(nodes))
    bare = [node.lineno for node in nodes.body
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)]
    assert not bare, f"line {bare} does something at import"


def test_nobody_inherits_from_our_classes():
    classes = [node for path in MODULES for node in ast.walk(tree(path))
               if isinstance(node, ast.ClassDef)]
    bases = {ast.unparse(base) for node in classes for base in node.bases}
    assert not bases & {node.name for node in classes}


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_devices_stand_in_one_module_and_randomness_is_owned(path):
    text = path.read_text("utf-8")
    assert path.name == "model.py" or "cuda" not in text
    assert not re.search(r"torch\.manual_seed\(|np\.random\.seed\(|(?<![.\w])random\.seed\(", text)


def test_repository_names_no_machine_path():
    others = ["README.md", "Makefile", "Snakefile", "pyproject.toml", "environment.yml",
              "requirements.lock", ".ci/run", "data/findings.md"]
    for path in [*SOURCES, *NOTEBOOKS, *(ROOT / other for other in others)]:
        found = re.search(r"/(?:home|root|Users|work|tmp)/\w+", path.read_text("utf-8"))
        assert not found or path == Path(__file__), f"{name(path)} names {found.group()}"


def test_ruff_finds_nothing():
    words = [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format=concise", "."]
    answer = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stdout


def test_readmes_links_lead_somewhere():
    text = (ROOT / "README.md").read_text("utf-8")
    links = re.findall(r"\]\((?!#|https:)([^)]+)\)", text)
    assert [link for link in links if not (ROOT / link).exists()] == []
    assert all(alt.strip() for alt in re.findall(r"!\[([^\]]*)\]", text))


def test_findings_name_reports_and_figures_that_exist():
    text = (ROOT / "data/findings.md").read_text("utf-8")
    stems = {path.stem for path in NOTEBOOKS}
    assert set(re.findall(r"\((\d\d_\w+)\.html\)", text)) <= stems
    for stem, figure in re.findall(r"<!-- figure (\S+) (\S+) -->", text):
        cells = nbformat.read(ROOT / "notebooks" / f"{stem}.ipynb", as_version=4).cells
        assert any(f'name="{figure}"' in cell.source for cell in cells), f"{stem} shows {figure}"


def test_the_full_study_gives_notebooks_parameters_that_they_have():
    for stem, values in report.full_study().items():
        report.check(ROOT / "notebooks" / f"{stem}.ipynb", values)


# ── notebooks ───────────────────────────────────────────────────────────────────────────────────

@pytest.fixture(params=NOTEBOOKS, ids=name)
def notebook(request):
    """One notebook."""
    return nbformat.read(request.param, as_version=4)


@pytest.fixture
def code(notebook):
    """The code cells of one notebook."""
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def test_notebook_is_stored_without_outputs(notebook):
    assert notebook.metadata.kernelspec.name == "python3"
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None, cell.source[:60]
            assert set(cell.metadata) <= {"tags"}, cell.metadata


def test_notebook_has_short_cells(code):
    lengths = sorted(len(source.splitlines()) for source in code)
    assert len(code) <= 40 and lengths[len(lengths) // 2] <= 4 and lengths[-1] <= 15, lengths
    assert sum(source.count("\ndef ") + source.startswith("def ") for source in code) <= 2
    for source in code:
        assert not re.search(r"^\s*(class |%%?\w|!)", source, re.M), source
        assert max(map(len, source.splitlines()), default=0) <= 100, source


def test_notebook_has_few_figures_and_shows_how_they_are_made(code):
    shows = [node for source in code for node in ast.walk(ast.parse(source))
             if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("show")]
    assert 0 < len(shows) <= 4 or not shows
    for call in shows:
        words = {word.arg: word.value for word in call.keywords}
        assert "name" in words, "a figure has a name"
        caption, alt = (words.get(part) or call.args[place] for place, part in ((1, "caption"),
                                                                               (2, "alt")))
        texts = [part.value for part in ast.walk(caption) if isinstance(part, ast.Constant)]
        assert len(" ".join(map(str, texts)).split()) < 50, "a caption of less than 50 words"
        assert not isinstance(alt, ast.Name), "alt text stands with the figure"


def test_notebook_plans_its_runs_in_cells_of_their_own(notebook):
    plans = [cell for cell in notebook.cells if "ec.plans." in cell.source]
    for cell in plans:      # `report` makes the runs of all notebooks together before it starts
        assert "plan" in cell.metadata.get("tags", []), f"tag this cell `plan`:\n{cell.source}"
        assert "execute" not in cell.source, f"execute in a cell of its own:\n{cell.source}"


def test_notebook_is_plain_markdown_under_a_question(notebook):
    first = notebook.cells[0]
    assert first.cell_type == "markdown" and re.match(r"# .+\?\s*(\n|$)", first.source)
    for cell in notebook.cells:
        urls = re.findall(r"https?://[^\s)\"']+", cell.source)
        assert all(url.startswith("https://arxiv.org/") for url in urls), urls
        assert cell.cell_type != "markdown" or "$" not in cell.source, "formulas are plain text"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_notebook_parameters_are_typed_and_commented(path):
    cells = nbformat.read(path, as_version=4).cells
    (source,) = [cell.source for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    lines = ast.parse(source).body
    assert all(isinstance(line, ast.AnnAssign) for line in lines), "every parameter has a type"
    known = report.parameters(path)
    assert set(known) == {line.target.id for line in lines}, "papermill reads every parameter"
    for key, line in known.items():
        assert line["help"], f"{key} needs a comment"
        report.check(path, {key: ast.literal_eval(line["default"])})
