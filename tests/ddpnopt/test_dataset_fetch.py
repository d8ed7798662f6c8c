"""Where files of datasets are looked for, and how missing ones are fetched. No network but loopback."""

from __future__ import annotations

import hashlib
import http.server
import re
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from ddpnopt.datasets import fetch, store
from ddpnopt.datasets.load import load
from ddpnopt.errors import ConfigError, DataError

CONTENT = b"not a dataset, but the bytes that were asked for" * 100
IDX_NAMES = [file.unpacked for file in fetch.OFFICIAL["mnist"]]


@pytest.fixture(autouse=True)
def no_pooch(monkeypatch, tmp_path):
    """Nothing is fetched by accident; a directory of this test's own."""
    monkeypatch.setitem(sys.modules, "pooch", None)
    monkeypatch.setenv("DDPSWEEP_DATA", str(tmp_path))
    load.cache_clear()
    yield
    load.cache_clear()


@pytest.fixture
def asked(monkeypatch):
    """A pooch that writes a file instead of downloading one; returns what it was asked for."""
    calls = []

    def retrieve(url: str, known_hash: str, fname: str, path: Path) -> str:
        calls.append((url, known_hash, fname))
        path.mkdir(parents=True, exist_ok=True)
        (path / fname).write_bytes(CONTENT)
        return str(path / fname)

    monkeypatch.setitem(sys.modules, "pooch", SimpleNamespace(retrieve=retrieve))
    return calls


# The directory.


def test_the_variable_names_the_directory(monkeypatch, tmp_path):
    assert store.directory() == tmp_path
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DDPSWEEP_DATA", "here")
    assert store.directory() == tmp_path / "here"


@pytest.mark.parametrize("value", [None, ""])
def test_without_it_the_cache_folder_is_taken(value, monkeypatch, tmp_path):
    if value is None:
        monkeypatch.delenv("DDPSWEEP_DATA")
    else:
        monkeypatch.setenv("DDPSWEEP_DATA", value)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert store.directory() == tmp_path / "cache" / "ddpsweep" / "data"
    for ignored in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert store.directory() == tmp_path / "home" / ".cache" / "ddpsweep" / "data"


def test_a_user_without_a_home_is_told_of_the_variable(monkeypatch):
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("DDPSWEEP_DATA")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", home)
    with pytest.raises(DataError, match=r"home directory\.; set DDPSWEEP_DATA"):
        store.directory()


# What is official.


def test_every_official_file_has_an_address_and_a_checksum_of_its_own():
    files = [file for several in fetch.OFFICIAL.values() for file in several]
    assert [len(several) for several in fetch.OFFICIAL.values()] == [4, 4, 2, 1]
    assert len({file.sha256 for file in files}) == len({file.url for file in files}) == len(files)
    for file in files:
        assert re.fullmatch("[0-9a-f]{64}", file.sha256)
        assert re.fullmatch(r"https?://[a-z0-9./~-]+/" + re.escape(file.name), file.url, re.IGNORECASE)


# Missing files.


@pytest.mark.parametrize("name", fetch.OFFICIAL)
def test_without_pooch_a_missing_file_says_where_and_how(name, tmp_path):
    first = fetch.OFFICIAL[name][0]
    with pytest.raises(DataError) as caught:
        load(name)
    message = str(caught.value)
    for word in (name, first.name, str(tmp_path / name), first.url, "DDPSWEEP_DATA", fetch.EXTRA):
        assert word in message


def test_what_is_missing_is_fetched_by_name_with_its_checksum(asked, tmp_path):
    folder = tmp_path / "svhn"
    fetch.ensure("svhn", folder)
    assert asked == [(f.url, f"sha256:{f.sha256}", f.name) for f in fetch.OFFICIAL["svhn"]]
    assert sorted(path.name for path in folder.iterdir()) == ["test_32x32.mat", "train_32x32.mat"]
    asked.clear()
    fetch.ensure("svhn", folder)
    assert asked == []


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_files_that_are_there_unpacked_are_not_fetched(name, asked, tmp_path):
    folder = tmp_path / name
    folder.mkdir()
    for file in fetch.OFFICIAL[name][1:]:
        (folder / file.name).touch()
    first = fetch.OFFICIAL[name][0]
    assert [file.name for file in fetch.missing(name, folder)] == [first.name]
    (folder / first.unpacked).touch()
    fetch.ensure(name, folder)
    assert asked == []


def test_loading_fetches_and_then_reads(asked, tmp_path):
    with pytest.raises(DataError, match=f"^{tmp_path}/mnist/train-images-idx3-ubyte.gz: cannot be read"):
        load("mnist")
    assert [name for _, _, name in asked] == [f"{name}.gz" for name in IDX_NAMES]


@pytest.mark.parametrize("error", [OSError("Name or service not known"), ValueError("SHA256 hash of ...")])
def test_a_download_that_fails_is_told_with_address_and_reason(error, monkeypatch, tmp_path):
    def retrieve(url: str, **_: object) -> str:
        raise error

    monkeypatch.setitem(sys.modules, "pooch", SimpleNamespace(retrieve=retrieve))
    with pytest.raises(DataError) as caught:
        load("cifar10")
    for word in ("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz", str(tmp_path), str(error)):
        assert word in str(caught.value)


# By hand.


def test_datasets_are_fetched_by_name(asked, capsys, tmp_path):
    fetch.main(["svhn", "cifar10"])
    assert [name for _, _, name in asked] == ["train_32x32.mat", "test_32x32.mat", "cifar-10-python.tar.gz"]
    assert capsys.readouterr().out == f"svhn is in {tmp_path}/svhn\ncifar10 is in {tmp_path}/cifar10\n"


@pytest.mark.parametrize("names", [[], ["digits"], ["svhn", "imagenet"]])
def test_only_what_can_be_fetched_is(names, asked):
    with pytest.raises(ConfigError, match="some of mnist, fashion_mnist, svhn, cifar10"):
        fetch.main(names)
    assert asked == []


def test_on_the_command_line_an_error_is_a_line():
    done = subprocess.run(
        [sys.executable, "-m", "ddpnopt.datasets.fetch", "imagenet"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert done.stderr == "names: got ['imagenet']; allowed: some of mnist, fashion_mnist, svhn, cifar10\n"


# pooch itself, where it is installed, against a server of this test's own.


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if "gone" in self.path:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(CONTENT[:100] if "cut" in self.path else CONTENT)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.delitem(sys.modules, "pooch")
    pytest.importorskip("pooch", reason=f"needs pooch: {fetch.EXTRA}")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


OFFERED = fetch.OfficialFile("", hashlib.sha256(CONTENT).hexdigest())


def test_pooch_downloads_checks_and_renames(server, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "OFFICIAL", {"svhn": (replace(OFFERED, url=f"{server}/some.mat"),)})
    fetch.ensure("svhn", tmp_path / "svhn")
    (path,) = (tmp_path / "svhn").iterdir()
    assert path.name == "some.mat"
    assert path.read_bytes() == CONTENT
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize(
    ("path", "sha256", "reason"),
    [
        ("/some.mat", "0" * 64, "does not match the known hash"),
        ("/gone.mat", OFFERED.sha256, "404"),
        ("/cut.mat", OFFERED.sha256, "IncompleteRead"),
    ],
)
def test_pooch_leaves_nothing_of_a_failed_download(server, path, sha256, reason, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "OFFICIAL", {"svhn": (fetch.OfficialFile(server + path, sha256),)})
    with pytest.raises(DataError, match=f"cannot fetch {server + path} into it: .*{reason}"):
        fetch.ensure("svhn", tmp_path / "svhn")
    assert list((tmp_path / "svhn").iterdir()) == []


def test_offline_is_told(server, tmp_path, monkeypatch):
    # Port 9 discards; nobody listens there.
    monkeypatch.setattr(fetch, "OFFICIAL", {"svhn": (replace(OFFERED, url="http://127.0.0.1:9/some.mat"),)})
    with pytest.raises(DataError, match=r"cannot fetch http://127.0.0.1:9/some.mat into it: .*refused"):
        fetch.ensure("svhn", tmp_path / "svhn")
