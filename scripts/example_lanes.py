"""`executor/lanes.py` without a language model: images are prepared on the CPU, computed on the GPU, results come back.

    python scripts/example_lanes.py                 # on CUDA if there is a device, else on the CPU
    python scripts/example_lanes.py --batches 400 --batch 64 --width 128

The launch thread resizes and normalizes a batch of images into a pinned buffer (numpy), launches it, and goes on with
the next one while the device still works. At depth 1 it waits for each result first. The device averages the scores of
several views of each image; by default so many that it takes about as long as the preparation, where overlap shows
most. The same work runs at each depth, the results are compared, and the gain is printed. On the CPU a step runs inside
its launch, so nothing can overlap and no gain is to be expected: that run shows only that the same code works there.
"""

from __future__ import annotations

import argparse
import os
import queue
import time
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from executor.lanes import Lanes, StepTimes, open_streams

SIDE = 96  # of a prepared image
CLASSES = 1000
MEAN = np.array([0.485, 0.456, 0.406], np.float32)
STD = np.array([0.229, 0.224, 0.225], np.float32)


@dataclass
class Outcome:
    """What one depth gave. `scores` are the batches' results in order of launch."""

    depth: int
    wall_s: float = 0.0
    prepare_s: float = 0.0
    device_s: float = 0.0
    idle_s: float = 0.0  # of the compute stream, between steps
    hidden: int = 0
    scores: list[npt.NDArray[np.float32]] = field(default_factory=list)


def prepare(images: npt.NDArray[np.uint8], out: npt.NDArray[np.float32]) -> None:
    """Resize uint8 [n, height, width, 3] to SIDE x SIDE by averaging 2 x 2 neighbours, normalize, channels first."""
    height, width = images.shape[1:3]
    rows, columns = (np.linspace(0, size - 2, SIDE).astype(np.intp) for size in (height, width))
    wide = images[:, :, columns].astype(np.float32) + images[:, :, columns + 1]
    small = (wide[:, rows] + wide[:, rows + 1]) * (0.25 / 255.0)  # [n, SIDE, SIDE, 3]
    out[:] = ((small - MEAN) / STD).transpose(0, 3, 1, 2)


def make_model(width: int, device: torch.device) -> nn.Module:
    """A small convolutional classifier with random weights."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, stride=2, padding=1), nn.ReLU()]
    for _ in range(6):
        layers += [nn.Conv2d(width, width, 3, padding=1), nn.ReLU()]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES)]
    model = nn.Sequential(*layers).to(device).eval()
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # the weights were copied on another stream than the lanes compute on
    return model


def score(model: nn.Module, pixels: torch.Tensor, views: int) -> torch.Tensor:
    """[n, CLASSES] of images [n, 3, SIDE, SIDE]: the mean over `views` shifted views."""
    total = model(pixels)
    for shift in range(1, views):
        total = total + model(torch.roll(pixels, shift, dims=3))
    return total / views


def pinned(nbytes: int, device: torch.device) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda")


def run(
    depth: int,
    sources: list[npt.NDArray[np.uint8]],
    batches: int,
    model: nn.Module,
    device: torch.device,
    views: int,
) -> Outcome:
    """Send `batches` batches, taken in turn from `sources`, through lanes of the given depth."""
    batch = len(sources[0])
    in_bytes, out_bytes = 4 * batch * 3 * SIDE * SIDE, 4 * batch * CLASSES
    # A host buffer is the lane's: it is filled again only when the step that used it has come back.
    host = [(pinned(in_bytes, device), pinned(out_bytes, device)) for _ in range(depth)]
    outcome = Outcome(depth)
    free: queue.SimpleQueue[int | BaseException] = queue.SimpleQueue()
    for buffer in range(depth):
        free.put(buffer)

    def step(device_in: torch.Tensor, device_out: torch.Tensor) -> None:
        pixels = device_in.view(torch.float32).view(batch, 3, SIDE, SIDE)
        device_out.view(torch.float32).view(batch, CLASSES).copy_(score(model, pixels, views))

    def on_done(buffer: int, times: StepTimes) -> None:
        """On the retire thread: the scores are in the host buffer."""
        outcome.scores.append(host[buffer][1].numpy().view(np.float32).copy())
        outcome.device_s += times.device_ns * 1e-9
        outcome.idle_s += times.gap_ns * 1e-9
        outcome.hidden += times.hidden
        free.put(buffer)

    lanes = Lanes(
        open_streams(device),
        device,
        depth=depth,
        in_bytes=in_bytes,
        out_bytes=out_bytes,
        on_done=on_done,
        on_error=free.put,
    )
    start = time.perf_counter()
    with torch.inference_mode():
        for i in range(batches):
            buffer = free.get()
            if isinstance(buffer, BaseException):
                raise buffer
            since_ns = time.monotonic_ns()
            host_in, host_out = host[buffer]
            pixels = host_in.numpy().view(np.float32).reshape(batch, 3, SIDE, SIDE)
            prepare(sources[i % len(sources)], pixels)
            outcome.prepare_s += (time.monotonic_ns() - since_ns) * 1e-9
            lanes.launch(host_in, host_out, step, buffer, in_bytes=in_bytes, out_bytes=out_bytes, since_ns=since_ns)
    lanes.close()
    outcome.wall_s = time.perf_counter() - start
    return outcome


def choose_views(sources: list[npt.NDArray[np.uint8]], model: nn.Module, device: torch.device) -> int:
    """So many that a batch takes the device about as long as its preparation takes the CPU."""
    run(1, sources, 3, model, device, 1)
    trial = run(1, sources, 10, model, device, 1)
    return max(1, round(trial.prepare_s / max(trial.device_s, 1e-9)))


def report(outcomes: list[Outcome], batches: int, batch: int) -> None:
    first = outcomes[0]
    print(
        f"{'depth':>5} {'images/s':>9} {'wall s':>7} {'prepare ms':>10} {'device ms':>9} {'idle ms':>8} "
        f"{'hidden %':>8} {'gain':>6}"
    )
    for o in outcomes:
        per_batch = 1e3 / batches
        print(
            f"{o.depth:5d} {batches * batch / o.wall_s:9.0f} {o.wall_s:7.2f} {o.prepare_s * per_batch:10.3f} "
            f"{o.device_s * per_batch:9.3f} {o.idle_s * per_batch:8.3f} {o.hidden / batches * 100:8.1f} "
            f"{first.wall_s / o.wall_s:5.2f}x"
        )
    best = max(first.prepare_s + first.device_s, 1e-9) / max(first.prepare_s, first.device_s, 1e-9)
    print(f"the most that overlap alone can give here: {best:.2f}x (preparing + computing over the longer of the two)")


def main(argv: list[str] | None = None) -> list[Outcome]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=200)
    parser.add_argument("--batch", type=int, default=32, help="images in a batch")
    parser.add_argument("--width", type=int, default=128, help="channels of the model")
    parser.add_argument("--views", type=int, default=0, help="of each image; 0: balances CPU and GPU (1 on the CPU)")
    parser.add_argument("--depth", default="1,2,3")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    if device.type == "cpu":
        print(f"running on the CPU ({os.cpu_count()} cores): steps run inside their launch, so nothing overlaps")
    else:
        print(f"running on {torch.cuda.get_device_name(device)}")
    rng = np.random.default_rng(0)
    sources = [rng.integers(0, 256, (args.batch, 224, 224, 3), dtype=np.uint8) for _ in range(4)]
    model = make_model(args.width, device)
    views = args.views or (choose_views(sources, model, device) if device.type == "cuda" else 1)
    print(f"{args.batches} batches of {args.batch} images, {views} views each; milliseconds are of a batch")
    run(1, sources, 3, model, device, views)  # what is loaded and chosen on first use is not in the times
    outcomes = [run(depth, sources, args.batches, model, device, views) for depth in map(int, args.depth.split(","))]
    report(outcomes, args.batches, args.batch)
    for outcome in outcomes[1:]:
        same = all(
            np.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in zip(outcomes[0].scores, outcome.scores, strict=True)
        )
        print(f"results of depth {outcome.depth} are those of depth {outcomes[0].depth}: {'yes' if same else 'NO'}")
        if not same:
            raise SystemExit(1)
    return outcomes


if __name__ == "__main__":
    main()
