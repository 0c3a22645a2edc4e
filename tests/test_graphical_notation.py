"""Notebook 01: its appendix leads to each of the paper's 47 points."""

import re
from pathlib import Path

import nbformat

NOTEBOOK = Path(__file__).resolve().parents[1] / "notebooks" / "01_graphical_tensor_notation.ipynb"


def test_the_appendix_leads_to_each_of_the_47_points():
    *cells, appendix = nbformat.read(NOTEBOOK, as_version=4).cells
    rows = re.findall(r"^\| \[(\d+)\]\(#point-(\d+)\) \| (.+) \| (.+) \|$", appendix.source, re.M)
    assert [int(point) for point, *_ in rows] == [int(link) for _, link, *_ in rows] == [*range(1, 48)]
    headings, found = set(), {}
    for cell in cells:
        if cell.cell_type == "markdown":
            headings |= set(re.findall(r"^#{2,3} (.+)$", cell.source, re.M))
            found |= dict.fromkeys(re.findall(r'<a id="point-(\d+)">', cell.source), cell.id)
    assert found.keys() == {point for point, *_ in rows}
    assert {section for *_, section in rows} <= {re.sub(r"[$*_]", "", heading) for heading in headings}
