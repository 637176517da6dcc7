"""How the evidence of a class is spread over many boxes: the usual, the odd, and groups that have theirs elsewhere.

A box is 65 numbers: its 8 x 8 grid and the net evidence outside the box, scaled to length 1 together, so that strong
and weak detections can be compared and a shortcut shows, whether it lies in a corner of the box or beside it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

#: Fewer boxes than this make no groups.
FEWEST = 12
#: Mean silhouette below which a class counts as one group (Kaufman & Rousseeuw 1990: no substantial structure).
STRUCTURE = 0.25
#: A finer division is taken where it is nearly as clear: a small group must not hide in a large one.
NEARLY = 0.05
MOST_GROUPS, ROUNDS, SAMPLE = 5, 50, 400

Vectors = NDArray[np.float64]


def vectors(grids: ArrayLike, outside: ArrayLike) -> Vectors:
    """(n, 65) of length 1 (0 where there is no evidence) from grids (n, 8, 8) and net evidence outside (n,), logits."""
    cells = np.asarray(grids, np.float64).reshape(len(np.asarray(outside)), -1)
    joined = np.column_stack([cells, np.asarray(outside, np.float64)])
    length = np.linalg.norm(joined, axis=1, keepdims=True)
    return np.asarray(np.divide(joined, length, out=np.zeros_like(joined), where=length > 0))


def likeness(unit: Vectors) -> NDArray[np.float64]:
    """(n,): cosine of each of `unit` (n, 65) with the mean of all, in [-1, 1]: high is typical, low is odd."""
    mean = unit.mean(0)
    length = float(np.linalg.norm(mean))
    return np.asarray(np.clip(unit @ (mean / length), -1, 1)) if length > 0 else np.zeros(len(unit))


def groups(unit: Vectors) -> tuple[list[NDArray[np.intp]], float]:
    """Members of each group, largest first and the most typical of each first, and the silhouette that chose them.

    Spherical k-means from far-apart starts, without chance. One group where no division reaches `STRUCTURE`.
    """
    best, chosen = 0.0, np.zeros(len(unit), np.intp)
    for k in range(2, MOST_GROUPS + 1) if len(unit) >= FEWEST else ():
        labels = _divide(unit, k)
        clear = silhouette(unit, labels)
        if clear > STRUCTURE and clear > best - NEARLY:
            best, chosen = max(clear, best), labels
    members = [np.flatnonzero(chosen == k) for k in np.unique(chosen)]
    members = [m[np.argsort(-likeness(unit[m]), kind="stable")] for m in members]
    members.sort(key=lambda m: (-len(m), int(m[0])))
    return members, silhouette(unit, chosen)


def silhouette(unit: Vectors, labels: NDArray[np.intp]) -> float:
    """Mean silhouette (Rousseeuw 1987) by cosine distance, of at most `SAMPLE` evenly picked boxes; 0 for one group."""
    picked = np.linspace(0, len(unit) - 1, min(len(unit), SAMPLE)).astype(np.intp)
    x, own = unit[picked], labels[picked]
    kinds, sizes = np.unique(own, return_counts=True)
    if len(kinds) < 2:
        return 0.0
    distance = 1 - x @ x.T
    sums = np.stack([distance[:, own == kind].sum(1) for kind in kinds], 1)
    at = np.searchsorted(kinds, own)
    rows = np.arange(len(x))
    inner = sums[rows, at] / np.maximum(sizes[at] - 1, 1)
    other = sums / sizes
    other[rows, at] = np.inf
    nearest = other.min(1)
    value = (nearest - inner) / np.maximum(np.maximum(nearest, inner), 1e-12)
    return float(np.where(sizes[at] > 1, value, 0).mean())


def where(grid: NDArray[np.float64]) -> str:
    """In words, which ninth of the box holds most of what speaks for the class, and how much of it."""
    positive = np.maximum(grid, 0)
    if not positive.sum() > 0:
        return "nothing speaks for it"
    thirds = np.array_split(np.arange(8), [3, 5])
    sums = np.array([[positive[np.ix_(rows, cols)].sum() for cols in thirds] for rows in thirds])
    cells = np.array([[len(rows) * len(cols) for cols in thirds] for rows in thirds])
    row, col = np.unravel_index(np.argmax(sums / cells), sums.shape)
    place = f"{('upper', 'middle', 'lower')[row]} {('left', 'centre', 'right')[col]}".replace("middle centre", "centre")
    return f"densest at the {place} ({sums[row, col] / sums.sum():.0%} on {cells[row, col] / 64:.0%} of the box)"


def outside_share(grids: NDArray[np.float64], outside: NDArray[np.float64]) -> float:
    """Share of what speaks for the class that lies outside the boxes, of all boxes together, in [0, 1]."""
    beside, inside = float(np.maximum(outside, 0).sum()), float(np.maximum(grids.sum((1, 2)), 0).sum())
    return beside / (beside + inside) if beside + inside > 0 else 0.0


def _divide(unit: Vectors, k: int) -> NDArray[np.intp]:
    """(n,): the group of each; fewer than `k` groups where some run empty."""
    centres = [unit[int(np.argmax(likeness(unit)))]]
    for _ in range(k - 1):  # the next start is what is least like all the others
        centres.append(unit[int(np.argmin((unit @ np.stack(centres).T).max(1)))])
    centre = np.stack(centres)
    labels = np.asarray(np.argmax(unit @ centre.T, 1))
    for _ in range(ROUNDS):
        sums = np.stack([unit[labels == i].sum(0) for i in range(k)])
        length = np.linalg.norm(sums, axis=1, keepdims=True)
        centre = np.divide(sums, length, out=centre.copy(), where=length > 0)
        before, labels = labels, np.asarray(np.argmax(unit @ centre.T, 1))
        if np.array_equal(before, labels):
            break
    return labels
