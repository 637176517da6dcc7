"""The only writer: an output tree that is whole at every moment, resumable and locked.

A file under its final name is complete: it is written to a temporary beside it, synced and renamed.
Pictures come first, the record last, and only then go the pictures that it supersedes.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import stat
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, suppress
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np

from detxai.errors import ImageError
from detxai.output import records
from detxai.output.atomic import LOCK, TEMPORARY, explained, held, replace
from detxai.output.bucket import Bucket, Mark, Place, contents, place
from detxai.output.mixture import Mixture
from detxai.output.parts import Parts
from detxai.output.seen import Seen
from detxai.output.summary import Summary
from detxai.values import Map

SUMMARY, LINES = "summary.json", "records.jsonl"
#: Failed records of images whose own path cannot be used, by a hash of that path.
UNPLACED = "unplaced"
NAME_BYTES, PATH_BYTES = 255, 1024
#: A signed 16-bit map: stored = ZERO + value / scale * RANGE.
PNG_ZERO, PNG_RANGE = 32768, 32767
MAP_SUFFIX = {"npz": ".npz", "png": ".map.png"}

#: What is to be said where nothing can be locked.
OTHER = (
    "another run has begun in {} and has not ended: if it is still at work, stop one of the two; if it was killed, "
    "this one goes on from there"
)
#: Records that a run looks at before it begins, to tell which models made the tree.
FIRST_LINES = 1000
#: Endings of the picture of all boxes.
OVERVIEWS = ("png", "jpg", "webp")

# Greedy: the last `.dNN.` ends the image's name, so `a.jpg.d00.x.png` may itself be an image.
_PICTURE = re.compile(r"(.+)\.(d\d{2,}\..+\.(?:png|jpg|webp|npz))", re.DOTALL)
_RECORD_START = b'{"schema":"' + records.RECORD_SCHEMA.encode() + b'",'


def picture_stem(
    path: str,
    number: int,
    method: str,
    gradient: str = "plain",
    target: str = "class",
    as_class: int | None = None,
) -> str:
    """The name of a picture of detection `number` without its suffix; defaults are left out."""
    parts = [f"{path.rpartition('/')[2]}.d{number:02d}", method]
    parts += [part for part, default in ((gradient, "plain"), (target, "class")) if part != default]
    return ".".join(parts if as_class is None else [*parts, f"as-{as_class}"])


def encode_map(values: Map, kind: Literal["none", "npz", "png"]) -> bytes:
    """The file of a raw signed map, its name ending in `MAP_SUFFIX[kind]`; the same map gives the same bytes.

    `.npz` holds float32 `map`. `.map.png` holds 16-bit grey: (grey - 32768) / 32767 * scale, where
    `scale`, the greatest absolute value, is the PNG's text `detxai-scale`.
    """
    buffer = io.BytesIO()
    if kind == "npz":
        np.savez_compressed(buffer, map=values.astype("<f4"))
        return buffer.getvalue()
    from PIL import Image, PngImagePlugin

    scale = float(np.abs(values).max(initial=0)) or 1.0
    grey = np.rint(PNG_ZERO + values.astype(np.float64) / scale * PNG_RANGE).astype(np.uint16)
    text = PngImagePlugin.PngInfo()
    text.add_text("detxai-scale", repr(scale))
    Image.fromarray(grey).save(buffer, "PNG", pnginfo=text)
    return buffer.getvalue()


def decode_map(data: bytes, name: str) -> Map:
    """The map, (height, width) float32, of a file that `encode_map` wrote under `name`."""
    if name.endswith(MAP_SUFFIX["npz"]):
        with np.load(io.BytesIO(data)) as kept:
            values: Map = kept["map"]
            return values
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        scale = float(image.info["detxai-scale"])
        grey = np.asarray(image).astype(np.float64)
    restored: Map = ((grey - PNG_ZERO) / PNG_RANGE * scale).astype(np.float32)
    return restored


#: See `Store.known`.
Known = tuple[tuple[str, ...], tuple[str, ...]]


class Store:
    """An output tree, held by this process alone while entered; in an object store, `doubts` say where it may not be.

    Reading (`existing`, `done`) also works without entering, as a dry run needs it.
    """

    def __init__(self, output: Path | str, lock_timeout: float = 0) -> None:
        self.output = place(output)
        self.doubts: list[str] = []
        self._mark: Mark | None = None
        self._lock_timeout, self._entered = lock_timeout, ExitStack()
        #: Size and time of inputs; see `detxai.output.seen`.
        self.seen = Seen(self.output)
        #: Image path -> endings of its pictures in the tree: 100,000 images take about 25 MB.
        self._pictures: dict[str, tuple[str, ...]] = {}
        self._parts = Parts(self.output)
        self._folders = {""}

    def __enter__(self) -> Self:
        """Create, lock, probe and tidy the tree. Raises OutputError."""
        with ExitStack() as entered:
            if isinstance(self.output, Path):
                entered.enter_context(held(self.output, self._lock_timeout))
            else:
                self._mark = Mark(self.output)
                entered.callback(self._mark.remove)
                self.doubts += [OTHER.format(self.output)] if self._mark.other else []
            with explained(self.output):
                self.tidy()
            self._entered = entered.pop_all()
        return self

    def __exit__(self, *raised: Any) -> None:
        self._entered.close()

    def existing(self, path: str) -> records.Record | None:
        """The record of the image `path`; None where there is none that can be read."""
        try:
            return records.load(self._locate(path).read_bytes())
        except (ImageError, OSError, ValueError):
            return None

    def done(self, path: str, fingerprint: str) -> records.Record | None:
        """The record of `path` if it is ok, has this fingerprint, and its pictures are there."""
        record = self.existing(path)
        if record is None or record.status != "ok" or record.fingerprint != fingerprint:
            return None
        folder = self._locate(path).parent
        names = set(record.files())
        if not all((folder / name).is_file() for name in names):
            return None
        with explained(self.output):
            self._sweep(path, names)
            self._parts.drop(path)
        return record

    def parts(self, path: str, fingerprint: str) -> dict[int, bytes]:
        """What an earlier run has finished of the image `path`, by number; what was made otherwise is removed."""
        with explained(self.output):
            return self._parts.read(path, fingerprint)

    def write_part(self, path: str, fingerprint: str, number: int, pictures: Mapping[str, bytes], part: bytes) -> None:
        """Write what is finished of the image `path`: `pictures` by name, then `part`, which goes with the record.

        Raises as `write_image` does.
        """
        with explained(self.output, path):
            self._put_pictures(path, pictures)
            replace(self._parts.add(path, fingerprint, number), [part])

    def holds(self, path: str, digests: Mapping[str, str]) -> bool:
        """Whether the pictures of the image `path` are still those with these SHA-256, by name."""
        folder = self._locate(path).parent
        with suppress(OSError):
            return all(hashlib.sha256((folder / n).read_bytes()).hexdigest() == own for n, own in digests.items())
        return False

    def write_image(
        self, path: str, pictures: Mapping[str, bytes], record: records.Record, written: Collection[str] = ()
    ) -> None:
        """Write the files of the image `path`: `pictures` by name, then `record`; others of its are `written` already.

        Raises OutputError, and ImageError `bad_path` where the path cannot be used. A failed record
        always finds a place: `unplaced/` holds those whose own path cannot be used.
        """
        try:
            self._write(path, pictures, record, written)
        except ImageError:
            if record.status == "ok":
                raise
            name = hashlib.sha256(path.encode("utf-8", "surrogatepass")).hexdigest()[:16]
            self._write(f"{UNPLACED}/{name}", {}, record)

    def stamp(self, path: str) -> str:
        """Which record of `path` is there, as when it was written tells; nothing where there is none."""
        with suppress(ImageError, OSError, ValueError):
            file = self._locate(path)
            return str(file.stat().st_mtime_ns) if isinstance(file, Path) else file.stamp()
        return ""

    def known(self, path: str) -> Known:
        """Endings of the pictures, and names of the parts, that the tree has of `path`."""
        return self._pictures.get(path, ()), self._parts.names(path)

    def learn(self, path: str, known: Known) -> None:
        """Take the word of who holds the lock for what is `known` of `path`."""
        self._pictures[path] = known[0]
        self._parts.know(path, known[1])

    def forget(self, path: str) -> None:
        """Of an image that is done: what was learned of it, before there are millions."""
        self._pictures.pop(path, None)
        self.seen.forget(path)

    def look(self, path: str) -> None:
        """Learn which parts there are of `path`, of which another process may have made some."""
        self._parts.know(path, self._parts.existing(path))

    def saw(self, record: records.Record, *, skipped: bool) -> None:
        """Note of what size and time the input of a finished image was. Raises OutputError."""
        with explained(self.output):
            self.seen.finish(record, skipped=skipped)

    def gather(self) -> Mixture:
        """Write `records.jsonl`, untouched where nothing changed; how the records of the tree were made.

        Raises OutputError, too where another run has written to a tree that could not be locked.
        """
        mixture = Mixture()
        if self._mark is not None:
            self._mark.check()
        with explained(self.output):
            self.seen.close()
            replace(self.output / LINES, self._lines(mixture))
        return mixture

    def finish(self, summary: Summary) -> None:
        """Write `summary.json`, the last file of a run."""
        with explained(self.output):
            replace(self.output / SUMMARY, [records.dump(summary)])

    def kinds(self) -> Mixture:
        """How the first records of an earlier run were made, by its `records.jsonl`; none without that file."""
        mixture = Mixture()
        if isinstance(self.output, Path):  # an object is only read whole
            with suppress(OSError), (self.output / LINES).open("rb") as lines:
                for line in islice(lines, FIRST_LINES):
                    mixture.add_line(line)
        return mixture

    def _write(
        self, path: str, pictures: Mapping[str, bytes], record: records.Record, written: Collection[str] = ()
    ) -> None:
        file, names = self._locate(path), {*pictures, *written}
        if names != set(record.files()):
            raise ValueError(f"pictures of {path} are not those of its record: {sorted(names)}")
        with explained(self.output, path):
            self._put_pictures(path, pictures)
            replace(file, [records.dump(record)])
            self._sweep(path, names)
            self._parts.drop(path)

    def _put_pictures(self, path: str, pictures: Mapping[str, bytes]) -> None:
        file = self._locate(path)
        base = path.split("/")[-1]
        owned = (_owner(name, {base}) for name in pictures)
        endings = tuple(ending for image, ending in filter(None, owned) if image == base)
        if len(endings) != len(pictures):
            raise ValueError(f"pictures of {path} are not those named after it: {sorted(pictures)}")
        self._make_folders(path)
        for name in (file.name, *pictures):
            if len(os.fsencode(name)) > NAME_BYTES:
                raise ImageError("bad_path", f"the name is too long for the output: {name}")
            if (file.parent / name).is_dir():
                raise ImageError("bad_path", f"a folder of the output has the name {name}")
        known = self._pictures.get(path, ())
        self._pictures[path] = tuple(dict.fromkeys(map(sys.intern, (*known, *endings))))
        for name, content in pictures.items():
            picture = file.parent / name
            if picture.exists() and picture.read_bytes() != content:
                # Killed from here on, the old record would vouch for the new picture.
                file.unlink(missing_ok=True)
            replace(picture, [content])

    def _locate(self, path: str) -> Place:
        """The record's file. Raises ImageError where it would be outside the tree or reserved."""
        parts = path.split("/")
        if "\0" in path or any(part in ("", ".", "..") for part in parts):
            raise ImageError("bad_path", f"not a path inside the output: {path!r}")
        if len(path.encode("utf-8", "surrogatepass")) > PATH_BYTES:
            raise ImageError("bad_path", f"the path is longer than {PATH_BYTES} bytes: {path}")
        if path + ".json" == SUMMARY or (parts[0] in (SUMMARY, LINES, LOCK) and len(parts) > 1):
            raise ImageError("bad_path", f"the output has its own file of this name: {path!r}")
        return self.output.joinpath(*parts[:-1], parts[-1] + ".json")

    def _make_folders(self, path: str) -> None:
        """Create the folders of `path`; a link in the tree could lead outside and is refused."""
        if isinstance(self.output, Bucket):
            return
        folder = ""
        for part in path.split("/")[:-1]:
            folder = f"{folder}/{part}" if folder else part
            if folder in self._folders:
                continue
            with suppress(FileExistsError):
                os.mkdir(self.output / folder)
            if not stat.S_ISDIR(os.lstat(self.output / folder).st_mode):
                raise ImageError("bad_path", f"a file or link of the output is in the way: {folder}")
            self._folders.add(folder)

    def _sweep(self, path: str, keep: set[str]) -> None:
        """Remove the pictures of `path` that its record, now in place, does not name."""
        folder, name = self._locate(path).parent, path.split("/")[-1]
        endings = self._pictures.get(path, ())
        for ending in endings:
            if f"{name}.{ending}" not in keep:
                (folder / f"{name}.{ending}").unlink(missing_ok=True)
        if endings:
            self._pictures[path] = tuple(end for end in endings if f"{name}.{end}" in keep)

    def _walk(self) -> Iterator[tuple[str, list[str]]]:
        """(folder with a slash, names of its files) of every folder of the tree, not through links."""
        if isinstance(self.output, Bucket):
            yield from self.output.walk()
            return

        def fail(error: OSError) -> None:
            raise error

        for folder, _, names in os.walk(self.output, onerror=fail):
            inside = os.path.relpath(folder, self.output)
            prefix = "" if inside == "." else f"{inside.replace(os.sep, '/')}/"
            yield prefix, names

    def tidy(self) -> None:
        """Remove the temporaries of a killed run and learn which pictures there are."""
        self._pictures.clear()
        for prefix, names in self._walk():
            images = {name.removesuffix(".json") for name in names if name.endswith(".json")}
            for name in names:
                if TEMPORARY.fullmatch(name):
                    (self.output / prefix / name).unlink(missing_ok=True)
                elif not self._parts.learn(prefix, name) and (owner := _owner(name, images)):
                    image = prefix + owner[0]
                    self._pictures[image] = (*self._pictures.get(image, ()), sys.intern(owner[1]))

    def _lines(self, mixture: Mixture) -> Iterator[bytes]:
        """Every record of the tree as a line, ordered by path, one in memory at a time; `mixture` learns from each."""
        names = (prefix + name for prefix, names in self._walk() for name in names if name.endswith(".json"))
        paths = sorted(name.removesuffix(".json") for name in names if name != SUMMARY)
        for raw in contents(self.output, (f"{path}.json" for path in paths)):
            if raw.startswith(_RECORD_START) and raw.find(b"\n") == len(raw) - 1:
                mixture.add_line(raw)
                yield raw
                continue
            with suppress(ValueError):  # some other JSON, or a record that someone reformatted
                record = records.load(raw)
                mixture.add(record)
                yield records.dump(record)


def _owner(name: str, images: Collection[str]) -> tuple[str, str] | None:
    """The image that the picture `name` was made of, and its ending; `images`: those that have a record beside it."""
    image, _, ending = name.rpartition(".")
    if ending in OVERVIEWS and image in images:
        return image, ending
    match = _PICTURE.fullmatch(name)
    return (match[1], match[2]) if match else None
