"""How every figure of this project looks, and how it is saved with the numbers behind it.

One colour, one meaning, in all notebooks. `PALETTE` names them: the kinds of targets by how often the model has seen
them (dark = often, light = never), and the mitigations by hue. A mitigation's result under the prompts alone has the
lighter tint of its hue; with DoRI, the attack, the full colour (`mitigation_color`). The colours come from a search for
the largest smallest distance (CIELAB) under normal vision and full protanopia, deuteranopia and tritanopia (Machado et
al. 2009), which tests/test_plots.py computes again.

Sizes are in inches of the printed page: `COLUMN` is one column of a two-column paper, `PAGE` its full text width.
"""

import base64
import csv
import html
import io
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from PIL import Image
from sklearn.metrics import roc_curve

from dori_utils.core.bars import in_notebook
from dori_utils.core.folders import ROOT
from dori_utils.core.metrics import THRESHOLD as COPY  # an SSCD above this counts as a copy

KINDS = {"VM": "#2E002E", "TM": "#79167C", "ladder": "#CA2C74", "once": "#CC9E79", "twin": "#8EB2E2"}
KINDS |= {"control": "#BDBDBD"}
MITIGATIONS = {
    "original": "#555555",
    "NeMo": "#0055AA",
    "Wanda": "#AC3700",
    "fine-tuning": "#53984D",
    "ESD": "#C977AE",
    "Concept Ablation": "#E18704",
    "SISS": "#3DA6FF",
    "without attack inside": "#9944FF",  # fine-tuning's ablation
}
PALETTE = KINDS | MITIGATIONS

# Eight images of one picture, where there is no other way to tell them apart: Okabe and Ito (2008).
IMAGES = ["#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#000000"]
COLUMN, PAGE = 3.3, 6.8
DPI = 200
CAPTION = 7  # points, of what stands under an image
SCORES = LinearSegmentedColormap.from_list("scores", ["#E8E8E8", KINDS["VM"]])  # borders: SSCD 0 → 1, a verbatim copy
FIGURES = ROOT / "figures"  # committed: README shows them


def use_style() -> None:
    """Sets matplotlib's defaults for this project: small type that stays readable in a paper column, no chart junk."""
    plt.rcParams.update(
        {
            "figure.figsize": (COLUMN, 2.3),
            "figure.dpi": 150,
            "figure.constrained_layout.use": True,
            "font.size": 8,
            "axes.titlesize": 8,
            "legend.fontsize": 7,
            "legend.frameon": False,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "lines.linewidth": 1.4,
            "axes.prop_cycle": plt.cycler(color=list(MITIGATIONS.values())),
        }
    )


def lighter(color: str) -> str:
    """The tint that stands for a mitigation without the attack."""
    return to_hex([1 - 0.45 * (1 - channel) for channel in to_rgb(color)])


def mitigation_color(mitigation: str, dori: bool) -> str:
    """The colour of a mitigation's results: full with DoRI, lighter under the prompts alone."""
    return MITIGATIONS[mitigation] if dori else lighter(MITIGATIONS[mitigation])


def layer_label(name: str) -> str:
    """A layer of a U-Net's attention blocks in few letters: "down 1.0" is the first attention of the second block."""
    block, number, attention = re.search(r"(down|mid|up)_blocks?\.(?:(\d+)\.)?attentions\.(\d+)", name).groups()
    return block if number is None else f"{block} {number}.{attention}"


def figures_folder(default: Path = ROOT / "build" / "figures") -> Path:
    """Where figures go: the environment variable DORI_FIGURES, else by default build/figures/, which git ignores.

    So whoever tries a notebook changes no committed file. The commands that make `FIGURES` say so.
    """
    return Path(os.environ.get("DORI_FIGURES") or default)


def save_figure(fig: Figure, table: pd.DataFrame, name: str) -> None:
    """Writes NAME.png and, beside it, NAME.csv with the numbers that the figure shows; a notebook shows the PNG itself.

    Both go to `figures_folder`.

    The same figure and table give the same bytes: the PNG carries no date and no version, and the CSV has six
    significant digits, so that a rerun shows up in version control only where a result has changed.

    Args:
        table: what is drawn, a row for each mark. Its index is written if it means something (is no plain range), and
            what its `attrs` say of model, SSCD and version as lines with a # in front: read it with
            `pd.read_csv(path, comment="#")`.
        name: the stem of both files, such as "01_roc".

    Raises:
        ValueError: the table is empty, or the name has a folder or an ending in it.
    """
    if table.empty:
        raise ValueError(f"figure {name!r} has an empty table: pass the numbers that it shows")
    if not name or name != Path(name).stem:
        raise ValueError(f"{name!r} is no plain name: the folder is {figures_folder()}, the endings are added here")
    picture = io.BytesIO()
    fig.savefig(picture, format="png", dpi=DPI, bbox_inches="tight", metadata={"Software": None})
    folder = figures_folder()
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / f"{name}.csv", csv_text(table).encode())
    _replace(folder / f"{name}.png", picture.getvalue())
    if in_notebook():
        _show(fig, picture)


def _show(fig: Figure, picture: io.BytesIO) -> None:
    """Shows the picture in the notebook; closes the figure, which would be drawn once more at the end of the cell."""
    from IPython.display import Image as Shown
    from IPython.display import display

    display(Shown(picture.getvalue(), width=round(Image.open(picture).width * fig.dpi / DPI)))
    plt.close(fig)


def csv_text(table: pd.DataFrame) -> str:
    """A table as CSV, with its index if that means something, and its `attrs` as lines with a # in front.

    Texts are quoted if one has a # in it, which `pd.read_csv(path, comment="#")` would take for a comment.
    """
    hashed = table.select_dtypes(exclude="number").map(lambda text: "#" in str(text)).any(axis=None)
    quoting = csv.QUOTE_NONNUMERIC if hashed else csv.QUOTE_MINIMAL
    has_index = not isinstance(table.index, pd.RangeIndex)
    made_by = "".join(f"# {key}: {value}\n" for key, value in table.attrs.items())
    return made_by + table.to_csv(index=has_index, float_format="%.6g", lineterminator="\n", quoting=quoting)


def _replace(path: Path, content: bytes) -> None:
    """Writes the whole file or leaves the old one."""
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_bytes(content)
    unfinished.replace(path)


class _Grid(Figure):
    """A figure that a notebook shows once, also as a cell's last value, which IPython shows, and matplotlib again."""

    def _ipython_display_(self):
        picture = io.BytesIO()
        self.savefig(picture, format="png", dpi=DPI)
        _show(self, picture)


def image_grid(
    rows: Sequence[Sequence[Image.Image | None]],
    *,
    row_labels: Sequence[str] | None = None,
    column_labels: Sequence[str] | None = None,
    captions: Sequence[Sequence[str]] | None = None,
    scores: Sequence[Sequence[float | None]] | None = None,
    width: float = PAGE,
) -> Figure:
    """Images in rows and columns, with a border that tells how close to its training image each one is.

    Args:
        rows: images by row; None leaves a place empty. Rows may differ in length.
        row_labels: one for each row, left of it.
        column_labels: one for each column, above it.
        captions: a text under each image, in the shape of `rows`; by default its score.
        scores: SSCD in the shape of `rows`; None or NaN: no border. The border darkens from 0 to 1 and is
            thick for a copy (`metrics.THRESHOLD`).
        width: of the figure in inches.

    Raises:
        ValueError: labels, captions or scores that do not fit the images.
    """
    columns = max((len(row) for row in rows), default=0)
    if columns == 0:
        raise ValueError("no images to show")
    _check_shape("row_labels", row_labels, [0] * len(rows), nested=False)
    _check_shape("column_labels", column_labels, [0] * columns, nested=False)
    _check_shape("captions", captions, rows)
    _check_shape("scores", scores, rows)

    if captions is None and scores is not None:
        captions = [["" if _no_score(score) else f"{score:.2f}" for score in row] for row in scores]
    gap, line, small = 0.03, 1.2 * plt.rcParams["font.size"] / 72, 1.2 * CAPTION / 72  # inches; two heights of a line
    left = _lines(row_labels) * line + (gap if row_labels else 0)
    side = (width - left) / columns
    tops = [_lines(column_labels) * line + gap]
    for row in captions or [[]] * len(rows):
        tops.append(tops[-1] + side + _lines(row) * small + gap)

    # One Axes in inches: with one for each image, matplotlib takes seconds to lay out and draw a hundred.
    fig = plt.figure(figsize=(width, tops[-1]), layout="none", FigureClass=_Grid)
    ax = fig.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(tops[-1], 0))
    ax.axis("off")
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            if image is None:
                continue
            x, y = left + (j + 0.5) * side, tops[i] + side / 2
            _tile(ax, image, (x, y), side - 2 * gap, None if scores is None else scores[i][j])
            if captions is not None:
                ax.text(x, y + side / 2, captions[i][j], ha="center", va="top", fontsize=CAPTION)
    for top, label in zip(tops, row_labels or [], strict=False):
        ax.text(left - gap, top + side / 2, label, rotation=90, ha="right", va="center", multialignment="center")
    for j, label in enumerate(column_labels or []):
        ax.text(left + (j + 0.5) * side, tops[0], label, ha="center", va="bottom")
    return fig


def _check_shape(name: str, values, expected: Sequence, nested: bool = True) -> None:
    if values is None:
        return
    lengths = [len(row) for row in values] if nested else len(values)
    wanted = [len(row) for row in expected] if nested else len(expected)
    if lengths != wanted:
        raise ValueError(f"{name} do not fit the images: {lengths} for {wanted}")


def _no_score(score: float | None) -> bool:
    return score is None or bool(np.isnan(score))


def _lines(texts: Sequence[str] | None) -> int:
    """Lines of the longest text."""
    return max((text.count("\n") + 1 for text in texts or [] if text), default=0)


def _tile(ax: Axes, image: Image.Image, middle: tuple[float, float], side: float, score: float | None) -> None:
    """The image as large as fits into a square of that side, with a border if it has a score."""
    (x, y), scale = middle, side / max(image.size)
    width, height = scale * image.width, scale * image.height
    x, y = x - width / 2, y - height / 2
    ax.imshow(image, extent=(x, x + width, y + height, y), aspect="auto")
    if not _no_score(score):
        thickness = 3 if score > COPY else 1.2
        ax.add_patch(Rectangle((x, y), width, height, fill=False, ec=SCORES(float(score)), linewidth=thickness))


def interval_bars(
    ax: Axes,
    labels: Sequence[str],
    values: Sequence[float],
    intervals: Sequence[tuple[float, float]],
    colors: Sequence[str],
) -> None:
    """A bar for each label, with its confidence interval (low, high) as a thin line and its value above."""
    values, intervals = np.asarray(values, dtype=float), np.asarray(intervals, dtype=float)
    errors = np.abs(intervals.T - values)  # (low/high, bars): distances from the value
    ax.bar(range(len(labels)), values, yerr=errors, color=colors, error_kw={"elinewidth": 0.8, "capsize": 2})
    ax.set_xticks(range(len(labels)), labels)
    ax.margins(x=0.02)
    for x, (value, (_, high)) in enumerate(zip(values, intervals, strict=True)):
        ax.annotate(f"{value:z.2f}", (x, high), xytext=(0, 2), textcoords="offset points", ha="center", fontsize=6)


def attack_bars(axes: Sequence[Axes], summary: pd.DataFrame, colors: Mapping[str, str], paper: Mapping) -> None:
    """SSCD_Orig and memorization rate of each mitigation, with intervals: three bars, a legend above the figure.

    Args:
        axes: two, for the one and the other.
        summary: of `metrics.summarize` by mitigation, kind and attack.
        colors: mitigation → colour, in the order of the bars: lighter for the prompts, full with DoRI.
        paper: mitigation → SSCD_Orig and rate that the paper has with DoRI, drawn as marks; of those that it has.
    """
    summary = summary.set_index(["kind", "attack", "mitigation"]).sort_index()
    places = np.arange(len(colors))
    tints = [lighter(color) for color in colors.values()]
    bars = {  # label → kind and attack, colours
        "prompts": (("VM", "none"), tints),
        "DoRI": (("VM", "DoRI"), list(colors.values())),
        "control + DoRI": (("control", "DoRI"), [PALETTE["control"]] * len(colors)),
    }
    columns = {"SSCD_Orig": ("sscd", "sscd_low", "sscd_high"), "memorization rate": ("rate", "low", "high")}
    for ax, (title, names), published in zip(axes, columns.items(), (0, 1), strict=True):
        for number, (key, own_colors) in enumerate(bars.values()):
            values, low, high = summary.loc[key].loc[list(colors), list(names)].to_numpy().T
            errors, line = np.abs([low - values, high - values]), {"elinewidth": 0.6}
            ax.bar(places + (number - 1) * 0.28, values, 0.28, yerr=errors, color=own_colors, error_kw=line)
        marks = [paper[name][published] if name in paper else np.nan for name in colors]
        ax.scatter(places, marks, color="black", marker="D", s=9, zorder=3, clip_on=False)  # whole, also at 0
        ax.set_xticks(places, list(colors))
        ax.set(ylim=(0, 1.1), title=title)
    handles = [Patch(color=own_colors[-1], label=label) for label, (_, own_colors) in bars.items()]
    handles.append(Line2D([], [], color="black", marker="D", markersize=3, linewidth=0, label="paper, with DoRI"))
    axes[0].figure.legend(handles=handles, loc="outside upper center", ncols=4)


def curve_with_interval(ax: Axes, x, y, low, high, *, color: str, label: str | None = None, **line) -> None:
    """A curve through the points, with the interval from `low` to `high` as a band behind it."""
    ax.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
    ax.plot(x, y, color=color, label=label, marker="o", markersize=2.5, **line)


def roc_curves(ax: Axes, scores: Mapping[str, Sequence[float]], *, controls: str = "control", labels=None) -> None:
    """The ROC curve of each kind of target against the controls, in the kind's colour.

    Args:
        scores: what a detector says of the targets, by kind; higher means memorized.
        controls: the kind that all others are told apart from.
        labels: the legend's text by kind, such as "VM 0.97 (0.92 to 1.00)"; by default the kind.
    """
    for kind in (kind for kind in scores if kind != controls):
        memorized = np.r_[np.ones(len(scores[kind])), np.zeros(len(scores[controls]))]
        false_positives, true_positives, _ = roc_curve(memorized, np.r_[scores[kind], scores[controls]])
        label = (labels or {}).get(kind, kind)
        ax.plot(false_positives, true_positives, color=PALETTE[kind], label=label, clip_on=False)
    ax.plot([0, 1], [0, 1], color=PALETTE[controls], linewidth=0.8, linestyle="--")
    ax.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", xlabel="false positive rate", ylabel="true positive rate")
    ax.legend(loc="lower right")


def region_map(ax: Axes, image: Image.Image, similarity: np.ndarray) -> None:
    """An image, and in the middle of each of its regions how alike it is, of a map (G, G), see core.regions."""
    side = len(similarity)
    shares = 0.25 + 0.5 * np.arange(side) / max(1, side - 1)  # middles of windows that are half as wide as the image
    x, y = np.meshgrid(shares * image.width, shares * image.height)
    ax.imshow(image, extent=(0, image.width, image.height, 0))
    ax.scatter(x, y, c=similarity, cmap="cividis", vmin=0, vmax=1, s=260, edgecolors="white")
    for left, top, value in zip(x.flat, y.flat, similarity.flat, strict=True):
        color = "black" if value > 0.6 else "white"
        ax.text(left, top, f"{value:.2f}", color=color, fontsize=6, ha="center", va="center")
    ax.set_axis_off()


def interactive_map(points: np.ndarray, colors: Sequence[str], labels: Sequence[str], images: Sequence[Image.Image]):
    """A scatter plot (N, 2) that shows an image and a label under the mouse; its last line in a cell displays it.

    The HTML holds everything, so it also works without a network and in an exported notebook.
    """
    from bokeh.embed import file_html
    from bokeh.models import ColumnDataSource, HoverTool
    from bokeh.plotting import figure
    from bokeh.resources import INLINE
    from IPython.display import HTML

    data = {"x": points[:, 0], "y": points[:, 1], "color": list(colors), "label": list(labels)}
    data["image"] = [_data_url(image) for image in images]
    plot = figure(width=620, height=440, tools="pan,wheel_zoom,box_zoom,reset", toolbar_location="above")
    dots = plot.scatter("x", "y", color="color", size=9, alpha=0.85, source=ColumnDataSource(data))
    tooltip = '<div><img src="@image" width="128" height="128"><br>@label</div>'
    plot.add_tools(HoverTool(tooltips=tooltip, renderers=[dots], attachment="horizontal"))
    plot.axis.visible, plot.grid.visible = False, False
    page = html.escape(file_html(plot, INLINE, "map"), quote=True)
    return HTML(f'<div><iframe srcdoc="{page}" width="660" height="480" style="border:0"></iframe></div>')


def _data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="webp", quality=80)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
