"""DICOM: the pictures are pydicom's, a 16-bit one is that of the same TIFF, and nobody's name leaves the file."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from conftest import SAMPLES, explain
from PIL import Image as pil

from detxai.errors import ImageError
from detxai.inputs import sources
from detxai.inputs.decode import load, pictures
from detxai.values import ImageRef

pydicom = pytest.importorskip("pydicom")
pixels = pytest.importorskip("pydicom.pixels")
RNG = np.random.default_rng(0)
NAME, NUMBER = "Quillfeather^Jane", "PAT-4711-0815"


def written(file: Path, values: np.ndarray[Any, Any], kind: str = "MONOCHROME2", **elements: Any) -> Path:
    """A DICOM file of `values` (frames, h, w) or (h, w), with a patient's name in it."""
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = "1.2.3"
    dataset.PatientName, dataset.PatientID = NAME, NUMBER
    dataset.Rows, dataset.Columns = values.shape[-2:]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, kind
    dataset.BitsAllocated = dataset.BitsStored = values.itemsize * 8
    dataset.HighBit, dataset.PixelRepresentation = dataset.BitsStored - 1, 0
    if values.ndim == 3:
        dataset.NumberOfFrames = len(values)
    dataset.PixelData = values.tobytes()
    for name, value in elements.items():
        setattr(dataset, name, value)
    dataset.save_as(file, enforce_file_format=True)
    return file


def picture(file: Path, frame: int | None = None, **options: Any) -> Any:
    return load(ImageRef(file.name, file, frame=frame), **options)


def gray16() -> np.ndarray[Any, Any]:
    grey = np.asarray(pil.open(next(SAMPLES.glob("*.png"), None) or SAMPLES / "bag-01.jpg").convert("L"))
    return grey.astype(np.uint16) * 16  # 12 bits


def test_a_scan_gives_the_detections_of_its_tiff_and_no_name(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    scans = tmp_path / "scans"
    scans.mkdir()
    written(scans / "a.dcm", gray16())
    pil.fromarray(gray16()).save(scans / "b.tif")
    options = ("--evidence", "none", "--max-evaluations", 4, "--tolerance", 1, "--conf", 0.05, "--imgsz", 160)
    assert explain(scans, *options, "-o", tmp_path / "out") == 0
    one, other = (json.loads((tmp_path / "out" / f"{name}.json").read_bytes()) for name in ("a.dcm", "b.tif"))
    same = ("kind", "class_id", "score", "logit", "box")
    first, second = ([{name: d[name] for name in same} for d in record["detections"]] for record in (one, other))
    assert first == second and first
    assert one["image"]["window"] == other["image"]["window"]
    said = "".join(capfd.readouterr())
    for content in [said.encode(), *(f.read_bytes() for f in (tmp_path / "out").rglob("*") if f.is_file())]:
        assert b"Quillfeather" not in content and NUMBER.encode() not in content


def test_windows_of_the_file_and_of_the_user(tmp_path: Path) -> None:
    values = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    plain = written(tmp_path / "p.dcm", values, BitsStored=12, HighBit=11)
    assert picture(plain).window.high == 4095
    told = written(tmp_path / "w.dcm", values, WindowCenter=1000, WindowWidth=401, BitsStored=12, HighBit=11)
    image = picture(told)
    assert image.window.method == "voi" and (image.window.low, image.window.high) == (799.5, 1199.5)
    expected = pixels.apply_voi_lut(values, pydicom.dcmread(told)) / 4095 * 255
    assert np.abs(image.pixels[..., 0] - expected).max() < 1
    assert picture(told, window="full").window.high == 4095
    shifted = written(tmp_path / "m.dcm", values, RescaleSlope=2, RescaleIntercept=-1000, BitsStored=12, HighBit=11)
    window = picture(shifted, window="full").window
    assert (window.low, window.high) == (-1000, 7190)
    inverse = written(tmp_path / "i.dcm", values, "MONOCHROME1", BitsStored=12, HighBit=11)
    assert np.array_equal(picture(inverse).pixels, 255 - picture(plain).pixels)
    curved = written(
        tmp_path / "s.dcm",
        values,
        WindowCenter=1000,
        WindowWidth=401,
        VOILUTFunction="SIGMOID",
        BitsStored=12,
        HighBit=11,
    )
    expected = pixels.apply_voi_lut(values, pydicom.dcmread(curved))
    expected = (expected - expected.min()) / (expected.max() - expected.min()) * 255
    assert np.abs(picture(curved).pixels[..., 0] - expected).max() < 1
    exact = written(tmp_path / "e.dcm", values, WindowCenter=1000, WindowWidth=400, VOILUTFunction="LINEAR_EXACT")
    assert (picture(exact).window.low, picture(exact).window.high) == (800, 1200)
    burned = written(tmp_path / "b.dcm", values, BurnedInAnnotation="YES")
    assert "burned" in picture(burned).notes[0]


def test_each_frame_is_a_picture(tmp_path: Path) -> None:
    values = RNG.integers(0, 256, (3, 8, 9), dtype=np.uint8)
    file = written(tmp_path / "x.dcm", values)
    assert pictures(ImageRef("x.dcm", file)) == 3
    assert "first of 3" in picture(file).notes[0]
    for n in (1, 2, 3):
        assert np.array_equal(picture(file, n).pixels[..., 0], values[n - 1])
    assert [ref.path for ref in sources.find([str(tmp_path)], frames="all").refs] == ["x.dcm#1", "x.dcm#2", "x.dcm#3"]
    with pytest.raises(ImageError, match="3 pictures"):
        picture(file, 4)


def test_an_enhanced_file_says_for_each_frame_what_its_values_mean(tmp_path: Path) -> None:
    def group(name: str, **elements: float) -> Any:
        inner, outer = pydicom.Dataset(), pydicom.Dataset()
        for key, value in elements.items():
            setattr(inner, key, value)
        setattr(outer, name, pydicom.Sequence([inner]))
        return outer

    values = RNG.integers(0, 200, (2, 8, 9), dtype=np.uint8)
    shared = group("PixelValueTransformationSequence", RescaleSlope=2, RescaleIntercept=-10)
    own = [group("FrameVOILUTSequence", WindowCenter=centre, WindowWidth=101) for centre in (100, 200)]
    file = written(
        tmp_path / "x.dcm",
        values,
        SharedFunctionalGroupsSequence=pydicom.Sequence([shared]),
        PerFrameFunctionalGroupsSequence=pydicom.Sequence(own),
    )
    for n, low in ((1, 49.5), (2, 149.5)):
        image = picture(file, n)
        assert (image.window.low, image.window.high) == (low, low + 100)
        expected = np.clip((values[n - 1] * 2.0 - 10 - low) / 100, 0, 1) * 255
        assert np.abs(image.pixels[..., 0] - expected).max() < 1


@pytest.mark.parametrize("name", ["palette_color", "rgb_color"])
def test_colour_is_that_of_pydicom(name: str) -> None:
    file = Path(pydicom.examples.get_path(name))
    dataset = pydicom.dcmread(file)
    values = pixels.pixel_array(dataset)
    if "palette" in name:
        values = pixels.apply_color_lut(values, dataset)
    expected = np.rint(values / 257).astype(np.uint8) if values.dtype == np.uint16 else values
    assert np.array_equal(picture(file).pixels, expected)


@pytest.mark.parametrize("name", ["jpeg2k", "ybr_color"])
def test_compressed_pictures_are_those_of_pydicom(name: str) -> None:
    file = Path(pydicom.examples.get_path(name))
    expected = pixels.pixel_array(file, index=0)
    image = picture(file)
    if expected.dtype == np.uint8 and expected.ndim == 3:
        assert np.array_equal(image.pixels, expected)
    else:
        assert image.pixels.std() > 5 and image.window is not None


def test_hostile_and_foreign_files(tmp_path: Path) -> None:
    def failed(file: Path) -> ImageError:
        with pytest.raises(ImageError) as caught:
            picture(file)
        assert NAME.partition("^")[0] not in str(caught.value)
        return caught.value

    values = np.zeros((8, 8), np.uint16)
    whole = written(tmp_path / "a.dcm", values).read_bytes()
    (tmp_path / "cut.dcm").write_bytes(whole[:-50])
    assert failed(tmp_path / "cut.dcm").code == "truncated"
    (tmp_path / "text.dcm").write_bytes(b"no scan at all " * 20)
    assert failed(tmp_path / "text.dcm").code in ("unsupported", "truncated")
    assert failed(written(tmp_path / "big.dcm", values, Rows=60000, Columns=60000)).code == "too_large"
    deflated = whole.replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.1.99\0")
    (tmp_path / "bomb.dcm").write_bytes(deflated)
    assert failed(tmp_path / "bomb.dcm").code == "unsupported"
    stream = io.BytesIO()
    pil.new("RGB", (900, 900)).save(stream, "JPEG")
    dataset = pydicom.dcmread(tmp_path / "a.dcm")
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.JPEGBaseline8Bit
    dataset.PixelData = pydicom.encaps.encapsulate([stream.getvalue()])
    dataset["PixelData"].is_undefined_length = True
    dataset.save_as(tmp_path / "liar.dcm")
    assert "900 x 900" in str(failed(tmp_path / "liar.dcm"))
    for seed in range(40):
        damaged = np.frombuffer(whole, np.uint8).copy()
        damaged[np.random.default_rng(seed).integers(132, len(whole), 6)] = RNG.integers(0, 256, 6)
        (tmp_path / "damaged.dcm").write_bytes(damaged.tobytes())
        try:
            picture(tmp_path / "damaged.dcm")
        except ImageError as error:
            assert NAME.partition("^")[0] not in str(error)


def test_without_pydicom_the_error_names_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = written(tmp_path / "a.dcm", np.zeros((8, 8), np.uint16))
    monkeypatch.setitem(__import__("sys").modules, "pydicom", None)
    with pytest.raises(ImageError, match="pip install pydicom"):
        picture(file)


def test_pages_and_frames_of_other_files(tmp_path: Path) -> None:
    shades = [pil.fromarray(np.full((8, 9, 3), 40 * n, np.uint8)) for n in (1, 2, 3)]
    for name, options in (("a.tif", {}), ("b.gif", {}), ("c.png", {}), ("d.webp", {"lossless": True})):
        shades[0].save(tmp_path / name, save_all=True, append_images=shades[1:], **options)
        assert "first of 3" in picture(tmp_path / name).notes[0]
        for n in (1, 2, 3):
            image = picture(tmp_path / name, n)
            assert abs(int(image.pixels[4, 4, 0]) - 40 * n) <= 1 and f"{n} of 3" in image.notes[0]
    (tmp_path / "e.tif#2").write_bytes(b"")
    (tmp_path / "f.tif").write_bytes((tmp_path / "a.tif").read_bytes()[:20])
    assert [r.path for r in sources.find([str(tmp_path / "f.tif")], frames="all").refs] == ["f.tif"], "cut short"
    tifffile = pytest.importorskip("tifffile")
    with tifffile.TiffWriter(tmp_path / "g.tif") as pages:
        pages.write(np.full((8, 9), 40, np.uint8))
        pages.write(np.full((4, 4), 40, np.uint8), subfiletype=1)
    assert [r.path for r in sources.find([str(tmp_path / "g.tif")], frames="all").refs] == ["g.tif"], "a thumbnail"
    (tmp_path / "f.tif").unlink(), (tmp_path / "g.tif").unlink()
    found = sources.find([str(tmp_path), str(tmp_path / "e.tif#2")], frames="all")
    refs = list(found.refs)
    assert len({ref.path for ref in refs}) == len(refs) == 13 and refs[-1].problem
    assert found.count is not None and found.count() == 13


def test_heic(tmp_path: Path) -> None:
    heif = pytest.importorskip("pillow_heif")
    smooth = cv2.resize(RNG.integers(0, 256, (2, 2, 3), dtype=np.uint8), (64, 48))
    heif.from_pillow(pil.fromarray(smooth)).save(tmp_path / "a.heic", quality=95)
    assert np.abs(picture(tmp_path / "a.heic").pixels.astype(int) - smooth).mean() < 8
