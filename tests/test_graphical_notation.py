"""Notebook 01: its appendix leads to each of the paper's 47 points, no picture of it has overlapping texts or tensors,
and any of its cells can be run again."""

import re
import subprocess
import sys
from pathlib import Path

import nbformat

NOTEBOOK = Path(__file__).resolve().parents[1] / "notebooks" / "01_graphical_tensor_notation.ipynb"

# A reader changes a cell of Part I after all parts have run, and runs it again: it must not trip over a name that a
# later part has used for something else. So every code cell is run twice: in order, and then once more, each on a copy
# of the names that the whole notebook leaves behind. (nbval runs each cell once, in order, and cannot see this.) On the
# way the boxes of every drawing are compared.
RUN_AGAIN = """
import sys

import matplotlib
import nbformat

matplotlib.use("agg")
import matplotlib.pyplot as plt

sys.path.insert(0, sys.argv[2])
from pictures import clashes

from tensorlens_utils.notation import drawing

page, drawn = drawing.page, []


def seen(*parts, **how):
    found = page(*parts, **how)
    drawn.append(clashes(found))
    return found

drawing.page = seen
plt.Figure.savefig = lambda *args, **how: None          # pictures are made, and not written
cells = [cell for cell in nbformat.read(sys.argv[1], as_version=4).cells if cell.cell_type == "code"]
names, failed = {"__name__": "__main__"}, []
for again in (False, True):
    for cell in cells:
        try:
            exec(compile(cell.source, cell.id, "exec"), dict(names) if again else names)
        except Exception as error:
            if not again:
                raise
            failed.append(f"{cell.id}: {type(error).__name__}: {error}")
        plt.close("all")
    assert len(drawn) > 60 and not any(drawn), [found for found in drawn if found]
sys.exit("\\n".join(failed) or 0)
"""


def test_the_appendix_leads_to_each_of_the_47_points():
    *cells, appendix = nbformat.read(NOTEBOOK, as_version=4).cells
    rows = re.findall(r"^\| \[(\d+)\]\(#point-(\d+)\) \| (.+) \| (.+) \|$", appendix.source, re.M)
    assert [int(point) for point, *_ in rows] == [int(link) for _, link, *_ in rows] == [*range(1, 48)]
    anchors, heading = {}, ""
    for cell in cells:
        if cell.cell_type == "markdown":
            own = [re.sub(r"[$*_]", "", found) for found in re.findall(r"^#{2,3} (.+)$", cell.source, re.M)]
            for point in re.findall(r'<a id="point-([\d-]+)">', cell.source):
                assert point not in anchors
                anchors[point] = {heading, *own}
            heading = own[-1] if own else heading
    named = {}
    for point, _, _, sections in rows:
        first, *others = sections.split("; ")
        named[point] = first
        for other in others:                            # a second place, with a link of its own
            section, link = re.fullmatch(r"\[(.+)\]\(#point-([\d-]+)\)", other).groups()
            assert link.startswith(f"{point}-")
            named[link] = section
    assert named.keys() == anchors.keys()
    assert all(section in anchors[point] for point, section in named.items())


def test_no_picture_overlaps_and_each_cell_can_be_run_again(tmp_path):
    command = [sys.executable, "-c", RUN_AGAIN, str(NOTEBOOK), str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
