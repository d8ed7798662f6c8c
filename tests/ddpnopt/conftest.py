"""One thread for all of them: nets this small gain nothing from a second. Real data where there are some."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from ddpnopt.datasets import fetch, store
from ddpnopt.datasets.load import Dataset, load


@pytest.fixture(autouse=True, scope="package")
def one_thread_for_fixtures() -> Iterator[None]:
    """Also while fixtures of a wider scope than a test's are set up."""
    yield from _one_thread()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    yield from _one_thread()


def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def real_data() -> Callable[[str], Dataset]:
    """Load a dataset by name if its files are on this machine; if not, skip and say how to get them."""

    def loaded(name: str) -> Dataset:
        directory = store.directory()
        if fetch.missing(name, directory / name):
            command = f"{store.VARIABLE}={directory} python -m ddpnopt.datasets.fetch {name}"
            pytest.skip(f"{name} is not in {directory}; to get it ({fetch.EXTRA}): {command}")
        return load(name)

    return loaded
