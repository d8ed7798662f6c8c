"""What datasets there are and how large they are, without reading them.

Adding one: a row here, a file with its reader beside this one, a row in `load.READERS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final


@dataclass(frozen=True, slots=True)
class DatasetInfo:
    """Sizes of a dataset after its deterministic split.

    Attributes:
        name: as written in a spec.
        features: inputs per sample.
        classes: number of labels.
        train_size: samples in the training set.
        test_size: samples in the test set.
        source: where the numbers come from.
    """

    name: str
    features: int
    classes: int
    train_size: int
    test_size: int
    source: str


CATALOG: Final[Mapping[str, DatasetInfo]] = MappingProxyType(
    {
        info.name: info
        for info in (
            DatasetInfo("digits", 64, 10, 1437, 360, "scikit-learn's copy of the UCI optical digits"),
            DatasetInfo("wine", 13, 3, 142, 36, "scikit-learn's copy of the UCI wine recognition data"),
        )
    }
)
