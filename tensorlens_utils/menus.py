"""Menus over one picture: alive where a kernel runs, and a still of it where none does.

The menus set the value of one HTML widget. Nothing here is an Output widget or `interact`, whose pictures are lost when
a notebook is run unattended; beside the live view a notebook gets a PNG and one fixed line of text. So JupyterLab shows
the menus; GitHub, nbconvert and a notebook that was not run yet show the picture that they began with.

`exploring.py` has the explorer of attributions, `lenses/exploring.py` that of heads.
"""

import base64
import io
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from textwrap import shorten
from typing import Any

import ipywidgets as widgets
import matplotlib as mpl
from matplotlib.figure import Figure

from .plotting import use_style

Menu = Sequence | Callable[..., Sequence] | widgets.ValueWidget


class Explorer(widgets.VBox):
    """Menus by name, and one picture of what they choose.

    While a picture is made the menus are disabled. An error is shown in its place, the traceback folded away, and the
    menus stay; an error in the first picture is raised.

    Args:
        menus: name -> its options, values or (label, value) pairs; or a function that takes the choices of the menus
            before it by name, and gives such options: when they change, the first is chosen; or a widget with a
            `value`, such as a text field.
        render: takes the choices by name, and gives HTML or SVG (`svg` makes it of a figure). Let it remember what is
            costly (`functools.cache`).
        still: takes the same, and gives the picture as a matplotlib Figure, for where no kernel runs. Both run in the
            figures' style.
        what: what can be chosen, in a few words that never change, for where no picture can be shown.

    Attributes:
        controls: name -> widget; set its `.value` to choose from code.
        choices: name -> value, as they stand.
        view: the HTML widget that shows the picture; status: the one that tells what is going on.

    >>> def table(n):
    ...     return "<br>".join(f"{n} × {k} = {n * k}" for k in range(1, 4))
    >>> board = Explorer({"n": [1, 2, 3]}, table, lambda n: Figure(), "multiplication tables")
    >>> board.controls["n"].value = 3
    >>> board.view.value
    '3 × 1 = 3<br>3 × 2 = 6<br>3 × 3 = 9'
    >>> print(board._repr_mimebundle_()["text/plain"])
    [interactive: multiplication tables; run this notebook to use the menus]
    """

    def __init__(self, menus: Mapping[str, Menu], render: Callable[..., str], still: Callable[..., Figure], what: str):
        self._menus, self._render, self._still, self._what = menus, render, still, what
        self._busy, self._shown = True, {}  # what the picture shows
        look = {"layout": {"width": "max-content", "max_width": "98%"}, "style": {"description_width": "initial"}}
        self.controls = {name: menu if isinstance(menu, widgets.Widget) else widgets.Dropdown(description=name, **look)
                         for name, menu in menus.items()}  # fmt: skip
        self.status, self.view = widgets.HTML(), widgets.HTML()
        row = widgets.HBox([*self.controls.values()], layout={"flex_flow": "row wrap", "grid_gap": "0 12px"})
        super().__init__([row, self.status, self.view])
        self._show()
        self._busy = False
        for control in self.controls.values():
            control.observe(self._changed, "value")

    @property
    def choices(self) -> dict[str, Any]:
        return {name: control.value for name, control in self.controls.items()}

    def _show(self):
        """Bring the menus up to date, from the first to the last, and then the picture."""
        before = {}
        for name, menu in self._menus.items():
            control = self.controls[name]
            if not isinstance(menu, widgets.Widget):
                options = tuple(menu(**before) if callable(menu) else menu)
                if not options:
                    raise ValueError(f"a menu has one option at least, and {name!r} has none for {before}")
                if options != control.options:
                    control.options = options
                    control.index = 0
            before[name] = control.value
        with _style():
            self.view.value = self._render(**before)
        self._shown = before

    def _changed(self, change):
        if self._busy:  # a menu that follows another
            return
        self._busy = True
        for control in self.controls.values():
            control.disabled = True
        self.status.value = "<i>computing …</i>"
        try:
            self._show()
            self.status.value = ""
        except (Exception, KeyboardInterrupt) as error:
            words, trace = (escape(text) for text in (f"{type(error).__name__}: {error}", traceback.format_exc()))
            self.view.value = ""  # what stood there was of other choices
            self.status.value = (f'<div style="color:#b2182b;line-height:1.4"><b>{words}</b><details><summary>where'
                                 f"</summary><pre>{trace}</pre></details></div>")  # fmt: skip
        finally:
            for control in self.controls.values():
                control.disabled = False
            self._busy = False

    def _repr_mimebundle_(self, **kwargs):
        data = super()._repr_mimebundle_(**kwargs)
        file = io.BytesIO()
        with _style():
            self._still(**self._shown).savefig(file, format="png", dpi=100, metadata={"Software": None})
        return {**data, "image/png": base64.b64encode(file.getvalue()).decode(),
                "text/plain": f"[interactive: {self._what}; run this notebook to use the menus]"}  # fmt: skip


def by_name(examples: Sequence | Mapping[str, Any]) -> dict[str, Any]:
    """Texts or images with a name each, for a menu: those of a dict, or of a list by their number and first words.

    Raises ValueError where there is none.

    >>> [*by_name(["a dull film", "a moving one"])]
    ['0: a dull film', '1: a moving one']
    """
    if isinstance(examples, str) or not len(examples):
        raise ValueError(f"examples are texts or images, one or more, in a list or by name; not {examples!r:.40}")
    if isinstance(examples, Mapping):
        return dict(examples)
    return {f"{i}: {shorten(e, 50, placeholder=' …')}" if isinstance(e, str) else f"image {i}": e
            for i, e in enumerate(examples)}  # fmt: skip


def typed() -> widgets.Text:
    """A field for a text of one's own, beside a menu of examples; see `typed_or_chosen`."""
    return widgets.Text(description="text", placeholder="or type your own, and Enter", continuous_update=False,
                        style={"description_width": "initial"})  # fmt: skip


def typed_or_chosen(board: Explorer) -> Explorer:
    """Empties the field "text", where there is one, when another "example" is chosen."""
    if "text" in board.controls:
        board.controls["example"].observe(lambda change: board.controls["text"].set_trait("value", ""), "value")
    return board


@contextmanager
def _style():
    """The figures' style inside, and whatever the notebook has set afterwards."""
    with mpl.rc_context():
        use_style()
        yield


def svg(figure: Figure) -> str:
    """A matplotlib figure as SVG for a page, its words as text."""
    file = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none"}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return file.getvalue()[file.getvalue().index("<svg"):]
