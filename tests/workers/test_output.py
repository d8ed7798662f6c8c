"""Text that any database takes, and where it comes from."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

import pytest

from workers.output import LoggedOnly, clean
from workers.protocol import LOG_BYTES


@pytest.mark.parametrize(
    ("written", "text"),
    [
        (b"", ""),
        ("V_xx, ī\n".encode(), "V_xx, ī\n"),
        (b"a\0b", "a\ufffdb"),
        (b"a\xffb", "a\ufffdb"),
        (b"\xed\xa0\x80", "\ufffd\ufffd\ufffd"),  # half of a surrogate pair
        (b"x" * LOG_BYTES + b"end", "x" * (LOG_BYTES - 3) + "end"),
    ],
    ids=["empty", "text", "nul", "byte", "surrogate", "long"],
)
def test_bytes_become_text(written, text):
    assert clean(written) == text


@pytest.mark.parametrize(
    "written",
    [b"\0" * LOG_BYTES, b"\xff" * LOG_BYTES, "ī".encode() * LOG_BYTES],
    ids=["nul", "byte", "two bytes"],
)
@pytest.mark.parametrize("shift", range(3))
def test_text_is_bounded_and_whole(written, shift):
    text = clean(written + b"x" * shift)
    assert LOG_BYTES - 3 <= len(text.encode()) <= LOG_BYTES
    assert set(text) <= set("\ufffdīx")


SCRIPT = """
import ctypes, json, os, sys
from workers import output

output.MOST_BYTES = 300_000
print("before", flush=True)
streams = output.StandardStreams()
c = ctypes.CDLL(None)
found = []

print("printed")
print("complained", file=sys.stderr)
c.printf(b"from C\\n")
os.system("echo from a child >&2")
found.append(streams.take())
found.append(streams.take())

for _ in range(10):
    os.write(1, b"x" * 50_000)
    streams.trim()
sys.stdout.write("end")
found.append(streams.take())
size = os.fstat(2).st_size
print("after")
found.append(streams.take())
with open(sys.argv[1], "w") as file:
    json.dump([found, size], file)
print("last words", file=sys.stderr)
"""


@pytest.mark.parametrize("kept", [True, False], ids=["file", "pipe"])
def test_what_a_process_writes(kept, tmp_path):
    """As in a worker of Ray's, whose streams go to files, and as where they go to pipes."""
    path = tmp_path / "err"
    with path.open("ab") as file:
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(tmp_path / "found")],
            stdout=subprocess.PIPE,
            stderr=file if kept else subprocess.PIPE,
            timeout=60,
        )
    assert done.returncode == 0
    assert done.stdout == b"before\n"
    (first, nothing, long, after), size = json.loads((tmp_path / "found").read_text())
    assert sorted(first.splitlines()) == ["complained", "from C", "from a child", "printed"]
    assert nothing == ""
    assert long == "x" * (LOG_BYTES - 3) + "end"
    assert after == "after\n"
    assert size <= 300_000
    # What comes last, as when a process crashes, stays in the file that Ray knows.
    assert path.read_bytes().endswith(b"last words\n" if kept else b"")


def test_logged_lines_are_bounded_and_taken_once():
    output, logger = LoggedOnly(), logging.getLogger("workers.test_output")
    with output:
        logger.error("first \0 %s", "\udc80")
        text = output.take()
        assert text.endswith("ERROR workers.test_output: first \ufffd ?\n")
        assert output.take() == ""
        for number in range(3000):
            logger.error("%d %s", number, "x" * 50)
    logger.error("unheard")
    text = output.take()
    assert len(text) <= LOG_BYTES
    assert text.splitlines()[-1].endswith("2999 " + "x" * 50)
