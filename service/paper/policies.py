"""Fig. 5: what the policies of a CNN answer most strongly, as images."""

from __future__ import annotations

from itertools import combinations
from typing import Any, Final

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from service.paper.results import Results
from service.paper.sections import Picture, Section, Table, Value

NEAR: Final = 3
"""Classes that an image is compared with."""
NOTHING: Final = "Every DDPNOpt run diverged: there is no policy to show."


def section(results: Results) -> Section:
    """Build the section of a preset with one sweep, whose first DDPNOpt run that came to its end is shown."""
    ((_, sweep),) = results.sweeps.items()
    ended = {run["id"]: run for run in results.client.runs(sweep["id"]) if run["state"] == "completed"}
    records = results.client.records(sweep["id"], "policy_image")
    record = next((one for one in records if one["run_id"] in ended), None)
    if record is None:
        return Section(results.preset.name, results.preset.title, (NOTHING,), notes=results.notes())
    images = record["values"][-1]  # (T, classes, channels, height, width)
    accuracy = ended[record["run_id"]]["accuracy"]
    table = tuple(likeness(images))
    return Section(
        results.preset.name,
        results.preset.title,
        (
            f"After {record['steps'][-1]} updates ({accuracy:.1f} % on the test set), the images of "
            f"{len(images) - 1} layers for {images.shape[1]} classes.",
            *_findings(table),
        ),
        (
            Picture(
                "fig5",
                "A digit of each class, and under it what the policy of each layer answers most strongly: "
                "red and blue are its two signs, each image on a scale of its own",
                _figure(images),
            ),
        ),
        (
            Table(
                "fig5",
                "how the images of the policies lie to the differences between two classes' examples, by the "
                "absolute cosine: with the nearest one that has the image's class, the mean over those that "
                "have it, and the mean over the others, as a control",
                ("layer", "class", "nearest", "cosine", "with_class", "without_class", "seen"),
                table,
            ),
        ),
        results.notes(),
    )


def likeness(images: NDArray[np.float64]) -> list[tuple[Value, ...]]:
    """Return for each layer and class how its image lies to the differences between classes."""
    shown = images.reshape(*images.shape[:2], -1)
    rows: list[tuple[Value, ...]] = []
    for t in range(1, len(shown)):
        for label, image in enumerate(shown[t]):
            cosines = {
                pair: abs(_cosine(image, shown[0, pair[0]] - shown[0, pair[1]]))
                for pair in combinations(range(shown.shape[1]), 2)
            }
            own = {sum(pair) - label: value for pair, value in cosines.items() if label in pair}
            others = [value for pair, value in cosines.items() if label not in pair]
            nearest = max(own, key=lambda other: own[other])
            seen = bool(np.isfinite(image).all() and np.any(image))
            means = (float(np.mean(list(own.values()))), float(np.mean(others)))
            rows.append((t, label, nearest, own[nearest], *means, "yes" if seen else "no"))
    return rows


def _cosine(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    length = float(np.linalg.norm(one) * np.linalg.norm(other))
    return float(one @ other) / length if length > 0 and np.isfinite(length) else 0.0


def _findings(table: tuple[tuple[Value, ...], ...]) -> list[str]:
    seen = [row for row in table if row[-1] == "yes"]
    last = max(int(row[0] or 0) for row in table)
    said = [f"{len(seen)} of {len(table)} images are not empty."]
    if seen:
        own, others = (np.mean([float(row[column] or 0.0) for row in seen]) for column in (4, 5))
        said.append(
            f"They have a mean absolute cosine of {own:.2f} with the differences between their class's "
            f"example and another's, and of {others:.2f} with those between two other classes."
        )
    top = sorted((row for row in table if row[0] == last), key=lambda row: -float(row[3] or 0.0))[:NEAR]
    pairs = ", ".join(f"({row[1]}, {row[2]}): {float(row[3] or 0.0):.2f}" for row in top)
    return [*said, f"The last layer's images that are most like a difference between two digits: {pairs}."]


def _figure(images: NDArray[np.float64]) -> Figure:
    rows, columns = images.shape[:2]
    figure = Figure(figsize=(0.85 * columns, 0.85 * rows + 0.2), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for t in range(rows):
        for label in range(columns):
            ax, image = axes[t][label], _grey(images[t, label])
            if t == 0:
                ax.imshow(image, cmap="gray")
            else:
                end = float(np.nanmax(np.abs(image))) if np.isfinite(image).any() else 0.0
                ax.imshow(image, cmap="bwr", vmin=-(end or 1.0), vmax=end or 1.0)
            ax.set_xticks([])
            ax.set_yticks([])
        axes[t][0].set_ylabel("image" if t == 0 else f"layer {t}", fontsize=7)
    return figure


def _grey(image: NDArray[Any]) -> NDArray[Any]:
    """Return a picture (height, width) of a sample, whatever its channels; a line if it is none."""
    return image.mean(axis=0) if image.ndim == 3 else image.reshape(1, -1)
