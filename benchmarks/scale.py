"""Time against the number of cases, of frames, and the size of the slices."""

import tempfile
from pathlib import Path

import numpy as np

from benchmarks.common import CALLS, DEVICE, cache_of, in_turn, number, seconds, write_dataset
from benchmarks.data import opened, settings_for
from benchmarks.registration import Ours, inference, step
from cardiac.slices import Pairs, SliceStore

SMALL = {"cases": 4, "frames": 10, "size": 96}
LARGER = ({}, {"cases": 8}, {"cases": 16}, {"frames": 20}, {"frames": 40}, {"size": 144}, {"size": 192})


def line(folder, cases, frames, size, rounds):
    """Cells of one row: times of building, opening, loading, drawing, a step and a registration."""
    data = write_dataset(folder / f"{cases}-{frames}-{size}", cases, (160, 160, 8, frames), (1.5, 1.5, 9.0))
    settings = settings_for(data, folder / f"cache-{size}", size, 240 / size)
    build = seconds(lambda: opened(settings))
    opening = np.median(in_turn({"open": lambda: opened(settings)}, rounds)["open"])
    cache = cache_of(folder / "slices.h5", cases, frames, 8, size)
    load = np.median(in_turn({"load": lambda: SliceStore(cache, cache.cases, DEVICE)}, rounds)["load"])
    pairs = Pairs(SliceStore(cache, cache.cases, DEVICE), 0.5)
    times = {"draw": lambda: pairs.draw(16, 0, 0), "step": step(Ours(size), size)}
    times = in_turn({**times, "register": inference(Ours(size), size)}, rounds, calls=CALLS)
    milliseconds = [1000 * np.median(times[name]) for name in ("draw", "step", "register")]
    samples = 16 / np.median(times["step"] + times["draw"])
    slices = f"{8 * cases * frames:,}"
    figures = (build, 1000 * opening, 1000 * load, *milliseconds, samples)
    return [f"{cases}", f"{frames}", f"{size}", slices, *map(number, figures)]


def sections(rounds):
    """(title, text, header and rows) of the table."""
    header = ["cases", "frames", "size", "slices", "build, s", "open, ms", "load, ms", "draw, ms", "step, ms",
              "register, ms", "samples/s"]
    with tempfile.TemporaryDirectory() as folder:
        lines = [line(Path(folder), **{**SMALL, **changed}, rounds=rounds) for changed in LARGER]
    text = (
        "Cines of 160 x 160 pixels and 8 slices. Build: the cache from NIfTI, in one process, once and cold. "
        "Draw, step and register: 16 pairs; samples/s: pairs drawn and trained on. Building and loading "
        "grow with the number of slices, steps only with their size."
    )
    yield "Time against cases, frames and size", text, [header, *lines]
