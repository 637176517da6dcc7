"""What a reader may rely on in an overlay: sign, place, honesty of the scale, nothing cut."""

from __future__ import annotations

import time
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SAMPLES
from numpy.typing import NDArray
from PIL import Image

from detxai.output import lettering, overlays, overview
from detxai.values import Box, Map, Pixels

BOX: Box = (100.0, 80.0, 300.0, 280.0)


def scan(width: int = 500, height: int = 400, value: int = 255) -> Pixels:
    """A flat ground with a darker item and a coloured one."""
    pixels = np.full((height, width, 3), value, np.uint8)
    pixels[height // 4 : height // 2, width // 4 : width // 2] //= 2
    pixels[-height // 4 :, -width // 4 :] = (240, 140, 20)
    return pixels


def spot(shape: tuple[int, int], x: float, y: float, value: float, radius: float = 9) -> Map:
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    bell = np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / (2 * radius**2))
    return np.asarray(value * bell, np.float32)


def two_spots(pixels: Pixels) -> Map:
    """Evidence for at (150, 200), as much against at (250, 200)."""
    return spot(pixels.shape[:2], 150, 200, 0.02) + spot(pixels.shape[:2], 250, 200, -0.02)


def overlay(pixels: Pixels, attribution: Map, box: Box = BOX, **options: Any) -> NDArray[np.int16]:
    options = dict[str, Any](label="knife", score=0.83) | options
    return np.asarray(overlays.draw(pixels, attribution, box=box, **options), np.int16)


def hue(picture: NDArray[np.int16]) -> NDArray[np.int16]:
    """Red minus blue: > 0 on the warm side, < 0 on the cold, 0 on gray."""
    return picture[..., 0] - picture[..., 2]


@pytest.mark.parametrize("ground", [0, 128, 255])
def test_sign_shows_as_colour_on_every_ground(ground: int) -> None:
    pixels = scan(value=ground)
    colour = hue(overlay(pixels, two_spots(pixels)))
    assert colour[200, 150] > 90
    assert colour[200, 250] < -90
    assert colour[100, 450] == colour[390, 490] == 0  # far from both; there the scan itself is orange


def test_opposite_maps_exchange_colours_only() -> None:
    pixels = scan()
    attribution = two_spots(pixels)
    one, other = hue(overlay(pixels, attribution)), hue(overlay(pixels, -attribution))
    assert one[200, 150] == other[200, 250]
    assert ((one[:400] > 8) == (other[:400] < -8))[:, 320:].all()


def test_colour_blind_eyes_tell_for_from_against() -> None:
    deuteranopia = np.array([[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]])
    protanopia = np.array([[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]])
    pixels = scan(value=128)
    picture = overlay(pixels, two_spots(pixels))
    for eye in (deuteranopia, protanopia):
        seen = ((picture / 255) ** 2.2 @ eye.T).clip(0, 1) ** (1 / 2.2)
        assert np.abs(seen[200, 150] - seen[200, 250]).max() > 0.35


def test_weak_evidence_is_fainter_and_a_common_factor_changes_only_the_legend() -> None:
    pixels = scan()
    attribution = two_spots(pixels) + spot(pixels.shape[:2], 200, 120, 0.008)
    picture = overlay(pixels, attribution)
    assert 10 < hue(picture)[120, 200] < hue(picture)[200, 150] - 40
    louder = overlay(pixels, attribution * 1024)
    assert (picture[:400] == louder[:400]).all()
    assert (picture[400:] != louder[400:]).any()


def test_zero_map_shows_the_scan_in_gray_and_says_so() -> None:
    pixels = scan()
    zero = np.zeros(pixels.shape[:2], np.float32)
    noise = np.random.default_rng(0).normal(0, 1e-9, zero.shape).astype(np.float32)
    picture = overlay(pixels, zero)
    assert (picture == overlay(pixels, noise)).all()
    assert np.abs(hue(picture[:400])).max() < 5  # the box's dark is a little blue; the scan is orange
    assert picture[150, 200, 0] < picture[250, 280, 0] - 60  # the item is still seen on its ground
    footers = picture[400:], overlay(pixels, two_spots(pixels))[400:]
    colourful = [np.abs(hue(footer)).max() > 20 for footer in footers]
    assert colourful == [False, True]  # words instead of the colour bar


@pytest.mark.parametrize("size", [(500, 400), (64, 64), (1600, 1200)])
def test_box_encloses_its_pixels_with_dark_and_light_lines(size: tuple[int, int]) -> None:
    pixels = np.full((size[1], size[0], 3), 128, np.uint8)
    x0, y0, x1, y1 = size[0] // 4, size[1] // 4, size[0] // 2, size[1] // 2
    zero = np.zeros(pixels.shape[:2], np.float32)
    picture = overlay(pixels, zero, (x0, y0, x1, y1))
    zoom = max(1, -(-overlays.MIN_LONG_SIDE // max(size)))
    inside = picture[y0 * zoom : y1 * zoom, x0 * zoom : x1 * zoom]
    assert (inside == inside[0, 0]).all()
    middle = (y0 + y1) * zoom // 2
    for line in (picture[middle, : x0 * zoom][::-1], picture[middle, x1 * zoom : size[0] * zoom]):
        tones = [tone for tone in line[:60, 0] if tone in (lettering.DARK[0], lettering.LIGHT[0])]
        width = len(tones) // 3
        assert width >= 1
        assert tones == [16] * width + [255] * width + [16] * width
        assert list(line[: len(tones), 0]) == tones


@pytest.mark.parametrize(
    "box",
    [(-40, -5, 60, 90), (430, -9, 700, 80), (0, 330, 30, 400), (0, 0, 500, 400),
     (450, 390, 500, 400), (250, 200, 250, 200), (900, 900, 950, 950)],
)  # fmt: skip
@pytest.mark.parametrize("label", ["gun", "x" * 5000, "水果刀 é\n\t\ud800", ""])
def test_tag_lies_whole_on_the_picture(box: Box, label: str) -> None:
    pixels = np.full((400, 500, 3), 90, np.uint8)
    zero = np.zeros((400, 500), np.float32)
    image = Image.new("RGB", (500, 400), (90, 90, 90))
    sheet = overlays._Sheet(pixels, box)
    frame = lettering.outline(image, sheet._corners((0, 0)), (lettering.LIGHT,) * 4, 1, None)
    before = np.asarray(image).copy()
    overlays._tag(image, frame, (label, 0.83), sheet.text)
    rows, columns = np.nonzero((np.asarray(image) != before).any(2))
    assert np.ptp(rows) + 1 >= sheet.text.em  # a whole line of text, not a slice of one
    assert np.ptp(columns) + 1 > 2 * sheet.text.em  # the score at least
    assert overlay(pixels, zero, box, label=label).shape[1] >= 500


def test_long_label_keeps_its_score() -> None:
    pixels = scan()
    zero = np.zeros(pixels.shape[:2], np.float32)
    pictures = [overlay(pixels, zero, label="k" * 500, score=score) for score in (0.11, 0.88)]
    assert (pictures[0] != pictures[1]).any()


@pytest.mark.parametrize("size", [(64, 64), (1, 1), (2000, 100), (100, 2000), (3, 700), (1300, 2)])
def test_every_shape_gets_a_readable_page(size: tuple[int, int]) -> None:
    pixels = np.full((size[1], size[0], 3), 200, np.uint8)
    attribution = spot(pixels.shape[:2], size[0] / 2, size[1] / 2, 1.0)
    page = overlay(pixels, attribution, (0, 0, *size), caption="ig · white · converged")
    height, width = page.shape[:2]
    assert width >= overlays.MIN_PANEL[0]
    assert height >= max(size[1], overlays.MIN_PANEL[1]) + 2 * lettering.MIN_FONT
    assert max(width, height) >= overlays.MIN_LONG_SIDE


def test_footer_never_covers_the_picture_and_grows_with_its_text() -> None:
    pixels = scan()
    attribution = two_spots(pixels)
    bare = overlay(pixels, attribution)
    full = overlay(pixels, attribution, caption="word " * 60, warning="not converged: 0.12 > 0.05")
    assert (full[:400] == bare[:400]).all()
    assert full.shape[0] > bare.shape[0] + 3 * lettering.MIN_FONT
    assert (full[-2] == lettering.WARNING).all()
    assert not (bare == lettering.WARNING).all(2).any()


def test_strip_sets_the_untouched_scan_first() -> None:
    pixels = scan()
    page = overlay(pixels, two_spots(pixels), strip=True)
    assert (page[:400, :500] == pixels).all()
    assert (page[:400, -500:] == overlay(pixels, two_spots(pixels))[:400]).all()
    wide = np.full((100, 1000, 3), 200, np.uint8)
    stacked = overlay(wide, np.zeros((100, 1000), np.float32), strip=True)
    assert stacked.shape[1] == 1000
    assert (stacked[:100] == wide).all()


def test_a_small_box_is_also_shown_enlarged() -> None:
    pixels = scan()
    small = (140.0, 190.0, 160.0, 210.0)
    page = overlay(pixels, spot(pixels.shape[:2], 150, 200, 0.02, radius=3), small)
    assert page.shape[1] > 500 + 200
    inset = page[:240, 520:]
    warm = (hue(inset) > 60).sum() / (hue(page[:400, :500]) > 60).sum()
    assert warm > 9, "the inset shows the same at several times the size"
    assert overlay(pixels, two_spots(pixels)).shape[1] == 500


def test_names_in_other_scripts_are_written_and_never_empty_frames() -> None:
    text = lettering.Lettering(20)
    assert text.set("нож")[0] == "нож" and text.set("μαχαίρι")[0] == "μαχαίρι"
    assert text.set("水果刀")[0] == r"\u6c34\u679c\u5200"  # no font here has them
    assert text.set("a\n\tb")[0] == "a  b"
    with pytest.raises(OSError, match=r"file format|resource"):
        lettering.require_font(Path(__file__))


def test_a_contrast_names_both_ends() -> None:
    pixels = scan()
    plain, named = (
        overlay(pixels, two_spots(pixels), poles=poles) for poles in (("against", "for"), ("for gun", "for knife"))
    )
    assert (plain[:400] == named[:400]).all()
    assert plain.shape != named.shape or (plain[400:] != named[400:]).any()


def boxes_of(*verdicts: str) -> list[overview.ShownBox]:
    boxes: list[Box] = [(20.0 + 90 * i, 80.0, 95.0 + 90 * i, 180.0) for i in range(len(verdicts))]
    attribution = spot((400, 500), 57, 130, 0.02) + spot((400, 500), 147, 130, -0.01)
    return [
        overview.ShownBox(i, box, "knife", 0.8, verdict, "because", overview.stamp(attribution, box))
        for i, (box, verdict) in enumerate(zip(boxes, verdicts, strict=True))
    ]


def test_an_overview_shows_every_box_on_one_scale() -> None:
    page = np.asarray(overview.draw(scan(), boxes_of("supported", "weak", "unsupported")), np.int16)
    colour = hue(page)
    assert colour[130, 57] > 90, "for, in full colour"
    assert -90 < colour[130, 147] < -10, "half as strong, so fainter: one scale for both"
    assert abs(colour[130, 237]) < 10
    line = page[80 - 6 : 80, 30:90].reshape(-1, 3)
    assert (line == lettering.LIGHT).all(1).any() and not (line == lettering.WARNING).all(1).any()
    asking = page[80 - 8 : 80, 120:180].reshape(-1, 3)
    assert (asking == lettering.WARNING).all(1).any()
    again = np.asarray(overview.draw(scan(), boxes_of("supported", "weak", "unsupported")), np.int16)
    assert (page == again).all()


def test_on_a_given_scale_colour_is_as_strong_as_the_number_says() -> None:
    pixels = scan()
    at, box = (57, 130), (20.0, 80.0, 95.0, 180.0)
    attribution = spot((400, 500), *at, 0.02)
    shared = overview.common_scale([overview.stamp(attribution, box), overview.stamp(3 * attribution, box)], (500, 400))
    alone = overview.common_scale([overview.stamp(attribution, box)], (500, 400))
    assert shared == pytest.approx(3 * alone, rel=1e-3)
    own, common, weaker = (
        hue(overlay(pixels, attribution, box, scale=scale))[130, 57] for scale in (None, alone, shared)
    )
    assert own > 90 and common > 90 and 10 < weaker < 0.6 * common


def test_verdicts_have_lines_of_their_own() -> None:
    """Shares of a side that are tint: whole, long dashes, short dashes."""
    shares = []
    for verdict in ("supported", "weak", "unsupported"):
        page = np.asarray(
            overview.draw(scan(900, 800), [overview.ShownBox(0, (100, 200, 700, 600), "gun", 0.5, verdict)])
        )
        tint = lettering.LIGHT if verdict == "supported" else lettering.WARNING
        side = (page[600:610, 130:670] == tint).all(2).any(0)
        shares.append(np.abs(np.diff(side.astype(int))).sum())
    assert shares[0] == 0 < shares[1] < shares[2]


@pytest.mark.parametrize("size", [(64, 64), (1, 1), (3000, 100), (100, 2000)])
def test_an_overview_of_every_shape_and_of_many_boxes(size: tuple[int, int]) -> None:
    pixels = np.full((size[1], size[0], 3), 200, np.uint8)
    rng = np.random.default_rng(1)
    boxes = []
    for i in range(40):
        x, y = rng.uniform(-5, size[0]), rng.uniform(-5, size[1])
        box = (x, y, x + rng.uniform(0, size[0]), y + rng.uniform(0, size[1]))
        stamp = overview.stamp(rng.normal(size=pixels.shape[:2]).astype(np.float32), box)
        boxes.append(overview.ShownBox(i, box, "x" * 300, 0.5, [*overview.LINES][i % 7], "y " * 50, stamp))
    page = overview.draw(pixels, boxes, caption="word " * 40)
    assert max(page.size) >= overlays.MIN_LONG_SIDE and page.width <= overview.MOST_LONG_SIDE


def test_edges_wear_their_tints_in_map_and_box() -> None:
    pixels = scan(value=128)
    at = {"left": (130, 180), "top": (200, 120), "right": (270, 180), "bottom": (200, 240)}
    maps = {name: spot(pixels.shape[:2], x, y, -1.0) for name, (x, y) in at.items()}
    image = overlays.draw_edges(pixels, maps, box=BOX, label="gun", score=0.5)
    picture = np.asarray(image, np.int16)
    for name, (x, y) in at.items():
        off = [np.abs(picture[y, x] - np.array(tint)).sum() for tint in overlays.EDGES.values()]
        assert list(overlays.EDGES)[int(np.argmin(off))] == name
    lines = {"left": (96, 180), "top": (290, 76), "right": (303, 180), "bottom": (200, 283)}
    for name, (x, y) in lines.items():
        assert (picture[y - 3 : y + 4, x - 3 : x + 4] == overlays.EDGES[name]).all(2).any(), name
    speckle = np.random.default_rng(0).choice([-0.02, 0.02], pixels.shape[:2]).astype(np.float32)
    mixed = {
        "left": speckle * (spot(pixels.shape[:2], 200, 180, 1.0, 30) > 0.5),
        "top": spot(pixels.shape[:2], 200, 180, 4e-3, 30),
    }
    at_speckle = np.asarray(overlays.draw_edges(pixels, mixed, box=BOX, label="gun", score=0.5), np.int16)[180, 200]
    assert at_speckle[2] > at_speckle[0], "left pushes it to and fro, more than top pushes one way"
    assert overlays.draw_edges(pixels, {"left": maps["left"]}, box=BOX, label="gun", score=0.5)
    with pytest.raises(ValueError, match="left, top, right, bottom"):
        overlays.draw_edges(pixels, {"front": maps["left"]}, box=BOX, label="gun", score=0.5)


def test_one_edge_alone_has_a_picture() -> None:
    pixels = scan()
    page = overlays.draw_edges(pixels, {"left": two_spots(pixels)}, box=BOX, label="gun", score=0.5)
    assert page.height > pixels.shape[0]


def test_bytes_are_the_same_every_time_and_carry_no_metadata() -> None:
    pixels = scan()
    pages = [overlays.draw(pixels, two_spots(pixels), box=BOX, label="knife", score=0.8) for _ in range(2)]
    pages[1].info["Software"] = "x"
    one, two = map(overlays.encode, pages)
    assert one == two
    decoded = Image.open(BytesIO(one))
    assert (np.asarray(decoded) == np.asarray(pages[0])).all()
    assert not decoded.info


def test_smoothing_keeps_the_sum_and_the_place() -> None:
    pixels = np.full((301, 403, 3), 200, np.uint8)
    sheet = overlays._Sheet(pixels, (0.0, 0.0, 403.0, 301.0))
    assert sheet.sigma > 1  # else nothing is tested
    smooth = sheet.smooth(spot((301, 403), 200, 150, 1.0))
    assert np.unravel_index(smooth.argmax(), smooth.shape) == (150, 200)
    assert smooth.sum() == pytest.approx(2 * np.pi * 81, rel=1e-3)
    edge = overlays.smoothed(spot((301, 403), 1, 1, 1.0), sheet.sigma)
    assert edge.sum() == pytest.approx(spot((301, 403), 1, 1, 1.0).sum(), rel=1e-3)  # nothing runs out of the picture


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_refuses_values_that_are_not_finite(value: float) -> None:
    pixels = scan()
    attribution = two_spots(pixels)
    attribution[3, 4] = value
    with pytest.raises(ValueError, match="not finite"):
        overlay(pixels, attribution)
    with pytest.raises(ValueError, match="not finite"):
        overlay(pixels, two_spots(pixels), (0.0, 0.0, value, 1.0))


def test_refuses_shapes_that_do_not_belong_together() -> None:
    pixels = scan()
    with pytest.raises(ValueError, match="map"):
        overlay(pixels, two_spots(pixels)[:-1])
    with pytest.raises(ValueError, match="uint8"):
        overlay(pixels.astype(np.float32), two_spots(pixels))
    with pytest.raises(ValueError, match="uint8"):
        overlay(pixels[..., :1], two_spots(pixels))


def test_is_fast_enough_for_fifty_thousand_pictures() -> None:
    pixels = scan(1000, 800)
    attribution = two_spots(pixels)
    overlay(pixels, attribution)  # fonts and tables
    start = time.process_time()
    overlay(pixels, attribution)
    assert time.process_time() - start < 0.3


def test_the_quantile_of_the_strongest_is_that_of_numpy() -> None:
    generator = np.random.default_rng(0)
    for rows, columns in ((1, 1), (1, 2), (3, 5), (40, 61), (300, 211)):
        rough = np.abs(generator.standard_normal((rows, columns))).astype(np.float32)
        for values in (rough, rough**9, np.round(rough), np.zeros_like(rough), np.sort(rough.ravel())[::-1]):
            for share in (0.3, 0.02, 1e-3, 0.02 / values.size):
                assert overlays.reached_by(values, share) == float(np.quantile(values, 1 - share))


@pytest.mark.parametrize("kind", ["jpg", "png", "webp"])
def test_a_file_holds_the_picture_and_nothing_else(kind: str) -> None:
    picture = Image.open(SAMPLES / "bag-03.jpg").convert("RGB").resize((160, 120))
    picture.info["comment"] = b"who was here"
    content = overlays.encode(picture, kind)
    read = Image.open(BytesIO(content))
    assert read.format == {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[kind]
    assert b"who was here" not in content and not read.getexif()
    assert float(np.abs(np.asarray(read.convert("RGB"), float) - np.asarray(picture, float)).mean()) < 5
    if kind == "jpg":
        buffer = BytesIO()
        Image.fromarray(np.asarray(picture)).save(buffer, "JPEG", quality=92, subsampling=0)
        assert np.array_equal(np.asarray(read), np.asarray(Image.open(buffer))), "as Pillow writes it"
