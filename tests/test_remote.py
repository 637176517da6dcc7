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
from typing import Any

import pytest
from conftest import FAST, Command, Inside, explain, files

from detxai.errors import ImageError, OutputError, UsageError
from detxai.inputs import remote
from detxai.output import bucket
from detxai.output.store import Store

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


def objects(root: str) -> dict[str, bytes]:
    """As `files`, of a tree in the store of this process."""
    store = pytest.importorskip("fsspec").filesystem("memory")
    names = [n for n in store.find(root) if n.rpartition("/")[2] != "summary.json" and "/." not in n]
    return {name.removeprefix(f"{root}/"): store.cat_file(name) for name in names}


def test_a_tree_in_a_store_is_the_one_in_a_folder(
    inside: Inside, tiny: Path, pictures: Path, finished: Callable[[], Path]
) -> None:
    store = pytest.importorskip("fsspec").filesystem("memory")
    line = ("explain", pictures, "-m", tiny, "-o", "memory://trees/run", "--maps", "npz", *FAST)
    here = files(finished())
    # A run that was killed: a record is missing, another one is of other settings, a picture is too many.
    (record,) = (name for name in here if name == "a.png.json")
    upload(store, "/trees/run", finished())
    store.rm_file(f"/trees/run/{record}")
    store.pipe_file("/trees/run/b.png.json", here["b.png.json"].replace(b'"fingerprint":"', b'"fingerprint":"0'))
    store.pipe_file("/trees/run/b.png.d00.old.png", b"superseded")
    store.pipe_file("/trees/run/.detxai.writer", b"another")
    outcome = inside(*line)
    assert outcome.code == 0 and "another run has begun" in outcome.err
    assert objects("/trees/run") == here
    assert not store.exists("/trees/run/.detxai.writer")
    summary = json.loads(store.cat_file("/trees/run/summary.json"))
    assert (summary["images"]["ok"], summary["images"]["skipped"]) == (2, 4)
    assert summary["config"]["output"]["dir"] == "memory://trees/run"
    outcome = inside(*line)
    assert (outcome.code, objects("/trees/run")) == (0, here) and "another run" not in outcome.err


def test_two_runs_on_one_tree_in_a_store_are_told(
    inside: Inside, tiny: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = pytest.importorskip("fsspec").filesystem("memory")
    real = Store.write_image

    def beside(*arguments: Any) -> None:
        store.pipe_file("/two/run/.detxai.writer", b"the mark of the other")
        real(*arguments)

    monkeypatch.setattr(Store, "write_image", beside)
    outcome = inside("explain", pictures / "a.png", "-m", tiny, "-o", "memory://two/run", *FAST)
    assert outcome.code == 6 and "may be of both" in outcome.err
    assert store.cat_file("/two/run/.detxai.writer") == b"the mark of the other"


def test_what_cannot_be_is_refused(inside: Inside, pictures: Path) -> None:
    outcome = inside("explain", "s3://key:word@bags/x.png")
    assert outcome.code == 2 and "without credentials" in outcome.err and "word" not in outcome.err
    outcome = inside("explain", pictures, "-o", "s3://key:wo/rd@bags/out")
    assert outcome.code == 2 and "credentials come from the environment" in outcome.err and "rd@" not in outcome.err
    outcome = inside("explain", pictures, "-o", "https://bags/out")
    assert outcome.code == 2 and "must be a folder here" in outcome.err
    outcome = inside("list", "s3://bags/out")
    assert outcome.code == 4 and "copied here from its store" in outcome.err
    for line in (("--report",), ("--skip", "by-stat")):
        outcome = inside("explain", pictures, "-o", "memory://bags/out", *line)
        assert outcome.code == 2 and f"{' '.join(line)} needs a folder" in outcome.err
    pytest.importorskip("fsspec").filesystem("memory").pipe_file("/held/a.png", b"")
    outcome = inside("explain", "memory://held", "-o", "memory://held/out")
    assert outcome.code == 2 and "lies in SOURCE" in outcome.err
    assert not (inside.cwd / "s3:").exists()


def test_what_a_store_refuses_is_said_without_its_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """They may hold credentials. What is not there is told from what cannot be read."""
    store = pytest.importorskip("fsspec").filesystem("memory")
    store.pipe_file("/refused/in/a.png", b"0123")
    (single,) = remote.Objects("memory://refused/in/a.png", "")
    assert (single.path, single.url) == ("a.png", "memory://refused/in/a.png")
    assert remote.read("memory://refused/in/a.png", 4) == b"0123"

    def refuses(*_: Any, **__: Any) -> Any:
        raise PermissionError(f"the key {SECRET} is not known")

    def failure(url: str, most: int = 4) -> ImageError:
        with pytest.raises(ImageError) as caught:
            remote.read(url, most)
        assert SECRET not in str(caught.value)
        return caught.value

    tree = bucket.place("memory://refused/out")
    assert isinstance(tree, bucket.Bucket)
    assert failure("memory://refused/in/a.png", 3).code == "too_large"
    assert failure("memory://refused/in/b.png").code == "not_found"
    with pytest.raises(FileNotFoundError):
        (tree / "x").unlink()
    (tree / "a.png").put([b"0123"])
    assert [place.name for place in tree.glob("*.png")] == ["a.png"] and (tree / "a.png").stamp()
    assert list((tree / "none").walk()) == [("", [])], "a tree that begins now"
    (tree / "x").unlink(missing_ok=True)
    for call in ("info", "cat_file", "ls", "isfile", "rm_file", "pipe_file", "put_file"):
        monkeypatch.setattr(type(store), call, refuses)
    assert failure("memory://refused/in/a.png").code == "unreadable"
    with pytest.raises(UsageError, match="cannot be listed: PermissionError") as listed:
        remote.Objects("memory://refused/in", "")
    asked: list[Callable[[], Any]] = [
        tree.read_bytes, tree.stamp, tree.is_file, tree.unlink, lambda: list(tree.walk()),
        lambda: tree.put([b""]), lambda: tree.put(iter([b""])),
    ]  # fmt: skip
    for ask in asked:
        with pytest.raises(OutputError, match="cannot be read or written: PermissionError") as told:
            ask()
        assert SECRET not in str(told.value) + str(listed.value)
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(UsageError, match="pip install 'detxai\\[remote\\]'"):
        remote.Objects("memory://refused/in", "")


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
    # A tree there: the same objects, by two rounds of which the first is stopped before its end.
    line = ("explain", pictures, "-m", tiny, "-o", "s3://bags/out", *FAST)
    cut = detxai(*line, "--max-failures", 1, "--max-pixels", 9000, env=key)
    assert cut.code == 3, cut.err
    outcome = detxai(*line, env=key)
    assert outcome.code == 0, outcome.err
    get = (
        "import s3fs, sys, pathlib\n"
        "store = s3fs.S3FileSystem(); root = pathlib.Path(sys.argv[1])\n"
        "for name in store.find('bags/out'):\n"
        "    file = root / name.removeprefix('bags/out/'); file.parent.mkdir(parents=True, exist_ok=True)\n"
        "    file.write_bytes(store.cat_file(name))\n"
    )
    copy = tmp_path / "copy"
    subprocess.run([sys.executable, "-c", get, str(copy)], check=True, env=os.environ | key)
    assert files(copy) == files(tmp_path / "here")
    assert not (copy / ".detxai.writer").exists()
    assert SECRET.encode() not in b"".join(file.read_bytes() for file in copy.rglob("*") if file.is_file())
    lost = detxai(*line[: -1 - len(FAST)], "s3://nobucket/out", *FAST, env=key)
    assert lost.code == 6 and "cannot be read or written" in lost.err and SECRET not in lost.err
    wrong = detxai("explain", "s3://nobucket/in", "-m", tiny, "-o", tmp_path / "none", env=key)
    assert wrong.code == 2 and SECRET not in wrong.err
