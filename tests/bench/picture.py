"""Loss curves of several arms in one picture."""

from collections.abc import Iterator
from pathlib import Path

COLOURS = {"ours": "#1f5a96", "stock": "#c2571a", "ours-again": "#8a8a8a", "ours-fp8": "#2f7d4f"}
NAMES = {
    "ours": "ours",
    "stock": "stock stack",
    "ours-again": "ours, other first weights and dropout",
    "ours-fp8": "ours in fp8",
}


def draw(losses: dict[str, list[float]], path: Path) -> None:
    """Above: the loss of each step (thin line) and its running mean. Below: the difference from ours at each step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from train.evaluation.report import smoothed

    figure, (above, below) = pyplot.subplots(
        2, 1, figsize=(9, 7), dpi=150, sharex=True, height_ratios=[3, 1], layout="constrained"
    )
    for arm, values in _in_drawing_order(losses):
        steps = range(1, len(values) + 1)
        above.plot(steps, values, color=COLOURS[arm], linewidth=0.6, alpha=0.35)
        style = "--" if arm in ("stock", "ours-fp8") else "-"
        above.plot(steps, smoothed(values), color=COLOURS[arm], linewidth=2, label=NAMES[arm], linestyle=style)
        if arm != "ours" and "ours" in losses:
            difference = [b - a for a, b in zip(losses["ours"], values)]
            label = f"{NAMES[arm]} − ours"
            below.plot(range(1, len(difference) + 1), difference, color=COLOURS[arm], linewidth=0.9, label=label)
    above.set(ylabel="loss (nats per labelled token)", title="The same base, data, order and first weights")
    above.legend(frameon=False)
    below.axhline(0, color="#444444", linewidth=0.8)
    below.set(xlabel="optimizer step", ylabel="difference")
    below.legend(frameon=False, fontsize="small")
    for axes in (above, below):
        axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    pyplot.close(figure)


def _in_drawing_order(losses: dict[str, list[float]]) -> Iterator[tuple[str, list[float]]]:
    """The arms in the order of drawing: the most important one last, on top."""
    for arm in ("ours-again", "ours", "stock", "ours-fp8"):
        if arm in losses:
            yield arm, losses[arm]
