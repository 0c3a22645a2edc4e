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


def signed(value, digits=1):
    """A number with its sign, the minus as long as the plus; without one where rounding leaves nothing of it.

    >>> signed(1.54), signed(-0.26), signed(-0.01)
    ('+1.5', '−0.3', '0.0')
    """
    text = f"{value:+.{digits}f}".replace("-", "\N{MINUS SIGN}")
    return text[1:] if float(f"{value:.{digits}f}") == 0 else text


def cells(ax, values, columns, rows=(), texts=None, *, top=None, grey=(), fontsize=8, both=None):
    """Draw a small table of numbers (R, C) as coloured cells with a text in each: a heat map, or coloured words.

    Signed values get white at zero, red above it and blue below; values of one sign get the sequential map.

    Args:
        ax: matplotlib axes.
        values: (R, C), any array or CPU tensor; NaN leaves a cell empty.
        columns, rows: labels, above and to the left.
        texts: (R, C) strings; None: the numbers, signed where the map is.
        top: the value at the end of the colours; None: the largest of `values`.
        grey: (r, c) of cells on a grey ground, whatever their value: such as the bias beside the tokens.
        fontsize: of all texts.
        both: whether values can be of either sign; None: whether they are.

    Returns:
        The AxesImage.
    """
    values = np.asarray(values, dtype=float)
    both = np.nanmin(values) < 0 if both is None else both
    top = top or float(np.nanmax(np.abs(values)))
    colours = {**diverging(values), "vmin": -top, "vmax": top} if both else {"cmap": SEQUENTIAL, "vmin": 0, "vmax": top}
    ground = values.copy()
    for cell in grey:
        ground[cell] = np.nan
        ax.add_patch(mpl.patches.Rectangle((cell[1] - 0.5, cell[0] - 0.5), 1, 1, color="0.85", lw=0))
    image = ax.imshow(ground, aspect="auto", **colours)
    for (r, c), value in np.ndenumerate(values):
        if np.isnan(value):
            continue
        red, green, blue, alpha = image.cmap(image.norm(ground[r, c])) if (r, c) not in grey else (1, 1, 1, 1)
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
        text = texts[r][c] if texts is not None else signed(value) if both else f"{value:.1f}"
        ax.text(c, r, text, ha="center", va="center", color="white" if dark else "black", fontsize=fontsize)
    ax.set_xticks(range(len(columns)), columns, fontsize=fontsize)
    ax.set_yticks(range(len(rows)), rows, fontsize=fontsize)
    ax.xaxis.tick_top()
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set_xticks(np.arange(values.shape[1] - 1) + 0.5, minor=True)
    ax.set_yticks(np.arange(values.shape[0] - 1) + 0.5, minor=True)
    ax.grid(which="minor", color="white", lw=1.5)
    ax.tick_params(which="minor", length=0)
    return image


def staircase(ax, parts, total, grey=()):
    """Draw numbers that add up to `total` as bars, one upon the other from left to right: red adds, blue takes away.

    `grey` holds the places of bars that are neither, such as the bias; a dashed line marks the total.
    """
    parts = np.asarray(parts, dtype=float)
    ends = parts.cumsum()
    red, blue = mpl.colormaps[DIVERGING]([0.85, 0.15])
    colours = ["0.6" if i in grey else red if part > 0 else blue for i, part in enumerate(parts)]
    ax.bar(range(len(parts)), parts, bottom=ends - parts, color=colours)
    for i, end in enumerate(ends[:-1]):
        ax.plot([i + 0.4, i + 0.6], [end, end], color="0.4", lw=0.8)
    ax.axhline(total, color="black", lw=0.8, ls="--", zorder=0)
    low, high = min(0, ends.min()), max(0, ends.max())
    ax.set_ylim(low - 0.05 * (high - low), high + 0.08 * (high - low))


def whisker(ax, place, triple, colour=PALETTE[0], marker="o", upright=False, **label):
    """A point with its interval, `triple` = (value, low, high), at `place` of the other axis; upright: along y.

    Several at once: places (n,) and triples (3, n), which have one entry in the legend.
    """
    place, (value, *ends) = np.atleast_1d(place), np.reshape(triple, (3, -1))
    (ax.vlines if upright else ax.hlines)(place, *ends, color=colour, lw=1.3)
    ax.plot(*((place, value) if upright else (value, place)), marker, color=colour, ms=4.5, **label)


def log_ticks(ax, x=None, y=None):
    """Make axes logarithmic, with ticks at these numbers, written out in full, and no others: x, y or both."""
    for axis, set_scale, ticks in [(ax.xaxis, ax.set_xscale, x), (ax.yaxis, ax.set_yscale, y)]:
        if ticks is not None:
            set_scale("log")
            axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
            axis.minorticks_off()


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
    with mpl.rc_context(_STABLE | {"figure.constrained_layout.use": False}):  # what the figure has, it keeps
        fig.savefig(svg, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
        fig.savefig(folder / f"{name}.png", metadata={"Software": None, "Description": caption})
    title = re.split(r"(?<=[.!?]) ", caption)[0]
    spoken = (f' role="img" aria-labelledby="title desc">\n <title id="title">{escape(title)}</title>\n'
              f' <desc id="desc">{escape(caption)}</desc>')
    head, tag, rest = svg.getvalue().partition("<svg")
    attributes, _, drawing = rest.partition(">")
    (folder / f"{name}.svg").write_text(head + tag + attributes + spoken + drawing, encoding="utf-8", newline="\n")
    print(textwrap.fill(f"figures/{name}.svg: {caption}", 100))
