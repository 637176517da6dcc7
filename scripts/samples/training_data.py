"""Synthetic X-rays as letterboxed arrays in memory, augmentation and batches for training."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from multiprocessing import Pool

import cv2
import numpy as np
import torch
from make_xrays import generate
from ultralytics.data.augment import LetterBox
from xraysim.catalogue import CATALOGUES

PAD = 114
"""Grey of the letterbox bars, as in Ultralytics."""


@dataclass(frozen=True)
class Set:
    """Letterboxed images uint8 (N, S, S, 3) RGB; boxes for each: float32 (n, 5) class, x0, y0,
    x1, y1 in pixels of the letterboxed picture."""

    images: np.ndarray
    boxes: list[np.ndarray]


def _prepare(index: int, seed: int, catalogue: str, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Image ``index`` of a seed, through JPEG as on disk, letterboxed to (size, size, 3) RGB."""
    cv2.setNumThreads(1)
    kinds = CATALOGUES[catalogue]
    bag = generate(seed, index, kinds)
    coded = cv2.imencode(".jpg", bag.image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])[1]
    image = cv2.imdecode(coded, cv2.IMREAD_COLOR)[..., ::-1]
    h, w = image.shape[:2]
    gain = min(size / h, size / w)
    left = round((size - round(w * gain)) / 2 - 0.1)
    top = round((size - round(h * gain)) / 2 - 0.1)
    boxes = np.zeros((len(bag.items), 5), np.float32)
    for row, item in zip(boxes, bag.items, strict=True):
        row[0] = list(kinds).index(item.name)
        row[1:] = np.array(item.box) * gain + (left, top, left, top)
    boxed = LetterBox(new_shape=(size, size), auto=False, padding_value=PAD)(image=np.ascontiguousarray(image))
    return boxed, boxes


def make_set(seed: int, count: int, size: int, catalogue: str = "standard") -> Set:
    """Images 0..count-1 of a seed as a training or validation set in memory."""
    images = np.empty((count, size, size, 3), np.uint8)
    boxes = []
    job = partial(_prepare, seed=seed, catalogue=catalogue, size=size)
    with Pool(os.cpu_count() or 1) as pool:
        for i, (image, rows) in enumerate(pool.imap(job, range(count), chunksize=16)):
            images[i] = image
            boxes.append(rows)
    return Set(images, boxes)


def _warp(image: np.ndarray, boxes: np.ndarray, matrix: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Apply a (2, 3) affine map of quarter turns, flips, scale and shift to picture and boxes."""
    out = cv2.warpAffine(image, matrix, (size, size), flags=cv2.INTER_LINEAR, borderValue=(PAD, PAD, PAD))
    if not len(boxes):
        return out, boxes
    corners = boxes[:, 1:].reshape(-1, 2) @ matrix[:, :2].T + matrix[:, 2]
    corners = corners.reshape(-1, 2, 2)
    full = np.concatenate([corners.min(1), corners.max(1)], 1)
    kept = np.clip(full, 0, size)
    area = (kept[:, 2:] - kept[:, :2]).prod(1) / (full[:, 2:] - full[:, :2]).prod(1)
    enough = (area > 0.4) & ((kept[:, 2:] - kept[:, :2]).min(1) > 4)
    return out, np.concatenate([boxes[:, :1], kept], 1)[enough].astype(np.float32)


def _random_matrix(rng: np.random.Generator, span: int, size: int, low: float, high: float) -> np.ndarray:
    """A random quarter turn, flip, scale and shift from a (span, span) to a (size, size) frame."""
    quarter = int(rng.integers(4))
    turn = np.eye(2)[:: 1 if quarter % 2 == 0 else -1]
    turn = np.diag(rng.choice([-1.0, 1.0], 2)) @ turn * rng.uniform(low, high)
    shift = size / 2 + rng.uniform(-0.1, 0.1, 2) * size - turn @ np.full(2, span / 2)
    return np.concatenate([turn, shift[:, None]], 1)


def _jitter(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Slight change of ground colour and contrast, as between scanners; uint8 (S, S, 3)."""
    ramp = np.linspace(0, 1, 256)[:, None] ** rng.uniform(0.85, 1.18)
    gains = rng.uniform(0.9, 1.0) * rng.uniform(0.97, 1.0, 3)
    table = np.round(ramp * gains * 255).astype(np.uint8)
    return cv2.LUT(image, table[None])


def augment(rng: np.random.Generator, data: Set, index: int, mosaic: float) -> tuple[np.ndarray, np.ndarray]:
    """One training picture uint8 (S, S, 3) and its boxes (n, 5); ``mosaic`` is a probability."""
    size = data.images.shape[1]
    image, boxes = data.images[index], data.boxes[index]
    if rng.uniform() < mosaic:
        picks = [index, *rng.integers(0, len(data.boxes), 3)]
        image = np.vstack([np.hstack([data.images[j] for j in picks[k : k + 2]]) for k in (0, 2)])
        offsets = [(0, x, y, x, y) for y in (0, size) for x in (0, size)]
        boxes = np.concatenate([data.boxes[j] + np.float32(o) for j, o in zip(picks, offsets, strict=True)])
        matrix = _random_matrix(rng, 2 * size, size, 0.45, 0.9)
    else:
        matrix = _random_matrix(rng, size, size, 0.75, 1.25)
    image, boxes = _warp(image, boxes, matrix, size)
    return _jitter(rng, image), boxes


def make_batch(picked: list[tuple[np.ndarray, np.ndarray]], size: int) -> dict[str, torch.Tensor]:
    """Batch of the Ultralytics loss: img (B, 3, size, size) in 0..1, boxes as shares xywh."""
    full = picked[0][0].shape[0]
    img = torch.from_numpy(np.stack([p[0] for p in picked])).permute(0, 3, 1, 2).float() / 255
    if size != full:
        img = torch.nn.functional.interpolate(img, (size, size), mode="bilinear", antialias=True)
    rows = torch.from_numpy(np.concatenate([p[1] for p in picked]))
    index = np.repeat(np.arange(len(picked)), [len(p[1]) for p in picked])
    corners = rows[:, 1:] / full
    middle, extent = (corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]
    return {
        "img": img.contiguous(memory_format=torch.channels_last),
        "cls": rows[:, :1],
        "bboxes": torch.cat([middle, extent], 1),
        "batch_idx": torch.from_numpy(index).float(),
    }
