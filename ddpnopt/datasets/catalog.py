"""What datasets there are and how large they are, without reading them.

Adding one: a row here, a file with its reader beside this one, and a row in `load.READERS`, or in
`load.FILE_READERS` if the data are files that no package carries.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

CLUSTERS: Final = (5, 8, 12, 15)
"""How many Gaussian clusters the synthetic datasets have: the paper's Fig. 8."""


@dataclass(frozen=True, slots=True)
class DatasetInfo:
    """Sizes of a dataset after its deterministic split.

    Attributes:
        name: as written in a spec.
        shape: one sample's; images are (channels, height, width).
        classes: number of labels.
        train_size: samples in the training set.
        test_size: samples in the test set.
        source: where the numbers come from.
    """

    name: str
    shape: tuple[int, ...]
    classes: int
    train_size: int
    test_size: int
    source: str

    @property
    def features(self) -> int:
        """Inputs per sample, flattened."""
        return math.prod(self.shape)


CATALOG: Final[Mapping[str, DatasetInfo]] = MappingProxyType(
    {
        info.name: info
        for info in (
            DatasetInfo("digits", (1, 8, 8), 10, 1437, 360, "scikit-learn's copy of the UCI optical digits"),
            DatasetInfo("wine", (13,), 3, 142, 36, "scikit-learn's copy of the UCI wine recognition data"),
            *(
                DatasetInfo(f"clusters{k}", (30,), k, 1920, 480, f"drawn here: {k} Gaussian clusters")
                for k in CLUSTERS
            ),
            DatasetInfo("mnist", (1, 28, 28), 10, 60_000, 10_000, "MNIST, official files"),
            DatasetInfo("fashion_mnist", (1, 28, 28), 10, 60_000, 10_000, "Fashion-MNIST, official files"),
            DatasetInfo("svhn", (3, 32, 32), 10, 73_257, 26_032, "SVHN, cropped digits, official files"),
            DatasetInfo("cifar10", (3, 32, 32), 10, 50_000, 10_000, "CIFAR-10, official Python version"),
        )
    }
)
