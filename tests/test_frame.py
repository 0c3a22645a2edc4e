"""The frame: what is declared agrees, what is committed is what `make` writes, the README names what is there."""
import ast
import re
import subprocess
import tomllib
from pathlib import Path

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from tensorlens_utils.notebooks import Series, normal, text_of

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PYTHONS = ("3.11", "3.12", "3.13")


def declared():
    """{name: Requirement} of the package and its dev extra."""
    project = PYPROJECT["project"]
    return {r.name: r for r in map(Requirement, project["dependencies"] + project["optional-dependencies"]["dev"])}


# ── the environment ──

def test_environment_yml_says_what_pyproject_says():
    env = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert env["name"] == "tensorlens" and env["channels"] == ["conda-forge", "nodefaults"]
    *conda, last = env["dependencies"]
    *pip, editable = last["pip"]
    names = {}
    for line in conda:
        match = re.fullmatch(r"([a-z0-9_.-]+)(?: (\S+))?", line)
        assert match, f"not a conda spec: {line!r}"
        names[match[1]] = SpecifierSet(match[2] or "")
    assert names.keys() == {"python", "pip", "make"}
    assert names["python"] == SpecifierSet(PYPROJECT["project"]["requires-python"])
    assert editable == "-e .[dev]" and not any(line.startswith("-") for line in pip)
    listed = {r.name: r.specifier for r in map(Requirement, pip)}
    (torch,) = (Requirement(c) for c in PYPROJECT["tool"]["uv"]["constraint-dependencies"])
    assert listed == {name: r.specifier for name, r in declared().items()} | {torch.name: torch.specifier}
    assert len(listed) == len(pip) and torch.specifier == SpecifierSet("==2.13.0")


@pytest.mark.parametrize("python", PYTHONS)
def test_lock_pins_each_dependency_in_its_range(python):
    assert python in SpecifierSet(PYPROJECT["project"]["requires-python"])
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        pin = Requirement(line)                                     # no URL, index or option line parses as one
        assert pin.url is None and str(pin.specifier).startswith("=="), line
        if pin.marker is None or pin.marker.evaluate({"python_version": python, "python_full_version": f"{python}.9"}):
            assert canonicalize_name(pin.name) not in pins, f"{pin.name} is pinned twice for python {python}"
            pins[canonicalize_name(pin.name)] = str(pin.specifier).removeprefix("==")
    assert not [p for p in pins if p.startswith(("nvidia", "cuda", "triton"))], "torch pins its CUDA packages by itself"
    for name, requirement in declared().items():
        assert pins.get(canonicalize_name(name)) in requirement.specifier, requirement
    (torch,) = (Requirement(c) for c in PYPROJECT["tool"]["uv"]["constraint-dependencies"])
    assert pins["torch"] in torch.specifier and len(pins) > 100


def test_ci_runs_the_test_command_of_the_readme():
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert lines[0].startswith("#!") and "set -euo pipefail" in lines and "make test" in lines
    assert re.search(r"^make test\b", README, re.M), "README.md gives the test command on a line of its own"


def test_make_has_its_targets():
    for target in ("all", "setup", "test", "lab", "bench", "zoo", "lock"):
        done = subprocess.run(["make", "-n", "ENV=current", target], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert target == "setup" or "python -m " in done.stdout
    paper = ["make", "-n", "ENV=current", "PROFILE=paper", "NB=05"]
    assert "--profile paper 05" in subprocess.run(paper, cwd=ROOT, capture_output=True, text=True).stdout


# ── the notebooks ──

def test_the_series_is_what_is_in_the_folder():
    names = [p.stem for p in NOTEBOOKS]
    assert names, "no notebooks"
    assert list(Series(ROOT).table) == names, "in the order of their numbers"
    numbers = [re.fullmatch(r"(\d\d)_[a-z0-9_]+", name)[1] for name in names]
    assert len(set(numbers)) == len(numbers)


@pytest.fixture(params=NOTEBOOKS or ["no notebooks"], ids=lambda p: getattr(p, "stem", p))
def notebook(request):
    assert NOTEBOOKS, "no notebooks"
    return request.param, nbformat.read(request.param, 4)


def code_cells(nb):
    return [c for c in nb.cells if c.cell_type == "code" and c.source.strip()]


def tags(cell):
    return set(cell.metadata.get("tags", []))


def shows(source):
    """Whether a cell prints, displays or saves a figure outside of the functions that it defines."""
    outside = [s for s in ast.parse(source).body if not isinstance(s, ast.FunctionDef | ast.ClassDef)]
    calls = (node.func for statement in outside for node in ast.walk(statement) if isinstance(node, ast.Call))
    return any(getattr(f, "id", getattr(f, "attr", "")) in ("print", "display", "save_figure", "show") for f in calls)


def test_shows_finds_what_is_visible():
    assert shows("for x in y:\n    print(x)") and shows("plt.show()") and shows("save_figure(fig, 'a', 'b')")
    assert not shows("def f():\n    print(1)") and not shows("x = f(1)")


def test_notebook_is_in_the_normal_form(notebook):
    path, nb = notebook
    same = path.read_bytes().decode() == text_of(normal(nb))
    assert same, f"{path.name} was saved by hand: type `make` and commit what it writes"


def test_notebook_was_run_and_shows_it(notebook):
    _, nb = notebook
    cells = code_cells(nb)
    assert [c.execution_count for c in cells] == list(range(1, len(cells) + 1)), "every cell was run, in order"
    assert not [c.source for c in cells if shows(c.source) and not c.outputs], "what prints or draws has its output"
    assert not [o for c in cells for o in c.outputs if o.output_type == "error"]
    assert any(c.outputs for c in cells)


def test_notebook_excuses_at_most_two_cells(notebook):
    _, nb = notebook
    excused = [c.source for c in nb.cells if tags(c) & {"nbval-skip", "nbval-ignore-output", "raises-exception"}]
    assert len(excused) <= 2, excused


def test_notebook_has_its_own_sizes(notebook):
    path, nb = notebook
    assert Series(ROOT).parameters(path.stem, nb) is None


def test_notebook_ends_with_exercises_that_are_solved(notebook):
    _, nb = notebook
    checks, solutions = ([c for c in code_cells(nb) if kind in tags(c)] for kind in ("check", "solution"))
    assert 3 <= len(solutions) <= 5
    names = [re.search(r"@exercise\s+def (\w+)", c.source)[1] for c in checks]
    solved = [re.search(r"assert (\w+)\(", c.source)[1] for c in solutions]
    assert solved == names, "each check has its solution, in order"
    assert all(c.metadata.get("jupyter", {}).get("source_hidden") for c in checks + solutions), "both are folded"
    said = "".join(o.get("text", "") for c in nb.cells for o in c.get("outputs", []))
    for name in (n.replace("_", " ") for n in names):
        assert f"{name}: not answered yet" in said and f"{name}: right" in said


# ── figures and README ──

def figures():
    return sorted(p.name for p in (ROOT / "figures").iterdir() if p.suffix in (".svg", ".png"))


def test_each_figure_is_drawn_by_one_notebook():
    stems = {Path(f).stem for f in figures()}
    assert stems, "no figures"
    assert figures() == sorted(f"{s}{end}" for s in stems for end in (".png", ".svg")), "each as .svg and .png"
    sources = {p.stem: "\n".join(c.source for c in code_cells(nbformat.read(p, 4))) for p in NOTEBOOKS}
    for stem in stems:
        drawn_in = [name for name, source in sources.items() if f'"{stem}"' in source]
        assert len(drawn_in) == 1 and drawn_in[0][:2] == stem[:2], f"{stem} is drawn in {drawn_in}"


def test_the_readme_table_names_every_figure_and_no_other_file():
    table = re.search(r"^\| figure or table.*?(?=\n\n|\Z)", README, re.M | re.S)
    assert table, "README.md has a table 'figure or table of the paper | notebook | file | minutes on two cores'"
    header, _, *rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in table[0].splitlines()]
    assert [h.split()[0] for h in header] == ["figure", "notebook", "file", "minutes"] and rows
    named = {Path(f).stem for row in rows for f in re.findall(r"figures/[\w.]+", row[2])}
    assert named == {Path(f).stem for f in figures()}
    told = {Path(f).stem for row in rows for f in re.findall(r"notebooks/[\w.]+", row[1])}
    assert told == {p.stem for p in NOTEBOOKS}


def test_the_readme_links_to_what_is_there():
    links = [t for t in re.findall(r"\]\(([^)#\s]+)|(?:src|href)=\"([^\"#]+)\"", README) for t in t if t]
    local = [t for t in links if not re.match(r"https?:", t)]
    assert local, "README.md links to no file"
    assert not [t for t in local if not (ROOT / t).exists()]
    families = re.search(r"<!-- families -->(.*?)<!-- /families -->", README, re.S)
    assert families and "|" in families[1], "the table of families is generated between its markers"


def test_the_readmes_code_runs_as_it_stands():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert blocks
    for code in blocks:
        exec(compile(code, "README.md", "exec"), {})  # its assert is the claim of the first screen


def test_each_room_imports_only_from_rooms_above_it():
    package = ROOT / "tensorlens_utils"
    rooms = re.findall(r"^\| `(\w+/?)` \|", README.split("## Layout")[1], re.M)
    there = {p.stem for p in package.glob("*.py")} - {"__init__"}
    there |= {f"{p.parent.name}/" for p in package.glob("*/__init__.py")}
    assert len(rooms) == len(set(rooms)) and set(rooms) == there, "the README's table of rooms names each one once"
    order = {room.strip("/"): i for i, room in enumerate(rooms)}
    for file in package.rglob("*.py"):
        parts = file.relative_to(package).parts
        if parts == ("__init__.py",):  # the package's own names come from all rooms
            continue
        room = parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == len(parts):  # reaches out of the room
                for other in [node.module.split(".")[0]] if node.module else [name.name for name in node.names]:
                    assert order[other] < order[room], f"{file}:{node.lineno} imports {other}: not above {room}"
