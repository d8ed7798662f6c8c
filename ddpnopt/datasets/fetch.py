"""Fetch the official files of datasets that no package carries, checked against known SHA-256 sums.

`load` does so by itself for files that are missing. By hand, before a cluster needs them:

    python -m ddpnopt.datasets.fetch mnist cifar10

Needs pooch, which the extra `data` brings.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

from ddpnopt.datasets import store
from ddpnopt.errors import ConfigError, DataError, MissingDataError

EXTRA: Final = "pip install 'ddpsweep[data]'"


@dataclass(frozen=True, slots=True)
class OfficialFile:
    """A file as its authors publish it.

    Attributes:
        url: where it is.
        sha256: of its bytes, in hexadecimal.
        unpacked: what serves as well, if it is there instead.
    """

    url: str
    sha256: str
    unpacked: str | None = None

    @property
    def name(self) -> str:
        """The file's name, the same here as there."""
        return self.url.rpartition("/")[2]

    def forms(self) -> str:
        """Name what is looked for, in words."""
        return self.name if self.unpacked is None else f"{self.name} or {self.unpacked}"

    def is_in(self, folder: Path) -> bool:
        """Tell whether the file, or what serves as well, is in a folder."""
        names = (self.name,) if self.unpacked is None else (self.name, self.unpacked)
        return store.first_of(folder, *names) is not None


def _idx(base: str, sums: Mapping[str, str]) -> tuple[OfficialFile, ...]:
    return tuple(OfficialFile(f"{base}/{name}.gz", sha256, name) for name, sha256 in sums.items())


# The sums are those that TensorFlow Datasets (MNIST, Fashion-MNIST, SVHN) and torchvision (CIFAR-10) record.
OFFICIAL: Final[Mapping[str, tuple[OfficialFile, ...]]] = MappingProxyType(
    {
        "mnist": _idx(
            "https://storage.googleapis.com/cvdf-datasets/mnist",
            {
                "train-images-idx3-ubyte": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
                "train-labels-idx1-ubyte": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
                "t10k-images-idx3-ubyte": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
                "t10k-labels-idx1-ubyte": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
            },
        ),
        "fashion_mnist": _idx(
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
            {
                "train-images-idx3-ubyte": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
                "train-labels-idx1-ubyte": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
                "t10k-images-idx3-ubyte": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
                "t10k-labels-idx1-ubyte": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
            },
        ),
        "svhn": (
            OfficialFile(
                "http://ufldl.stanford.edu/housenumbers/train_32x32.mat",
                "435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8af2240d066de1df7508d083b8",
            ),
            OfficialFile(
                "http://ufldl.stanford.edu/housenumbers/test_32x32.mat",
                "cdce80dfb2a2c4c6160906d0bd7c68ec5a99d7ca4831afa54f09182025b6a75b",
            ),
        ),
        "cifar10": (
            OfficialFile(
                "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
                "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
                "cifar-10-batches-py",
            ),
        ),
    }
)


def missing(name: str, folder: Path) -> list[OfficialFile]:
    """List the files of a dataset that are not in its folder."""
    return [file for file in OFFICIAL[name] if not file.is_in(folder)]


def ensure(name: str, folder: Path) -> None:
    """Fetch what a dataset's folder lacks.

    Raises:
        MissingDataError: if something is missing and cannot be fetched.
    """
    for file in missing(name, folder):
        _fetch(name, file, folder)


def _fetch(name: str, file: OfficialFile, folder: Path) -> None:
    """Download one file: pooch writes beside it, checks the sum and renames."""
    try:
        import pooch
    except ImportError as error:
        raise MissingDataError(
            f"{name}: found no {file.forms()} in {folder}; put it there (from {file.url}), "
            f"name another directory in {store.VARIABLE}, or let it be fetched: {EXTRA}"
        ) from error
    try:
        pooch.retrieve(file.url, known_hash=f"sha256:{file.sha256}", fname=file.name, path=folder)
        # pooch leaves the file to its owner alone; others may share the directory.
        (folder / file.name).chmod(0o644)
    # requests' errors are OSErrors; a wrong sum is a ValueError.
    except (OSError, ValueError) as error:
        raise MissingDataError(
            f"{name}: found no {file.forms()} in {folder}, and cannot fetch {file.url} into it: {error}"
        ) from error


def main(names: Sequence[str]) -> None:
    """Fetch datasets by name into `store.directory()`.

    Raises:
        ConfigError: if a name is not that of a dataset that is fetched, or none is given.
        MissingDataError: if a file cannot be fetched.
    """
    if not names or not set(names) <= set(OFFICIAL):
        raise ConfigError("names", list(names), "some of " + ", ".join(OFFICIAL))
    for name in names:
        folder = store.directory() / name
        ensure(name, folder)
        sys.stdout.write(f"{name} is in {folder}\n")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ConfigError, DataError) as error:
        sys.exit(str(error))
