"""Laws of the sources: stable order, unique safe paths, shards that add up, lazy stdin."""

from __future__ import annotations

import io
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from detxai.config import settings
from detxai.errors import ExitCode, UsageError
from detxai.inputs import naming
from detxai.inputs.sources import ImageSource, find
from detxai.values import ImageRef


def touch(root: Path, *names: str) -> Path:
    for name in names:
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"x")
    return root


def refs(found: ImageSource) -> list[ImageRef]:
    return list(found.refs)


def paths(*given: object, **options: object) -> list[str]:
    return [ref.path for ref in refs(find([str(g) for g in given], **options))]  # type: ignore[arg-type]


def piped(data: bytes, **options: object) -> list[ImageRef]:
    return refs(find(["-"], io.BytesIO(data), **options))  # type: ignore[arg-type]


def test_folder_is_sorted_recursive_and_counts_what_it_ignores(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "b.JPG",
        "a/z.png",
        "a.png",
        "a/b/c.avif",
        "a-b/x.jpg",
        "n.txt",
        ".h/x.jpg",
        ".h.jpg",
    )
    found = find([str(tmp_path)])
    got = [ref.path for ref in found.refs]
    assert got == sorted(got) == ["a-b/x.jpg", "a.png", "a/b/c.avif", "a/z.png", "b.JPG"]
    assert (found.ignored, found.total) == (1, 5)
    assert all(ref.file == tmp_path / ref.path for ref in find([str(tmp_path)]).refs)


def test_links_are_followed_once_and_loops_end(tmp_path: Path) -> None:
    touch(tmp_path, "d/a.jpg")
    (tmp_path / "d/loop").symlink_to(tmp_path)
    (tmp_path / "self.jpg").symlink_to("self.jpg")
    (tmp_path / "gone.jpg").symlink_to("nowhere.jpg")
    assert paths(tmp_path) == ["d/a.jpg", "gone.jpg", "self.jpg"]


def test_output_inside_the_source_is_left_out(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "runs/explain/a.jpg.d00.ig.png", "runs/b.jpg")
    output = tmp_path / "runs" / "explain"
    assert paths(tmp_path, exclude=output) == ["a.jpg", "runs/b.jpg"]
    assert paths(f"{tmp_path}/**/*.png", exclude=output) == []
    assert paths(tmp_path, exclude=tmp_path) == paths(tmp_path)


def test_an_unreadable_folder_is_a_failed_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "a.jpg", "locked/b.jpg")
    scandir = os.scandir

    def refuse(path: Path) -> object:
        if path.name == "locked":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    first, second = refs(find([str(tmp_path)]))
    assert (first.path, second.path, first.problem) == ("a.jpg", "locked", None)
    assert "Permission denied" in str(second.problem)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.jpg", ["a.jpg"]),
        ("*", ["a.jpg", "b.png"]),
        ("**", ["a.jpg", "b.png", "d/c.jpg", "d/e/f.jpg"]),
        ("**/*.jpg", ["a.jpg", "d/c.jpg", "d/e/f.jpg"]),
        ("*/*.jpg", ["d/c.jpg"]),
        ("d/**/f.*", ["e/f.jpg"]),
        ("[ab].???", ["a.jpg", "b.png"]),
        ("*.txt", ["n.txt"]),
        ("none/*.jpg", []),
        ("*.gif", []),
    ],
)
def test_globs(tmp_path: Path, pattern: str, expected: list[str]) -> None:
    touch(tmp_path, "a.jpg", "b.png", "n.txt", "d/c.jpg", "d/e/f.jpg")
    assert paths(f"{tmp_path}/{pattern}") == expected


def test_relative_glob_and_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "d/a.jpg")
    monkeypatch.chdir(tmp_path / "d")
    assert paths("*.jpg") == paths(".") == ["a.jpg"]
    assert paths("*.jpg", "../d") == ["d/a.jpg", "d-2/a.jpg"]


def test_a_file_with_glob_characters_is_a_file(tmp_path: Path) -> None:
    touch(tmp_path, "a[1].jpg", "a1.jpg")
    assert paths(tmp_path / "a[1].jpg") == ["a[1].jpg"]
    touch(tmp_path, "x[1]/b.jpg")
    assert paths(tmp_path / "x[1]") == ["b.jpg"]


def test_several_sources_never_collide(tmp_path: Path) -> None:
    touch(tmp_path, "1/s/a.jpg", "2/s/a.jpg", "3/s.v1/a.jpg", "4/s.v1/a.jpg", "5/a.jpg", "6/a.jpg")
    one, two, three, four = (tmp_path / name for name in ("1/s", "2/s", "3/s.v1", "4/s.v1"))
    assert paths(one, two, three, four, tmp_path / "5/a.jpg", tmp_path / "6/a.jpg") == [
        *("s/a.jpg", "s-2/a.jpg", "s.v1/a.jpg", "s.v1-2/a.jpg", "a.jpg", "a-2.jpg"),
    ]
    assert paths(one, f"{one}/") == ["a.jpg"], "the same source twice is one source"
    both = find([str(one), "-"], io.BytesIO(b"q.jpg\n"))
    assert [ref.path for ref in both.refs] == ["s/a.jpg", "stdin/q.jpg"]


def test_explicit_files_are_taken_whatever_their_suffix(tmp_path: Path) -> None:
    touch(tmp_path, "a.dat", "summary")
    assert paths(tmp_path / "a.dat") == ["a.dat"]
    assert paths(tmp_path / "summary") == ["summary-2"], "summary.json is the tree's own"


@pytest.mark.parametrize("bad", [["missing.jpg"], ["missing/"], [""], [], ["-"]])
def test_a_missing_source_is_a_usage_error_at_once(bad: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        find(bad)
    assert caught.value.exit_code == ExitCode.USAGE
    assert caught.value.hint
    assert not bad or repr(bad[0]) in caught.value.message


def test_stdin_paths_once_as_given() -> None:
    data = b"./x/a.jpg\r\n/abs/b\n\nx/a.jpg\nx//a.jpg\n sp ace.jpg\nlast.jpg"
    got = piped(data)
    assert [ref.path for ref in got] == ["x/a.jpg", "abs/b", " sp ace.jpg", "last.jpg"]
    assert [str(ref.file) for ref in got][:2] == ["x/a.jpg", "/abs/b"]
    assert not any(ref.problem for ref in got)


def test_stdin_null_separated_keeps_newlines() -> None:
    (ref,) = piped(b"a\nb.jpg\0", null=True)
    assert (ref.path, ref.file) == ("a\\nb.jpg", Path("a\nb.jpg"))


def test_stdin_paths_that_cannot_be_used_are_failed_records() -> None:
    got = piped(b"../up.jpg\na/../../b.jpg\n__/up.jpg\n.\n/\nnul\0.jpg\n..\n")
    assert [bool(ref.problem) for ref in got] == [True, True, False, True, True, True, True]
    assert got[2].path == "__/up.jpg"
    assert len({ref.path for ref in got}) == len(got)
    for ref in got:
        assert not {"..", ".", ""} & set(ref.path.split("/")) and ref.path.isprintable()


def test_absolute_and_relative_twins_get_two_paths() -> None:
    got = piped(b"a/b.jpg\n/a/b.jpg\n/a/b.jpg\n")
    assert len({ref.path for ref in got}) == len(got) == 2
    assert got[0].path == "a/b.jpg"


def test_odd_names_on_disk(tmp_path: Path) -> None:
    names = [b"new\nline.jpg", b"latin-\xff.jpg", "snow ☃\u202f.jpg".encode(), b"back\\slash.jpg"]
    names += [
        b"latin-\\udcff.jpg",
        b"n" * 250 + b".jpg",
        "雪".encode() * 83 + b".jpg",
        b"--help.jpg",
    ]
    for name in names:
        (tmp_path / os.fsdecode(name)).write_bytes(b"x")
    got = refs(find([str(tmp_path)]))
    assert len({ref.path for ref in got}) == len(names)
    for ref in got:
        assert ref.file.is_file()
        assert len(ref.path.encode()) <= naming.MAX_COMPONENT
        assert "\n" not in ref.path and Path(ref.path).suffix == ".jpg"
    assert "snow ☃\u202f.jpg" in {ref.path for ref in got}


def test_shards_are_a_partition(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{n % 3}/{n}.jpg" for n in range(40)), *(f"{n}.txt" for n in range(20)))
    whole = find([str(tmp_path)])
    everything = [ref.path for ref in whole.refs]
    shards = [find([str(tmp_path)], shard=(n, 3)) for n in (1, 2, 3)]
    parts = [[ref.path for ref in shard.refs] for shard in shards]
    assert sorted(itertools.chain(*parts)) == everything and all(parts)
    assert all(part == sorted(part) for part in parts)
    assert sum(shard.ignored for shard in shards) == whole.ignored == 20
    assert {shard.total for shard in shards} == {40}
    assert paths(tmp_path, shard=(1, 1)) == everything


def test_shard_membership_is_fixed_for_ever() -> None:
    data = b"".join(b"%d.jpg\n" % n for n in range(8))
    first = [ref.path for ref in piped(data, shard=(1, 2))]
    assert first == ["0.jpg", "2.jpg", "3.jpg", "6.jpg", "7.jpg"]


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "1/0", "-1/2", "1/2/3", ""])
def test_bad_shards(text: str) -> None:
    with pytest.raises(UsageError, match="shard"):
        settings.load(options={"shard": text})


def test_good_shards() -> None:
    for text, part in (("2/8", (2, 8)), ("1/1", (1, 1))):
        assert settings.load(options={"shard": text}).run.part == part


def test_nothing_found_is_for_the_caller_to_judge(tmp_path: Path) -> None:
    found = find([str(tmp_path), f"{tmp_path}/*.jpg"])
    assert refs(found) == [] and found.total == 0


def test_what_detxai_made_is_never_its_input(tmp_path: Path) -> None:
    """Known by the record beside it, wherever the tree lies: in the source, around it, or of an earlier run."""
    touch(tmp_path, "a.jpg", "in/b.png", "c.png", "c.json", "a.jpg.d00.notes.png")
    made = ["a.jpg.png", "a.jpg.d00.ig.png", "a.jpg.d12.ig.box.webp", "in/b.png.d00.ig.map.png"]
    touch(tmp_path, *made)
    for record in ("a.jpg.json", "in/b.png.json"):
        (tmp_path / record).write_bytes(b'{"schema":"detxai.record/1","status":"ok"}')
    found = find([str(tmp_path)], exclude=tmp_path)
    assert [ref.path for ref in found.refs] == ["a.jpg", "c.png", "in/b.png"], "c.json is somebody else's"
    assert (found.own, found.ignored, found.total) == (5, 3, 3)
    assert paths(f"{tmp_path}/*.png") == ["c.png"]
    assert paths(tmp_path / "a.jpg", tmp_path / "a.jpg.d00.ig.png") == ["a.jpg"]
    listed = "".join(f"{tmp_path}/{name}\n" for name in ("c.png", *made))
    assert len(piped(listed.encode())) == 1
    assert found.count is not None and found.count() == 3


def test_a_killed_run_in_the_source_leaves_no_input(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "a.jpg.d00.ig.png", "a.jpg.png", "b.png")
    assert paths(tmp_path, exclude=tmp_path) == ["a.jpg", "b.png"]
    assert paths(tmp_path) == ["a.jpg", "a.jpg.d00.ig.png", "a.jpg.png", "b.png"], "no tree lies here"


@pytest.mark.parametrize("source", ["http://x/a.jpg", "https://bucket/scans", "rtsp://camera", "BAGS.ZIP", "a.tar.gz"])
def test_what_is_not_read_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    touch(tmp_path, "BAGS.ZIP", "a.tar.gz")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"URL|archive"):
        find([source])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_lists_as_other_programs_write_them(tmp_path: Path, encoding: str) -> None:
    touch(tmp_path, "snow ☃.jpg", "'own'.jpg")
    text = f"\"{tmp_path}/snow ☃.jpg\"\r\n{tmp_path}/'own'.jpg\r\n"
    assert [ref.file.name for ref in piped(text.encode(encoding))] == ["snow ☃.jpg", "'own'.jpg"]
    assert all(ref.file.is_file() for ref in piped(text.encode(encoding)))


def test_a_folder_as_stdin_is_no_bug() -> None:
    class Folder(io.RawIOBase):
        def read(self, _: int = -1) -> bytes:
            raise IsADirectoryError(21, "Is a directory")

    with pytest.raises(UsageError, match="stdin cannot be read: Is a directory"):
        list(find(["-"], Folder()).refs)  # type: ignore[arg-type]


def test_stdin_is_lazy() -> None:
    """The first path arrives while the writer still lives."""
    read, write = os.pipe()
    with os.fdopen(read, "rb") as stream:
        os.write(write, b"a.jpg\nb.jp")
        images = iter(find(["-"], stream).refs)
        assert next(images).path == "a.jpg"
        os.write(write, b"g\n")
        assert next(images).path == "b.jpg"
        os.close(write)
        assert list(images) == []


def test_sources_need_no_torch() -> None:
    code = "import sys, detxai.inputs.sources, detxai.inputs.decode; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
