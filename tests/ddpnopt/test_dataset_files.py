"""Datasets that come in files: the formats, what is wrong with a file, and what becomes of its numbers.

The files are small and written here; real ones, where there are some, are read at the end.
"""

from __future__ import annotations

import gzip
import io
import os
import pickle
import struct
import sys
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.io import loadmat, savemat

from ddpnopt.datasets import cifar10, images, mat5, mnist, svhn
from ddpnopt.datasets import load as module
from ddpnopt.datasets.catalog import CATALOG
from ddpnopt.datasets.load import FILE_READERS, load
from ddpnopt.datasets.unpickle import unpickle
from ddpnopt.errors import DataError

TRAIN, TEST = 50, 20
RNG = np.random.default_rng(0)
Parts = dict[str, tuple[np.ndarray, np.ndarray]]


def parts(*shape: int) -> Parts:
    """Random (N, *shape) bytes, and labels that go round."""
    return {
        part: (RNG.integers(0, 256, (size, *shape), dtype=np.uint8), np.arange(size, dtype=np.uint8) % 10)
        for part, size in (("train", TRAIN), ("test", TEST))
    }


GREY, COLOUR = parts(28, 28), parts(3, 32, 32)


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_mnist(folder: Path, zipped: bool = False) -> None:
    for part, prefix in (("train", "train"), ("test", "t10k")):
        for kind, array in zip(("images-idx3", "labels-idx1"), GREY[part], strict=True):
            path = folder / f"{prefix}-{kind}-ubyte{'.gz' if zipped else ''}"
            path.write_bytes(gzip.compress(idx(array)) if zipped else idx(array))


def write_svhn(folder: Path, compressed: bool = True) -> None:
    for part, (x, y) in COLOUR.items():
        content = {"X": x.transpose(2, 3, 1, 0), "y": np.where(y == 0, 10, y).astype(np.uint8)[:, None]}
        savemat(folder / f"{part}_32x32.mat", content, do_compression=compressed)


class Python2Pickler(pickle._Pickler):
    """Writes strings and bytes as Python 2 did, which wrote the official files."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_string(self, text: str | bytes) -> None:
        content = text.encode("latin-1") if isinstance(text, str) else text
        self.write(pickle.BINSTRING + struct.pack("<i", len(content)) + content)
        self.memoize(text)

    dispatch[str] = dispatch[bytes] = save_string


def python2(batch: object) -> bytes:
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(batch)
    return file.getvalue().replace(b"cnumpy._core.", b"cnumpy.core.")


def python3(batch: object) -> bytes:
    return pickle.dumps(batch, protocol=4)


def cifar_batches(dump: Callable[[object], bytes] = python2) -> dict[str, bytes]:
    """Six batches; the training set's samples are dealt out in order."""
    x, y = COLOUR["train"]
    cuts = {f"data_batch_{i + 1}": slice(i * TRAIN // 5, (i + 1) * TRAIN // 5) for i in range(5)}
    chosen = {name: (x[cut], y[cut]) for name, cut in cuts.items()} | {"test_batch": COLOUR["test"]}
    return {
        name: dump({b"batch_label": name.encode(), b"data": x.reshape(len(x), -1), b"labels": y.tolist()})
        for name, (x, y) in chosen.items()
    }


def write_cifar_archive(folder: Path, batches: dict[str, bytes] | None = None) -> None:
    with tarfile.open(folder / cifar10.ARCHIVE, "w:gz") as archive:
        for name, content in (batches or cifar_batches()).items():
            member = tarfile.TarInfo(f"{cifar10.UNPACKED}/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def write_cifar_folder(folder: Path, batches: dict[str, bytes] | None = None) -> None:
    (folder / cifar10.UNPACKED).mkdir()
    for name, content in (batches or cifar_batches()).items():
        (folder / cifar10.UNPACKED / name).write_bytes(content)


FORMS: dict[str, tuple[str, Callable[[Path], None], Parts]] = {
    "mnist": ("mnist", write_mnist, GREY),
    "mnist, gzipped": ("mnist", lambda folder: write_mnist(folder, zipped=True), GREY),
    "fashion_mnist": ("fashion_mnist", write_mnist, GREY),
    "svhn": ("svhn", write_svhn, COLOUR),
    "svhn, not compressed": ("svhn", lambda folder: write_svhn(folder, compressed=False), COLOUR),
    "cifar10, archive": ("cifar10", write_cifar_archive, COLOUR),
    "cifar10, folder": ("cifar10", write_cifar_folder, COLOUR),
    "cifar10, by Python 3": ("cifar10", lambda f: write_cifar_folder(f, cifar_batches(python3)), COLOUR),
}
forms = pytest.mark.parametrize("form", FORMS)


@pytest.fixture(autouse=True)
def small_files_and_no_network(tmp_path, monkeypatch):
    """Folders for all datasets in a directory of this test's own, and a catalogue of small ones."""
    monkeypatch.setenv("DDPSWEEP_DATA", str(tmp_path))
    monkeypatch.setitem(sys.modules, "pooch", None)
    small = {name: replace(info, train_size=TRAIN, test_size=TEST) for name, info in CATALOG.items()}
    monkeypatch.setattr(module, "CATALOG", small)
    for name in FILE_READERS:
        (tmp_path / name).mkdir()
    load.cache_clear()
    yield
    load.cache_clear()


@forms
def test_bytes_become_standardised_numbers_and_keep_border_and_order(form, tmp_path):
    name, write, raw = FORMS[form]
    write(tmp_path / name)
    data = load(name)
    assert (data.name, data.shape) == (name, CATALOG[name].shape)
    axes = (0, 2, 3)
    train = raw["train"][0].reshape(TRAIN, *data.shape) / 255.0
    mean, std = train.mean(axis=axes, keepdims=True), train.std(axis=axes, keepdims=True)
    for part, inputs, targets in (
        ("train", data.train_inputs, data.train_targets),
        ("test", data.test_inputs, data.test_targets),
    ):
        size = {"train": TRAIN, "test": TEST}[part]
        assert inputs.dtype == np.float32
        assert inputs.flags.c_contiguous
        expected = (raw[part][0].reshape(size, *data.shape) / 255.0 - mean) / std
        np.testing.assert_allclose(inputs, expected.reshape(size, -1), rtol=1e-5, atol=1e-6)
        assert targets.dtype == np.int64
        assert targets.tolist() == raw[part][1].tolist()


@pytest.mark.parametrize("name", FILE_READERS)
def test_all_forms_of_a_dataset_give_the_same_bytes(name, tmp_path, monkeypatch):
    checksums = set()
    for number, (dataset, write, _) in enumerate(FORMS.values()):
        if dataset == name:
            folder = tmp_path / str(number) / name
            folder.mkdir(parents=True)
            write(folder)
            monkeypatch.setenv("DDPSWEEP_DATA", str(folder.parent))
            checksums.add(load(name).checksum)
            load.cache_clear()
            checksums.add(load(name).checksum)
    assert len(checksums) == 1


def test_another_directory_is_noticed_and_one_large_set_is_kept(tmp_path, monkeypatch):
    write_mnist(tmp_path / "mnist")
    write_svhn(tmp_path / "svhn")
    first, wine = load("mnist"), load_wine(monkeypatch)
    assert load("mnist") is first
    other = tmp_path / "other"
    (other / "mnist").mkdir(parents=True)
    write_mnist(other / "mnist")
    (other / "mnist" / "t10k-labels-idx1-ubyte").write_bytes(idx(9 - GREY["test"][1]))
    monkeypatch.setenv("DDPSWEEP_DATA", str(other))
    assert load("mnist").checksum != first.checksum
    monkeypatch.setenv("DDPSWEEP_DATA", str(tmp_path))
    again = load("mnist")
    assert again is not first
    assert again.checksum == first.checksum
    load("svhn")
    assert load("mnist") is not again
    assert load("wine") is wine


def load_wine(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(module, "CATALOG", CATALOG)
        return load("wine")


@forms
def test_other_sizes_than_the_catalogues_are_refused(form, tmp_path, monkeypatch):
    name, write, _ = FORMS[form]
    write(tmp_path / name)
    for part, change in (
        ("training set", {"train_size": TRAIN + 1, "test_size": TEST - 1}),
        ("test set", {"test_size": TEST + 1}),
    ):
        expected = {name: replace(module.CATALOG[name], **change)}
        with monkeypatch.context() as patch:
            patch.setattr(module, "CATALOG", expected)
            with pytest.raises(DataError, match=f"^{name}: {part} in {tmp_path / name}: got .*, expected"):
                load(name)


def test_a_class_without_samples_is_refused(tmp_path):
    write_mnist(tmp_path / "mnist")
    (tmp_path / "mnist" / "train-labels-idx1-ubyte").write_bytes(idx(np.minimum(GREY["train"][1], 8)))
    with pytest.raises(DataError, match=r"mnist: training set in .*: got labels .*, expected 0 to 9"):
        load("mnist")


def test_images_of_one_value_are_refused(tmp_path):
    write_mnist(tmp_path / "mnist")
    (tmp_path / "mnist" / "train-images-idx3-ubyte").write_bytes(idx(np.full((TRAIN, 28, 28), 7, np.uint8)))
    with pytest.raises(DataError, match=r"mnist: training set in .*one value only in channel 0"):
        load("mnist")


# IDX.

ARRAY = RNG.integers(0, 256, (6, 4, 5), dtype=np.uint8)

IDX_FAULTS = {
    "empty": (lambda c: b"", "0 bytes that begin with nothing, expected IDX of 3 dimensions: 00000803"),
    "header alone, cut": (lambda c: c[:10], "10 bytes that begin with 00000803"),
    "labels": (lambda c: idx(np.arange(9, dtype=np.uint8)), "begin with 00000801, expected IDX of 3"),
    "floats": (lambda c: c[:2] + b"\x0d" + c[3:], "begin with 00000d03"),
    "still zipped": (gzip.compress, "begin with 1f8b0800"),
    "truncated": (lambda c: c[:-1], "got 119 bytes after the header, expected 120"),
    "too long": (lambda c: c + b"x", "got 121 bytes after the header, expected 120"),
    "a count too high": (lambda c: c[:7] + b"\x07" + c[8:], r"expected 140: its header says \(7, 4, 5\)"),
    "a count beyond all memory": (lambda c: c[:4] + b"\xff" * 12 + c[16:], "got 120 bytes after the header"),
}


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("fault", IDX_FAULTS)
def test_idx_that_is_damaged_is_refused(fault, suffix, tmp_path):
    spoil, message = IDX_FAULTS[fault]
    path = tmp_path / f"images{suffix}"
    content = spoil(idx(ARRAY))
    path.write_bytes(gzip.compress(content) if suffix else content)
    with pytest.raises(DataError, match=f"^{path}: .*{message}"):
        mnist.read_idx(path, 3)


@pytest.mark.parametrize("kept", [0, 5, 12, 60, -9, -1])
def test_a_truncated_gzip_is_refused(kept, tmp_path):
    path = tmp_path / "images.gz"
    path.write_bytes(gzip.compress(idx(ARRAY))[:kept])
    with pytest.raises(DataError, match=f"^{path}: "):
        mnist.read_idx(path, 3)


def test_a_gzip_with_a_flipped_bit_is_refused(tmp_path):
    path = tmp_path / "images.gz"
    content = bytearray(gzip.compress(idx(ARRAY)))
    content[60] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"^{path}: cannot be read"):
        mnist.read_idx(path, 3)


MNIST_FAULTS = {
    "fewer labels": ("train-labels-idx1-ubyte", GREY["train"][1][:-1], "got 49 labels, expected 50"),
    "a label out of range": ("t10k-labels-idx1-ubyte", np.append(GREY["test"][1][:-1], 10), "got label 10"),
    "labels as images": ("t10k-images-idx3-ubyte", GREY["test"][1], "begin with 00000801, expected"),
}


@pytest.mark.parametrize("fault", MNIST_FAULTS)
def test_files_that_do_not_fit_each_other_are_refused(fault, tmp_path):
    name, array, message = MNIST_FAULTS[fault]
    folder = tmp_path / "mnist"
    write_mnist(folder)
    (folder / name).write_bytes(idx(array.astype(np.uint8)))
    with pytest.raises(DataError, match=f"^{folder / name}: .*{message}"):
        load("mnist")


def test_images_of_another_size_are_refused(tmp_path):
    write_mnist(tmp_path / "mnist")
    (tmp_path / "mnist" / "train-images-idx3-ubyte").write_bytes(idx(np.zeros((TRAIN, 32, 32), np.uint8)))
    with pytest.raises(DataError, match=r"got inputs \(50, 1024\) .*, expected \(50, 784\)"):
        load("mnist")


# SVHN, and the MATLAB format.


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize(
    "dtype", ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8"], ids=lambda dtype: f"as {dtype}"
)
def test_arrays_are_read_as_scipy_reads_them(dtype, compressed, tmp_path):
    path = tmp_path / "some.mat"
    content = {
        "X": np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5).astype(dtype),
        "y": np.arange(3).astype(dtype)[:, None],
        "empty": np.zeros((0, 3), dtype),
        "one_with_a_long_name": np.ones((1, 1), dtype),
        "text": "skipped",
        "struct": {"field": 1.0},
    }
    savemat(path, content, do_compression=compressed)
    ours = mat5.read(path, ("X", "y", "empty", "one_with_a_long_name", "absent"))
    theirs = loadmat(path)
    assert set(ours) == {"X", "y", "empty", "one_with_a_long_name"}
    for name, array in ours.items():
        assert array.dtype == theirs[name].dtype
        np.testing.assert_array_equal(array, theirs[name])


def svhn_content(**changes: np.ndarray) -> dict[str, np.ndarray]:
    content = {"X": np.zeros((32, 32, 3, 4), np.uint8), "y": np.array([[1], [2], [10], [3]], np.uint8)}
    return {name: array for name, array in (content | changes).items() if array is not None}


SVHN_FAULTS = {
    "no y": ({"y": None}, "got X, expected X and y"),
    "neither": ({"X": None, "y": None}, "got neither, expected X and y"),
    "images first": ({"X": np.zeros((4, 32, 32, 3), np.uint8)}, r"got X of shape \(4, 32, 32, 3\)"),
    "grey": ({"X": np.zeros((32, 32, 4), np.uint8)}, r"got X of shape \(32, 32, 4\)"),
    "floats": ({"X": np.full((32, 32, 3, 4), 0.5)}, "float64, expected .* uint8"),
    "fewer labels": ({"y": np.ones((3, 1), np.uint8)}, r"got y of shape \(3, 1\), .* expected \(4, 1\)"),
    "labels in a row": ({"y": np.ones((1, 4), np.uint8)}, r"got y of shape \(1, 4\)"),
    "labels from zero": ({"y": np.arange(4)[:, None]}, "got labels 0 to 3, expected 1 to 10"),
    "a label too high": ({"y": np.full((4, 1), 11)}, "got labels 11 to 11, expected 1 to 10"),
    "fractions": ({"y": np.full((4, 1), 1.5)}, "float64, expected .* integers"),
    "text": ({"X": "pixels"}, "X is not an array of real numbers"),
    "complex": ({"X": np.full((32, 32, 3, 4), 1j)}, "X is not an array of real numbers"),
}


@pytest.mark.parametrize("fault", SVHN_FAULTS)
def test_matlab_files_that_are_not_svhns_are_refused(fault, tmp_path):
    changes, message = SVHN_FAULTS[fault]
    path = tmp_path / "svhn" / "train_32x32.mat"
    write_svhn(tmp_path / "svhn")
    savemat(path, svhn_content(**changes) or {"other": np.ones(3)})
    with pytest.raises(DataError, match=f"^{path}: .*{message}"):
        load("svhn")


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("kept", [0, 100, 128, 130, 140, 400, -100, -1])
def test_a_truncated_matlab_file_is_refused(kept, compressed, tmp_path):
    path = tmp_path / "svhn" / "test_32x32.mat"
    write_svhn(tmp_path / "svhn", compressed)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DataError, match=f"^{path}: "):
        load("svhn")


@pytest.mark.parametrize("start", [b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM", b"<html>" * 40])
def test_files_of_another_format_are_refused(start, tmp_path):
    path = tmp_path / "svhn" / "train_32x32.mat"
    write_svhn(tmp_path / "svhn")
    path.write_bytes(start)
    with pytest.raises(DataError, match=f"^{path}: cannot be read as a MATLAB 5 file"):
        load("svhn")


# CIFAR-10, and its pickles.


class Malicious:
    def __init__(self, call: Callable[..., object], *arguments: object) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call, self.arguments


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_runs_nothing(protocol, tmp_path):
    marker = tmp_path / "marker"
    for call, arguments, name in (
        (os.system, (f"touch {marker}",), r"\w+.system"),
        (eval, (f"open({str(marker)!r}, 'w')",), r"\w+.eval"),
        (np.load, (str(marker),), "numpy.load"),
        (getattr, (np.ndarray, "tofile"), r"\w+.getattr"),
    ):
        content = pickle.dumps(Malicious(call, *arguments), protocol)
        with pytest.raises(DataError, match=f"^this: cannot be unpickled: it asks for {name}, .*refused"):
            unpickle(content, "this")
        assert not marker.exists()


def test_a_pickle_reaches_nothing_through_what_is_allowed(tmp_path):
    dotted = b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93."
    with pytest.raises(DataError, match=r"it asks for numpy.ndarray.tofile"):
        unpickle(dotted, "this")
    write_cifar_archive(tmp_path / "cifar10", cifar_batches() | {"data_batch_3": dotted})
    with pytest.raises(
        DataError, match=r"cifar-10-python.tar.gz: cifar-10-batches-py/data_batch_3: .*asks for"
    ):
        load("cifar10")


PIXELS = np.zeros((4, 3072), np.uint8)
LABELS = [0, 1, 2, 3]

BATCH_FAULTS = {
    "not a dictionary": ([PIXELS, LABELS], "got list without data and labels"),
    "no labels": ({b"data": PIXELS}, "got dict without data and labels"),
    "data in a list": ({b"data": [[0] * 3072], b"labels": [0]}, "got data in a list"),
    "floats": ({b"data": PIXELS / 2, b"labels": LABELS}, "not made of bytes"),
    "objects": ({b"data": PIXELS.astype(object), b"labels": LABELS}, "not made of bytes"),
    "images cut": ({b"data": PIXELS[:, 1:], b"labels": LABELS}, r"got data of shape \(4, 3071\)"),
    "one image": ({b"data": PIXELS[0], b"labels": LABELS}, r"got data of shape \(3072,\)"),
    "fewer labels": ({b"data": PIXELS, b"labels": LABELS[1:]}, "got 4 images and 3 labels"),
    "labels in a tuple": ({b"data": PIXELS, b"labels": tuple(LABELS)}, "got labels in a tuple"),
    "a label too high": ({b"data": PIXELS, b"labels": [0, 1, 2, 10]}, "got label 10, expected 0 to 9"),
    "a label below zero": ({b"data": PIXELS, b"labels": [0, 1, 2, -1]}, "got label -1"),
    "a fraction": ({b"data": PIXELS, b"labels": [0, 1, 2, 0.5]}, "got a label of type float"),
    "a label too long to print": ({b"data": PIXELS, b"labels": [0, 1, 2, 10**5000]}, "a label of type int"),
}


@pytest.mark.parametrize("dump", [python2, python3])
@pytest.mark.parametrize("fault", BATCH_FAULTS)
def test_pickles_that_are_no_batches_are_refused(fault, dump):
    batch, message = BATCH_FAULTS[fault]
    with pytest.raises(DataError, match=f"^this: .*{message}"):
        cifar10.parse(dump(batch), "this")


def test_an_array_stored_by_columns_is_read():
    images = RNG.integers(0, 256, (4, 3072), dtype=np.uint8)
    content = python3({b"data": np.asfortranarray(images), b"labels": LABELS})
    assert np.array_equal(cifar10.parse(content, "this")[0], images)


@pytest.mark.parametrize("kept", [0, 1, 20, 200, -200, -1])
def test_a_truncated_batch_is_refused(kept, tmp_path):
    path = tmp_path / "cifar10" / "cifar-10-batches-py" / "test_batch"
    write_cifar_folder(tmp_path / "cifar10")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DataError, match=f"^{path}: cannot be unpickled"):
        load("cifar10")


@pytest.mark.parametrize("kept", [0, 1, 20, 2000, -2000])
def test_a_truncated_archive_is_refused(kept, tmp_path):
    path = tmp_path / "cifar10" / cifar10.ARCHIVE
    write_cifar_archive(tmp_path / "cifar10")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DataError, match=f"^{path}: "):
        load("cifar10")


@pytest.mark.parametrize("write", [write_cifar_archive, write_cifar_folder])
def test_missing_batches_are_named(write, tmp_path):
    batches = cifar_batches()
    del batches["data_batch_2"], batches["test_batch"]
    write(tmp_path / "cifar10", batches)
    with pytest.raises(DataError, match=rf"{tmp_path}/cifar10/.*: found no data_batch_2, test_batch"):
        load("cifar10")


def test_a_link_in_an_archive_is_not_followed(tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(cifar_batches()["test_batch"])
    folder = tmp_path / "cifar10"
    batches = cifar_batches()
    del batches["test_batch"]
    with tarfile.open(folder / cifar10.ARCHIVE, "w:gz") as archive:
        for name, content in batches.items():
            member = tarfile.TarInfo(f"{cifar10.UNPACKED}/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo(f"{cifar10.UNPACKED}/test_batch")
        link.type, link.linkname = tarfile.SYMTYPE, str(secret)
        archive.addfile(link)
    with pytest.raises(DataError, match="found no test_batch"):
        load("cifar10")


# Any damage at all: a message, never a crash or another exception. scipy's and numpy's own readers of these
# two formats do crash.


def spoilt(content: bytes, data: st.DataObject) -> bytes:
    damaged = bytearray(content)
    head = st.integers(0, min(400, len(content) - 1)) | st.integers(0, len(content) - 1)
    for place, value in data.draw(st.lists(st.tuples(head, st.integers(0, 255)), min_size=1, max_size=12)):
        damaged[place] = value
    return bytes(damaged[: data.draw(st.just(len(damaged)) | st.integers(0, len(damaged)))])


def complaint(read: Callable[[], object]) -> str:
    """Return what a reader says of damage; nothing if none is to be seen, as in a pixel."""
    try:
        read()
    except DataError as error:
        return str(error)
    return ""


anything = settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("compressed", [True, False])
@anything
@given(data=st.data())
def test_any_damage_to_a_matlab_file_is_told(compressed, data, tmp_path):
    file = io.BytesIO()
    savemat(file, svhn_content(), do_compression=compressed)
    path = tmp_path / "damaged.mat"
    path.write_bytes(spoilt(file.getvalue(), data))
    said = complaint(lambda: svhn.read_part(path))
    assert not said or said.startswith(f"{path}: ")


@pytest.mark.parametrize("dump", [python2, python3])
@anything
@given(data=st.data())
def test_any_damage_to_a_batch_is_told(dump, data):
    content = spoilt(dump({b"data": PIXELS[:1], b"labels": [1]}), data)
    said = complaint(lambda: cifar10.parse(content, "this"))
    assert not said or said.startswith("this: ")


# Standardising.


@pytest.mark.parametrize("chunk", [1, 7, images.CHUNK])
def test_statistics_are_exact_and_do_not_depend_on_chunks(chunk, monkeypatch):
    train = COLOUR["train"][0]
    expected = images.statistics(train.reshape(TRAIN, -1), 3)
    monkeypatch.setattr(images, "CHUNK", chunk)
    mean, std = images.statistics(train.reshape(TRAIN, -1), 3)
    assert (mean.tolist(), std.tolist()) == tuple(part.tolist() for part in expected)
    pixels = train.transpose(1, 0, 2, 3).reshape(3, -1) / 255.0
    np.testing.assert_allclose(mean, pixels.mean(axis=1), rtol=1e-12)
    np.testing.assert_allclose(std, pixels.std(axis=1), rtol=1e-12)
    scaled = images.colour(train.reshape(TRAIN, -1), train.reshape(TRAIN, -1))
    by_channel = scaled.reshape(TRAIN, 3, -1).astype(np.float64)
    np.testing.assert_allclose(by_channel.mean(axis=(0, 2)), 0, atol=1e-7)
    np.testing.assert_allclose(by_channel.std(axis=(0, 2)), 1, rtol=1e-7)


# The real files.

MNIST_LABELS = {
    "train": [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949],
    "test": [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009],
}
MNIST_CHECKSUM = "ef4c22d712fef9935bf6bd148b085d5e1719a6ba39d5cbdd76917ab8fb01171a"


class TestRealFiles:
    @pytest.fixture(autouse=True)
    def small_files_and_no_network(self, monkeypatch):
        """The catalogue and the directory as they are, and still no network."""
        monkeypatch.setitem(sys.modules, "pooch", None)
        load.cache_clear()
        yield
        load.cache_clear()

    def test_mnist(self, real_data):
        data = real_data("mnist")
        assert np.bincount(data.train_targets).tolist() == MNIST_LABELS["train"]
        assert np.bincount(data.test_targets).tolist() == MNIST_LABELS["test"]
        check_scaled(data, mean=0.1307, std=0.3081)
        assert data.checksum == MNIST_CHECKSUM

    def test_fashion_mnist(self, real_data):
        data = real_data("fashion_mnist")
        assert np.bincount(data.train_targets).tolist() == [6000] * 10
        assert np.bincount(data.test_targets).tolist() == [1000] * 10
        check_scaled(data, mean=0.2860, std=0.3530)


def check_scaled(data: module.Dataset, mean: float, std: float) -> None:
    """Compare with the constants that others use; black is the lowest value of all."""
    assert data.train_inputs.shape == (60_000, 784)
    assert data.test_inputs.shape == (10_000, 784)
    assert data.shape == (1, 28, 28)
    assert data.train_inputs.dtype == data.test_inputs.dtype == np.float32
    assert data.train_inputs.mean(dtype=np.float64) == pytest.approx(0, abs=1e-6)
    assert data.train_inputs.std(dtype=np.float64) == pytest.approx(1, rel=1e-6)
    for inputs in (data.train_inputs, data.test_inputs):
        assert inputs.min() == pytest.approx(-mean / std, rel=2e-3)
        assert inputs.max() == pytest.approx((1 - mean) / std, rel=2e-3)
