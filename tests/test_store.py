"""The output tree under real faults: kills, locks, clashes, full disks, ways out of the tree."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from detxai.errors import ImageError, OutputError
from detxai.evidence.maps import map_sums
from detxai.output import atomic, recording, records, store
from detxai.output.store import Store
from detxai.output.summary import Summary
from detxai.values import Attribution, ClassScore, Detection, ImageRef, Target


def record(path: str, pictures: list[str], fingerprint: str = "f") -> records.Record:
    """A record that names `pictures`, one a detection."""
    score = ClassScore(0, "bag", 0.9, 2.2)
    detection = Detection(0, 0, 0, "bag", 0.9, 2.2, (0, 0, 9, 9), (score,))
    values = np.eye(9, dtype=np.float32)
    attribution = Attribution("ig", Target(0, 0), "white", "fp32", "full", values, 9.0, 0.0, 2.2, -7.0, 3)
    found = [
        recording.detection_record(
            detection,
            number,
            [recording.attribution_record(attribution, map_sums(attribution, detection.box), "bag", overlay=name)],
        )
        for number, name in enumerate(pictures)
    ]
    model = records.ModelInfo(name="m.pt", sha256="0", family="v8", head="one2many", imgsz=640)
    return records.Record(
        status="ok",
        fingerprint=fingerprint,
        image=records.ImageInfo(path=path),
        model=model,
        detections=tuple(found),
    )


def finish(tree: Store, summary: Summary) -> None:
    tree.gather()
    tree.finish(summary)


def write(tree: Store, path: str, count: int, fingerprint: str = "f") -> None:
    names = [store.picture_stem(path, number, "ig") + ".png" for number in range(count)]
    pictures = {name: f"{fingerprint} {name}".encode() for name in names}
    tree.write_image(path, pictures, record(path, names, fingerprint))


def failed(path: str) -> records.Record:
    return recording.failed_record(ImageRef(path, Path(path)), ImageError("truncated", "short"))


def files(root: Path) -> dict[str, bytes]:
    """The tree without what may change: the summary and dot-files."""
    return {
        str(file.relative_to(root)): file.read_bytes()
        for file in root.rglob("*")
        if file.is_file() and file.name != "summary.json" and not file.name.startswith(".")
    }


def test_tree_of_a_run(tmp_path: Path) -> None:
    with Store(tmp_path / "deep/out") as tree:
        write(tree, "bags/b.jpg", 1)
        write(tree, "a.jpg", 0)
        finish(tree, Summary())
    found = files(tmp_path / "deep/out")
    assert set(found) == {
        "a.jpg.json",
        "bags/b.jpg.json",
        "bags/b.jpg.d00.ig.png",
        "records.jsonl",
    }
    assert found["records.jsonl"] == found["a.jpg.json"] + found["bags/b.jpg.json"]
    assert (tmp_path / "deep/out/summary.json").is_file()
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_second_run_changes_nothing(tmp_path: Path) -> None:
    def run() -> dict[str, int]:
        with Store(tmp_path) as tree:
            for number in range(3):
                if not tree.done(f"{number}.jpg", "f"):
                    write(tree, f"{number}.jpg", 2)
            tree.write_image("bad.jpg", {}, failed("bad.jpg"))
            finish(tree, Summary(seconds=os.times().elapsed))
        return {name: (tmp_path / name).stat().st_mtime_ns for name in files(tmp_path)}

    assert run() == run()


def test_done_asks_for_fingerprint_status_and_pictures(tmp_path: Path) -> None:
    with Store(tmp_path) as tree:
        write(tree, "a.jpg", 1)
        tree.write_image("bad.jpg", {}, failed("bad.jpg"))
        assert tree.done("a.jpg", "f")
        assert not tree.done("a.jpg", "g")
        assert not tree.done("bad.jpg", "f")
        assert not tree.done("none.jpg", "f")
        assert not tree.done("../a.jpg", "f")
        (tmp_path / "a.jpg.d00.ig.png").unlink()
        assert not tree.done("a.jpg", "f")
        (tmp_path / "a.jpg.json").write_bytes(b'{"schema":"detxai.record/1"')
        assert tree.existing("a.jpg") is None
    assert Store(tmp_path).existing("bad.jpg") is not None


def test_superseded_pictures_go_and_others_stay(tmp_path: Path) -> None:
    with Store(tmp_path) as tree:
        write(tree, "a.jpg", 3)
        write(tree, "a.jpg.d00.x.png", 1)
    own = {"a.jpg.txt", "a.jpg.d00", "notes.json", "a.jpg.d0.ig.png", "b.jpg.png"}
    for name in own:
        (tmp_path / name).write_text("{}")
    (tmp_path / "a.jpg.d07.orphan.npz").write_text("left by a kill")
    (tmp_path / "a.jpg.webp").write_text("the picture of all boxes of an earlier run")
    (tmp_path / ".detxai-0123456789abcdef.tmp").write_text("left by a kill")
    (tmp_path / ".detxai-mine.tmp").write_text("not of detxai")
    with Store(tmp_path) as tree:
        write(tree, "a.jpg", 1, "g")
        finish(tree, Summary())
    assert {file.name for file in tmp_path.iterdir() if "lock" not in file.name} == own | {
        "a.jpg.json",
        "a.jpg.d00.ig.png",
        "a.jpg.d00.x.png.json",
        "a.jpg.d00.x.png.d00.ig.png",
        ".detxai-mine.tmp",
        "records.jsonl",
        "summary.json",
    }
    assert (tmp_path / "records.jsonl").read_bytes().count(b"\n") == 2
    with Store(tmp_path) as tree:
        tree.write_image("a.jpg", {}, failed("a.jpg"))
    assert not (tmp_path / "a.jpg.d00.ig.png").exists()


OUTSIDE = ("../a.jpg", "x/../../a.jpg", "/a.jpg", "", "x//a.jpg", "./a.jpg", "a\0b", "link/a.jpg")
OWN = ("summary", "records.jsonl/a.jpg", "summary.json/a.jpg", ".detxai.lock/a.jpg")
TOO_LONG = ("a" * 260, "a/" * 3000 + "b")


@pytest.mark.parametrize("path", [*OUTSIDE, *OWN, *TOO_LONG], ids=lambda path: repr(path[:20]))
def test_nothing_is_written_outside_or_over_the_own_files(tmp_path: Path, path: str) -> None:
    output, outside = tmp_path / "out", tmp_path / "outside"
    outside.mkdir()
    with Store(output) as tree:
        (output / "link").symlink_to(outside)
        with pytest.raises(ImageError) as caught:
            write(tree, path, 1)
        assert caught.value.code == "bad_path"
        tree.write_image(path, {}, failed(path.replace("\0", "?")))
        finish(tree, Summary())
    assert {file.name for file in tmp_path.iterdir()} == {"out", "outside"}
    assert not list(outside.iterdir())
    assert (output / "records.jsonl").read_bytes().count(b'"failed"') == 1
    assert not list(output.rglob("*.png"))


def test_a_name_that_is_too_long_for_its_pictures_only(tmp_path: Path) -> None:
    path = "a" * 246 + ".jpg"
    with Store(tmp_path) as tree:
        with pytest.raises(ImageError, match="too long"):
            write(tree, path, 1)
        tree.write_image(path, {}, failed(path))
        assert tree.existing(path) is not None


def test_an_image_and_a_folder_of_its_records_name(tmp_path: Path) -> None:
    with Store(tmp_path) as tree:
        write(tree, "a.jpg", 1)
        with pytest.raises(ImageError, match="in the way"):
            write(tree, "a.jpg.json/b.png", 1)
        write(tree, "c.jpg.json/b.png", 1)
        with pytest.raises(ImageError, match="folder"):
            write(tree, "c.jpg", 1)
        tree.write_image("c.jpg", {}, failed("c.jpg"))
        finish(tree, Summary())
    lines = (tmp_path / "records.jsonl").read_bytes().splitlines()
    assert len(lines) == 3
    assert not (tmp_path / "c.jpg.d00.ig.png").exists()


def test_pictures_must_be_those_of_the_record(tmp_path: Path) -> None:
    with Store(tmp_path) as tree:
        for pictures in ({}, {"../a.jpg.d00.ig.png": b""}, {"b.jpg.d00.ig.png": b""}):
            with pytest.raises(ValueError, match="not those"):
                tree.write_image("a.jpg", pictures, record("a.jpg", [*pictures] or ["x.d00.i.png"]))


def test_names_that_are_no_unicode(tmp_path: Path) -> None:
    path = os.fsdecode(b"caf\xe9.jpg")
    with Store(tmp_path) as tree:
        tree.write_image(path, {}, record(path, []))
        assert tree.done(path, "f")
        finish(tree, Summary())
    assert b"caf" in (tmp_path / "records.jsonl").read_bytes()


def test_a_file_in_the_way_of_the_output(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    for output in (tmp_path / "out", tmp_path / "out/below"):
        with pytest.raises(OutputError, match="file is in the way"), Store(output):
            pass
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ENOSPC, "No space is left"),
        (errno.EROFS, "not writable"),
        (errno.EACCES, "not writable"),
        (errno.EIO, "Cannot write"),
    ],
)
def test_a_failing_disk_is_an_output_error_and_leaves_whole_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, words: str
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    with Store(tmp_path) as tree:
        write(tree, "a.jpg", 1)
        before = files(tmp_path)
        with monkeypatch.context() as broken:
            broken.setattr(os, "fsync", fail)
            with pytest.raises(OutputError, match=words):
                write(tree, "b.jpg", 1)
            with pytest.raises(OutputError, match=words):
                finish(tree, Summary())
        assert files(tmp_path) == before
        assert not list(tmp_path.rglob("*.tmp"))
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OutputError, match=words), Store(tmp_path):
        pass
    monkeypatch.undo()
    with Store(tmp_path):  # the lock was given back
        pass


def test_a_file_is_whole_and_synced_under_another_name_before_it_gets_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: dict[int, int] = {}
    named, rename = [], os.replace

    def fsync(number: int) -> None:
        synced[os.fstat(number).st_ino] = os.fstat(number).st_size

    def replace(source: Path, target: Path) -> None:
        status = os.stat(source)
        assert source.parent == target.parent
        assert atomic.TEMPORARY.fullmatch(source.name)
        assert synced[status.st_ino] == status.st_size > 0
        named.append(target.name)
        rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    with Store(tmp_path) as tree:
        write(tree, "a.jpg", 2)
        finish(tree, Summary())
    assert named == ["a.jpg.d00.ig.png", "a.jpg.d01.ig.png", "a.jpg.json", "records.jsonl", "summary.json"]
    assert {file.name for file in tmp_path.iterdir()} == {*named, atomic.LOCK}


def test_a_name_that_somebody_took_is_never_written_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name of a temporary cannot be guessed; one that is there all the same is left alone, link or not."""
    (tmp_path / "precious").write_text("mine")
    with Store(tmp_path / "out") as tree:
        monkeypatch.setattr("detxai.output.atomic.secrets.token_hex", lambda size: "0" * 2 * size)
        (tmp_path / "out" / f".detxai-{'0' * 16}.tmp").symlink_to(tmp_path / "precious")
        with pytest.raises(OutputError, match="File exists"):
            write(tree, "a.jpg", 1)
    assert (tmp_path / "precious").read_text() == "mine"
    assert not files(tmp_path / "out")


def test_a_folder_of_the_tree_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Store(tmp_path) as tree:
        write(tree, "bags/a.jpg", 1)
    scan = os.scandir

    def fails(folder: str) -> Any:
        if str(folder).endswith("bags"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return scan(folder)

    monkeypatch.setattr(os, "scandir", fails)
    with pytest.raises(OutputError, match="Check the disk"), Store(tmp_path):
        pass


def test_a_worker_takes_the_word_of_who_holds_the_lock(tmp_path: Path) -> None:
    """It has not walked the tree, and still removes what its record supersedes."""
    with Store(tmp_path) as tree:
        write(tree, "a.jpg", 2)
        worker, stamp = Store(tmp_path), tree.stamp("a.jpg")
        worker.learn("a.jpg", tree.known("a.jpg"))
        worker.look("a.jpg")
        digests = {name: hashlib.sha256(f"f {name}".encode()).hexdigest() for name in ("a.jpg.d00.ig.png",)}
        assert worker.holds("a.jpg", digests)
        assert not worker.holds("a.jpg", {"a.jpg.d09.ig.png": "0"})
        write(worker, "a.jpg", 1, "g")
        assert not worker.holds("a.jpg", digests)
        assert set(files(tmp_path)) == {"a.jpg.json", "a.jpg.d00.ig.png"}
        assert tree.stamp("a.jpg") not in (stamp, "")
        assert tree.stamp("none.jpg") == tree.stamp("../a.jpg") == ""


def test_the_second_of_two_processes_is_refused_until_the_first_is_killed(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from detxai.output.store import Store\n"
        "with Store(Path(sys.argv[1])): print('in', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parent.parent) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"in\n"
        for patience in (0, 0.2):
            with pytest.raises(OutputError, match="Another run"), Store(tmp_path, patience):
                pass
        holder.kill()
    with Store(tmp_path, 5) as tree:
        write(tree, "a.jpg", 1)


KILLS = """
import os, signal, sys
from pathlib import Path
from detxai.output.store import Store
from detxai.output.summary import Summary
from tests.test_store import failed, files, write

def run(root, fingerprint, counts):
    with Store(root) as tree:
        for path, count in counts.items():
            if not tree.done(path, fingerprint):
                if count is None:
                    tree.write_image(path, {}, failed(path))
                else:
                    write(tree, path, count, fingerprint)
        tree.gather(); tree.finish(Summary())

def dying(call, countdown):
    def patched(*arguments, **named):
        countdown[0] -= 1
        if countdown[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments, **named)
    return patched

base = Path(sys.argv[1])
one, two = {"a.jpg": 2, "d/b.jpg": 1}, {"a.jpg": 1, "d/b.jpg": None, "d/e/c.jpg": 2}
run(base / "one", "1", one)
run(base / "two", "1", one)
run(base / "two", "2", two)
moment, status = 0, 1
while status:
    moment += 1
    root = base / f"killed-{moment}"
    run(root, "1", one)
    child = os.fork()
    if child == 0:
        countdown = [moment]
        for name in ("fsync", "replace", "unlink", "mkdir", "open"):
            setattr(os, name, dying(getattr(os, name), countdown))
        run(root, "2", two)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if moment % 2:  # back to the old settings first: no old record may vouch for a new picture
        run(root, "1", one)
        found, wanted = files(root), files(base / "one")
        found.pop("records.jsonl"), wanted.pop("records.jsonl")
        assert {name: found[name] for name in found if "c.jpg" not in name} == wanted, moment
    run(root, "2", two)
    assert files(root) == files(base / "two"), (moment, sorted(files(root)))
    assert not list(root.rglob("*.tmp")), moment
print(moment)
"""


def test_killed_at_any_moment_the_next_run_completes_the_same_tree(tmp_path: Path) -> None:
    """SIGKILL at every single file-system step of a run that changes an older tree."""
    script = textwrap.dedent(KILLS)
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent.parent,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 20


def test_a_reformatted_record_still_counts(tmp_path: Path) -> None:
    with Store(tmp_path) as tree:
        write(tree, "a.jpg", 0)
        finish(tree, Summary())
        before = (tmp_path / "records.jsonl").read_bytes()
        raw = (tmp_path / "a.jpg.json").read_bytes()
        (tmp_path / "a.jpg.json").write_bytes(raw.replace(b",", b",\n  "))
        finish(tree, Summary())
    assert (tmp_path / "records.jsonl").read_bytes() == before


def test_lines_are_ordered_by_path_not_by_file_name(tmp_path: Path) -> None:
    with Store(tmp_path) as tree:
        for path in ("a.jpg", "a.jpg.b/x.jpg", "a.jpg!", "B.jpg"):
            write(tree, path, 0)
        finish(tree, Summary())
    lines = (tmp_path / "records.jsonl").read_bytes().splitlines(keepends=True)
    paths = [records.load(line).image.path for line in lines]
    assert paths == sorted(paths)


def test_picture_stems_leave_out_defaults() -> None:
    assert store.picture_stem("b/a.jpg", 0, "ig") == "a.jpg.d00.ig"
    assert store.picture_stem("a.jpg", 112, "ig", "parchgrad-cls", "left", 3) == "a.jpg.d112.ig.parchgrad-cls.left.as-3"


def test_maps_are_stable_and_read_back() -> None:
    values = np.random.default_rng(3).normal(size=(20, 30)).astype(np.float32)
    raw = store.encode_map(values, "npz")
    assert raw == store.encode_map(values, "npz")
    with np.load(io.BytesIO(raw)) as archive:
        assert np.array_equal(archive["map"], values)
    assert np.array_equal(store.decode_map(raw, "a.npz"), values)
    raw = store.encode_map(values, "png")
    assert raw == store.encode_map(values, "png")
    with Image.open(io.BytesIO(raw)) as picture:
        scale = float(picture.info["detxai-scale"])
        grey = np.asarray(picture).astype(np.float64)
    assert np.allclose((grey - 32768) / 32767 * scale, values, atol=scale / 32767)
    assert np.allclose(store.decode_map(raw, "a.map.png"), values, atol=scale / 32767)
    assert store.encode_map(np.zeros((2, 2), np.float32), "png")
