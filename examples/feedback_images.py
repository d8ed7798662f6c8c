"""Fig. 5: what the feedback policies of a CNN on MNIST answer most strongly, as images (Alg. 4).

Trains the paper's CNN for a few updates by DDPNOpt; then, for one test image of each digit and every layer
with a feedback, projects the leading right-singular vector of K back to image space by deconvolution. Red and
blue are its two signs: where more intensity, or less, is what the policy answers.

The safeguard keeps K from vanishing where an image alone has so large a gradient that the paper's factor
sqrt(1 - c) ends at zero, as it does for the one digit in ten that the net is not sure of.

MNIST is read from the folder that DDPSWEEP_DATA names (see docs/datasets.md).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Final

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from ddpnopt import DDPNOpt
from ddpnopt.datasets.load import load
from ddpnopt.errors import DataError
from ddpnopt.models import for_dataset

SHAPE: Final = (1, 28, 28)
BATCH: Final = 32
STEPS: Final = 150
QUICK_STEPS: Final = 5
LEARNING_RATE: Final = 1e-3
TEST_IMAGES: Final = 1000
"""How many images of the test set the accuracy is taken on, and the digits out of."""
SKIPPED: Final = 2
"""Images of a digit to pass over: the first ones of the test set are not its most legible."""


def samples(inputs: object, targets: object, count: int | None = None) -> tuple[Tensor, Tensor]:
    """Return images (N, 1, 28, 28) and labels (N,)."""
    return torch.as_tensor(inputs)[:count].reshape(-1, *SHAPE), torch.as_tensor(targets)[:count]


def train(steps: int) -> tuple[nn.Sequential, DDPNOpt, float, Tensor, Tensor]:
    """Return the net, its optimizer, its accuracy in percent, and an image and a label of each digit."""
    torch.manual_seed(0)
    data = load("mnist")
    images, labels = samples(data.train_inputs, data.train_targets)
    model = for_dataset("mnist", "cnn")
    optimizer = DDPNOpt(model, lr=LEARNING_RATE, preconditioner="adam", safeguard="psd")
    for _ in range(steps):
        rows = torch.randint(len(images), (BATCH,))
        optimizer.step(images[rows], labels[rows])
    test_images, test_labels = samples(data.test_inputs, data.test_targets, TEST_IMAGES)
    with torch.inference_mode():
        right = model(test_images).argmax(dim=1) == test_labels
    chosen = [int((test_labels == digit).nonzero()[SKIPPED]) for digit in range(10)]
    return model, optimizer, 100 * float(right.double().mean()), test_images[chosen], test_labels[chosen]


def policies(optimizer: DDPNOpt, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return δx_max (T - 1, N, 28, 28) and σ_max (T - 1, N) of the layers t = 1..T-1, image by image."""
    shown, strengths = [], []
    for image, label in zip(images.split(1), labels.split(1), strict=True):
        inspection = optimizer.inspect(image, label)
        with_feedback = inspection.layers[1:]
        strengths.append([float(layer.K.singular_values()) for layer in with_feedback])
        projected = [
            inspection.deconvolve(layer.K.right_singular_vectors()[:, 0], layer.t) for layer in with_feedback
        ]
        shown.append(torch.stack(projected)[:, 0, 0])
    return torch.stack(shown, dim=1), torch.tensor(strengths).T


def table(model: nn.Sequential, images: Tensor, labels: Tensor, strengths: Tensor) -> Table:
    """Return how sure the net is of each digit, and how strong its policies are."""
    with torch.inference_mode():
        probabilities = model(images).softmax(dim=1)
    found = Table(title="leading singular value of K, layer by layer")
    for name in (
        "digit",
        "its probability",
        "next likely",
        *(f"layer {t + 1}" for t in range(len(strengths))),
    ):
        found.add_column(name, justify="right")
    for i, (label, p) in enumerate(zip(labels.tolist(), probabilities, strict=True)):
        others = p.clone()
        others[label] = -1
        values = [f"{float(sigma):.1e}" for sigma in strengths[:, i]]
        found.add_row(str(label), f"{float(p[label]):.4f}", str(int(others.argmax())), *values)
    return found


def draw(images: Tensor, shown: Tensor, path: Path) -> None:
    """Draw the digits, and under them a row for each layer; every image has a scale of its own."""
    rows, columns = len(shown) + 1, len(images)
    figure = Figure(figsize=(columns, rows + 0.3), layout="constrained")
    axes = figure.subplots(rows, columns)
    for column in range(columns):
        axes[0][column].imshow(images[column, 0], cmap="gray")
        for t in range(1, rows):
            image = shown[t - 1, column]
            top = float(image.abs().max()) or 1.0
            axes[t][column].imshow(image, cmap="bwr", vmin=-top, vmax=top)
    for t, row in enumerate(axes):
        row[0].set_ylabel("image" if t == 0 else f"layer {t}", fontsize=8)
        for ax in row:
            ax.set_xticks([])
            ax.set_yticks([])
    figure.savefig(path, dpi=120)


def main() -> None:
    """Train, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the picture")
    parser.add_argument("--quick", action="store_true", help="a few updates only")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    steps = QUICK_STEPS if args.quick else STEPS
    try:
        model, optimizer, accuracy, images, labels = train(steps)
    except DataError as error:
        sys.exit(str(error))
    shown, strengths = policies(optimizer, images, labels)
    console = Console(highlight=False, width=100)
    console.print(f"{steps} updates, accuracy {accuracy:.1f} % on {TEST_IMAGES} test images")
    console.print(table(model, images, labels, strengths))
    draw(images, shown, args.out / "feedback-images.png")
    console.print(f"wrote {args.out / 'feedback-images.png'}")


if __name__ == "__main__":
    main()
