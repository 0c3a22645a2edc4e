"""The runner of the series, on a toy series of two notebooks; the normal form; exercises; figures."""
import base64
import io
import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from nbval.plugin import get_sanitize_patterns

from tensorlens_utils import notebooks, plotting
from tensorlens_utils.notebooks import Progress, Series, SeriesError, exercise, main, normal, settle, text_of

pytestmark = pytest.mark.usefixtures("environment")
SANITIZE = Path(__file__).with_name("nbval_sanitize.cfg")
NOISE = notebooks.sanitizers(SANITIZE)


def code(source, **metadata):
    return new_code_cell(source, metadata=metadata)


TOY = [
    new_markdown_cell("# A toy"),
    code("points = 3", tags=["parameters"]),
    code("import sys, time\nfrom tensorlens_utils.notebooks import exercise\nstart = time.monotonic()\n"
         "print(sum(range(points)), 'is the sum', file=sys.stdout)\nprint('noise', file=sys.stderr)"),
    code("print(f'took {time.monotonic() - start:.6f} s')\nobject()"),
    code("import matplotlib.pyplot as plt\nfrom tensorlens_utils.plotting import save_figure, use_style\nuse_style()\n"
         "fig, ax = plt.subplots(figsize=(2, 1))\n_ = ax.plot(range(points))\n"
         "save_figure(fig, '01_line', 'A line. It rises.')"),
    code("@exercise\ndef exercise_1(answer):\n    assert answer == points, 'count again'",
         tags=["check"], jupyter={"source_hidden": True}),
    code("answer = None\nexercise_1(answer)"),
    code("answer = points\nassert exercise_1(answer)", tags=["solution"], jupyter={"source_hidden": True}),
]


def series_of(root, **cells):
    """Lay out a series in the folder `root`: NAME=cells, with `points` in each parameters cell."""
    for folder in ("notebooks", "tests"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    (root / "tests" / SANITIZE.name).write_text(SANITIZE.read_text())
    table = ""
    for name, content in cells.items():
        name = name.removeprefix("nb_")
        (root / "notebooks" / f"{name}.ipynb").write_text(text_of(normal(new_notebook(cells=content))))
        table += f"[{name}.tiny]\npoints = 3\n[{name}.paper]\npoints = 5\n"
    (root / "notebooks" / "parameters.toml").write_text(table)
    return Series(root)


def contents(root):
    return {p.name: p.read_bytes() for folder in ("notebooks", "figures") for p in (root / folder).iterdir()}


# ── a run, a second one, a failure, the paper's sizes: in one story, since each kernel costs seconds ──

def test_story_of_a_series(tmp_path, capsys):
    series = series_of(tmp_path, nb_01_toy=TOY)
    assert main(["--root", str(tmp_path)]) == 0
    first = contents(tmp_path)
    nb = nbformat.reads(first["01_toy.ipynb"].decode(), 4)
    printed = ["".join(o.get("text", "") for o in c.get("outputs", [])) for c in nb.cells]
    assert printed[2] == "3 is the sum\n" and printed[4] == "figures/01_line.svg: A line. It rises.\n"
    assert printed[6:] == ["exercise 1: not answered yet\n", "exercise 1: right\n"]
    assert first["01_toy.ipynb"].decode() == text_of(normal(nb)), "in the normal form"
    assert not any("injected-parameters" in c.metadata.get("tags", []) for c in nb.cells)
    assert {"01_line.png", "01_line.svg"} < first.keys() and series.up_to_date("01_toy")
    assert "changed: 01_line.png, 01_line.svg, 01_toy.ipynb" in capsys.readouterr().out

    # a run from nothing gives the same bytes, although its timing and its address differ
    (tmp_path / "build" / "nb" / "01_toy.json").unlink()
    assert main(["--root", str(tmp_path)]) == 0 and contents(tmp_path) == first
    assert (tmp_path / "build" / "nb" / "01_toy.ipynb").read_bytes() != first["01_toy.ipynb"]
    assert "as before" in capsys.readouterr().out

    # a second notebook that fails: the first is not run again, nothing that git keeps is touched, the report says all
    bad = [TOY[1], code("print('so far')\nraise ValueError('out of ink')"), code("b = 1")]
    series_of(tmp_path, nb_01_toy=[], nb_02_bad=bad)
    (tmp_path / "notebooks" / "01_toy.ipynb").write_bytes(first["01_toy.ipynb"])
    before = contents(tmp_path)
    assert main(["--root", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert "01_toy" not in out and contents(tmp_path) == before
    for part in ("02_bad: code cell 2 of 3 failed", "  | raise ValueError('out of ink')", "  > so far",
                 "Cell In[2], line 2", "ValueError: out of ink", "build/nb/02_bad.ipynb", "type `make` again"):
        assert part in err
    assert "\x1b" not in err and (tmp_path / "build" / "nb" / "02_bad.ipynb").exists()

    # the paper's sizes are injected, and stay under build/paper
    assert main(["--root", str(tmp_path), "--profile", "paper", "01"]) == 0
    assert contents(tmp_path) == before
    ran = nbformat.read(tmp_path / "build" / "paper" / "01_toy.ipynb", 4)
    assert "10 is the sum\n" in [o.get("text") for c in ran.cells for o in c.get("outputs", [])]
    assert (tmp_path / "build" / "paper" / "figures" / "01_line.svg").exists()

    # a second `make` imports nothing that is slow
    look = ("import sys; from tensorlens_utils.notebooks import main; code = main(sys.argv[1:])\n"
            "print(code, sorted({'torch', 'transformers', 'papermill', 'nbformat', 'numpy'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", look, "--root", str(tmp_path), "01"], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["1 of 1 notebooks up to date, 0 of them run now (profile tiny)", "0 []"]

    # every input and every result counts towards being up to date
    for path in ("figures/01_line.png", "notebooks/01_toy.ipynb", "constraints.txt"):
        path = tmp_path / path
        old = path.read_bytes() if path.exists() else None
        path.write_bytes(b"other")
        assert not series.up_to_date("01_toy"), path
        path.unlink() if old is None else path.write_bytes(old)
        assert series.up_to_date("01_toy")


def test_exit_in_a_cell_is_a_failure(tmp_path, capsys):
    series_of(tmp_path, nb_01_toy=[TOY[1], code("raise SystemExit"), code("a = 1")])
    assert main(["--root", str(tmp_path)]) == 1
    assert "exit or quit" in capsys.readouterr().err


# ── what the series refuses ──

@pytest.mark.parametrize("table, words", [
    ("", r"not listed: \['01_toy'\]"),
    ("[01_toy.tiny]\n", r"two tables .*this one has \['tiny'\]"),
    ("[01_toy.tiny]\n[01_toy.paper]\n[02_x.tiny]\n[02_x.paper]\n", r"not there: \['02_x'\]"),
    ("[01_toy.tiny\n", "not valid TOML"),
])
def test_a_wrong_list_is_refused(tmp_path, table, words):
    series_of(tmp_path, nb_01_toy=TOY)
    (tmp_path / "notebooks" / "parameters.toml").write_text(table)
    with pytest.raises(SeriesError, match=words):
        Series(tmp_path).select([])


def test_unknown_notebook_and_wrong_folder_are_refused(tmp_path, capsys):
    assert series_of(tmp_path, nb_01_toy=TOY).select(["01"]) == ["01_toy"]
    assert main(["--root", str(tmp_path), "07"]) == 1
    assert "'07' fits none of 01_toy" in capsys.readouterr().err
    assert main(["--root", str(tmp_path / "notebooks")]) == 1
    assert "run this in the repository's root" in capsys.readouterr().err


@pytest.mark.parametrize("source, words", [
    ("points = 4", "equals the notebook's parameters cell"),
    ("points = 3\nn = 1", "equals the notebook's parameters cell"),
    ("points = 3\nimport os", "`name = literal` and nothing else.*`import os`"),
    ("points = 2 + n", "`name = literal`"),
    ("points += 3", "`name = literal`"),
])
def test_a_parameters_cell_holds_sizes_that_the_file_repeats(tmp_path, source, words):
    series = series_of(tmp_path, nb_01_toy=TOY)
    with pytest.raises(SeriesError, match=words):
        series.parameters("01_toy", new_notebook(cells=[code(source, tags=["parameters"])]))


def test_parameters_of_both_profiles(tmp_path):
    series = series_of(tmp_path, nb_01_toy=TOY)
    nb = new_notebook(cells=[code("points: int = 3  # how many", tags=["parameters"])])
    assert series.parameters("01_toy", nb) is None
    assert Series(tmp_path, "paper").parameters("01_toy", nb) == {"points": 5}
    with pytest.raises(SeriesError, match="01_toy has 0"):
        series.parameters("01_toy", new_notebook())
    path = tmp_path / "notebooks" / "parameters.toml"
    path.write_text(path.read_text().replace("points = 5", "pionts = 5"))
    with pytest.raises(SeriesError, match=r"only one of them has \['pionts', 'points'\]"):
        Series(tmp_path).parameters("01_toy", nb)


# ── the normal form, and what is noise ──

def png(array):
    file = io.BytesIO()
    plt.imsave(file, array, vmin=0, vmax=1, cmap="gray", format="png")
    return base64.b64encode(file.getvalue()).decode()


def ran(source, *outputs, **metadata):
    cell = code(source, **metadata)
    cell.outputs, cell.execution_count = list(outputs), 7
    return cell


def stream(text, name="stdout"):
    return new_output("stream", text=text, name=name)


def test_normal_form_drops_what_belongs_to_one_run():
    image = png(np.eye(2))
    nb = new_notebook(cells=[
        ran("a", stream("one\n"), stream("warning", "stderr"), stream("two\n"), tags=["x"], papermill={"duration": 1}),
        code("b"),
        ran("c", new_output("execute_result", data={"image/png": image[:9] + "\n" + image[9:], "text/plain": "<I>",
                            "application/vnd.jupyter.widget-view+json": {"model_id": "1"}}, execution_count=40)),
    ], metadata={"widgets": {}, "papermill": {}, "kernelspec": {"name": "mine", "display_name": "Mine"}})
    form = normal(nb)
    a, b, c = form.cells
    assert form.metadata == notebooks.HEADER and a.metadata == {"tags": ["x"]}
    assert [o.text for o in a.outputs] == ["one\ntwo\n"]
    assert (a.execution_count, b.execution_count, c.execution_count, c.outputs[0].execution_count) == (1, None, 2, 2)
    assert c.outputs[0].data == {"image/png": image, "text/plain": "<I>"}
    assert text_of(normal(form)) == text_of(form) and nb.cells[0].execution_count == 7, "idempotent, and a copy"
    assert text_of(normal(nbformat.reads(text_of(form), 4))) == text_of(form), "survives git"


@pytest.mark.parametrize("old, new, kept", [
    ("loss 0.123, took 9.1 s", "loss 0.124, took 12.75 s", True),     # one unit of the last place; a timing
    ("loss 0.123", "loss 0.125", False),
    ("error 3.1e-16", "error 2.22e-15", True),                        # rounding error
    ("error 3.1e-04", "error 2.2e-04", False),
    ("x = -0.000", "x =  0.000", True),                               # the padding goes with the sign
    ("12 of 20", "13 of 20", False),                                  # counts are exact
    ("<a at 0x7f00aa11>", "<a at 0x7f00bb22>", True),
    ("in /one/place/figures", "in /quite/another/place/figures", True),
    ("http://a.org/b/c", "http://a.org/d/c", False),
    ("yes 0.5", "no 0.5", False),
    ("0.5", "0.5 0.5", False),
])
def test_noise_in_text(old, new, kept):
    first, second = (normal(new_notebook(cells=[ran("c", stream(text))])) for text in (old, new))
    assert settle(second, first, NOISE).cells[0].outputs[0].text == (old if kept else new)


def test_noise_in_pictures_and_changed_cells():
    def cell(source, shade, text="<Figure>", metadata=None):
        data = {"image/png": png(np.full((4, 4), shade)), "text/plain": text}
        return ran(source, new_output("display_data", data=data, metadata=metadata or {}))

    def result(old, new):
        old, new = (normal(new_notebook(cells=cells)) for cells in (old, new))
        olds = [c.outputs for c in old.cells]
        return [any(c.outputs == o for o in olds) for c in settle(new, old, NOISE).cells]

    assert result([cell("a", 0.5)], [cell("a", 0.5 + 3 / 255)]) == [True]
    assert result([cell("a", 0.5)], [cell("a", 0.5 + 9 / 255)]) == [False]
    assert result([cell("a", 0.5)], [cell("a", 0.5 + 3 / 255, text="<Image>")]) == [False]
    assert result([cell("a", 0.5)], [cell("a", 0.5 + 3 / 255, metadata={"width": 3})]) == [False]
    assert result([cell("a", 0.5)], [cell("b", 0.5 + 3 / 255)]) == [False]
    shifted = [cell("new", 0.9), cell("b", 0.5 + 3 / 255), cell("a", 0.2 + 3 / 255)]
    assert result([cell("a", 0.2), cell("b", 0.5)], shifted) == [False, True, True], "cells are found by their source"


def test_runner_and_nbval_read_the_same_rules():
    theirs = get_sanitize_patterns(SANITIZE.read_text())
    assert [(r.pattern, s) for r, s in NOISE[0]] + [(NOISE[1].pattern, "FLOAT")] == theirs and len(theirs) == 4
    with pytest.raises(SeriesError, match="section \\[floats\\]"):
        notebooks.sanitizers(SANITIZE.with_name("absent.cfg"))


# ── figures ──

def draw(folder, monkeypatch, values, caption="A line. It rises.", name="01_line"):
    monkeypatch.setenv("TENSORLENS_FIGURES", str(folder))
    plotting.use_style()
    fig, (left, right) = plt.subplots(1, 2, figsize=(3, 1))
    left.plot(values, label="rise")
    left.legend()
    right.imshow(np.outer(values, values), **plotting.diverging(values))
    plotting.save_figure(fig, name, caption)
    plt.close(fig)


def test_figures_have_stable_bytes_and_captions(tmp_path, monkeypatch, capsys):
    values = np.linspace(-1, 1, 9)
    for run in ("a", "b"):
        draw(tmp_path / run, monkeypatch, values, caption="A line & a map.\n  It rises < 2.")
    a, b = ({p.name: p.read_bytes() for p in (tmp_path / run).iterdir()} for run in "ab")
    assert a == b and a.keys() == {"01_line.svg", "01_line.png"}
    svg = a["01_line.svg"].decode()
    assert '<title id="title">A line &amp; a map.</title>' in svg
    assert '<desc id="desc">A line &amp; a map. It rises &lt; 2.</desc>' in svg
    root = ElementTree.fromstring(svg)
    assert (root.attrib["role"], root.attrib["aria-labelledby"]) == ("img", "title desc")
    assert "<metadata" not in svg, "no date, no version"
    assert "figures/01_line.svg: A line & a map. It rises < 2." in capsys.readouterr().out


def test_figures_that_differ_by_noise_stay(tmp_path, monkeypatch):
    series, drawn, values = Series(tmp_path), tmp_path / "drawn", np.linspace(-1, 1, 9)
    series.__dict__["noise"] = NOISE

    def take(values, caption="A line. It rises."):
        draw(drawn, monkeypatch, values, caption)
        return series._take_figures(drawn)

    assert take(values) == ["01_line.png", "01_line.svg"]
    stored = {p.name: p.read_bytes() for p in series.figures.iterdir()}
    assert take(values + 1e-7 * np.cos(np.arange(9))) == []
    assert {p.name: p.read_bytes() for p in drawn.iterdir()} != stored, "there was noise to ignore"
    assert {p.name: p.read_bytes() for p in series.figures.iterdir()} == stored
    assert take(values + 0.1 * np.cos(np.arange(9))) == ["01_line.png", "01_line.svg"]
    assert "01_line.svg" in take(values + 0.1 * np.cos(np.arange(9)), caption="A line. It falls.")


def test_save_figure_refuses_what_a_reader_cannot_use(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="NN_what"):
        draw(tmp_path, monkeypatch, np.ones(2), name="Line 1")
    with pytest.raises(ValueError, match="has none: say what it shows"):
        draw(tmp_path, monkeypatch, np.ones(2), caption=" ")


def test_diverging_is_white_at_zero():
    assert plotting.diverging([[-3.0, 1.0]]) == {"cmap": "RdBu_r", "vmin": -3.0, "vmax": 3.0}
    assert plotting.diverging(np.zeros(2))["vmax"] == 1.0
    assert plotting.size(0.5, 0.2) == (plotting.PAGE_WIDTH / 2, plotting.PAGE_WIDTH / 5)


@pytest.mark.parametrize("upright", [False, True])
def test_whiskers_are_drawn_one_by_one_or_all_at_once(upright):
    places, triples = [1.0, 2.0, 4.0], np.array([[3.0, 5.0, 6.0], [2.0, 4.5, 5.0], [3.5, 6.0, 9.0]])
    _, (one_by_one, at_once) = plt.subplots(1, 2)
    for place, triple in zip(places, triples.T, strict=True):
        plotting.whisker(one_by_one, place, triple, upright=upright)
    plotting.whisker(at_once, places, triples, upright=upright, label="all")
    a, b = ([np.concatenate([drawn(a) for a in artists]) for artists, drawn in [
        (ax.collections, lambda c: np.array(c.get_segments())), (ax.lines, lambda line: line.get_xydata())]]
        for ax in (one_by_one, at_once))
    assert np.array_equal(a[0], b[0]) and np.array_equal(a[1], b[1])
    along = [[place, end] if upright else [end, place] for place, end in zip(places, triples[2], strict=True)]
    assert np.array_equal(b[0][:, 1], along), "a bar ends where its interval does"
    assert at_once.get_legend_handles_labels()[1] == ["all"], "one label"
    plt.close("all")


def test_log_ticks_are_the_numbers_asked_for_and_no_others():
    fig, ax = plt.subplots()
    ax.plot([2, 1000], [0.5, 50])
    plotting.log_ticks(ax, [2, 32, 1024], [0.5, 50])
    fig.canvas.draw()
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    assert [text.get_text() for text in ax.get_xticklabels()] == ["2", "32", "1024"]
    assert [text.get_text() for text in ax.get_yticklabels()] == ["0.5", "50"]
    assert not len(ax.xaxis.get_minorticklocs()) and not len(ax.yaxis.get_minorticklocs())
    plotting.log_ticks(plt.subplots()[1], y=[1, 10])
    assert plt.gca().get_xscale() == "linear", "an axis that is not named stays as it is"
    plt.close("all")


# ── what the person sees ──

def test_exercise_replies(capsys):
    @exercise
    def exercise_2(answer):
        """Half of one."""
        assert answer > 0
        assert abs(answer - 0.5) < 1e-3, "halve it"

    assert [exercise_2(a) for a in (None, 0.5, 0.7, -1, "half")] == [None, True, False, False, False]
    assert capsys.readouterr().out.splitlines()[:3] == [
        "exercise 2: not answered yet", "exercise 2: right", "exercise 2: not yet: halve it"]
    assert exercise_2.__doc__ == "Half of one."


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_in_a_log_and_on_a_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    lines = {}
    for out in (io.StringIO(), Terminal()):
        with Progress("01_toy", 2, out) as progress:
            progress.cell(cell=code("first = 1\nsecond"), cell_index=1)
            progress.cell(cell=code("x" * 200), cell_index=3)
            progress.done("as before")
        lines[out.isatty()] = out.getvalue()
    assert lines[False] == "01_toy  cell 0/2  0:00  starting\n01_toy  2 cells  0:00  as before\n"
    shown = lines[True].split("\r\x1b[K")[1:]
    assert shown[1] == "01_toy  cell 1/2  0:00  first = 1" and shown[-1] == "01_toy  2 cells  0:00  as before\n"
    assert len(shown[2]) == 59, "one line of the terminal, whatever the cell's length"


def test_failure_is_short():
    progress = Progress("01_toy", 9, io.StringIO())
    progress.cell(cell=code("\n".join(f"line{i}" for i in range(40))), cell_index=0)
    frames = [f"\x1b[32mFile f{i}\x1b[39m, line {i}" for i in range(20)]
    report = str(progress.failure("build/nb/01_toy.ipynb", "-----", "Traceback", *frames, "Oops: \x1b[31mink\x1b[0m"))
    assert "line10\n  | ... (29 more lines)\n\n  File f0, line 0\n\n  File f1, line 1\n\n  ... 17 more frames" in report
    assert "  File f19, line 19\n\n  Oops: ink\n" in report and len(report.splitlines()) < 32


def test_figures_go_to_figures_by_make_alone(monkeypatch):
    monkeypatch.delenv("TENSORLENS_FIGURES")
    assert plotting.figures_dir() == Path(__file__).resolve().parents[1] / "build" / "figures"


def test_batch_environment_is_quiet_and_offline(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("TQDM_DISABLE", "0")
    tiny, paper = notebooks.batch_environment(), notebooks.batch_environment("paper")
    assert tiny["HF_HUB_OFFLINE"] == "1" and "HF_HUB_OFFLINE" not in paper
    assert tiny["TQDM_DISABLE"] == "0" and tiny["PYTHONHASHSEED"] == "0", "the user's wish wins, but for the hash seed"
    assert json.dumps(tiny)
