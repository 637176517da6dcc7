"""Checkpoints as the repositories of YOLOv3, v5, v7, v9, v10 and v12 pickle them: read right, or refused by name."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from ultralytics.nn import tasks
from ultralytics.nn.modules import block, conv
from ultralytics.utils.torch_utils import fuse_conv_and_bn

from detxai.errors import ModelError
from detxai.models import checkpoints, detectors

NAMES = ["knife", "gun"]
ANCHORS = torch.tensor([[[1.25, 1.6], [2.0, 3.75]], [[1.9, 3.8], [3.9, 2.8]]])  # in cells, as they are stored
STRIDES = (8, 16)
#: Names that ultralytics has changed.
RENAMED = {"RepCSP": "RepNCSP", "RepBottleneck": "RepNBottleneck", "RepConv": "RepConvN"}
Make = Callable[..., Any]


@pytest.fixture
def repository() -> Iterator[Make]:
    """Makes an object of a class of `models.<room>`, a repository that is there only while its file is written."""
    made = {name: ModuleType(name) for name in ("models", "models.yolo", "models.common", "models.experimental")}
    sys.modules.update(made)

    def shell(room: str, name: str, source: nn.Module | None = None, **more: Any) -> Any:
        module = made[f"models.{room}"]
        if not hasattr(module, name):
            code = {"__module__": module.__name__, "forward": _forward, "fuseforward": _forward}
            setattr(module, name, type(name, (nn.Module,), code))
        part = getattr(module, name)()
        if source is not None:
            part.__dict__.update({k: v for k, v in source.__dict__.items() if k != "forward"})
        for key, value in more.items():
            setattr(part, key, value)
        return part

    yield shell
    for name in made:
        sys.modules.pop(name, None)


def _forward(self: Any, x: Any) -> Any:
    raise AssertionError("code of the file ran")


def relabelled(part: nn.Module, make: Make) -> nn.Module:
    """A copy of `part` in the classes of the other repository."""
    name = type(part).__name__
    copied = make("common", RENAMED.get(name, name), part) if "ultralytics" in type(part).__module__ else part
    if copied is not part or list(part.children()):
        copied = copied if copied is not part else type(part)()
        copied.__dict__.update({k: v for k, v in part.__dict__.items() if k not in ("forward", "_modules")})
        copied._modules = {k: None if v is None else relabelled(v, make) for k, v in part._modules.items()}
    return copied


def lively(module: nn.Module) -> nn.Module:
    """`module` with statistics and activations of a trained network."""
    torch.manual_seed(1)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.eps = 1e-3
            part.running_mean.normal_(0, 0.1)  # type: ignore[union-attr]
            part.running_var.uniform_(0.05, 0.2)  # type: ignore[union-attr]
    return module.eval()


def wired(layers: Sequence[Any], sources: Sequence[Any]) -> None:
    for i, (layer, f) in enumerate(zip(layers, sources, strict=True)):
        layer.i, layer.f = i, f


def outputs(layers: Sequence[Any], x: Tensor) -> list[Tensor]:
    made: list[Tensor] = []
    for layer in layers:
        f = layer.f
        given = (made[f] if made else x) if isinstance(f, int) else [made[i] for i in f]
        made.append(layer(given))
    return made


def save(file: Path, make: Make, layers: Sequence[nn.Module], head: Any, kind: str = "Model") -> str:
    head.i = len(layers)
    model = make("yolo", kind, model=nn.Sequential(*(relabelled(layer, make) for layer in layers), head))
    model.yaml, model.names, model.stride = {"nc": 2}, NAMES, torch.tensor(STRIDES).float()
    torch.save({"model": model, "ema": None}, file)
    return str(file)


def anchored(make: Make, feeds: list[int], widths: list[int], name: str = "Detect", extra: int = 0, **more: Any) -> Any:
    head = make("yolo", name, nc=2, nl=2, na=2, no=7 + extra, f=feeds, **more)
    head.register_buffer("anchors", ANCHORS.clone())
    head.m = nn.ModuleList(nn.Conv2d(width, 2 * (7 + extra), 1) for width in widths)
    return head


def decoded(raws: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Boxes and scores of the raw outputs (1, anchors × n, H, W) of a YOLOv5 or v7 head, in plain torch."""
    boxes, scores = [], []
    for raw, anchors, stride in zip(raws, ANCHORS, STRIDES, strict=True):
        _, _, height, width = raw.shape
        y = raw[0].unflatten(0, (2, -1)).permute(0, 2, 3, 1).sigmoid()
        grid = torch.stack(torch.meshgrid(torch.arange(width), torch.arange(height), indexing="xy"), -1)
        centre = (2 * y[..., :2] - 0.5 + grid) * stride
        half = (2 * y[..., 2:4]) ** 2 * (anchors * stride)[:, None, None] / 2
        boxes.append(torch.cat([centre - half, centre + half], -1).flatten(0, 2))
        scores.append((y[..., 4:5] * y[..., 5:7]).flatten(0, 2))
    return torch.cat(boxes), torch.cat(scores)


def same(file: str, boxes: Tensor, scores: Tensor, x: Tensor) -> Any:
    checkpoint = checkpoints.load(file)
    assert checkpoint.names == dict(enumerate(NAMES)) and not checkpoint.trusted
    detector = detectors.build(checkpoint)
    with torch.no_grad():
        (ours,) = detector.predict(x)
    assert float(scores.std()) > 1e-4, "a network that says one thing everywhere shows nothing"
    torch.testing.assert_close(ours.scores, scores, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours.boxes, boxes, atol=1e-3, rtol=1e-4)
    detectors.self_test(detector, x)  # type: ignore[arg-type]
    return checkpoint


def picture() -> Tensor:
    return torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(2))


def v3_layers() -> list[Any]:
    """Convolutions and top-level bottlenecks, whose first kernel is 1 × 1 in these repositories."""
    torch.manual_seed(0)
    first = block.Bottleneck(16, 16)
    first.cv1 = conv.Conv(16, 8, 1)
    first.cv2 = conv.Conv(8, 16, 3)
    layers = [conv.Conv(3, 8, 3, 2), conv.Conv(8, 16, 3, 2), first, conv.Conv(16, 16, 3, 2), conv.Conv(16, 16, 3, 2)]
    wired(layers, [-1] * 5)
    return [lively(layer) for layer in layers]


def v3(folder: Path, repository: Make) -> tuple[Path, Tensor, Tensor, Tensor]:
    """The file of a full YOLOv3, what it reports on a picture (boxes, scores), and that picture."""
    layers, x = v3_layers(), picture()
    head = anchored(repository, [3, 4], [16, 16])
    made = outputs(layers, x)
    boxes, scores = decoded([m(made[f]) for m, f in zip(head.m, head.f, strict=True)])
    return save(folder / "v3.pt", repository, layers, head), boxes, scores, x


@torch.no_grad()
def test_full_yolov3_has_bottlenecks_of_its_own(tmp_path: Path, repository: Make) -> None:
    file, boxes, scores, x = v3(tmp_path, repository)
    with torch.enable_grad():
        assert same(file, boxes, scores, x).kind == "legacy"


@torch.no_grad()
def test_a_fused_model(tmp_path: Path, repository: Make) -> None:
    """`fuse()` folds each BatchNorm in and puts the method for that in the place of `forward`."""
    file, boxes, scores, x = v3(tmp_path, repository)
    content = torch.load(file, weights_only=False)
    for part in list(content["model"].modules()):
        if type(part).__name__ == "Conv":
            part.conv = fuse_conv_and_bn(part.conv, part.bn)
            del part.bn
            part.forward = part.fuseforward
    torch.save(content, file)
    with torch.enable_grad():
        same(file, boxes, scores, x)


@torch.no_grad()
def test_the_detections_of_yolov5_seg(tmp_path: Path, repository: Make) -> None:
    """Behind the classes of each anchor its head has 32 numbers for a mask."""
    layers, x = v3_layers(), picture()
    head = anchored(repository, [3, 4], [16, 16], "Segment", 32, nm=32, npr=8)
    head.proto = relabelled(block.Proto(16, 8, 32), repository)
    head.detect = type(anchored(repository, [3, 4], [16, 16])).forward
    made = outputs(layers, x)
    boxes, scores = decoded([m(made[f]) for m, f in zip(head.m, head.f, strict=True)])
    _forward.__module__, _forward.__qualname__ = "models.yolo", "Detect.forward"  # as it is named in the file
    try:
        file = save(tmp_path / "seg.pt", repository, layers, head, "SegmentationModel")
    finally:
        _forward.__module__, _forward.__qualname__ = __name__, "_forward"
    with torch.enable_grad():
        same(file, boxes, scores, x)


def test_yolov5_cls_says_that_it_is_a_classifier(tmp_path: Path, repository: Make) -> None:
    head = repository("common", "Classify", conv=conv.Conv(16, 8), linear=nn.Linear(8, 2), f=-1)
    head.conv = relabelled(head.conv, repository)
    file = save(tmp_path / "cls.pt", repository, v3_layers(), head, "ClassificationModel")
    with pytest.raises(ModelError, match=r"cls\.pt is a classifier"):
        checkpoints.load(file)


@torch.no_grad()
def test_yolov7(tmp_path: Path, repository: Make) -> None:
    """MP, ReOrg, SPPCSPC, RepConv and IDetect, each written out once more here."""
    torch.manual_seed(0)
    convs = [lively(conv.Conv(*a)) for a in ((12, 8, 3, 1), (8, 16, 3, 2), (16, 16, 3, 1))]
    pyramid = [lively(conv.Conv(*a)) for a in ((16, 8), (16, 8), (8, 8, 3), (8, 8), (32, 8), (8, 8, 3), (16, 16))]
    dense, point, alone = nn.Conv2d(16, 16, 3, 1, 1, bias=False), nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16)
    branches = [nn.Sequential(part, nn.BatchNorm2d(16)) for part in (dense, point)]
    rep = repository("common", "RepConv", rbr_dense=branches[0], rbr_1x1=branches[1], rbr_identity=alone)
    rep.act, rep.in_channels, rep.out_channels, rep.groups, rep.deploy = nn.SiLU(), 16, 16, 1, False
    lively(rep)
    pools = nn.ModuleList(nn.MaxPool2d(k, 1, k // 2) for k in (5, 9, 13))
    spp = repository("common", "SPPCSPC", m=pools)
    for i, part in enumerate(pyramid, 1):
        setattr(spp, f"cv{i}", relabelled(part, repository))
    mp = repository("common", "MP", m=nn.MaxPool2d(2, 2))
    layers = [repository("common", "ReOrg"), convs[0], convs[1], mp, convs[2], mp.__class__(), spp, rep]
    layers[5].m = nn.MaxPool2d(2, 2)
    wired(layers, [-1] * len(layers))
    head = anchored(repository, [4, 7], [16, 16], "IDetect")
    pixels = (ANCHORS * torch.tensor(STRIDES).view(2, 1, 1)).view(2, 1, 2, 1, 1, 2)
    head.register_buffer("anchor_grid", pixels)
    head.ia = nn.ModuleList(repository("common", "ImplicitA", channel=16) for _ in STRIDES)
    head.im = nn.ModuleList(repository("common", "ImplicitM", channel=14) for _ in STRIDES)
    for i in range(2):
        head.ia[i].implicit = nn.Parameter(torch.randn(1, 16, 1, 1))
        head.im[i].implicit = nn.Parameter(1 + 0.3 * torch.randn(1, 14, 1, 1))
    x = picture()
    corners = [x[..., a::2, b::2] for a, b in ((0, 0), (1, 0), (0, 1), (1, 1))]
    y = convs[1](convs[0](torch.cat(corners, 1)))
    near = convs[2](nn.functional.max_pool2d(y, 2))
    inner = pyramid[3](pyramid[2](pyramid[0](z := nn.functional.max_pool2d(near, 2))))
    wide = pyramid[5](pyramid[4](torch.cat([inner, *(pool(inner) for pool in pools)], 1)))
    far = pyramid[6](torch.cat([wide, pyramid[1](z)], 1))
    far = nn.functional.silu(branches[0](far) + branches[1](far) + alone(far))
    raws = [
        im.implicit * m(ia.implicit + f) for m, ia, im, f in zip(head.m, head.ia, head.im, (near, far), strict=True)
    ]
    boxes, scores = decoded(raws)
    file = save(tmp_path / "v7.pt", repository, layers, head)
    with torch.enable_grad():
        assert same(file, boxes, scores, x).kind == "legacy"


@torch.no_grad()
def test_yolov9_reports_with_its_main_branch(tmp_path: Path, repository: Make) -> None:
    """DualDDetect: the first branch is for training; its own `detect.py` takes the second."""
    torch.manual_seed(0)
    layers = [nn.Identity(), conv.Conv(3, 8, 3, 2), conv.Conv(8, 16, 3, 2), block.RepNCSPELAN4(16, 16, 8, 8, 1)]
    layers += [block.ADown(16, 16), conv.Conv(16, 16, 1), block.ADown(16, 16), conv.Conv(16, 16, 1)]
    layers += [block.SPPELAN(16, 16, 8)]
    wired(layers, [-1, 0, 1, 2, 3, 4, 5, 6, 7])
    layers = [lively(layer) for layer in layers]
    head, parts = dual(repository, [4, 8, 5, 8])
    x = picture()
    boxes, scores = distances(outputs(layers, x), parts)
    silence = repository("common", "Silence")
    silence.i, silence.f = 0, -1
    file = save(tmp_path / "v9.pt", repository, [silence, *layers[1:]], head, "DetectionModel")
    with torch.enable_grad():
        checkpoint = same(file, boxes, scores, x)
    assert checkpoint.family == "yolov9"


def dual(repository: Make, feeds: list[int]) -> tuple[Any, dict[str, nn.ModuleList]]:
    """A DualDDetect whose main branch reads the last two of four `feeds`, and its parts."""
    parts = {
        name: nn.ModuleList(
            lively(nn.Sequential(conv.Conv(16, 16, 3), conv.Conv(16, 16, 3, g=4 if last == 64 else 1),
                                 nn.Conv2d(16, last, 1, groups=4 if last == 64 else 1))) for _ in STRIDES
        )
        for name, last in (("cv2", 64), ("cv3", 2), ("cv4", 64), ("cv5", 2))
    }  # fmt: skip
    head = repository("yolo", "DualDDetect", nc=2, nl=2, reg_max=16, no=66, inplace=True, f=feeds)
    head.stride = torch.tensor(STRIDES).float()
    for name, part in parts.items():
        setattr(head, name, relabelled(part, repository))
    head.dfl, head.dfl2 = (relabelled(block.DFL(16), repository) for _ in range(2))
    return head, parts


def distances(made: Sequence[Tensor], parts: dict[str, nn.ModuleList], feeds: Sequence[int] = (5, 8)) -> Any:
    """Boxes and scores of the main branch of a `dual` head over the outputs `made`, in plain torch."""
    boxes, scores = [], []
    for box_part, class_part, feed, stride in zip(parts["cv4"], parts["cv5"], feeds, STRIDES, strict=True):
        edges = box_part(made[feed])[0].unflatten(0, (4, 16)).softmax(1)
        height, width = edges.shape[2:]
        near = (edges * torch.arange(16.0).view(1, 16, 1, 1)).sum(1).permute(1, 2, 0)
        centre = torch.stack(torch.meshgrid(torch.arange(width), torch.arange(height), indexing="xy"), -1) + 0.5
        boxes.append((torch.cat([centre - near[..., :2], centre + near[..., 2:]], -1) * stride).flatten(0, 1))
        scores.append(class_part(made[feed])[0].sigmoid().permute(1, 2, 0).flatten(0, 1))
    return torch.cat(boxes), torch.cat(scores)


@torch.no_grad()
def test_yolov9_e_has_columns_that_are_added_up(tmp_path: Path, repository: Make) -> None:
    """CBLinear splits maps, CBFuse adds the parts to a second column, which begins at the picture; SPPELAN of SP."""
    torch.manual_seed(0)
    silence = repository("common", "Silence")
    first = [lively(conv.Conv(*a)) for a in ((3, 8, 3, 2), (8, 16, 3, 2), (16, 16, 3, 2), (16, 16, 3, 2))]
    splits = [nn.Conv2d(16, width, 1) for width in (8, 24)]
    second = [lively(conv.Conv(*a)) for a in ((3, 8, 3, 2), (8, 16, 3, 2), (16, 16, 3, 2), (16, 16, 3, 2))]
    pyramid = [lively(conv.Conv(*a)) for a in ((16, 8), (32, 16))]
    linear = [
        repository("common", "CBLinear", c2s=c2s, conv=split) for c2s, split in zip(([8], [8, 16]), splits, strict=True)
    ]
    fuse = [repository("common", "CBFuse", idx=idx) for idx in ([0, 0], [1])]
    pool = repository("common", "SPPELAN", c=8, cv1=relabelled(pyramid[0], repository))
    for name in ("cv2", "cv3", "cv4"):
        setattr(pool, name, repository("common", "SP", m=nn.MaxPool2d(5, 1, 2)))
    pool.cv5 = relabelled(pyramid[1], repository)
    layers = [silence, *first, *linear, second[0], fuse[0], *second[1:3], fuse[1], second[3], pool]
    wired(layers, [-1, 0, 1, 2, 3, 2, 4, 0, [5, 6, 7], -1, -1, [6, 10], -1, -1])
    head, parts = dual(repository, [3, 4, 11, 13])
    x = picture()
    column = x
    made = [column := layer(column) for layer in first]
    near, (far, farther) = splits[0](made[1]), splits[1](made[3]).split([8, 16], 1)
    y = second[0](x)
    y = y + sum(nn.functional.interpolate(part, y.shape[2:], mode="nearest") for part in (near, far))
    y = second[2](second[1](y))
    fine = y + nn.functional.interpolate(farther, y.shape[2:], mode="nearest")
    pooled = [pyramid[0](second[3](fine))]
    for _ in range(3):
        pooled.append(nn.functional.max_pool2d(pooled[-1], 5, 1, 2))
    boxes, scores = distances([fine, pyramid[1](torch.cat(pooled, 1))], parts, (0, 1))
    file = save(tmp_path / "v9e.pt", repository, layers, head, "DetectionModel")
    with torch.enable_grad():
        assert same(file, boxes, scores, x).family == "yolov9"


@torch.no_grad()
def test_yolov7_with_an_auxiliary_head(tmp_path: Path, repository: Make) -> None:
    """IAuxDetect reports with `m`, behind what `ia` adds and `im` multiplies; `m2` is for training. DownC, Shortcut."""
    torch.manual_seed(0)
    convs = [lively(conv.Conv(*a)) for a in ((12, 8, 3, 1), (8, 16, 3, 2), (16, 16, 3, 1))]
    downs = [[lively(conv.Conv(*a)) for a in ((16, 16, 1), (16, 8, 3, 2), (16, 8, 1))] for _ in range(2)]
    made = []
    for down in downs:
        made.append(repository("common", "DownC", mp=nn.MaxPool2d(2, 2)))
        for i, part in enumerate(down, 1):
            setattr(made[-1], f"cv{i}", relabelled(part, repository))
    layers = [repository("common", "ReOrg"), convs[0], convs[1], made[0], convs[2],
              repository("common", "Shortcut", d=0), made[1]]  # fmt: skip
    wired(layers, [-1, -1, -1, -1, -1, [-1, -2], -1])
    head = anchored(repository, [5, 6, 4, 3], [16, 16], "IAuxDetect")
    head.m2 = nn.ModuleList(nn.Conv2d(16, 14, 1) for _ in STRIDES)
    head.register_buffer("anchor_grid", (ANCHORS * torch.tensor(STRIDES).view(2, 1, 1)).view(2, 1, 2, 1, 1, 2))
    head.ia, head.im = (
        nn.ModuleList(
            repository("common", name, implicit=nn.Parameter(start + 0.3 * torch.randn(1, width, 1, 1)))
            for _ in STRIDES
        )
        for name, width, start in (("ImplicitA", 16, 0), ("ImplicitM", 14, 1))
    )
    x = picture()

    def down(parts: list[Any], y: Tensor) -> Tensor:
        return torch.cat([parts[1](parts[0](y)), parts[2](nn.functional.max_pool2d(y, 2))], 1)

    y = convs[1](convs[0](torch.cat([x[..., a::2, b::2] for a, b in ((0, 0), (1, 0), (0, 1), (1, 1))], 1)))
    y = down(downs[0], y)
    near = convs[2](y) + y
    raws = [
        im.implicit * m(ia.implicit + f)
        for m, ia, im, f in zip(head.m, head.ia, head.im, (near, down(downs[1], near)), strict=True)
    ]
    boxes, scores = decoded(raws)
    file = save(tmp_path / "v7-w6.pt", repository, layers, head)
    with torch.enable_grad():
        assert same(file, boxes, scores, x).kind == "legacy"


@pytest.mark.parametrize("name", ["IKeypoint", "IBin", "DualDSegment"])
def test_heads_that_report_something_else_are_refused_by_name(tmp_path: Path, repository: Make, name: str) -> None:
    head = repository("yolo", name, nc=2, nl=2, f=[3, 4], cv2=nn.ModuleList([nn.Conv2d(16, 64, 1)]))
    file = save(tmp_path / "other.pt", repository, v3_layers(), head)
    with pytest.raises(ModelError, match=rf"it ends in a {name} head of its own repository") as caught:
        checkpoints.load(file)
    assert "ONNX" in caught.value.hint


def small(yaml: str, width: float = 0.125) -> Any:
    torch.manual_seed(0)
    thin = {"scales": {"n": [0.33, width, 256]}, "scale": "n"}
    return checkpoints.build(tasks.yaml_model_load(yaml) | thin, dict(enumerate(NAMES)))


@torch.no_grad()
def test_yolov10_of_its_own_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "YOLOv10DetectionModel"
    own = type(name, (tasks.DetectionModel,), {"__module__": "ultralytics.nn.tasks"})
    module = small("yolov10n.yaml")
    x = picture()
    expected = module.eval()(x)[0]
    module.__class__ = own
    monkeypatch.setattr(tasks, name, own, raising=False)
    torch.save({"model": module}, tmp_path / "v10.pt")
    monkeypatch.undo()
    loaded = checkpoints.load(str(tmp_path / "v10.pt"))
    assert (loaded.family, type(loaded.module).__name__) == ("yolov10", "DetectionModel")
    assert torch.equal(loaded.module(x)[0], expected)


def test_the_first_yolov12_is_refused_by_its_layer(tmp_path: Path) -> None:
    """Its area attention has two convolutions where the one of today has one."""
    module = small("yolo12n.yaml", 0.25)
    attention = next(part for part in module.modules() if isinstance(part, block.AAttn))
    attention.qk, attention.v = conv.Conv(16, 32, 1), conv.Conv(16, 16, 1)
    del attention.qkv
    torch.save({"model": module}, tmp_path / "v12.pt")
    with pytest.raises(ModelError, match=r"attn\.(qk|v) has no place in the AAttn") as caught:
        checkpoints.load(str(tmp_path / "v12.pt"))
    assert "ONNX" in caught.value.hint
