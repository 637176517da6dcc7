"""Sources in object stores: the same records as from files; refused where that cannot be, and credentials nowhere."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import FAST, Command, Inside, explain, files

SECRET = "topsecretkey"


def upload(store: object, root: str, pictures: Path) -> None:
    for file in pictures.rglob("*"):
        if file.is_file():
            store.pipe_file(f"{root}/{file.relative_to(pictures)}", file.read_bytes())  # type: ignore[attr-defined]


def test_objects_are_explained_like_files(
    inside: Inside, tiny: Path, pictures: Path, finished: Callable[[], Path]
) -> None:
    store = pytest.importorskip("fsspec").filesystem("memory")
    upload(store, "/bags", pictures)
    store.pipe_file("/bags/cut.png", b"")
    outcome = inside("explain", "memory://bags", "-m", tiny, "-o", "there", "--maps", "npz", *FAST)
    assert outcome.code == 3 and "cut.png" in outcome.err
    there, here = files(inside.cwd / "there"), files(finished())
    assert {n: there[n] for n in there if "cut" not in n and n != "records.jsonl"} == {
        n: here[n] for n in here if n != "records.jsonl"
    }
    assert inside("explain", "memory://nowhere", "-m", tiny, "-o", "none").code == 2


def test_what_cannot_be_is_refused(inside: Inside, pictures: Path) -> None:
    outcome = inside("explain", "s3://key:word@bags/x.png")
    assert outcome.code == 2 and "without credentials" in outcome.err
    outcome = inside("explain", pictures, "-o", "s3://bags/out")
    assert outcome.code == 2 and "must be a folder here" in outcome.err
    assert not (inside.cwd / "s3:").exists()


@pytest.fixture
def endpoint() -> Iterator[str]:
    """A real S3 server on loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        for _ in range(600):
            with socket.socket() as asked:
                if asked.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


@pytest.mark.slow
@pytest.mark.skipif(find_spec("moto") is None or find_spec("s3fs") is None, reason="needs moto and s3fs")
def test_a_bucket_is_explained_like_a_folder(
    detxai: Command, endpoint: str, tiny: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = {"AWS_ACCESS_KEY_ID": "somebody", "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_ENDPOINT_URL": endpoint}
    for name, value in key.items():
        monkeypatch.setenv(name, value)
    put = (
        "import s3fs, sys, pathlib\n"
        "store = s3fs.S3FileSystem(); store.mkdir('bags'); root = pathlib.Path(sys.argv[1])\n"
        "for f in root.rglob('*'):\n"
        "    f.is_file() and store.pipe_file(f'bags/in/{f.relative_to(root)}', f.read_bytes())\n"
    )
    subprocess.run([sys.executable, "-c", put, str(pictures)], check=True, env=os.environ | key)
    outcome = detxai("explain", "s3://bags/in", "-m", tiny, "-o", tmp_path / "there", *FAST, "--json", env=key)
    assert outcome.code == 0, outcome.err
    assert explain(pictures, "-m", tiny, "-o", tmp_path / "here", *FAST) == 0
    assert files(tmp_path / "there") == files(tmp_path / "here")
    assert json.loads((tmp_path / "there" / "summary.json").read_bytes())["images"]["ignored"] == 1
    written = b"".join(file.read_bytes() for file in (tmp_path / "there").rglob("*") if file.is_file())
    assert SECRET not in outcome.out + outcome.err and SECRET.encode() not in written
    wrong = detxai("explain", "s3://nobucket/in", "-m", tiny, "-o", tmp_path / "none", env=key)
    assert wrong.code == 2 and SECRET not in wrong.err
