"""The loss curves of the optimisers' benchmark, against steps and against seconds."""

from collections.abc import Mapping
from pathlib import Path

from optimizer_training import Trained


def save(found: Mapping[str, Mapping[str, Trained]], path: Path) -> None:
    """A column for each problem; says so where Matplotlib is not installed."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print("no plot: Matplotlib is not installed.")
        return
    fig, axes = plt.subplots(
        2,
        len(found),
        figsize=(max(7, 4.2 * len(found)), 6.4),
        layout="constrained",
        squeeze=False,
    )
    for column, (problem, curves) in zip(axes.T, found.items(), strict=True):
        for number, (name, curve) in enumerate(curves.items()):
            style = {"label": name, "color": f"C{number}", "linewidth": 1.4}
            times = [curve.seconds_at(step) for step in curve.steps]
            column[0].loglog(curve.steps, curve.losses, **style)
            column[1].loglog(times, curve.losses, **style)
        column[0].set(title=problem, xlabel="steps", ylabel="training loss")
        column[0].title.set_fontsize(9)
        column[1].set(xlabel="seconds", ylabel="training loss")
        for ax in column:
            ax.spines[["top", "right"]].set_visible(False)
    fig.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=6
    )
    fig.savefig(path, dpi=120)
    print(f"curves in {path}")
