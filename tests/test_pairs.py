"""Dual energy by pictures of the generator, whose truth is known; two views of one bag."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import struct
import sys
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from browser import CHROMIUM, DRIVER, browser
from conftest import FAST, explain, files, pixels
from PIL import Image
from xraysim.bags import Bag, make_bag
from xraysim.physics import MU, OPEN

from detxai.cli.app import run
from detxai.config import settings
from detxai.errors import ImageError
from detxai.inputs import bands, decode, energies, sources
from detxai.inputs.samples import Samples
from detxai.output.recording import image_info
from detxai.output.tree import Tree
from detxai.review.index import build
from detxai.values import ImageRef, Pair


@pytest.fixture(scope="module")
def bag() -> Bag:
    return make_bag(np.random.default_rng([7, 1]))


@pytest.fixture
def scans(tmp_path: Path, bag: Bag) -> Path:
    """Two pairs in folders of their own, one half without its other, and a file of another name."""
    assert bag.energies is not None
    small = [cv2.resize(part, (90, 80), interpolation=cv2.INTER_AREA) for part in bag.energies]
    for name, part in zip(("low", "high"), small, strict=True):
        (tmp_path / "scans" / "deep").mkdir(parents=True, exist_ok=True)
        for stem in ("a", "deep/b"):
            cv2.imwrite(str(tmp_path / "scans" / f"{stem}_{name}.png"), part)
    shutil.copy(tmp_path / "scans" / "a_high.png", tmp_path / "scans" / "c_high.png")
    shutil.copy(tmp_path / "scans" / "a_high.png", tmp_path / "scans" / "other.png")
    return tmp_path / "scans"


def test_effective_numbers_are_those_of_the_truth(bag: Bag) -> None:
    """Where one material makes nearly all of what is measured, and enough of it."""
    assert bag.stack is not None and bag.energies is not None
    low, high = (energies.transmission(Samples(part, (0, 65535)), ("fixed", 0, OPEN))[0] for part in bag.energies)
    numbers = energies.atomic_number(low, high)
    colours = energies.materials(low, high).astype(int)
    measured = [sum(MU[name][energy] * t for name, t in bag.stack.maps.items()) for energy in (0, 1)]
    seen = (measured[1] > 0.15) & (measured[1] < 2)
    truth = np.interp(measured[0] / np.maximum(measured[1], 1e-6), energies.RATIOS, energies.NUMBERS)
    edges = cv2.dilate(truth, np.ones((7, 7))) - cv2.erode(truth, np.ones((7, 7))) > 2
    error = np.abs(numbers - truth)[seen & ~edges]
    assert len(error) > 10_000 and np.median(error) < 0.3 and (error < 1.5).mean() > 0.97
    for least, most, strong, weak in ((0, 7.5, 0, 2), (12, 14, 1, 0), (22, 27, 2, 0)):  # orange, green, blue
        pure = seen & ~edges & (truth >= least) & (truth < most)
        assert pure.sum() > 100 and (colours[pure][:, strong] > colours[pure][:, weak]).mean() > 0.95
    assert numbers[measured[1] < 0.002].mean() < 9, "air has no metal in it"


def test_two_files_are_one_image_and_halves_alone_fail(tiny: Path, scans: Path, tmp_path: Path) -> None:
    given = (scans, "-m", tiny, "--pair", "_low,_high", *FAST, "-o", tmp_path / "out")
    assert explain(*given) == 3
    lines = [json.loads(line) for line in (tmp_path / "out" / "records.jsonl").read_text().splitlines()]
    assert [line["image"]["path"] for line in lines] == ["a_low.png", "c_high.png", "deep/b_low.png", "other.png"]
    whole, half, _, neither = lines
    high = hashlib.sha256((scans / "a_high.png").read_bytes()).hexdigest()
    assert whole["image"]["pair"] == {"path": "a_high.png", "sha256": high, "colors": "materials"}
    assert whole["image"]["sha256"] == hashlib.sha256((scans / "a_low.png").read_bytes()).hexdigest()
    assert half["error"]["code"] == "unpaired" and "c_low.png" in half["error"]["message"]
    assert "neither _low nor _high" in neither["error"]["message"]
    before = files(tmp_path / "out")
    assert explain(*given) == 3 and files(tmp_path / "out") == before, "nothing is done again"
    values = cv2.imread(str(scans / "a_high.png"), cv2.IMREAD_UNCHANGED)
    cv2.imwrite(str(scans / "a_high.png"), values // 2)
    assert explain(*given) == 3 and files(tmp_path / "out") != before, "either half decides"


def test_pairs_in_two_folders_shards_and_sizes(scans: Path, tmp_path: Path) -> None:
    for name in ("low", "high"):
        (tmp_path / "all" / name).mkdir(parents=True)
        shutil.copy(scans / f"a_{name}.png", tmp_path / "all" / name / "x.png")
    pair = ("low/", "high/", "channels")
    (ref,) = sources.find([str(tmp_path / "all")], pair=pair).refs
    assert ref.path == "low/x.png" and ref.pair == Pair(tmp_path / "all/high/x.png", "high/x.png", "channels")
    shards = [[r.path for r in sources.find([str(tmp_path / "all")], shard=(n, 2), pair=pair).refs] for n in (1, 2)]
    assert sorted(shards) == [[], ["low/x.png"]]
    shown = decode.load(ref, "0,50000").pixels
    values = cv2.imread(str(tmp_path / "all/low/x.png"), cv2.IMREAD_UNCHANGED)
    assert np.abs(shown[..., 0] - np.clip(values / 50000, 0, 1) * 255).max() <= 0.51
    cv2.imwrite(str(tmp_path / "all/high/x.png"), values[:10])
    with pytest.raises(ImageError, match="not of one size"):
        decode.load(ref)
    with pytest.raises(ImageError, match="the model reads 5 channels"):
        decode.load(ref, channels=5)
    assert ref.pair is not None
    ref.pair.file.write_bytes(ref.pair.file.read_bytes()[:60])
    with pytest.raises(ImageError, match="cut short"):
        decode.load(ref)


def gray_with_alpha(low: np.ndarray, high: np.ndarray) -> bytes:
    """A PNG of 16 bits, gray and alpha, which neither Pillow nor OpenCV writes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in np.stack([low, high], axis=2))
    head = struct.pack(">IIBBBBB", low.shape[1], low.shape[0], 16, 4, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def frames(*parts: np.ndarray) -> bytes:
    pydicom = pytest.importorskip("pydicom")
    made = pydicom.Dataset()
    made.file_meta = pydicom.dataset.FileMetaDataset()
    made.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    made.SOPClassUID, made.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.7.3", "1.2.3"
    made.Rows, made.Columns, made.NumberOfFrames, made.SamplesPerPixel = *parts[0].shape, len(parts), 1
    made.BitsAllocated = made.BitsStored = 16
    made.HighBit, made.PixelRepresentation, made.PhotometricInterpretation = 15, 0, "MONOCHROME2"
    made.PixelData = np.stack(parts).astype("<u2").tobytes()
    buffer = io.BytesIO()
    made.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def tiff(low: np.ndarray, high: np.ndarray, **more: Any) -> bytes:
    both, buffer = np.stack([low, high], axis=2 if more.get("planarconfig") == "contig" else 0), io.BytesIO()
    pytest.importorskip("tifffile").imwrite(buffer, both, photometric="minisblack", **more)
    return buffer.getvalue()


ONE_FILE = {
    "interleaved.tif": partial(tiff, planarconfig="contig"),
    "deflated.tif": partial(tiff, planarconfig="contig", compression="zlib"),
    "planes.tif": partial(tiff, planarconfig="separate"),
    "pages.tif": tiff,
    "alpha.png": gray_with_alpha,
    "frames.dcm": frames,
}


@pytest.mark.parametrize("name", ONE_FILE)
def test_both_energies_in_one_file_are_those_of_two(scans: Path, tmp_path: Path, name: str) -> None:
    low, high = (cv2.imread(str(scans / f"a_{part}.png"), cv2.IMREAD_UNCHANGED) for part in ("low", "high"))
    data = ONE_FILE[name](low, high)
    (tmp_path / "one").mkdir()
    file = tmp_path / "one" / name
    file.write_bytes(data)
    two = next(iter(sources.find([str(scans)], pair=("_low", "_high", "materials")).refs))
    (one,) = sources.find([str(tmp_path / "one")], pair=("bands", "", "materials")).refs
    image = decode.load(one, "0,50000")
    assert one.path == name and image.notes and np.array_equal(image.pixels, decode.load(two, "0,50000").pixels)
    assert decode.digest(one) == image.digest
    with pytest.raises(ImageError, match="--max-pixels"):
        decode.load(one, max_pixels=999)
    for cut in (len(data) // 2, len(data) - 40, 60):
        file.write_bytes(data[:cut])
        with pytest.raises(ImageError):
            decode.load(one)


def test_a_file_of_one_energy_is_no_pair(scans: Path, tmp_path: Path) -> None:
    colors = "materials"
    assert settings.load(options={"pair": "bands"}).images.paired == ("bands", "", colors)
    low, high = (cv2.imread(str(scans / f"a_{part}.png"), cv2.IMREAD_UNCHANGED) for part in ("low", "high"))
    Image.fromarray(low).save(tmp_path / "one.tif")
    (tmp_path / "one.dcm").write_bytes(frames(low))
    for file in (scans / "a_low.png", tmp_path / "one.tif", tmp_path / "one.dcm"):
        with pytest.raises(ImageError, match="one energy, not two") as raised:
            decode.load(ImageRef(file.name, file, pair=Pair(file, file.name, colors)))
        assert raised.value.code == "unpaired"
    file = tmp_path / "two.png"
    file.write_bytes(gray_with_alpha(low, high))
    pair = image_info(decode.load(ImageRef("two.png", file, pair=Pair(file, "two.png", colors)))).pair
    assert pair is not None and pair.path == "two.png" and pair.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()


def test_halves_that_are_dicom_files(scans: Path, tmp_path: Path) -> None:
    low, high = (cv2.imread(str(scans / f"a_{part}.png"), cv2.IMREAD_UNCHANGED) for part in ("low", "high"))
    for name, values in (("low", low), ("high", high)):
        (tmp_path / f"a_{name}.dcm").write_bytes(frames(values))
    shown = []
    for folder, suffix in ((scans, "png"), (tmp_path, "dcm")):
        one, other = f"a_low.{suffix}", f"a_high.{suffix}"
        ref = ImageRef(one, folder / one, pair=Pair(folder / other, other, "materials"))
        shown.append(decode.load(ref, "0,50000").pixels)
    assert np.array_equal(*shown)


def test_both_energies_of_8_bits_and_of_floats(scans: Path, tmp_path: Path) -> None:
    low, high = (cv2.imread(str(scans / f"a_{part}.png"), cv2.IMREAD_UNCHANGED) for part in ("low", "high"))

    def shown(name: str, data: bytes) -> np.ndarray:
        (tmp_path / name).write_bytes(data)
        pair = Pair(tmp_path / name, name, "materials")
        return decode.load(ImageRef(name, tmp_path / name, pair=pair), "full").pixels.astype(int)

    deep = shown("deep.tif", tiff(low, high))
    stream = io.BytesIO()
    Image.merge("LA", [Image.fromarray((part >> 8).astype(np.uint8)) for part in (low, high)]).save(stream, "PNG")
    assert np.abs(shown("eight.png", stream.getvalue()) - deep).mean() < 3
    for most in (1.0, 65535.0):
        floats = (part.astype(np.float32) / 65535 * most for part in (low, high))
        assert np.abs(shown("floats.tif", tiff(*floats)) - deep).max() <= 1


def test_damage_within_a_file_of_both_energies(scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    low, high = (cv2.imread(str(scans / f"a_{part}.png"), cv2.IMREAD_UNCHANGED) for part in ("low", "high"))
    data = tiff(low, high, planarconfig="contig", compression="zlib")
    middle = len(data) // 2
    with pytest.raises(ImageError, match="damaged"):
        bands.of_tiff(data[:middle] + bytes(99) + data[middle + 99 :])
    whole = gray_with_alpha(low, high)
    with Image.open(io.BytesIO(whole)) as image, pytest.raises(ImageError, match="damaged"):
        bands.of_alpha(image, whole[:60])
    (tmp_path / "two.tif").write_bytes(data)
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(ImageError, match="pip install tifffile"):
        decode.load(ImageRef("two.tif", tmp_path / "two.tif", pair=Pair(tmp_path / "two.tif", "two.tif", "materials")))


def test_the_beam_lies_between_the_ends_of_file_or_window() -> None:
    values = np.linspace(0, 1000, 15).reshape(3, 5)
    plain = Samples(values, (0, 1000))
    passed, window = energies.transmission(plain, ("full", 0, 0))
    assert (window.low, window.high) == (0, 1000) and np.allclose(passed, np.clip(values / 1000, energies.DARKEST, 1))
    gray, inverted = Samples(np.stack([values] * 3, 2), (0, 1000)), Samples(1000 - values, (0, 1000), inverted=True)
    for same in (gray, inverted):
        assert np.allclose(energies.transmission(same, ("full", 0, 0))[0], passed)
    assert energies.transmission(plain, ("percentile", 5, 50))[1].high == 500
    for wrong, words in ((values * np.nan, "not-a-number"), (values * 0, "no beam; give --window")):
        with pytest.raises(ImageError, match=words):
            energies.transmission(Samples(wrong, (0, 1000)), ("auto", 0, 0))


def test_one_of_two_bands_is_not_shown_in_silence(scans: Path, tmp_path: Path) -> None:
    low, high = (cv2.imread(str(scans / f"a_{part}.png"), cv2.IMREAD_UNCHANGED) for part in ("low", "high"))
    ref = ImageRef("two.tif", tmp_path / "two.tif")
    for layout in ("separate", "contig"):
        ref.file.write_bytes(tiff(low, high, planarconfig=layout))
        with pytest.raises(ImageError, match="--pair bands"):
            decode.load(ref)
    eight = [(part >> 8).astype(np.uint8) for part in (low, high)]
    ref.file.write_bytes(tiff(*eight, planarconfig="contig"))
    assert any("two bands" in note for note in decode.load(ref).notes)


def test_what_is_no_picture_of_one_energy_is_refused(tmp_path: Path) -> None:
    colour = np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8)
    for name in ("low", "high"):
        cv2.imwrite(str(tmp_path / f"{name}.png"), colour)
    with pytest.raises(ImageError, match="colour"):
        decode.load(ImageRef("low.png", tmp_path / "low.png", pair=Pair(tmp_path / "high.png", "high.png", "channels")))
    for words in (("--pair", "low"), ("--pair", "a,ab"), ("--pair", "low,high", "--frames", "all")):
        assert explain(tmp_path, *words, "-o", tmp_path / "out") == 2


@pytest.fixture(scope="module")
def bags(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tree of two bags of two views each, a picture alone, and a view that cannot be read."""
    folder = tmp_path_factory.mktemp("bags")
    (folder / "scans").mkdir()
    for number, name in enumerate(("a_side", "a_top", "b_side", "b_top", "lone"), 1):
        Image.fromarray(pixels(f"bag-{number:02d}.jpg", (90, 80))).save(folder / "scans" / f"{name}.png")
    (folder / "scans" / "c_top.png").write_bytes(b"no picture")
    options = (*FAST, "--max-evaluations", 2, "--views", "_top,_side")
    assert explain(folder / "scans", "-m", tiny, *options, "-o", folder / "out") == 3
    return folder / "out"


def test_two_views_stay_together(bags: Path, capfd: pytest.CaptureFixture[str]) -> None:
    lines = [json.loads(line)["image"] for line in (bags / "records.jsonl").read_text().splitlines()]
    views = {line["path"]: line.get("view") for line in lines}
    assert views["a_top.png"] == {"bag": "a.png", "name": "_top"} and views["lone.png"] is None
    assert views["a_side.png"] == {"bag": "a.png", "name": "_side"} and views["c_top.png"]["bag"] == "c.png"
    capfd.readouterr()
    assert run(["list", str(bags), "--verdict", "all", "--json"]) == 0
    boxes = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    order = [box.get("bag") or box["path"] for box in boxes]
    runs = [bag for n, bag in enumerate(order) if n == 0 or order[n - 1] != bag]
    assert len({box["path"] for box in boxes}) > len(set(order)) and runs.count("a.png") == runs.count("b.png") == 1
    index = build(Tree(bags), bags / "report.html")
    assert sorted(map(str, index["images"]["bag"])) == ["None", "a.png", "a.png", "b.png", "b.png"]


@pytest.mark.slow
@pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver")
def test_the_page_shows_both_views(bags: Path, tmp_path: Path) -> None:
    assert run(["report", str(bags)]) == 0
    with browser(tmp_path) as window:
        window.go(bags / "report.html")
        window.run("detxai.state.verdict.clear(); detxai.state.sort = 'score'; detxai.refresh()")
        bag_of = "const {images, boxes} = detxai.index; const bag = i => images.bag[boxes.image[i]] ?? `#${i}`;"
        order = window.run(f"{bag_of} return detxai.state.shown.map(bag)")
        runs = [bag for n, bag in enumerate(order) if n == 0 or order[n - 1] != bag]
        assert {"a.png", "b.png"} <= set(runs) and len(runs) == len(set(runs)), "a bag is in one place"
        window.run(f"{bag_of} detxai.openBox(detxai.state.shown.find(i => bag(i) === 'a.png'))")
        window.wait("document.querySelector('#detail img[alt^=\"the other view, a_\"]')?.naturalWidth > 0")
        assert window.complaints() == []
