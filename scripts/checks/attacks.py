"""Crafted pictures and models against the real command: the exit code, the time and the memory of each.

Every attack runs in a process of its own, forked when torch is loaded, and killed a minute of one core after it should
have ended.
Leaves with 1 where an attack ends in another code than it should, or takes more than its kind may.

    python scripts/checks/attacks.py [pictures|models|crowds]
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import resource
import signal
import struct
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from pickle_programs import BYPASSES, archive, program
from torch import nn
from ultralytics.nn.modules.transformer import AIFI

from detxai.cli.app import run
from detxai.models import checkpoints

#: What makes the content of a file: hundreds of attacks are listed, few are run at a time.
Bytes = Callable[[], bytes]

torch.set_num_threads(1)  # a child that is forked from several threads would wait for the others
#: Seconds of one core beyond those of a good picture, and GiB, that an attack may take.
LIMITS = {"pictures": (2.0, 1.0), "models": (10.0, 2.0), "crowds": (300.0, 6.0)}
#: Seconds, of one core beyond its limit and of the clock, after which it counts as one that hangs.
PATIENCE, HANGS = 60, 600
QUICK = ["--imgsz", "64", "--max-evaluations", "2", "--evidence", "none", "--no-overlays", "--device", "cpu", "-q"]


@dataclass(frozen=True)
class Attack:
    """`arguments` of the command, made in a folder of its own, and the exit `codes` that are right."""

    kind: str
    name: str
    arguments: Callable[[Path], list[str]]
    codes: tuple[int, ...]


@dataclass(frozen=True)
class Outcome:
    """The exit `code` (negative: a signal), `seconds` of one core, peak `gib`, and the first line that was said."""

    code: int
    seconds: float
    gib: float
    said: str


def outcome(attack: Attack, folder: Path) -> Outcome:
    """What the command makes of `attack`, in a process of its own."""
    folder.mkdir()
    arguments = attack.arguments(folder)
    said = folder / "said"
    child = os.fork()
    if not child:
        signal.alarm(HANGS)  # its default ends the process, as that of the limit does
        patience = PATIENCE + int(LIMITS[attack.kind][0])
        resource.setrlimit(resource.RLIMIT_CPU, (patience, patience))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        out = os.open(said, os.O_WRONLY | os.O_CREAT)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os._exit(run(arguments))
    _, status, used = os.wait4(child, 0)
    lines = [line for line in said.read_text(errors="replace").splitlines() if line.strip()]
    cpu = used.ru_utime + used.ru_stime
    return Outcome(os.waitstatus_to_exitcode(status), cpu, used.ru_maxrss / 2**20, lines[0] if lines else "")


def usual() -> float:
    """Seconds of one core that the command takes for a small good picture."""

    def made(folder: Path) -> list[str]:
        (folder / "a.png").write_bytes(picture("PNG"))
        return ["explain", str(folder / "a.png"), "-o", str(folder / "out"), *QUICK]

    with tempfile.TemporaryDirectory() as folder:
        return outcome(Attack("pictures", "none", made, (0,)), Path(folder) / "good").seconds


# -- pictures -----------------------------------------------------------------------------------


def png(width: int, height: int, data: bytes, depth: int = 8, colour: int = 2, more: bytes = b"") -> bytes:
    """A PNG that announces a size and holds the compressed `data`."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + more + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def picture(form: str, size: tuple[int, int] = (64, 48), **how: object) -> bytes:
    file = io.BytesIO()
    values = np.random.default_rng(1).integers(0, 255, (size[1], size[0], 3), np.uint8)
    PIL.Image.fromarray(values).save(file, form, **how)
    return file.getvalue()


def many(form: str, count: int) -> bytes:
    """A picture of `count` frames."""
    file = io.BytesIO()
    frames = [PIL.Image.new("P", (8, 8), i % 250) for i in range(count)]
    frames[0].save(file, form, save_all=True, append_images=frames[1:])
    return file.getvalue()


def bmp(width: int, height: int, bits: int = 24) -> bytes:
    return (
        b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, width, height, 1, bits, 0, 0, 0, 0, 0, 0) + bytes(64)
    )


def tiff(width: int, height: int, strips: int = 1, next_page: int = 0, bits: int = 8) -> bytes:
    """A TIFF of one gray page whose strips all lie at its head."""
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, 1), (273, 8), (277, 1), (278, height)]
    tags.append((279, strips))
    made = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + made + struct.pack("<I", next_page)


SIDES = ((2**31 - 1, 2**31 - 1), (60_000, 60_000), (1, 2**31 - 1), (0, 0), (13_000, 13_000), (30_000, 3))


def lying(form: str, good: bytes, width: int, height: int) -> bytes:
    """A small picture whose header tells of another size."""
    if form == "JPEG":
        at = good.index(b"\xff\xc0") + 5
        return good[:at] + struct.pack(">HH", height & 0xFFFF, width & 0xFFFF) + good[at + 4 :]
    if form == "GIF":
        return good[:6] + struct.pack("<HH", width & 0xFFFF, height & 0xFFFF) + good[10:]
    at = good.index(b"VP8 ") + 14  # WebP: fourteen bits each
    return good[:at] + struct.pack("<HH", width & 0x3FFF, height & 0x3FFF) + good[at + 4 :]


def deep() -> bytes:
    return zlib.compress(bytes(30_000_000), 9)


def pictures(seed: int) -> Iterator[tuple[str, str, Bytes]]:
    """65 files: (suffix, what is wrong, what makes the bytes)."""
    dice = random.Random(seed)
    small = zlib.compress(bytes(1000))
    for width, height in SIDES:
        said = f"header of {width} x {height}"
        yield "png", said, partial(png, width, height, small)
        yield "bmp", said, partial(bmp, width, height)
        yield "tif", said, partial(tiff, width, height)
        for form in ("JPEG", "GIF", "WEBP"):
            suffix = {"JPEG": "jpg", "GIF": "gif"}.get(form, "webp")
            yield suffix, said, partial(lying, form, picture(form), width, height)
    yield "png", "30 MB of zeros for 64 x 48 pixels", lambda: png(64, 48, deep())
    yield "png", "text that unpacks to 30 MB", lambda: png(8, 8, small, more=chunk(b"zTXt", b"a\0\0" + deep()) * 20)
    yield (
        "png",
        "colour profile that unpacks to 30 MB",
        lambda: png(8, 8, small, more=chunk(b"iCCP", b"a\0\0" + deep())),
    )
    yield "png", "three of 9,999 rows", lambda: png(100, 9999, zlib.compress(bytes(301 * 3)))
    yield "png", "200,000 chunks", lambda: png(8, 8, small, more=chunk(b"tEXt", b"a\0b") * 200_000)
    yield (
        "png",
        "16-bit RGBA of 9 megapixels from zeros",
        lambda: png(3000, 3000, zlib.compress(bytes(72_003_000)), 16, 6),
    )
    yield "gif", "5,000 frames", partial(many, "GIF", 5000)
    yield "tif", "2,000 pages", partial(many, "TIFF", 2000)
    yield "webp", "1,000 frames", partial(many, "WEBP", 1000)
    yield "tif", "pages that go round", partial(tiff, 8, 8, next_page=8)
    yield "tif", "strips of 4 GB", partial(tiff, 64, 64, strips=2**32 - 1)
    yield "tif", "2 ** 30 bits a sample", partial(tiff, 64, 64, bits=2**30)
    yield "ppm", "header of 10 ** 9 digits' worth", lambda: b"P6 " + b"9" * 100_000 + b" 1 255\n"
    for form in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"):
        whole = picture(form)
        suffix = {"JPEG": "jpg", "TIFF": "tif"}.get(form, form.lower())
        yield suffix, "cut in its middle", partial(bytes, whole[: len(whole) // 2])
        yield suffix, "cut in its header", partial(bytes, whole[:20])
    while True:  # the rest: bytes that are not what they were
        form = dice.choice(("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"))
        damaged = bytearray(picture(form))
        for _ in range(20):
            damaged[dice.randrange(len(damaged))] = dice.randrange(256)
        yield {"JPEG": "jpg", "TIFF": "tif"}.get(form, form.lower()), "20 bytes changed", partial(bytes, damaged)


def picture_attacks(seed: int) -> Iterator[Attack]:
    for number, (suffix, what, data) in zip(range(65), pictures(seed), strict=False):

        def made(folder: Path, data: Bytes = data, name: str = f"a{number}.{suffix}") -> list[str]:
            (folder / name).write_bytes(data())
            return ["explain", str(folder / name), "-o", str(folder / "out"), *QUICK]

        yield Attack("pictures", f"{suffix}: {what}", made, (0, 3))


def crowd_attacks() -> Iterator[Attack]:
    """Fourteen PNGs in a folder, each within the limit of pixels and of less than a megabyte, that unpack to much."""
    for megapixels in (16, 99):

        def made(folder: Path, megapixels: int = megapixels) -> list[str]:
            packer, row = zlib.compressobj(), bytes(8000 * 8 + 1)
            height = megapixels * 125
            data = b"".join([packer.compress(row) for _ in range(height)]) + packer.flush()
            (folder / "in").mkdir()
            for number in range(14):
                (folder / "in" / f"{number:02d}.png").write_bytes(png(8000, height, data, 16, 6))
            return ["explain", str(folder / "in"), "-o", str(folder / "out"), *QUICK]

        yield Attack("crowds", f"14 PNGs of {megapixels} megapixels, 16-bit RGBA", made, (0,))


# -- models -------------------------------------------------------------------------------------


def explained(data: Bytes, suffix: str = ".pt") -> Callable[[Path], list[str]]:
    """`detxai doctor` of a model file of these bytes."""

    def made(folder: Path) -> list[str]:
        (folder / f"m{suffix}").write_bytes(data())
        return ["doctor", "--device", "cpu", str(folder / f"m{suffix}")]

    return made


def darknet(cfg: str, weights: bytes = bytes(4096)) -> Callable[[Path], list[str]]:
    def made(folder: Path) -> list[str]:
        (folder / "m.cfg").write_text(cfg)
        (folder / "m.weights").write_bytes(weights)
        return ["doctor", "--device", "cpu", str(folder / "m.cfg")]

    return made


def net(size: int, filters: int, layers: int) -> str:
    layer = f"[convolutional]\nfilters={filters}\nsize=3\nstride=1\npad=1\nactivation=leaky\n"
    head = "[convolutional]\nfilters=18\nsize=1\nstride=1\nactivation=linear\n[yolo]\nmask=0,1,2\nclasses=1\nnum=3\n"
    return f"[net]\nwidth={size}\nheight={size}\nchannels=3\n{layer * layers}{head}anchors=1,1,2,2,3,3\n"


def changed(**change: object) -> bytes:
    """The bundled detector with another architecture in its header, its tensors as they were."""
    data = checkpoints.BUNDLED.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    told = header["__metadata__"]
    for key, value in change.items():
        told[key] = value if isinstance(value, str) else json.dumps(value)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def yamls() -> Iterator[tuple[str, dict[str, object]]]:
    """Architectures that would take the machine."""
    detect: list[object] = [[-1], 1, "Detect", ["nc"]]
    yield "a Linear of 65,536 squared", {"nc": 1, "backbone": [[-1, 1, "nn.Linear", [65536, 65536]]], "head": [detect]}
    yield "300 wide rows", {"nc": 1, "backbone": [[-1, 1, "Conv", [8192, 3, 1]]] * 300, "head": [detect]}
    yield "a million repeats", {"nc": 1, "backbone": [[-1, 10**6, "Conv", [8, 1, 1]]], "head": [detect]}
    repeated: dict[str, object] = {"nc": 1, "backbone": [[-1, 999, "C2f", [64, True]]] * 99, "head": [detect]}
    yield "depth times repeats", repeated | {"depth_multiple": 50.0}
    yield "ten thousand rows", {"nc": 1, "backbone": [[-1, 1, "Conv", [8, 1, 1]]] * 10_000, "head": [detect]}
    yield "a width of a million", {"nc": 1, "width_multiple": 1e6, "backbone": [[-1, 1, "Conv", [8]]], "head": [detect]}
    yield "300,000 classes", {"nc": 300_000, "backbone": [[-1, 1, "Conv", [8, 3, 2]]] * 3, "head": [detect]}
    bomb: list[object]
    for bomb in ([-1, 1, "nn.Upsample", ["None", 65536, "nearest"]], [-1, 1, "Conv", [8, 1, 1, 65536]]):
        yield f"{bomb[2]} of 65,536", {"nc": 1, "backbone": [[-1, 1, "Conv", [8, 3, 2]], bomb], "head": [detect]}
    yield "code for a layer", {"nc": 1, "backbone": [[-1, 1, "__import__('os').getcwd", []]], "head": [detect]}


def hungry() -> Iterator[tuple[str, Bytes]]:
    """Checkpoints of small weights and endless maps, and of layers that do not fit together."""

    def stored(change: Callable[[Any], None], size: int = 320) -> bytes:
        module: Any = checkpoints.load().module
        change(module.model)
        file = io.BytesIO()
        torch.save({"model": module, "train_args": {"imgsz": size}}, file)
        return file.getvalue()

    def act(*layers: nn.Module) -> Callable[[Any], None]:
        return lambda model: model[0].__setattr__("act", nn.Sequential(*layers))

    pool = {"kernel_size": 4001, "stride": 1, "padding": 2000}
    for what, layers in (
        ("a chain of upsamplings", [nn.Upsample(scale_factor=2) for _ in range(20)]),
        ("one upsampling", [nn.Upsample(scale_factor=65536.0)]),
        ("an upsampling to a size", [nn.Upsample(size=(60000, 60000))]),
        ("padding", [nn.ZeroPad2d(65536)]),
        ("a padded convolution", [nn.Conv2d(16, 16, 1, padding=65536)]),
        ("a transposed convolution", [nn.ConvTranspose2d(16, 16, 1, stride=1000)]),
        ("an adaptive pooling", [nn.AdaptiveAvgPool2d(65536)]),
        ("a wide pooling", [nn.MaxPool2d(**pool)]),
        ("nineteen thousand layers", [nn.SiLU()] * 19_000),
        ("a thousand upsamplings, up and down", [nn.Upsample(scale_factor=8), nn.AvgPool2d(8)] * 1000),
    ):
        yield what, partial(stored, act(*layers))
    yield "attention of all cells", partial(stored, act(AIFI(16, 16, 1)))
    yield "an odd attention", partial(stored, act(AIFI(6, 6, 1)))
    yield "a stride of a million", partial(stored, lambda model: model[-1].stride.mul_(1e6))
    yield "a size of 4,096 px and wide maps", partial(stored, act(nn.Conv2d(16, 512, 1), nn.Conv2d(512, 16, 1)), 4096)
    yield "layers that do not fit together", partial(stored, act(nn.Conv2d(8, 16, 1)))


def headers() -> Iterator[tuple[str, bytes]]:
    """Safetensors that lie."""
    good = checkpoints.BUNDLED.read_bytes()
    for share in (0, 4, 9, 1000, len(good) // 2, len(good) - 1):
        yield f"cut after {share} bytes", good[:share]
    for size in (0, 1, 2**40, 2**63, 2**64 - 1):
        yield f"a header of {size} bytes", struct.pack("<Q", size) + good[8:]
    for shape in ([2**31, 2**31], [-1], [10**6, 10**6]):
        text = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4]}}).encode()
        yield f"a tensor of {shape}", struct.pack("<Q", len(text)) + text + bytes(4)
    text = b"[" * 100_000
    yield "deep nesting", struct.pack("<Q", len(text)) + text


def zipped(entry: bytes, times: int) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("a/data.pkl", b"N.")
        for number in range(times):
            packed.writestr(f"a/data/{number}", entry)
    return file.getvalue()


def places(option: str, codes: tuple[int, ...]) -> Iterator[Attack]:
    """Things that are no regular file, where one is asked for."""

    def at(folder: Path, what: str) -> list[str]:
        where = what
        if what == "FIFO":
            where = str(folder / "fifo")
            os.mkfifo(where)
        elif what == "folder":
            where = str(folder)
        elif what == "4,096-byte path":
            where = "a" * 4096
        PIL.Image.new("RGB", (64, 64)).save(folder / "a.png")
        model = darknet(net(64, 8, 1), bytes(20 + 4 * 410))(folder)[-1:] if option == "--names" else []
        more = [f"--model={model[0]}"] if model else []
        return ["explain", str(folder / "a.png"), "-o", str(folder / "out"), *QUICK, *more, f"{option}={where}"]

    for what in ("/dev/zero", "/dev/full", "FIFO", "folder", "4,096-byte path"):
        yield Attack("models", f"{option} {what}", lambda folder, what=what: at(folder, what), codes)  # type: ignore[misc]


def model_attacks(seed: int) -> Iterator[Attack]:
    dice = random.Random(seed)
    for name, stream in BYPASSES.items():
        yield Attack("models", f"pickle: {name}", explained(partial(archive, stream)), (5,))
        yield Attack("models", f"pickle without archive: {name}", explained(partial(bytes, stream)), (5,))
    for number in range(112):
        yield Attack("models", f"random program {number}", explained(partial(archive, program(dice))), (5,))
    for what, data in headers():
        yield Attack("models", f"safetensors: {what}", explained(partial(bytes, data), ".safetensors"), (5,))
    for what, yaml in yamls():
        yield Attack(
            "models", f"architecture: {what}", explained(partial(changed, architecture=yaml), ".safetensors"), (5,)
        )
    for what, data in hungry():
        yield Attack("models", f"checkpoint: {what}", explained(data), (5,))
    for imgsz in (-32, 0, 10**9, "x", 1e300):
        yield Attack("models", f"imgsz {imgsz}", explained(partial(changed, imgsz=imgsz), ".safetensors"), (5,))
    yield Attack(
        "models",
        "300,000 names",
        explained(partial(changed, names={str(i): "x" for i in range(300_000)}), ".safetensors"),
        (5,),
    )
    for size, filters, layers in (
        (8192, 64, 3),
        (4096, 512, 1),
        (10**9, 8, 1),
        (64, 10**6, 2),
        (64, 8, 20_000),
        (0, 8, 1),
        (-32, 8, 1),
    ):
        said = f"Darknet of {size} px, {layers} x {filters} filters"
        weights = bytes(16 + 4 * (filters * 28 + 18 * (filters + 1))) if layers == 1 else bytes(4096)
        yield Attack("models", said, darknet(net(size, filters, layers), weights), (5,))
    for size in (0, 1, 100):
        yield Attack(
            "models", f"ONNX of {size} random bytes", explained(partial(bytes, dice.randbytes(size)), ".onnx"), (5,)
        )
    yield Attack(
        "models",
        "ONNX with a length of 2 ** 60",
        explained(partial(bytes, b"\x3a" + b"\xff" * 8 + b"\x0f"), ".onnx"),
        (5,),
    )
    yield Attack("models", "zip of 20 x 100 MB of zeros", explained(lambda: zipped(bytes(10**8), 20)), (5,))
    for option, codes in (("-m", (5,)), ("--config", (2,)), ("--names", (2, 5)), ("--predictions", (0, 2))):
        yield from places("--model" if option == "-m" else option, codes)


def main() -> None:
    """Run the attacks and print them as a Markdown table; leaves with 1 where one got through."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("kind", nargs="?", choices=tuple(LIMITS), help="only these")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", metavar="TEXT", help="only those with this in their name")
    options = parser.parse_args()
    torch.set_num_threads(1)  # threads do not live on in a process that is forked
    attacks = [*picture_attacks(options.seed), *model_attacks(options.seed), *crowd_attacks()]
    attacks = [a for a in attacks if options.kind in (None, a.kind) and options.only in a.name]
    broken, good = 0, usual()
    print("| attack | exit code | s of one core | peak GiB | |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for number, attack in enumerate(attacks):
            result = outcome(attack, Path(folder) / str(number))
            seconds, gib = LIMITS[attack.kind][0] + good, LIMITS[attack.kind][1]
            wrong = result.code not in attack.codes
            held = not wrong and result.seconds <= seconds and result.gib <= gib
            broken += not held
            said = f"**{result.said[:160]}**" if wrong else "" if held else "**over the limit**"
            print(f"| {attack.name} | {result.code} | {result.seconds:.1f} | {result.gib:.2f} | {said} |", flush=True)
    print(f"\n{len(attacks)} attacks, {broken} not survived; a small good picture takes {good:.1f} s")
    sys.exit(bool(broken))


if __name__ == "__main__":
    main()
