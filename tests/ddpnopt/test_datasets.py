"""Datasets: what the catalogue promises, the same bytes every time, and nothing learnt from the test set.

Here those that come whole; the ones that come in files have `test_dataset_files.py`.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from ddpnopt.datasets import clusters, fetch, wine
from ddpnopt.datasets import load as module
from ddpnopt.datasets.catalog import CATALOG, CLUSTERS
from ddpnopt.datasets.load import FILE_READERS, READERS, Dataset, load
from ddpnopt.errors import ConfigError, DataError

CHECKSUMS = {
    "digits": "047e39c591cf252696da035a0d05386903a17e77d438028c676b8f89a0a65633",
    "wine": "c6958100894fe049743211d7e7b747650d9bf9d09c8ef78f383156e802a0d307",
    "clusters5": "832211ea8b881af81d67581cba3beaa580aba462aca1566b9d2000e1907ce083",
    "clusters8": "b8df601c2fe56b87da3624f695e0fd2cc45bcd2f1f16e6e7e2696e947bf79857",
    "clusters12": "7679f2f5595760d0002496b2fe0bc96309a1d4a4ebacb4444b5754d7010c8e83",
    "clusters15": "0a281a8f01f52addd1bc10e21079d3d096b41cfd8f8b07116a44ca6efb2aa789",
}

datasets = pytest.mark.parametrize("name", sorted(READERS))


@pytest.fixture(autouse=True)
def nothing_cached():
    load.cache_clear()
    yield
    load.cache_clear()


def test_every_row_of_the_catalogue_has_a_reader_and_a_checksum_here():
    assert set(READERS) == set(CHECKSUMS)
    assert set(FILE_READERS) == set(fetch.OFFICIAL)
    assert sorted([*READERS, *FILE_READERS]) == sorted(CATALOG)
    assert all(info.name == name for name, info in CATALOG.items())
    assert all(info.features == math.prod(info.shape) for info in CATALOG.values())
    with pytest.raises(TypeError):
        CATALOG["more"] = CATALOG["wine"]


@datasets
def test_sizes_are_the_catalogues(name):
    info, data = CATALOG[name], load(name)
    assert data.shape == info.shape
    assert data.train_inputs.shape == (info.train_size, info.features)
    assert data.test_inputs.shape == (info.test_size, info.features)
    assert data.train_targets.shape == (info.train_size,)
    assert data.test_targets.shape == (info.test_size,)
    for inputs in (data.train_inputs, data.test_inputs):
        assert inputs.dtype == np.float64
        assert inputs.flags.c_contiguous
        assert np.isfinite(inputs).all()
    for targets in (data.train_targets, data.test_targets):
        assert targets.dtype == np.int64
        assert np.unique(targets).tolist() == list(range(info.classes))


@datasets
def test_the_same_bytes_every_time(name):
    first = load(name)
    load.cache_clear()
    again = load(name)
    assert again is not first
    assert first.checksum == again.checksum == CHECKSUMS[name]


@datasets
def test_the_split_is_stratified_and_takes_every_sample_once(name):
    info, data = CATALOG[name], load(name)
    read, scale = READERS[name]
    inputs, targets = read()
    both = np.concatenate((data.train_inputs, data.test_inputs))
    labels = np.concatenate((data.train_targets, data.test_targets))
    expected = scale(inputs, _raw_training_set(name))
    order = [np.lexsort((y, *x.T)) for x, y in ((both, labels), (expected, targets))]
    np.testing.assert_allclose(both[order[0]], expected[order[1]], rtol=0, atol=1e-12)
    assert labels[order[0]].tolist() == targets[order[1]].tolist()
    share = np.bincount(data.test_targets) / np.bincount(targets)
    np.testing.assert_allclose(share, module.TEST_FRACTION, atol=1 / np.bincount(targets).min())
    assert len(both) == info.train_size + info.test_size


def _raw_training_set(name: str) -> np.ndarray:
    """The training set before scaling, found by loading with a scaler that does nothing."""
    read, _ = READERS[name]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(READERS, name, (read, lambda inputs, train: inputs))
        load.cache_clear()
        raw = load(name).train_inputs
    load.cache_clear()
    return raw


def test_wine_is_standardised_by_the_training_set_alone():
    data = load("wine")
    np.testing.assert_allclose(data.train_inputs.mean(axis=0), 0, atol=1e-12)
    np.testing.assert_allclose(data.train_inputs.std(axis=0), 1, rtol=1e-12)
    assert np.abs(data.test_inputs.mean(axis=0)).max() > 0.01
    assert np.abs(data.test_inputs.std(axis=0) - 1).max() > 0.01
    train = _raw_training_set("wine")
    probe = train[:1] * 3
    np.testing.assert_array_equal(wine.scale(probe, train), (probe - train.mean(axis=0)) / train.std(axis=0))


@datasets
def test_what_the_test_set_holds_does_not_change_the_training_set(name, monkeypatch):
    plain = load(name)
    read, scale = READERS[name]

    def with_other_test_set(inputs, train):
        return scale(inputs, train) if inputs is train else scale(inputs * 100, train)

    monkeypatch.setitem(READERS, name, (read, with_other_test_set))
    load.cache_clear()
    other = load(name)
    assert np.array_equal(other.train_inputs, plain.train_inputs)
    assert not np.array_equal(other.test_inputs, plain.test_inputs)
    assert other.checksum != plain.checksum


def test_digits_are_pixels_from_zero_to_one():
    data = load("digits")
    assert (data.train_inputs.min(), data.train_inputs.max()) == (0.0, 1.0)
    assert (data.test_inputs.min(), data.test_inputs.max()) == (0.0, 1.0)
    assert np.array_equal(data.train_inputs * 16, np.round(data.train_inputs * 16))


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(
        ConfigError, match=r"one of cifar10, clusters12, .*, digits, .*, mnist, .*wine"
    ) as caught:
        load("imagenet")
    assert (caught.value.field, caught.value.value) == ("dataset", "imagenet")


def test_small_sets_are_kept_until_they_are_forgotten():
    wine, digits = load("wine"), load("digits")
    assert load("wine") is wine
    assert load("digits") is digits
    load.cache_clear()
    assert load("wine") is not wine


def test_a_set_of_ones_own_has_the_shape_of_its_rows():
    inputs, targets = np.zeros((4, 6), np.float32), np.arange(4)
    assert Dataset("own", inputs, targets, inputs, targets, "none").shape == (6,)
    assert Dataset("own", inputs, targets, inputs, targets, "none", (2, 3)).shape == (2, 3)


@pytest.mark.parametrize("k", CLUSTERS)
def test_clusters_are_what_their_law_says(k):
    inputs, targets = clusters.read(k)
    assert np.bincount(targets).tolist() == [clusters.SAMPLES // k] * k
    assert np.bincount(load(f"clusters{k}").test_targets).tolist() == [480 // k] * k
    centres = clusters.centres(np.random.Generator(np.random.PCG64(k)), k)
    noise = inputs - centres[targets]
    # Five standard errors of a mean and of a variance of this many numbers.
    assert abs(noise.mean()) < 5 / math.sqrt(noise.size)
    assert abs(noise.var() - 1) < 5 * math.sqrt(2 / noise.size)
    means = np.stack([inputs[targets == label].mean(axis=0) for label in range(k)])
    np.testing.assert_allclose(means, centres, rtol=0, atol=5 / math.sqrt(clusters.SAMPLES / k))


@pytest.mark.parametrize("k", CLUSTERS)
def test_clusters_can_be_learnt_but_not_perfectly(k):
    data = load(f"clusters{k}")
    centres = clusters.centres(np.random.Generator(np.random.PCG64(k)), k)
    distances = ((data.test_inputs[:, None] - centres) ** 2).sum(axis=-1)
    assert 0.92 < (distances.argmin(axis=1) == data.test_targets).mean() < 0.98
    learnt = LogisticRegression(max_iter=1000).fit(data.train_inputs, data.train_targets)
    assert 0.85 < learnt.score(data.test_inputs, data.test_targets) < 0.98


def spoilt_with_nan(inputs, targets, at):
    inputs = inputs.copy()
    inputs[at, 0] = np.nan
    return inputs, targets


WRONG = {
    "truncated": (lambda x, y: (x[:100], y[:100]), "expected"),
    "one sample too many": (lambda x, y: (np.vstack((x, x[:1])), np.append(y, 0)), "expected"),
    "a feature less": (lambda x, y: (x[:, 1:], y), "expected"),
    "labels of other samples": (lambda x, y: (x, y[:-1]), "expected"),
    "labels from one": (lambda x, y: (x, y + 1), "labels"),
    "a class less": (lambda x, y: (x, np.minimum(y, 1)), "labels"),
    "a class too many": (lambda x, y: (x, np.where(np.arange(len(y)) < 20, 99, y)), "labels"),
    "empty": (lambda x, y: (x[:0], y[:0]), "expected"),
    # Any sample: one of them ends up in the test set.
    **{
        f"nan in sample {i}": (lambda x, y, i=i: spoilt_with_nan(x, y, i), "finite")
        for i in (0, 1, 2, 50, 141)
    },
}


@datasets
@pytest.mark.parametrize("fault", WRONG)
def test_data_that_are_not_what_was_promised_are_refused(name, fault, monkeypatch):
    spoil, word = WRONG[fault]
    read, scale = READERS[name]
    monkeypatch.setitem(READERS, name, (lambda: spoil(*read()), scale))
    with pytest.raises(DataError, match=rf"^{name}: .*{word}"):
        load(name)


def test_a_failed_read_is_not_remembered(monkeypatch):
    _, scale = READERS["wine"]
    with monkeypatch.context() as patch:
        patch.setitem(READERS, "wine", (lambda: (np.zeros((1, 1)), np.zeros(1)), scale))
        with pytest.raises(DataError):
            load("wine")
    assert load("wine").checksum == CHECKSUMS["wine"]
