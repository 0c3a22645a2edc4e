"""Running the series of notebooks, the normal form in which git keeps them, and their exercises.

    python -m tensorlens_utils.notebooks                       # `make`: run whatever is not up to date
    python -m tensorlens_utils.notebooks --profile paper 02    # `make PROFILE=paper NB=02`

**Running.** `notebooks/parameters.toml` lists the series in order, with two sets of sizes for each notebook: `tiny`,
which is what the notebook's own `parameters` cell says, and `paper`, which papermill injects. A run goes to
`build/nb/NAME.ipynb`, its figures to `build/nb/NAME.figures/`; only when every cell has run are they copied to
`notebooks/` and `figures/`, so that a failure touches nothing that git keeps. `build/nb/NAME.json` then records one
digest of all that the result depends on (notebook, package, models, measurements, lock, figures); a notebook
is up to date while that digest holds. Times of files play no part: a checkout, which makes every file new, neither
hides a change nor invents one. A `paper` run stays under `build/paper/`.

**Normal form.** One kernel, no timings, no widget state, execution counts 1, 2, 3, ..., no stderr, images on one line.
Where a cell is unchanged and its new outputs differ from the stored ones by noise alone, the stored ones stay; so do
figures. Noise is what `tests/nbval_sanitize.cfg` masks (timings, addresses, paths); in a printed number, one unit of
its last place, or anything where both values are under ROUNDING; in a picture, PIXEL_NOISE.

**Exercises.** Four cells each:

    markdown                        **Exercise 1.** What share of the score of "7" is bias?
    code, tag `check`, folded       @exercise
                                    def exercise_1(share):
                                        assert abs(share - float(bias / score)) < 1e-3, "divide B by F(X)"
    code                            share = None          # your answer
                                    exercise_1(share)     # prints "exercise 1: not answered yet"
    code, tag `solution`, folded    share = float(bias / score)
                                    assert exercise_1(share)

Folded is the cell metadata `{"jupyter": {"source_hidden": true}}`. Solutions run with the rest of the notebook, so a
worked answer that its own check refuses stops `make` and fails the tests.

This module imports neither torch nor the rest of the package: a second `make` costs no more than starting python.
"""
import argparse
import ast
import base64
import configparser
import functools
import hashlib
import io
import json
import os
import re
import shutil
import sys
import threading
import time
import tomllib
from collections import defaultdict
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
PROFILES = ("tiny", "paper")
CELL_TIMEOUT = 600      # seconds, in the tiny profile
PIXEL_NOISE = 4         # of 255: data moved by 1e-6 of its range moves a pixel by 1, data moved by 1e-5 by 4
ROUNDING = 1e-5         # of two printed numbers that are both smaller, neither says more than "rounding error"


class SeriesError(Exception):
    """What stops the series, in words for the person at the terminal."""


def batch_environment(profile="tiny"):
    """The environment variables under which notebooks run unattended, as a dict.

    No progress bars, and in the tiny profile no network, unless the user has set otherwise; PYTHONHASHSEED is 0 in any
    case, since outputs are compared.
    """
    quiet = ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS",
             "PYDEVD_DISABLE_FILE_VALIDATION", *(["HF_HUB_OFFLINE"] if profile == "tiny" else []))
    return {name: os.environ.get(name, "1") for name in quiet} | {"PYTHONHASHSEED": "0"}


# ── exercises ──

def exercise(check):
    """Turn a function that asserts something of an answer into one that replies to a reader.

    The reply is one printed line, and None for the answer None ("not answered yet"), True for an answer that passes,
    False for one that does not, with the assertion's message as a hint. It never raises, whatever the answer is.
    """
    label = check.__name__.replace("_", " ")

    @functools.wraps(check)
    def reply(answer):
        if answer is None:
            print(f"{label}: not answered yet")
            return None
        try:
            check(answer)
        except AssertionError as e:
            print(f"{label}: not yet" + f": {e}" * bool(str(e)))
            return False
        except Exception as e:      # an answer of another type or shape is a wrong answer, not a crash
            print(f"{label}: not yet: the check cannot use this answer ({type(e).__name__}: {e})")
            return False
        print(f"{label}: right")
        return True
    return reply


# ── the normal form ──

HEADER = {"kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
          "language_info": {"name": "python"}}


def normal(nb):
    """A copy, in the normal form, of a notebook (a NotebookNode)."""
    from nbformat import from_dict
    nb = from_dict(nb)
    nb.metadata, nb.nbformat, nb.nbformat_minor, ran = from_dict(HEADER), 4, 5, 0
    for cell in nb.cells:
        cell.metadata = from_dict({k: v for k, v in sorted(cell.metadata.items()) if k in ("jupyter", "tags") and v})
        if cell.cell_type == "code":
            if cell.execution_count is not None:
                cell.execution_count = ran = ran + 1
            cell.outputs = _normal_outputs(cell.outputs, cell.execution_count)
    return nb


def _normal_outputs(outputs, count):
    kept = []
    for out in outputs:
        if out.output_type == "stream":
            if out.name == "stderr":
                continue
            if kept and kept[-1].output_type == "stream":       # the kernel cuts one text into pieces as it pleases
                kept[-1].text += out.text
                continue
        if "data" in out:
            out.data.pop("application/vnd.jupyter.widget-view+json", None)
            for mime in {"image/png", "image/jpeg"} & out.data.keys():
                out.data[mime] = out.data[mime].replace("\n", "")
        if out.output_type == "execute_result":
            out.execution_count = count
        kept.append(out)
    return kept


def text_of(nb):
    """The text of a notebook as git keeps it."""
    import nbformat
    return nbformat.writes(nb, indent=1).rstrip("\n") + "\n"


def sanitizers(config):
    """The rules of nbval's sanitising file: [(regex, replacement), ...] in order, and apart the regex of [floats]."""
    ini = configparser.RawConfigParser()
    if not ini.read(config, encoding="utf-8") or "floats" not in ini:
        raise SeriesError(f"what counts as noise is said in {config}, with a section [floats]; it is not there")
    rules = {s: (re.compile(ini[s]["regex"]), ini[s]["replace"]) for s in ini.sections()}
    return [rule for s, rule in rules.items() if s != "floats"], rules["floats"][0]


def settle(new, old, noise):
    """Give each cell of `new` whose outputs differ from those in `old` by noise alone the old ones; returns `new`.

    Cells are matched by their source; `noise` is what `sanitizers` returned.
    """
    stored = defaultdict(list)
    for cell in old.cells:
        if cell.cell_type == "code":
            stored[cell.source].append(cell.outputs)
    for cell in new.cells:
        if cell.cell_type == "code" and stored[cell.source]:
            outputs = stored[cell.source].pop(0)
            if len(outputs) == len(cell.outputs) and all(map(functools.partial(_alike, noise), outputs, cell.outputs)):
                cell.outputs = _normal_outputs(outputs, cell.execution_count)
    return new


def _alike(noise, a, b):
    if a.output_type == b.output_type == "stream":
        return a.name == b.name and same_text(a.text, b.text, noise)
    if a.output_type != b.output_type or "data" not in a:
        return a == b
    return a.metadata == b.metadata and a.data.keys() == b.data.keys() and all(
        same_png(base64.b64decode(x), base64.b64decode(b.data[mime])) if mime == "image/png"
        else same_text(str(x), str(b.data[mime]), noise) for mime, x in a.data.items())


def same_text(a, b, noise):
    """Whether two texts differ at most by what the sanitising file masks and by rounding in the numbers."""
    masks, floats = noise
    for regex, replacement in masks:
        a, b = regex.sub(replacement, a), regex.sub(replacement, b)
    return floats.split(a) == floats.split(b) and all(map(_near, floats.findall(a), floats.findall(b)))


def _near(a, b):
    a, b = Decimal(a.strip()), Decimal(b.strip())
    last_place = Decimal(10) ** max(a.as_tuple().exponent, b.as_tuple().exponent)
    return abs(a - b) <= last_place or max(abs(a), abs(b)) < ROUNDING


def same_png(a, b):
    """Whether two PNG files (bytes) have one size and no pixel that differs by more than PIXEL_NOISE."""
    if a == b:
        return True
    import numpy as np
    from matplotlib.image import imread
    x, y = (np.asarray(imread(io.BytesIO(png), format="png"), dtype=float) for png in (a, b))
    return x.shape == y.shape and float(np.abs(x - y).max()) * 255 < PIXEL_NOISE + 0.5


def same_svg(a, b, noise):
    """Whether two SVG files (bytes) of `save_figure` have like captions and drawings, each number within 0.1 point.

    Identifiers (hashes of what they name) and embedded bitmaps are left to `same_png` on the PNG beside them.
    """
    names = re.compile(r'base64,[^"]*|(?<= id=")[^"]*|(?<=href=")#[^"]*|(?<=url\()#[^)]*')
    number = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")
    (caption, _, a), (other, _, b) = (names.sub("", svg.decode()).partition("</desc>") for svg in (a, b))
    moved = zip(map(float, number.findall(a)), map(float, number.findall(b)), strict=False)
    return same_text(caption, other, noise) and number.split(a) == number.split(b) and all(
        abs(x - y) <= 0.1 for x, y in moved)


# ── the series ──

def parameters_cell(nb, name):
    """{name: value} of the one cell tagged `parameters`; SeriesError unless all its lines are `name = literal`."""
    cells = [c for c in nb.cells if "parameters" in c.metadata.get("tags", [])]
    if len(cells) != 1:
        raise SeriesError(f"a notebook has one cell tagged 'parameters', for its sizes; {name} has {len(cells)}")
    values = {}
    for node in ast.parse(cells[0].source).body:
        try:
            (target,) = [node.target] if isinstance(node, ast.AnnAssign) else node.targets
            value = ast.literal_eval(node.value)
            values[target.id] = list(value) if isinstance(value, tuple) else value
        except (AttributeError, ValueError):
            raise SeriesError(f"a parameters cell holds lines `name = literal` and nothing else; {name} has "
                              f"`{ast.unparse(node)}`: move it to another cell") from None
    return values


@dataclass(frozen=True)
class Series:
    """The notebooks that `notebooks/parameters.toml` lists, in that order, run with one of its two sets of sizes.

    Args:
        root: the folder that holds notebooks/, figures/, tests/ and build/.
        profile: "tiny" or "paper".
    """
    root: Path
    profile: str = "tiny"

    @cached_property
    def table(self):
        """{name: {"tiny": {...}, "paper": {...}}} in the order of the series."""
        path = self.root / "notebooks" / "parameters.toml"
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise SeriesError(f"the series is listed in {path}, and it is not there: run this in the repository's root "
                              "or name it by --root") from None
        except tomllib.TOMLDecodeError as e:
            raise SeriesError(f"{path} is not valid TOML: {e}") from None
        for name, sets in table.items():
            if set(sets) != set(PROFILES):
                raise SeriesError(f"a notebook has two tables in {path.name}, [{name}.tiny] and [{name}.paper]; "
                                  f"this one has {sorted(sets)}")
        there = {p.stem for p in path.parent.glob("*.ipynb")}
        if there != table.keys():
            raise SeriesError("notebooks/ holds what notebooks/parameters.toml lists; not listed: "
                              f"{sorted(there - table.keys())}, not there: {sorted(table.keys() - there)}")
        return table

    @property
    def work(self):
        """Where runs, their figures and their stamps are."""
        return self.root / "build" / ("nb" if self.profile == "tiny" else self.profile)

    @property
    def figures(self):
        return self.root / "figures" if self.profile == "tiny" else self.work / "figures"

    def source(self, name):
        return self.root / "notebooks" / f"{name}.ipynb"

    def result(self, name):
        return self.work / f"{name}.ipynb"

    @cached_property
    def noise(self):
        return sanitizers(self.root / "tests" / "nbval_sanitize.cfg")

    def select(self, wanted):
        """The names, in the order of the series, that begin with one of `wanted` ("05", "05_lang"); all for none."""
        for word in wanted:
            if not any(name.startswith(word) for name in self.table):
                raise SeriesError(f"NB is the number of a notebook or the beginning of its name; '{word}' fits none of "
                                  + ", ".join(self.table))
        return [name for name in self.table if not wanted or name.startswith(tuple(wanted))]

    def parameters(self, name, nb):
        """What papermill injects: None for tiny, the notebook's own. SeriesError where file and notebook differ."""
        own, sets = parameters_cell(nb, name), self.table[name]
        if own != sets["tiny"]:
            raise SeriesError(f"[{name}.tiny] of notebooks/parameters.toml equals the notebook's parameters cell; the "
                              f"cell has {own}, the file {sets['tiny']}")
        if own.keys() != sets["paper"].keys():
            raise SeriesError(f"[{name}.paper] of notebooks/parameters.toml sets the names that [{name}.tiny] sets; "
                              f"only one of them has {sorted(own.keys() ^ sets['paper'].keys())}")
        return None if self.profile == "tiny" else sets[self.profile]

    def digest(self, name, figures):
        """One hash of all that a notebook's result depends on, and of the result itself: notebook and figures."""
        package = sorted(p for p in PACKAGE.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
        results = [self.figures / f for f in figures] + [self.result(name)] * (self.profile != "tiny")
        whole = hashlib.sha256(json.dumps([self.table[name][self.profile], sys.version_info[:2]]).encode())
        measured = sorted(self.root.glob("tests/*/**/*.json"))  # by `make bench` and tests/measurements/, for figures
        for path in [self.source(name), self.root / "constraints.txt", *measured, *package, *results]:
            whole.update(path.name.encode() + hashlib.sha256(path.read_bytes() if path.exists() else b"").digest())
        return whole.hexdigest()

    def up_to_date(self, name):
        try:
            stamp = json.loads((self.work / f"{name}.json").read_bytes())
            return stamp["digest"] == self.digest(name, stamp["figures"])
        except (FileNotFoundError, ValueError, KeyError):
            return False

    def run(self, name):
        """Execute a notebook, put its results in their place, stamp it; SeriesError, a report, where a cell fails."""
        import nbformat
        before = self.source(name).read_bytes()
        nb = nbformat.reads(before.decode(), as_version=4)
        parameters = self.parameters(name, nb)
        drawn = self.work / f"{name}.figures"
        shutil.rmtree(drawn, ignore_errors=True)
        drawn.mkdir(parents=True)
        os.environ["TENSORLENS_FIGURES"] = str(drawn)
        with Progress(name, sum(map(_runs, nb.cells)) + bool(parameters)) as progress:
            ran = self._execute(name, parameters, progress)
            if self.source(name).read_bytes() != before:
                raise SeriesError(f"{name} was saved by someone else while it ran, and is left so: type `make` again")
            changed = self._take_figures(drawn)
            if self.profile == "tiny":
                text = text_of(settle(normal(ran), normal(nb), self.noise))
                changed += [f"{name}.ipynb"] if _write(self.source(name), text.encode()) else []
            figures = sorted(p.name for p in drawn.iterdir())
            stamp = {"figures": figures, "digest": self.digest(name, figures)}
            _write(self.work / f"{name}.json", json.dumps(stamp).encode())
            progress.done("changed: " + ", ".join(changed) if changed else "as before")

    def _execute(self, name, parameters, progress):
        import papermill
        from nbclient.exceptions import CellTimeoutError, DeadKernelError
        from papermill.exceptions import PapermillExecutionError
        failed = functools.partial(progress.failure, self.result(name).relative_to(self.root))
        try:
            ran = papermill.execute_notebook(
                str(self.source(name)), str(self.result(name)), parameters=parameters, kernel_name="python3",
                cwd=str(self.root / "notebooks"), progress_bar=False, on_cell_execute=progress.cell,
                execution_timeout=CELL_TIMEOUT if self.profile == "tiny" else None,
                extra_arguments=["--IPKernelApp.log_level=50"])     # the kernel warns at each start, and when stopped
        except PapermillExecutionError as e:
            raise failed(*e.traceback or [f"{e.ename}: {e.evalue}"]) from None
        except CellTimeoutError:
            raise failed(f"It ran for more than {CELL_TIMEOUT} s.") from None
        except DeadKernelError:
            raise failed("The kernel died: out of memory, or killed.") from None
        if any(_runs(cell) and cell.execution_count is None for cell in ran.cells):
            raise failed("It ended the notebook (exit or quit) before the last cell.")
        return ran

    def _take_figures(self, drawn):
        """Copy figures (all files of one together) unless they differ by noise alone; the names of what changed."""
        same = {".png": same_png, ".svg": functools.partial(same_svg, noise=self.noise)}
        figures, changed = defaultdict(list), []
        for path in sorted(drawn.iterdir()):
            figures[path.stem].append(path)
        for files in figures.values():
            pairs = [(new, self.figures / new.name) for new in files]
            if not all(old.exists() and same[new.suffix](new.read_bytes(), old.read_bytes()) for new, old in pairs):
                changed += [old.name for new, old in pairs if _write(old, new.read_bytes())]
        return changed


def _runs(cell):
    return cell.cell_type == "code" and bool(cell.source.strip())


def _write(path, data):
    """Write bytes, at once or not at all, where they differ from what is there; whether anything was written."""
    if path.exists() and path.read_bytes() == data:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_bytes(data)
    os.replace(part, path)
    return True


# ── what the person at the terminal sees ──

class Progress:
    """One line: which notebook, which cell of how many, how long so far, how the cell begins.

    On a terminal it is rewritten in place every second; in a log it is written at the start and every 15 seconds.
    """

    def __init__(self, name, cells, out=None):
        self.name, self.cells, self.number, self.current, self.out = name, cells, 0, None, out or sys.stdout
        self.live, self.started, self.over = self.out.isatty(), time.monotonic(), threading.Event()
        self.clock = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self):
        self._draw()
        self.clock.start()
        return self

    def __exit__(self, kind, *_):
        self.over.set()
        self.clock.join()
        if kind and self.live:
            print(file=self.out)

    def cell(self, cell, cell_index):
        """nbclient's hook: a code cell starts."""
        self.number, self.current = self.number + 1, cell
        if self.live:
            self._draw()

    def elapsed(self):
        minutes, seconds = divmod(int(time.monotonic() - self.started), 60)
        return f"{minutes}:{seconds:02d}"

    def done(self, what):
        self._print(f"{self.name}  {self.cells} cells  {self.elapsed()}  {what}", end="\n")

    def failure(self, partial, *traceback):
        """The SeriesError for the running cell: how it begins, what it printed, its error, where to see the rest.

        `partial` is the path of the outputs so far; `traceback` is IPython's, one text a frame, the error itself last.
        """
        *frames, error = (re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text) for text in traceback)
        frames = [text for text in frames if text.lstrip().startswith(("Cell In", "File "))]
        if len(frames) > 3:     # the reader's are the first, where the cell called, and the last, which raised
            frames[2:-1] = [f"... {len(frames) - 3} more frames ..."]
        source = self.current.source.strip().splitlines() if self.current else []
        if len(source) > 12:
            source[11:] = [f"... ({len(source) - 11} more lines)"]
        printed = "".join(o.text for o in self.current.outputs if "text" in o) if self.current else ""
        parts = [[f"  | {line}" for line in source], [f"  > {line}" for line in printed.splitlines()[-6:]],
                 *([f"  {line}" for line in text.strip().splitlines()] for text in [*frames, error])]
        return SeriesError("\n\n".join([
            f"{self.name}: code cell {self.number} of {self.cells} failed after {self.elapsed()}",
            *("\n".join(part) for part in parts if part),
            f"What ran so far, with this cell marked, is in {partial}; notebooks/ and figures/ are untouched.\n"
            "Mend the cell and type `make` again: it goes on with this notebook."]))

    def _tick(self):
        while not self.over.wait(1 if self.live else 15):
            self._draw()

    def _draw(self):
        head = self.current.source.strip().partition("\n")[0] if self.current else "starting"
        line = f"{self.name}  cell {self.number}/{self.cells}  {self.elapsed()}  {head}"
        self._print(line, end="" if self.live else "\n")

    def _print(self, line, end):
        width = shutil.get_terminal_size().columns - 1 if self.live else 160
        print(("\r\x1b[K" if self.live else "") + line[:width], end=end, file=self.out, flush=True)


def main(argv=None):
    """The command line; returns 0 where all is up to date in the end, 1 where a notebook failed, 130 where stopped."""
    parser = argparse.ArgumentParser(prog="python -m tensorlens_utils.notebooks", description="Run the series.")
    parser.add_argument("notebooks", nargs="*", metavar="NB", help="number or beginning of a name; none: all")
    parser.add_argument("--profile", choices=PROFILES, default="tiny", help="which sizes of notebooks/parameters.toml")
    parser.add_argument("--root", type=Path, default=Path.cwd(), help="the repository (default: the working directory)")
    args = parser.parse_args(argv)
    os.environ.update(batch_environment(args.profile))
    try:
        series, ran = Series(args.root.resolve(), args.profile), 0
        names = series.select(args.notebooks)
        for name in names:
            if not series.up_to_date(name):
                series.run(name)
                ran += 1
    except SeriesError as e:
        print(e, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; type `make` again to go on with this notebook", file=sys.stderr)
        return 130
    print(f"{len(names)} of {len(names)} notebooks up to date, {ran} of them run now (profile {args.profile})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
