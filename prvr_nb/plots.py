"""Colours, curves and matrices, the same everywhere."""

import io
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

# Okabe and Ito's colours with a dark grey for their black, told apart with any kind of colour vision.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#555555")

COLOUR = {
    "text": "#0072B2",
    "video": "#D55E00",
    "teacher": "#555555",
    "baseline": "#E69F00",
    "full": "#009E73",
    "moment": "#CC79A7",
}


def use_style():
    "Set matplotlib's defaults for all figures of the project."
    plt.rcParams.update(
        {
            "figure.dpi": 90,
            "savefig.bbox": "tight",
            "figure.constrained_layout.use": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": "medium",
            "axes.titlelocation": "left",
            "image.cmap": "viridis",
            "axes.prop_cycle": plt.cycler(color=PALETTE),
        }
    )


def show_small(
    colours: int = 64,  # at most
):
    "Show the current figure as a PNG of few colours."
    from IPython.display import Image, display
    from PIL import Image as Picture

    drawn, small = io.BytesIO(), io.BytesIO()
    plt.savefig(drawn)
    plt.close()
    Picture.open(drawn).convert("RGB").quantize(colours).save(small, "PNG", optimize=True)
    display(Image(small.getvalue()))


def colour_of(
    index: int,  # number of an event, a clip or a video
) -> str:  # hex colour
    "The colour of the index-th thing; they repeat after eight."
    return PALETTE[int(index) % len(PALETTE)]


# Boxes of the method: name → left edge, height of the middle, width. Text on top, video below, losses on the right.
BOXES = {
    "teacher": (0.0, 2.0, 1.2),
    "query": (0.0, 1.0, 1.2),
    "tokens": (0.0, 0.0, 1.2),
    "frame branch": (1.7, 0.35, 1.4),
    "clip branch": (1.7, -0.35, 1.4),
    "segments": (3.6, -0.7, 1.2),
    "scores": (3.6, 0.65, 1.2),
    "TCPL": (5.3, 1.5, 1.1),
    "L_base": (5.3, 0.65, 1.1),
    "CBVA": (5.3, -0.35, 1.1),
}
ARROWS = (
    ("teacher", "TCPL"),
    ("query", "TCPL"),
    ("query", "scores"),
    ("tokens", "frame branch"),
    ("tokens", "clip branch"),
    ("frame branch", "scores"),
    ("clip branch", "scores"),
    ("clip branch", "segments"),
    ("frame branch", "CBVA"),
    ("segments", "CBVA"),
    ("scores", "L_base"),
)


def method_strip(
    *lit: str,  # names from BOXES
) -> Figure:  # boxes and arrows
    "The whole method in one picture, with this lesson's boxes lit."
    unknown = [name for name in lit if name not in BOXES]
    if unknown:
        raise ValueError(f"no box is called {', '.join(unknown)}; the boxes are {', '.join(BOXES)}")
    fig, ax = plt.subplots(figsize=(8, 2.2), dpi=75)
    for start, end in ARROWS:
        (x0, y0, width), (x1, y1, _) = BOXES[start], BOXES[end]
        ax.annotate("", (x1 - 0.02, y1), (x0 + width + 0.02, y0), arrowprops={"arrowstyle": "->", "color": "0.5"})
    for name, (x, y, width) in BOXES.items():
        here = name in lit
        ax.add_patch(
            FancyBboxPatch(
                (x, y - 0.22),
                width,
                0.44,
                boxstyle="round,pad=0.02",
                edgecolor="0.4",
                facecolor=PALETTE[1] if here else "white",
            )
        )
        ax.text(x + width / 2, y, name, ha="center", va="center", fontsize=9, weight="bold" if here else "normal")
    ax.set(xlim=(-0.1, 6.5), ylim=(-1.05, 2.35))
    ax.axis("off")
    return fig


def strips(
    rows: dict,  # name → (L,) integer labels over time, −1 for nothing
    title: str = "",  # the claim
    xlabel: str = "time",  # unit of the axis
    ax: Axes | None = None,  # drawn into this, or into a new figure
) -> Axes:
    "Label sequences as coloured strips, one under the other, all stretched to the same length."
    ax = ax or plt.subplots(figsize=(9, 0.5 + 0.45 * len(rows)))[1]
    for y, labels in enumerate(rows.values()):
        labels = np.asarray(labels)
        starts = np.flatnonzero(np.diff(labels, prepend=labels[0] - 1))
        ends = np.append(starts[1:], len(labels))
        for start, end in zip(starts, ends, strict=True):
            if labels[start] >= 0:
                ax.broken_barh(
                    [(start / len(labels), (end - start) / len(labels))],
                    (y - 0.4, 0.8),
                    facecolor=colour_of(labels[start]),
                    edgecolor="white",
                    linewidth=0.8,
                )
    ax.set(
        yticks=range(len(rows)),
        yticklabels=list(rows),
        ylim=(len(rows) - 0.5, -0.5),
        xlim=(0, 1),
        xlabel=xlabel,
        title=title,
    )
    return ax


def similarity_map(
    matrix,  # (N, N) similarities
    groups: Sequence[int] | None = None,  # (N,) group of each row; lines are drawn where it changes
    title: str = "",  # the claim
    label: str = "cosine",  # what the colours mean
    vmin: float | None = None,  # value of the darkest colour
    vmax: float | None = None,  # value of the brightest colour
    ax: Axes | None = None,  # drawn into this, or into a new figure
) -> Axes:
    "A similarity matrix as a heat map."
    ax = ax or plt.subplots(figsize=(4.2, 3.6))[1]
    image = ax.imshow(np.asarray(matrix), vmin=vmin, vmax=vmax, interpolation="nearest")
    if groups is not None:
        for edge in np.flatnonzero(np.diff(np.asarray(groups))) + 0.5:
            ax.axhline(edge, color="white", linewidth=0.6)
            ax.axvline(edge, color="white", linewidth=0.6)
    ax.set(title=title, xticks=[], yticks=[])
    ax.figure.colorbar(image, ax=ax, label=label, shrink=0.8)
    return ax


def curves(
    series: dict,  # name → (epochs,) values
    title: str = "",  # the claim
    ylabel: str = "SumR",  # quantity and unit
    xlabel: str = "epoch",  # unit of the axis
    ax: Axes | None = None,  # drawn into this, or into a new figure
) -> Axes:
    "One line per series; 'baseline', 'full' and 'teacher' have their colours."
    ax = ax or plt.subplots(figsize=(5, 3))[1]
    for i, (name, values) in enumerate(series.items()):
        ax.plot(np.arange(len(values)), values, label=name, color=COLOUR.get(name, colour_of(i)))
    ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
    ax.xaxis.get_major_locator().set_params(integer=True)  # there is no epoch 2.5
    if len(series) > 1:
        ax.legend(frameon=False)
    return ax


def relevance_curve(
    scores,  # (L,) similarity of a query with each token of a video
    moment: tuple | None = None,  # (start, end) of the annotated moment, in seconds
    duration: float = 1.0,  # of the video, in seconds
    title: str = "",  # the claim
    ax: Axes | None = None,  # drawn into this, or into a new figure
) -> Axes:
    "Relevance over the whole video, the best token marked and the annotated moment shaded."
    ax = ax or plt.subplots(figsize=(6, 1.6))[1]
    scores = np.asarray(scores)
    time = (np.arange(len(scores)) + 0.5) * duration / len(scores)
    if moment:
        ax.axvspan(*moment, color=COLOUR["moment"], alpha=0.3, label="annotated moment")
    ax.plot(time, scores, color=COLOUR["text"])
    ax.plot(time[scores.argmax()], scores.max(), "v", color=COLOUR["video"], label="best token")
    ax.set(title=title, xlabel="seconds", ylabel="cosine", xlim=(0, duration))
    return ax
