"""The style that all figures share, and the one way to save them.

    use_style()
    fig, ax = plt.subplots(figsize=size(0.5))
    image = ax.imshow(scores, **diverging(scores))
    save_figure(fig, "02_digit_split", "The score of one digit, split over its patches. Red adds, blue takes away.")
"""
import io
import os
import re
import textwrap
from html import escape
from pathlib import Path

import matplotlib as mpl
import numpy as np

# Okabe and Ito's palette, told apart with any kind of colour vision; yellow comes last because it is faint on white
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#F0E442")
SEQUENTIAL = "cividis"      # even in lightness, alike with any kind of colour vision
DIVERGING = "RdBu_r"        # white at zero, red above it, blue below
PAGE_WIDTH = 6.75           # inches: the text width of a two-column paper

# glyphs as paths and a fixed salt, so that neither the machine's fonts nor the hour shows in a file
_STABLE = {"svg.fonttype": "path", "svg.hashsalt": "tensorlens"}


def use_style():
    """Set matplotlib's defaults to the style of the series; whatever a user's matplotlibrc says is put aside first."""
    mpl.rcdefaults()
    mpl.rcParams.update({
        **_STABLE, "font.family": "DejaVu Sans", "font.size": 9, "axes.titlesize": 10, "axes.labelsize": 9,
        "legend.fontsize": 8, "xtick.labelsize": 8, "ytick.labelsize": 8, "figure.figsize": size(), "figure.dpi": 100,
        "savefig.dpi": 150, "figure.constrained_layout.use": True, "axes.prop_cycle": mpl.cycler(color=PALETTE),
        "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left", "image.cmap": SEQUENTIAL,
        "image.interpolation": "nearest", "lines.linewidth": 1.6, "legend.frameon": False})


def size(width=1.0, aspect=0.45):
    """(width, height) in inches: `width` as a share of the page's width, `aspect` the height as a share of the same."""
    return PAGE_WIDTH * width, PAGE_WIDTH * aspect


def diverging(values):
    """The `cmap`, `vmin` and `vmax` that show signed values (any array or CPU tensor) with white at zero."""
    top = float(np.abs(np.asarray(values, dtype=float)).max(initial=0.0)) or 1.0
    return {"cmap": DIVERGING, "vmin": -top, "vmax": top}


def figures_dir():
    """Where figures go: $TENSORLENS_FIGURES, which `make` sets, else build/figures of the repository, else ./figures.

    Nobody but `make` writes to the repository's figures/, as nobody else writes to notebooks/.
    """
    repository = Path(__file__).resolve().parents[1]
    home = repository / "build" if (repository / "notebooks").is_dir() else Path.cwd()
    return Path(os.environ.get("TENSORLENS_FIGURES") or home / "figures")


def save_figure(fig, name, caption):
    """Write NAME.svg and NAME.png to `figures_dir()`, the same bytes for the same figure, and print the caption.

    Args:
        fig: a matplotlib figure; it stays open, so that the notebook shows it.
        name: lower-case letters, digits and underscores, beginning with the notebook's number: "02_digit_split".
        caption: what the figure shows, also for those who cannot see it: its first sentence becomes the SVG's title,
            the whole its description. State no number in it that another machine would round differently.

    Raises:
        ValueError: for a name of another form, or an empty caption.
    """
    if not re.fullmatch(r"\d\d_[a-z0-9_]+", name):
        raise ValueError(f"a figure is named NN_what in lower case, as in '02_digit_split'; got {name!r}")
    caption = " ".join(caption.split())
    if not caption:
        raise ValueError(f"a figure has a caption, which screen readers read out; '{name}' has none: say what it shows")
    folder = figures_dir()
    folder.mkdir(parents=True, exist_ok=True)
    svg = io.StringIO()
    with mpl.rc_context(_STABLE):
        fig.savefig(svg, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
        fig.savefig(folder / f"{name}.png", metadata={"Software": None, "Description": caption})
    title = re.split(r"(?<=[.!?]) ", caption)[0]
    spoken = (f' role="img" aria-labelledby="title desc">\n <title id="title">{escape(title)}</title>\n'
              f' <desc id="desc">{escape(caption)}</desc>')
    head, tag, rest = svg.getvalue().partition("<svg")
    attributes, _, drawing = rest.partition(">")
    (folder / f"{name}.svg").write_text(head + tag + attributes + spoken + drawing, encoding="utf-8", newline="\n")
    print(textwrap.fill(f"figures/{name}.svg: {caption}", 100))
