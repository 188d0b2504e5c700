"""The examples' figures."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

BLUE, ORANGE, GREY = "#2166ac", "#d6604d", "0.45"


def coefficient_paths(path: Path, names: list[str], readings: list, fit) -> None:
    """Estimates with their 95 % bands as rows come in, and the batch fit."""
    counts, means, lowers, uppers = (
        np.stack([np.asarray(reading) for reading in column])
        for column in zip(*readings, strict=True)
    )
    num_rows = -(-len(names) // 3)
    figure, axes = plt.subplots(
        num_rows, 3, figsize=(11, 2.5 * num_rows), sharex=True, layout="constrained"
    )
    limits = fit.conf_int()
    for i, (axis, name) in enumerate(zip(axes.flat, names, strict=False)):
        band = axis.axhspan(*limits[i], color=ORANGE, alpha=0.25, lw=0)
        line = axis.axhline(fit.params[i], color=ORANGE, lw=1.5)
        batch = line, band
        band = axis.fill_between(
            counts, lowers[:, i], uppers[:, i], color=BLUE, alpha=0.2, lw=0
        )
        (line,) = axis.plot(counts, means[:, i], color=BLUE, lw=1.5)
        streamed = line, band
        axis.axhline(0, color=GREY, lw=0.8, ls=":")
        axis.set_title(name.replace("_", " "), fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    ticks = [200, 500, 1000, 2000, 5000]
    axes[0, 0].set_xscale("log")
    axes[0, 0].set_xlim(counts[0], counts[-1])
    axes[0, 0].set_xticks(ticks, [str(tick) for tick in ticks])
    axes[0, 0].set_xticks([], minor=True)
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    figure.supxlabel("rows seen", fontsize=10)
    figure.supylabel("coefficient (log-odds for one standard deviation)", fontsize=10)
    figure.legend(
        [streamed, batch],
        ["streamed: estimate and 95 % interval", "batch fit of all rows, the same"],
        loc="outside upper center",
        ncols=2,
        frameon=False,
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


def reliability(path: Path, bins: dict[str, np.ndarray]) -> None:
    """Accuracy against confidence, and how often a prediction is so confident.

    `bins[name]` is `(seeds, bins, 3)`: how many, sum of confidences, how many right.
    """
    figure, axes = plt.subplots(
        2,
        len(bins),
        figsize=(2.7 * len(bins), 4.3),
        sharex=True,
        sharey="row",
        height_ratios=(3, 1),
        layout="constrained",
    )
    for (top, bottom), (name, values) in zip(axes.T, bins.items(), strict=True):
        gaps = np.abs(values[:, :, 2] - values[:, :, 1]).sum(1)
        error = np.mean(gaps / values[:, :, 0].sum(1))
        count, confidence, right = values.sum(0).T
        seen = count >= 10  # an average of fewer says little
        top.plot([0, 1], [0, 1], color=GREY, lw=1, ls="--")
        top.plot(
            confidence[seen] / count[seen],
            right[seen] / count[seen],
            color=BLUE,
            lw=1.3,
            marker="o",
            ms=5,
        )
        top.set_title(name, fontsize=10)
        top.text(0.05, 0.92, f"ECE {error:.3f}", fontsize=9, transform=top.transAxes)
        top.set_ylim(0, 1.03)
        width = 1 / len(count)
        edges = width * np.arange(len(count))
        share = count / count.sum()
        bottom.bar(edges, share, width, align="edge", color=BLUE, alpha=0.5)
        bottom.set_xlim(0, 1)
        bottom.set_ylim(0, 1)
        bottom.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
        for axis in (top, bottom):
            axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("accuracy")
    axes[1, 0].set_ylabel("share")
    figure.supxlabel("confidence: the probability of the predicted digit", fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def rounds(path: Path, curves: dict[str, np.ndarray]) -> None:
    """Accuracy after each round, of all clients and of a half that changes.

    `curves[name]` is `(rounds,)`; a name that ends in "half missing" goes to the right.
    """
    figure, axes = plt.subplots(
        1, 2, figsize=(9, 3.8), sharex=True, sharey=True, layout="constrained"
    )
    axes[0].set_title("ten clients", fontsize=10)
    axes[1].set_title("five of ten, others each round", fontsize=10)
    styles: dict[str, dict] = {}
    for label, values in curves.items():
        name = label.removesuffix(", half missing")
        axis = axes[int(label != name)]
        if name not in styles:
            method, _, structure = name.partition(", ")
            color = {"merge": BLUE, "sites": ORANGE}.get(method, GREY)
            dashed = "--" if structure == "diagonal" else "-"
            styles[name] = {"color": color, "ls": dashed, "marker": "o", "ms": 3}
        numbers = np.arange(1, len(values) + 1)
        axis.plot(numbers, values, label=name, **styles[name])
    for axis in axes:
        axis.set_ylim(0, 100)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="0.9", lw=0.8)
    axes[0].set_ylabel("test accuracy, percent")
    figure.supxlabel("round", fontsize=10)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper center", ncols=len(labels), frameon=False
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


def label_curves(path: Path, step: int, panels: dict[str, dict]) -> None:
    """Accuracy against labels, mean and range over seeds, `(seeds, rounds)` each."""
    figure, axes = plt.subplots(
        1, len(panels), figsize=(5 * len(panels), 4), sharey=True, layout="constrained"
    )
    colors = dict.fromkeys(("most information", "most for the target"), BLUE) | {
        "random": GREY,
        "smallest margin": ORANGE,
        "k-centre": "#4d9221",
    }
    for axis, (title, curves) in zip(axes, panels.items(), strict=True):
        for name, values in curves.items():
            labels = step * np.arange(1, values.shape[1] + 1)
            dashed = "--" if name == "most information" and len(curves) == 3 else "-"
            style = {"color": colors[name], "ls": dashed}
            axis.plot(labels, 100 * values.mean(0), label=name, **style)
            low, high = 100 * values.min(0), 100 * values.max(0)
            axis.fill_between(labels, low, high, color=colors[name], alpha=0.15, lw=0)
        axis.set(title=title, xlabel="labels")
        axis.legend(frameon=False, loc="lower right")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="0.9", lw=0.8)
    axes[0].set_ylabel("test accuracy, percent; range of three runs")
    figure.savefig(path, dpi=130)
    plt.close(figure)
