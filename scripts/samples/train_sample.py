"""Train a small YOLO detector from scratch on synthetic X-rays, on a CPU.

    python scripts/samples/train_sample.py --out runs/bags --train-seed 11 --count 8000 --epochs 20

A compact loop of our own: bfloat16 autocast (which the Ultralytics trainer lacks on CPUs), images
letterboxed once and kept in memory, mosaics and smaller pictures early on, EMA weights saved after
every epoch. Weights start at random unless ``--init`` names a model. One single-threaded worker
per core, gradients averaged between them: unlike OpenMP threads they do not stall each other on a
busy machine.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import time
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("YOLO_AUTOINSTALL", "0")
os.environ.setdefault("YOLO_OFFLINE", "1")

import numpy as np
import torch
import torch.distributed as dist
import xraysim
from safetensors.torch import load_file
from training_data import Set, augment, make_batch, make_set
from ultralytics.cfg import get_cfg
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils.metrics import ap_per_class, box_iou
from ultralytics.utils.nms import non_max_suppression
from ultralytics.utils.torch_utils import ModelEMA
from xraysim.catalogue import CATALOGUES

IOUS = np.linspace(0.5, 0.95, 10)
log = logging.getLogger("train")


def _to_float(output: object) -> object:
    """Every tensor of a nested model output as float32: the loss needs the full mantissa."""
    if torch.is_tensor(output):
        return output.float()
    if isinstance(output, dict):
        return {key: _to_float(value) for key, value in output.items()}
    if isinstance(output, (list, tuple)):
        return type(output)(_to_float(value) for value in output)
    return output


def _matches(boxes: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Which detections (n, 6) hit which level of IOUS: bool (n, 10), each truth taken once."""
    hits = np.zeros((len(boxes), len(IOUS)), bool)
    if not len(boxes) or not len(truth):
        return hits
    iou = box_iou(torch.from_numpy(truth[:, 1:]), torch.from_numpy(boxes[:, :4])).numpy()
    iou = iou * (truth[:, :1] == boxes[:, 5])
    for level, threshold in enumerate(IOUS):
        free = np.ones(len(truth), bool)
        for j in range(len(boxes)):
            best = int(np.argmax(iou[:, j] * free))
            if free[best] and iou[best, j] >= threshold:
                hits[j, level], free[best] = True, False
    return hits


def evaluate(model: torch.nn.Module, data: Set, names: list[str], bf16: bool = True) -> dict:
    """mAP50, mAP50-95 and AP50 per class of a model in eval mode (NMS at IoU 0.7)."""
    hits, scores, classes = [], [], []
    with torch.inference_mode():
        for start in range(0, len(data.images), 16):
            part = torch.from_numpy(data.images[start : start + 16]).permute(0, 3, 1, 2)
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                output = model((part.float() / 255).contiguous(memory_format=torch.channels_last))
            output = (output[0] if isinstance(output, (list, tuple)) else output).float()
            boxes = non_max_suppression(output, 0.001, 0.7, multi_label=True, nc=len(names), max_time_img=1.0)
            for rows, truth in zip(boxes, data.boxes[start : start + 16], strict=True):
                rows = rows.numpy()[:, :6]
                hits.append(_matches(rows, truth))
                scores.append(rows[:, 4])
                classes.append(rows[:, 5])
    targets = np.concatenate(data.boxes)[:, 0]
    result = ap_per_class(np.concatenate(hits), np.concatenate(scores), np.concatenate(classes), targets)
    ap, present = result[5], result[6]
    per_class = {names[c]: round(float(row[0]), 4) for c, row in zip(present, ap, strict=True)}
    return {"mAP50": round(float(ap[:, 0].mean()), 4), "mAP50-95": round(float(ap.mean()), 4), "AP50": per_class}


def _optimizer(model: torch.nn.Module, rate: float) -> torch.optim.AdamW:
    """AdamW with weight decay on convolution weights only, not on norms and biases."""
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    plain = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.999))


def _average_gradients(model: torch.nn.Module) -> None:
    """Give every worker the mean of all workers' gradients."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for grad, mean in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
        grad.copy_(mean.view_as(grad))


def _agree(value: float) -> float:
    """The first worker's value, so that clocks that differ cannot part the workers."""
    box = torch.tensor([value], dtype=torch.float64)
    dist.broadcast(box, 0)
    return float(box)


def start_from(model: torch.nn.Module, path: Path) -> tuple[int, int]:
    """Copy the weights of a safetensors model whose names and shapes match; (copied, held by the file).

    What does not match, as the outputs of other classes, keeps its random start.
    """
    stored, own = load_file(path), model.state_dict()
    fitting = {k: v for k, v in stored.items() if k in own and own[k].shape == v.shape}
    if not fitting:
        raise ValueError(f"{path}: no tensor fits this architecture")
    model.load_state_dict(fitting, strict=False)
    return len(fitting), len(stored)


def train(rank: int, args: argparse.Namespace, data: Set, check: Set) -> None:
    """One worker's part of the run; worker 0 also keeps the EMA model and saves every epoch."""
    dist.init_process_group(
        "gloo", init_method=f"file://{args.out.resolve()}/rendezvous", rank=rank, world_size=args.workers
    )
    torch.set_num_threads(1)
    torch.manual_seed(args.model_seed)
    names = list(CATALOGUES[args.catalogue])
    model = DetectionModel(args.arch, nc=len(names), verbose=False)
    model.args = get_cfg()
    model.names = dict(enumerate(names))
    if args.init:
        copied, of = start_from(model, args.init)
        log.info("%s: %d of %d tensors copied", args.init.name, copied, of)
    model.to(memory_format=torch.channels_last)
    ema = ModelEMA(model, decay=0.999, tau=300)
    optimizer = _optimizer(model, args.lr)
    rng = np.random.default_rng([args.model_seed, 1, rank])
    per_epoch = args.count // (args.batch * args.workers)
    steps, step, began = args.epochs * per_epoch, 0, time.time()
    for epoch in range(args.epochs):
        model.train()
        sums, tick = torch.zeros(3), time.time()
        order = np.random.default_rng([args.model_seed, 2, epoch]).permutation(args.count)
        for seen, chunk in enumerate(
            order[rank :: args.workers][: per_epoch * args.batch].reshape(per_epoch, args.batch), 1
        ):
            # The clock may run ahead of the steps on a busy machine: then cool down by the clock.
            done = _agree(max(step / steps, (time.time() - began) / 60 / args.minutes))
            if done >= 1:
                break
            size = args.early_size if done < args.early_share else args.imgsz
            mosaic = 0.5 if done < args.mosaic_share else 0.0
            warm = min(1.0, (step + 1) / args.warmup)
            for group in optimizer.param_groups:
                group["lr"] = args.lr * warm * (0.02 + 0.98 * (1 + math.cos(math.pi * done)) / 2)
            batch = make_batch([augment(rng, data, int(i), mosaic) for i in chunk], size)
            with torch.autocast("cpu", torch.bfloat16, enabled=not args.fp32):
                output = model(batch["img"])
            loss, shares = model.loss(batch, _to_float(output))
            optimizer.zero_grad(set_to_none=True)
            loss.sum().backward()
            _average_gradients(model)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
            optimizer.step()
            ema.update(model)
            step += 1
            sums += torch.stack([v.detach().float().reshape(()) for v in shares.values()])[:3]
            if rank == 0 and seen % 25 == 0:
                speed = seen * args.batch * args.workers / (time.time() - tick)
                log.info(
                    "epoch %d %d/%d px %d done %.3f loss %s %.1f img/s",
                    epoch,
                    seen,
                    per_epoch,
                    size,
                    done,
                    (sums / seen).numpy().round(3),
                    speed,
                )
        if rank == 0:
            figures = evaluate(ema.ema, check, names)
            log.info("epoch %d, %.1f min, %s", epoch, (time.time() - began) / 60, json.dumps(figures))
            save(ema.ema, args, round(step / per_epoch, 1), step, figures)
        if _agree((time.time() - began) / 60 / args.minutes) >= 1:
            break
    dist.destroy_process_group()


def save(model: DetectionModel, args: argparse.Namespace, epochs: float, step: int, figures: dict) -> None:
    """Write the EMA weights (plain tensors) and how they came about as ``last.pt``."""
    summary = {
        "script": "scripts/samples/train_sample.py",
        "data": f"xraysim {xraysim.VERSION}",
        "architecture": args.arch,
        "imgsz": args.imgsz,
        "train_seed": args.train_seed,
        "images": args.count,
        "epochs": epochs,
        "batch": args.batch * args.workers,
        "steps": step,
        "val_seed": args.val_seed,
        "val": figures,
        "catalogue": args.catalogue,
        "init": args.init.name if args.init else None,
    }
    target = args.out / "last.pt"
    torch.save(
        {
            "state": model.state_dict(),
            "yaml": model.yaml,
            "names": model.names,
            "stride": model.stride.tolist(),
            "summary": summary,
        },
        target.with_suffix(".tmp"),
    )
    target.with_suffix(".tmp").replace(target)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line of a run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="yolov8n.yaml", help="an Ultralytics model description")
    parser.add_argument("--init", type=Path, help="a .safetensors to start from instead of at random")
    parser.add_argument("--imgsz", type=int, default=320)
    parser.add_argument("--catalogue", choices=sorted(CATALOGUES), default="standard")
    parser.add_argument("--train-seed", type=int, default=11)
    parser.add_argument("--count", type=int, default=8000, help="training images")
    parser.add_argument("--val-seed", type=int, default=12)
    parser.add_argument("--val-count", type=int, default=300)
    parser.add_argument("--model-seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=math.inf, help="cool down to end by then")
    parser.add_argument("--batch", type=int, default=12, help="images a worker takes per step")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--warmup", type=int, default=300, help="steps")
    parser.add_argument("--early-size", type=int, default=224, help="px of the early pictures")
    parser.add_argument("--early-share", type=float, default=0.35, help="share of the run")
    parser.add_argument("--mosaic-share", type=float, default=0.55, help="share of the run")
    parser.add_argument("--fp32", action="store_true", help="no bfloat16")
    parser.add_argument("--out", type=Path, required=True, help="folder for last.pt and log.txt")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Train as the command line says and log to ``log.txt`` in the output folder."""
    args = parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(message)s",
        force=True,
        handlers=[logging.FileHandler(args.out / "log.txt")],
    )
    log.info("%s", vars(args))
    began = time.time()
    data = make_set(args.train_seed, args.count, args.imgsz, args.catalogue)
    check = make_set(args.val_seed, args.val_count, args.imgsz, args.catalogue)
    log.info("made %d + %d images in %.0f s", args.count, args.val_count, time.time() - began)
    (args.out / "rendezvous").unlink(missing_ok=True)
    fork = get_context("fork")  # the workers share the images' memory
    workers = [fork.Process(target=train, args=(rank, args, data, check)) for rank in range(args.workers)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


if __name__ == "__main__":
    main()
