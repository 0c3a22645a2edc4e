"""The drawing of diagrams: what is asked of a picture is asked of its layout, which is data."""
import io

import matplotlib.pyplot as plt
import nbformat
import networkx as nx
import numpy as np
import pytest
from nbclient import NotebookClient
from pictures import clashes, graph, numbers, scribble, showcase, sketch

from tensorlens_utils.notation import bubble, diagram
from tensorlens_utils.notation.drawing import describe, draw, page, stages, strip
from tensorlens_utils.notation.geometry import crossings, dense, inside, tangles
from tensorlens_utils.notation.layouts import layout
from tensorlens_utils.plotting import PAGE_WIDTH, save_figure

SHOWCASE = showcase()
PLANAR = {
    "K4": nx.complete_graph(4), "wheel of 6": nx.wheel_graph(6), "wheel of 8": nx.wheel_graph(8),
    "cube": nx.hypercube_graph(3), "octahedron": nx.octahedral_graph(), "3×3": nx.grid_2d_graph(3, 3),
    "3×4": nx.grid_2d_graph(3, 4), "prism": nx.circular_ladder_graph(5), "ladder": nx.ladder_graph(6),
    "K2,4": nx.complete_bipartite_graph(2, 4), "bull": nx.bull_graph(), "house": nx.house_x_graph(),
    "tree": nx.balanced_tree(2, 3), "lollipop": nx.lollipop_graph(4, 4), "cut tetrahedron":
    nx.truncated_tetrahedron_graph(), "star": nx.star_graph(5)}  # fmt: skip


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def centres(found):
    return {s.name: np.array([(s.box[0] + s.box[2]) / 2, (s.box[1] + s.box[3]) / 2]) for s in found.shapes}


@pytest.mark.parametrize("name", SHOWCASE)
def test_nothing_overlaps_and_all_fits_the_page(name):
    found = layout(SHOWCASE[name])
    assert not clashes(found)
    assert found.box[2] - found.box[0] <= PAGE_WIDTH
    assert not tangles([line.points for line in found.lines]) or name == "grid"  # its free legs come forward


@pytest.mark.parametrize("labels", ["free", "all"])
def test_nothing_overlaps_in_random_diagrams_and_every_leg_has_its_name(labels):
    for seed in range(200) if labels == "free" else range(40):
        d = scribble(seed)
        found = layout(d, labels=labels)
        assert not clashes(found), (seed, d)
        assert found.box[2] - found.box[0] <= PAGE_WIDTH, (seed, d)
        assert {text.text.split()[0] for text in found.labels} == set(d.ends()), (seed, d)


@pytest.mark.parametrize("name", PLANAR)
def test_planar_networks_have_no_crossing(name):
    found = layout(graph(PLANAR[name].edges))
    assert not tangles([line.points for line in found.lines]) and not clashes(found)
    through = sum(inside(dense(line.points), s.box) > 0 for line in found.lines for s in found.shapes)
    assert through == 2 * len(found.lines), "a line meets the tensors at its ends and no other"


def test_a_chain_is_straight_with_its_first_leg_left_and_its_last_right():
    found = layout(sketch("i j, j k, k l -> i l", "A B C"))
    at = centres(found)
    assert at["A"][1] == at["B"][1] == at["C"][1] and at["A"][0] < at["B"][0] < at["C"][0]
    ends = {line.free: line.points[-1] for line in found.lines if line.free}
    assert ends["i"][0] < at["A"][0] and ends["l"][0] > at["C"][0] and ends["i"][1] == ends["l"][1] == at["A"][1]


@pytest.mark.parametrize("hole", [True, False])
def test_the_only_free_leg_of_a_chain_goes_straight_on(hole):
    x, W = numbers(3), numbers(3, 3)
    chain = diagram("i, i j, j ->", x, W, x, names="x W x").hole("x")[1] if hole else sketch("i, i j -> j", "x W")
    found = layout(chain)
    (end,), at = [line.points[-1] for line in found.lines if line.free], centres(found)
    assert at["x"][0] < at["W"][0] < end[0] and at["x"][1] == at["W"][1] == pytest.approx(end[1])


def test_parts_beside_one_another_have_the_first_leg_left_and_the_last_right():
    found = layout(sketch("i, , j -> i j", "u s v"))
    at, ends = centres(found), {line.free: line.points[-1] for line in found.lines if line.free}
    assert ends["i"][0] < at["u"][0] < at["s"][0] < at["v"][0] < ends["j"][0]


def test_lines_are_level_or_upright_where_they_can_be():
    norm = layout(sketch("seq a, b a, seq b, d b -> seq d", "X C N U"))
    slants = [np.ptp(line.points, axis=0).min() for line in norm.lines]
    assert len(slants) == 8 and max(slants) < 1e-6
    at = centres(layout(SHOWCASE["ten"]))
    assert np.ptp([at[name][1] for name in "ADEVWX"]) < 1e-6, "and chains are straight"


def test_a_train_is_a_row_with_its_legs_down():
    found = layout(SHOWCASE["train"])
    at = np.array([centres(found)[f"A{k}"] for k in range(1, 7)])
    assert np.ptp(at[:, 1]) < 1e-9 and (np.diff(at[:, 0]) > 0).all()
    for line in found.lines:
        assert not line.free or line.points[0][0] == line.points[-1][0] and line.points[-1][1] < line.points[0][1]


def test_a_ladder_has_two_rails_and_upright_rungs():
    at = centres(layout(SHOWCASE["ladder"]))
    rails = [{round(at[f"{rail}{k}"][1], 9) for k in range(1, 6)} for rail in "AB"]
    assert len(rails[0]) == len(rails[1]) == 1 and rails[0] != rails[1]
    assert all(at[f"A{k}"][0] == at[f"B{k}"][0] for k in range(1, 6))


def test_a_grid_is_square_a_ring_round_a_tree_level():
    at = centres(layout(SHOWCASE["grid"]))
    assert len({round(x, 6) for x, _ in at.values()}) == len({round(y, 6) for _, y in at.values()}) == 3
    ring = np.array(list(centres(layout(SHOWCASE["ring"])).values()))
    radii = np.hypot(*(ring - ring.mean(0)).T)
    assert np.ptp(radii) < 0.2 * radii.mean()
    tree = centres(layout(SHOWCASE["tree"]))
    assert len({round(tree[f"B{k}"][1], 6) for k in (1, 2, 3, 4)}) == 1 and tree["R"][1] > tree["A1"][1]


def test_the_joints_of_a_kronecker_product_are_left_and_right():
    d = sketch("l m, c d -> l c m d", "A W").group("l c", "lc").group("m d", "md")
    found = layout(d)
    at, (left, right) = centres(found), [line.points for line in found.lines if line.free]
    assert at["A"][0] == pytest.approx(at["W"][0]) and at["A"][1] > at["W"][1]
    middle = (at["A"][1] + at["W"][1]) / 2
    assert np.allclose([*left[:, 1], *right[:, 1]], middle) and left[1][0] < left[0][0] < right[0][0] < right[1][0]
    square = centres(layout(sketch("a b i, a c j, b d k, c d l -> i j k l", "A B C D")))
    assert len({round(x, 6) for x, _ in square.values()}) == len({round(y, 6) for _, y in square.values()}) == 2


def test_isometries_point_to_their_tips():
    found = {s.name: s for s in layout(SHOWCASE["canonical"]).shapes}
    assert [round(np.cos(found[f"A{k}"].angle)) for k in (1, 2, 4, 5, 6)] == [1, 1, -1, -1, -1]
    assert found["A3"].kind == "circle" and found["A1"].kind == "triangle"
    assert [s.kind for s in layout(SHOWCASE["svd"]).shapes] == ["triangle", "circle", "triangle", "dot"]
    assert np.cos(layout(SHOWCASE["isometry"]).shapes[0].angle) == pytest.approx(1), "to the right"


@pytest.mark.parametrize("name, shapes, lines", [
    ("vector", 1, 1), ("matrix", 1, 2), ("scalar", 1, 0), ("dot", 2, 1), ("outer", 2, 2), ("trace", 1, 1),
    ("wire", 0, 2), ("wire_trace", 0, 1), ("copy", 4, 4), ("sum", 2, 2), ("cp", 4, 6), ("svd", 4, 5), ("hole", 1, 4),
    ("parallel", 2, 4), ("grouped", 1, 2), ("joint", 3, 4), ("gauge_matrix", 4, 5), ("long_tensor", 1, 6)])  # fmt: skip
def test_wires_are_lines_and_copy_tensors_dots(name, shapes, lines):
    found = layout(SHOWCASE[name])
    assert (len(found.shapes), len(found.lines)) == (shapes, lines)


def test_grouped_legs_are_thick():
    for name, thick in (("grouped", ["ik"]), ("joint", ["ij"]), ("grouped_bond", ["bc"]), ("parallel", [])):
        assert [line.leg for line in layout(SHOWCASE[name]).lines if line.thick] == thick
    moved = SHOWCASE["grouped"].rename(ik="x").join(sketch("x y", "B", {"x": 4, "y": 2}))
    assert [line.leg for line in layout(moved).lines if line.thick] == ["x"], "a group stays one when renamed or joined"


@pytest.mark.parametrize("legs, bond", [("i k", False), ("i j", False), ("b c", True)])
def test_a_thick_line_does_not_touch_its_label(legs, bond):
    d = (SHOWCASE["parallel"] if bond else sketch("i j k", "T")).group(legs, "both")
    found, half = layout(d), 1.6 / 72  # of its width
    (line,), (text,) = [x for x in found.lines if x.thick], [x for x in found.labels if x.text.startswith("both")]
    assert not inside(dense(line.points), text.box, half + 0.01)


def test_parallel_legs_are_apart():
    lines = [line for line in layout(SHOWCASE["parallel"]).lines if not line.free]
    middle = [dense(line.points)[12] for line in lines]
    assert np.hypot(*(middle[0] - middle[1])) > 0.15 and not crossings(lines[0].points, lines[1].points)


@pytest.mark.parametrize("name", ["mlp", "nested", "frozen"])
def test_a_bubble_holds_what_is_within(name):
    found = layout(SHOWCASE[name])
    frames = {s.name: s for s in found.shapes if s.kind == "bubble"}
    held = [(s, frames[outer]) for s in found.shapes for outer in s.within]
    assert len(held) == {"mlp": 2, "nested": 6, "frozen": 4}[name]
    for s, frame in held:
        margin = (np.array(s.box) - frame.box) * (1, 1, -1, -1)
        assert (margin > 0).all()
    assert [s.frozen for s in frames.values()] == [name == "frozen"] * len(frames)
    assert {text.text for text in found.labels if text.role == "bubble"} == set(frames)


def test_what_a_bubble_leads_to_is_beside_it():
    sizes = {"query": 6, "key": 6, "m": 9, "n": 9, "head": 8, "e": 4, "d": 9}
    scores = sketch("query m, head m e, head n e, key n -> query key head", "X W_Q W_K Y", sizes)
    d = bubble(scores, None, "softmax").join(sketch("key m, head m e, head e d -> key head d", "X W_V W_O", sizes),
                                              ["query", "d"])
    found = layout(d)
    (frame,) = [s.box for s in found.shapes if s.kind == "bubble"]
    assert all(s.box[0] > frame[2] for s in found.shapes if not s.within and s.kind != "bubble")
    assert not tangles([line.points for line in found.lines])


def test_positions_are_kept():
    d = sketch("i j, j k, k l -> i l", "A B C")
    at = centres(layout(d, positions={"A": (0, 0), "B": (1, -1), "C": (3, 0)}))
    unit = at["B"][0] - at["A"][0]
    assert np.allclose(at["C"] - at["A"], (3 * unit, 0)) and np.allclose(at["B"] - at["A"], (unit, -unit))
    some = centres(layout(d, positions={"A": (0, 0), "C": (0, -2)}))
    assert some["A"][0] == pytest.approx(some["C"][0]) and some["A"][1] > some["C"][1]
    apart = layout(SHOWCASE["outer"], positions={"a": (0, 0)})
    assert not clashes(apart) and len(apart.shapes) == 2
    found = layout(sketch("i, i k -> i k", "v W"), positions={"i": (0, 0), "v": (0, 1), "W": (1, 0)})
    at, free = centres(found), {line.free: line.points[-1] for line in found.lines if line.free}
    assert at["v"][0] == pytest.approx(at["i"][0]) and at["v"][1] > at["i"][1], "a dot goes by its leg's name"
    assert at["W"][1] == pytest.approx(at["i"][1]) == free["i"][1] and free["i"][0] < at["i"][0] < at["W"][0]


def test_each_part_has_the_positions_of_what_is_in_it():
    d = sketch("i j, j k, k l -> i l", "A B C")
    found = page(d, "→", d.merge("A", "B"), positions={"A": (0, 0), "B": (1, 0), "C": (2, -1), "AB": (0, -1)})
    lone = layout(d, {"A": (0, 0), "B": (1, 0), "C": (2, -1)}), layout(d.merge("A", "B"), {"AB": (0, -1), "C": (2, -1)})
    for part, shapes in zip(lone, (found.shapes[:3], found.shapes[3:]), strict=True):
        alone, here = ([s.box[:2] for s in some] for some in (part.shapes, shapes))
        assert np.allclose(np.ptp(np.subtract(alone, here), axis=0), 0)
    with pytest.raises(ValueError, match="one of A, B, C, AB; there is no 'Z'"):
        draw(d, "→", d.merge("A", "B"), positions={"A": (0, 0), "Z": (1, 1)})


def test_labels_are_as_asked():
    d = sketch("i j, j k -> i k", "A B", {"i": 2, "j": 3, "k": 4})
    hows = ("free", "all", "names", "none")
    texts = {how: sorted(text.text for text in layout(d, labels=how).labels) for how in hows}
    assert texts == {"free": ["i 2", "j", "k 4"], "all": ["i 2", "j 3", "k 4"], "names": ["i", "j", "k"], "none": []}


def test_what_cannot_be_drawn_is_said():
    with pytest.raises(ValueError, match="one of A, B; there is no 'Z'"):
        layout(sketch("i j, j k", "A B"), positions={"Z": (0, 0)})
    with pytest.raises(ValueError, match='labels are "free", "all"'):
        draw(sketch("i", "v"), labels="some")


def test_a_figure_wraps_at_the_page_and_has_signs_and_captions():
    d = SHOWCASE["train"]
    parts = ((d, "a train"), "=", d, "→", d)
    found, figure = page(*parts), draw(*parts)
    assert figure.get_size_inches()[0] <= PAGE_WIDTH + 1e-9 and not clashes(found)
    assert {text.text for text in found.labels} >= {"a train", "=", "→"}
    assert sum(s.name == "A1" for s in found.shapes) == 3
    assert describe(*parts).startswith("Tensors: A1, an isometry") and "a train =" in describe(*parts)


def test_a_sign_goes_on_with_what_follows():
    d = SHOWCASE["train"]
    found = page("x =", d, "+", d)
    at = {text.text: text for text in found.labels if text.role == "sign"}
    (first, second) = [s.box for s in found.shapes if s.name == "A1"]
    assert at["x ="].x < first[0] and at["+"].x < second[0] and second[1] < at["+"].y < second[3] < first[1]


@pytest.mark.filterwarnings("error")
def test_saving_twice_does_not_warn():
    with plt.rc_context({"figure.constrained_layout.use": True}):
        figure = draw(SHOWCASE["matrix"])
        for kind in ("svg", "png"):
            figure.savefig(io.BytesIO(), format=kind)


def test_texts_are_where_the_layout_says():
    """The renderer's extents lie in the boxes that collisions are computed from."""
    figure = draw(SHOWCASE["head"])
    figure.canvas.draw()
    ax, found = figure.axes[0], page(SHOWCASE["head"])
    boxes = {text.text: text.box for text in found.labels}
    for text in ax.texts:
        if text.get_text() in boxes:
            left, bottom, right, top = text.get_window_extent().transformed(ax.transData.inverted()).extents
            want = boxes[text.get_text()]
            assert abs((left + right) / 2 - (want[0] + want[2]) / 2) < 0.03 and right - left < want[2] - want[0] + 0.04
            assert want[1] - 0.03 < bottom and top < want[3] + 0.03
        assert text.get_size() >= 7


def test_the_same_bytes_twice(tmp_path, monkeypatch):
    seen = []
    for folder in ("one", "two"):
        monkeypatch.setenv("TENSORLENS_FIGURES", str(tmp_path / folder))
        d = SHOWCASE["nested"]
        save_figure(draw((d, "twice"), "=", d), "01_nested", describe(d))
        seen.append([(tmp_path / folder / f"01_nested.{kind}").read_bytes() for kind in ("svg", "png")])
    assert seen[0] == seen[1]


def test_a_strip_has_a_picture_for_each_step():
    d = sketch("i j, j k, k -> i", "A B v", {"i": 2, "j": 3, "k": 4})
    parts = stages(d, ["B v", "A Bv"])
    assert [part[0].nodes[-1].name for part in parts[2::2]] == ["Bv", "ABv"]
    assert [part[1] for part in parts[2::2]] == ["24 operations\n3 entries", "12 operations\n2 entries"]
    assert d.cost(["B v", "A Bv"]).flops == 36
    buffer = io.BytesIO()
    strip(SHOWCASE["ladder"], "left to right").savefig(buffer)
    assert buffer.tell() > 1000


def test_a_notebook_shows_each_picture_once():
    start = "from tensorlens_utils.notation.drawing import draw\nfrom tensorlens_utils.notation import diagram\n" \
            "d = diagram('i j ->', A=None, sizes={'i': 2, 'j': 3})\n"
    sources = [start + "draw(d)", "figure = draw(d)", "draw(d)\nprint('more')", "figure"]
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    NotebookClient(nb, timeout=60).execute()
    shown = [sum("image/png" in out.get("data", {}) for out in cell.outputs) for cell in nb.cells]
    assert shown == [1, 1, 1, 1]
    (picture,) = nb.cells[0].outputs  # what it shows stands beside it in words, and screen readers get them
    words = describe(diagram("i j ->", A=None, sizes={"i": 2, "j": 3}))
    assert picture.data["text/plain"] == picture.metadata["image/png"]["alt"] == words
