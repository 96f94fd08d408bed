"""What is shown of counterfactual removal: each query, and what is drawn from its noise without some images."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from torch import Tensor

from lightning_mem.evaluation.pictures import pixels
from lightning_mem.records import Record


def draw_removal(
    before: Tensor, drawn: Tensor, distances: Tensor, methods: Sequence[str], path: Path, remove: int
) -> None:
    """Write a PNG: a line a query, and beside it what every method's model draws from its noise.

    Args:
        before: uint8 [Q, C, H, W], the queries.
        drawn: uint8 [Q, methods, C, H, W].
        distances: [Q, methods].
        methods: Names.
        path: The file.
        remove: Images that were removed.
    """
    count, columns = len(before), 1 + len(methods)
    figure = Figure(figsize=(1.15 * columns, 1.3 * count + 0.6), dpi=110, layout="constrained")
    figure.suptitle(f"drawn from the same noise without the first {remove} images by each method (RMS-L2)", fontsize=8)
    for query, line in enumerate(figure.subplots(count, columns, squeeze=False)):
        shown = [before[query], *drawn[query]]
        for place, (axes, image) in enumerate(zip(line, shown, strict=True)):
            axes.imshow(pixels(image), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            axes.set_axis_off()
            if place:
                axes.text(0.5, -0.03, f"{float(distances[query, place - 1]):.3f}", fontsize=7, ha="center", va="top",
                          transform=axes.transAxes)  # fmt: skip
            if query == 0:
                axes.set_title(["query", *methods][place], fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def removal_table(records: Sequence[Record]) -> str:
    """One row a method, in Markdown; a star where the interval of the gain over chance excludes 0."""
    gains = {record.name.split("/")[1]: record for record in records if record.name.endswith("removal_gain")}
    lines = ["| method | distance | over random |", "|---|---|---|"]
    for record in records:
        _, method, what = record.name.split("/")
        if what == "removal_distance":
            gain = gains.get(method)
            star = "" if gain is None or not gain.definition["claimed"] else "*"
            over = "" if gain is None else f"{gain.value:+.3f} [{gain.low:.3f}, {gain.high:.3f}]{star}"
            lines.append(f"| {method} | {record.value:.3f} [{record.low:.3f}, {record.high:.3f}] | {over} |")
    return "\n".join(lines) + "\n"
