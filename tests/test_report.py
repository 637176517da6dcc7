"""The page: its index without a browser, and what people do with it in headless Chromium where there is one."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import CHROMIUM, DRIVER, Browser, browser
from make_tree import write

from detxai.cli.app import run
from detxai.output import ranking, records
from detxai.output.tree import Tree
from detxai.review import index
from detxai.review.report import SCRIPTS, render, report

needs_chromium = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver")
#: What a file name or class must not do to the page.
HOSTILE = "</script><img src=x onerror=\"document.title='owned'\">\u202e\x1b[31m"
#: The record of an image whose boxes have no pictures of their own.
TOGETHER = "belt-2/bag-00057.jpg.json"


@pytest.fixture(scope="module")
def night(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree of 60 images with overlays, one box with a hostile class, one image with all its boxes on one picture; a
    page; read only."""
    folder = tmp_path_factory.mktemp("night") / "bags & co"
    write(folder, 60, seed=5, overlays=True)
    file = next(f for f in sorted(folder.rglob("*.json")) if json.loads(f.read_bytes()).get("detections"))
    record = json.loads(file.read_bytes())
    box = record["detections"][0]
    box |= {"class_name": HOSTILE, "class_id": 9, "score": 0.01}
    box["evidence"] |= {"verdict": "unsupported", "reasons": [HOSTILE]}
    file.write_text(json.dumps(record), encoding="utf-8")
    file = folder / TOGETHER
    record = json.loads(file.read_bytes())
    record["overview"] = f"{file.stem}.png"
    (file.parent / record["detections"][0]["attributions"][0]["overlay"]).rename(file.with_suffix(".png"))
    for box in record["detections"]:
        box["attributions"][0]["overlay"] = None
    file.write_text(json.dumps(record), encoding="utf-8")
    assert run(["report", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as found:
        found.size(1280, 900)
        yield found


def packed(page: Path) -> dict[str, Any]:
    text = page.read_text(encoding="utf-8")
    found = re.search(r'id="index">([A-Za-z0-9+/=]+)</script>', text)
    assert found
    return index.unpack(found[1])


def test_the_index_holds_the_records(night: Path) -> None:
    found = packed(night / "report.html")
    every = sorted((f for r in Tree(night).read() for f in ranking.findings(r)), key=ranking.severity)
    boxes = found["boxes"]
    assert [found["images"]["path"][i] for i in boxes["image"]] == [f.path for f in every]
    assert boxes["id"] == [f.id for f in every]
    assert boxes["reasons"] == [list(f.reasons) for f in every]
    np.testing.assert_allclose(boxes["score"], [f.score for f in every], rtol=5e-3)
    grids = np.frombuffer(index.base64.b64decode(found["grids"]), np.int8).reshape(-1, 8, 8)
    for f, maps in zip(every, boxes["maps"], strict=True):
        (made,) = maps
        true = np.asarray(f.detection.attributions[0].grid.values)
        np.testing.assert_allclose(grids[made[1]] / index.STEPS * made[2], true, atol=abs(true).max() * 0.012)
        ending = found["variants"][made[0]][6]
        assert ending is None if f"{f.path}.json" == TOGETHER else (night / f"{f.path}.d{f.id:02d}.{ending}").is_file()
    shares = [f.detection.evidence.outside_share for f in every if f.detection.evidence]
    np.testing.assert_allclose(found["measures"]["outside_share"], shares, rtol=5e-3)


def test_the_page_is_one_file_that_asks_for_nothing(night: Path) -> None:
    text = (night / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"""(?:src|href)=["']?(?:https?:)?//|@import|url\(""", text)
    assert "fetch(" not in text and "XMLHttpRequest" not in text and "innerHTML" not in text
    assert "default-src 'none'" in text
    assert HOSTILE not in text and "owned" not in text, "names travel packed"
    assert report(night).read_text(encoding="utf-8") == text, "the same tree gives the same bytes"


def test_every_script_is_in_the_page() -> None:
    folder = Path(index.__file__).parent / "page"
    assert {file.name for file in folder.glob("*.js")} == set(SCRIPTS)


def test_a_page_elsewhere_finds_its_pictures(night: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["report", str(night), "-o", str(tmp_path / "pages" / "p.html")]) == 0
    base = packed(tmp_path / "pages" / "p.html")["base"]
    assert (tmp_path / "pages" / base).resolve() == night.resolve()
    assert run(["report", str(tmp_path / "none")]) == 4
    (tmp_path / "file").write_text("")
    assert run(["report", str(night), "-o", str(tmp_path / "file" / "p.html")]) == 6


def test_alike_reasons_are_one_kind() -> None:
    kinds = {
        index.kind_of_reason(text, ["gun", "knife"])
        for text in (
            "with only the box kept its lead over gun is -0.3 logits, unsupported below 0",
            "with only the box kept its lead over knife is 0.84 logits, weak below 1",
        )
    }
    assert kinds == {"with only the box kept its lead over … is … logits"}


def test_a_page_of_5000_images_stays_small() -> None:
    """Megabytes grow with boxes: a tenth of the night, ten times."""
    from make_tree import record

    rng = np.random.default_rng(0)
    many = [f for k in range(500) for f in ranking.findings(record(rng, k))]

    class Some(Tree):
        def read(self) -> Iterator[records.Record]:
            again = np.random.default_rng(0)
            yield from (record(again, k) for k in range(500))

    text = render(index.build(Some(Path("night")), Path("night/report.html")))
    assert len(many) > 1000 and 10 * len(text) < 5e6


@needs_chromium
def test_names_are_text(night: Path, window: Browser) -> None:
    window.go(night / "report.html")
    assert window.run("return document.title") == "bags & co · detxai"
    assert window.run("return document.querySelector('.card h3 span').textContent") == HOSTILE
    for view in ("classes", "plots", "about", "list"):
        window.run("detxai.view(arguments[0])", view)
    window.run("detxai.openBox(0)")
    assert window.run("return document.title") == "bags & co · detxai"
    assert window.run("return document.querySelectorAll('img[src=x]').length") == 0
    assert window.complaints() == []


@needs_chromium
def test_filters_sort_and_pictures(night: Path, window: Browser) -> None:
    window.go(night / "report.html")
    window.wait("[...document.querySelectorAll('.card img')].some(i => i.complete && i.naturalWidth > 100)")
    every = [f for r in Tree(night).read() for f in ranking.findings(r)]
    assert window.run("return detxai.state.shown.length") == len(every)
    window.run("document.querySelector('.toggle.weak input').click()")
    weak = sum(f.verdict == "weak" for f in every)
    assert window.run("return document.getElementById('status').textContent").startswith(
        f"{weak} of {len(every)} boxes"
    )
    shown = window.run("return detxai.state.shown.map(i => detxai.index.boxes.score[i])")
    assert shown == sorted(shown), "worst first: the lowest score"
    window.run("Object.assign(detxai.state, {sort: 'outside_share', down: true}); detxai.refresh()")
    shares = window.run("return detxai.state.shown.map(i => detxai.index.measures.outside_share[i])")
    assert shares == sorted(shares, reverse=True) and len(shares) == weak


@needs_chromium
def test_a_box_without_a_picture_of_its_own_is_shown_where_it_lies_on_that_of_all(night: Path, window: Browser) -> None:
    window.go(night / "report.html")
    window.run("Object.assign(detxai.state, {text: 'bag-00057', verdict: new Set()}); detxai.refresh()")
    window.wait("[...document.querySelectorAll('.card .crop img')].some(i => i.complete && i.naturalWidth > 100)")
    seen = window.run("""return [...document.querySelectorAll('.card')].map(card => {
        const box = detxai.index.boxes.box[card.dataset.box];
        const crop = card.querySelector('.crop').getBoundingClientRect();
        const image = card.querySelector('img').getBoundingClientRect(), times = image.width / 640;
        return [image.left + times * box[0] - crop.left, image.top + times * box[1] - crop.top,
                crop.right - image.left - times * box[2], crop.bottom - image.top - times * box[3],
                image.width / crop.width];
    })""")
    assert len(seen) == len(json.loads((night / TOGETHER).read_bytes())["detections"])
    for *inside, times in seen:
        assert min(inside) > 0 and times > 1.2, "the whole box is seen, and larger than on the whole picture"


@needs_chromium
def test_the_other_view_of_a_bag_is_a_click_away(night: Path, window: Browser) -> None:
    window.go(night / "report.html")
    other = TOGETHER.removesuffix(".json")
    window.run(
        """
        const {images, boxes} = detxai.index, of = boxes.image.find(k => images.path[k] !== arguments[0]);
        images.bag[of] = images.bag[images.path.indexOf(arguments[0])] = "a bag";
        detxai.openBox(boxes.image.indexOf(of));
        document.querySelector(".thumb[title^='the other view']").click()""",
        other,
    )
    shown = window.run("return document.querySelector('#stage img').src")
    assert shown.endswith(f"/{other}.png")


@needs_chromium
def test_keys_and_reviewed_marks(night: Path, window: Browser) -> None:
    window.go(night / "report.html")
    window.press("j", "j", "r", "\ue007")
    assert window.run("return document.getElementById('detail').open && detxai.state.at") == 2
    heading = window.run("return document.querySelector('#detail h2').textContent")
    window.press("\ue014")
    assert window.run("return detxai.state.at") == 3
    window.press("\ue00c")
    assert not window.run("return document.getElementById('detail').open")
    window.go(night / "report.html")
    (row,) = csv.DictReader(io.StringIO(window.run("return detxai.csv()")))
    assert row["class"] in heading and row["verdict"] in heading and row["reviewed"].startswith("20")
    window.run("detxai.marks.all.clear(); localStorage.clear()")


@needs_chromium
def test_a_missing_picture_is_drawn_from_the_record(night: Path, tmp_path: Path, window: Browser) -> None:
    shutil.copy(night / "report.html", tmp_path / "alone.html")
    window.go(tmp_path / "alone.html")
    window.wait("document.querySelectorAll('.card .sketch').length > 3")
    assert window.run("return document.querySelectorAll('.card .sketch .own').length") > 3
    window.run("detxai.view('classes')")
    names = window.run("return [...document.querySelectorAll('.class h2')].map(h => h.textContent)")
    assert [name.split()[0] for name in names[:-1]] == ["gun", "knife", "pliers", "scissors", "wrench"]
    assert window.run("return document.querySelectorAll('.class .grid rect').length") >= 64 * 2 * len(names)


@needs_chromium
def test_a_group_can_be_looked_at(tmp_path: Path, window: Browser) -> None:
    write(tmp_path / "many", 150, seed=2)
    window.go(report(tmp_path / "many"), "#view=classes")
    (found,) = [b for b in packed(tmp_path / "many" / "report.html")["behaviours"] if b["class"][1] == "knife"]
    small = min(found["groups"], key=lambda g: len(g["boxes"]))
    assert "lower left" in small["where"], "the planted shortcut"
    window.run(
        """[...document.querySelectorAll('.class')].find(c => c.innerText.startsWith('knife'))
        .querySelectorAll('.group button')[arguments[0]].click()""",
        found["groups"].index(small),
    )
    assert window.run("return detxai.state.view") == "list"
    assert sorted(window.run("return detxai.state.shown")) == sorted(small["boxes"])


@needs_chromium
@pytest.mark.slow
def test_5000_images_open_and_filter_at_once(tmp_path: Path, window: Browser) -> None:
    write(tmp_path / "big", 5000)
    page = report(tmp_path / "big")
    assert page.stat().st_size < 5e6
    window.go(page)
    opened = window.run("return +document.body.dataset.ready")
    filtered = window.run("""
        const times = [];
        for (const text of ["knife", "softened gun", ""]) {
            const began = performance.now();
            detxai.state.text = text; detxai.refresh(); document.body.offsetHeight;
            times.push(performance.now() - began);
        }
        return times.sort((a, b) => a - b)[1]""")
    print(f"opened in {opened} ms, filtered in {filtered:.0f} ms, {page.stat().st_size / 1e6:.2f} MB")
    assert opened < 2000 and filtered < 200, (opened, filtered)
    assert window.run("return document.querySelectorAll('.card').length") < 80, "only what is seen exists"
