"""Shared by the benchmarks: contestants in turn, ratios with their spread, peak memory, synthetic data.

A ratio is measured round by round, both contestants on the same input, in one process and on one thread;
shown are the median and, in brackets, the smallest and largest of the rounds. On the CPU, CPU time is
measured, which other processes on a shared machine hardly change; on CUDA, and if a disk is waited for, wall
time.
"""

import csv
import dataclasses
import json
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
import torch

from cardiac.cache import Cache, CachedCase, SliceFile

ROOT = Path(__file__).parent.parent
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CPU = torch.device("cpu")
CALLS = 20 if DEVICE.type == "cuda" else 1  # in a row: a few milliseconds are too short to time


def strong(kind, **changes):
    """Settings of the strong recipe."""
    return kind(**{**kind.STRONG, "recipe": "strong", **changes})


@dataclasses.dataclass
class Row:
    """One line of a table: what was measured, the values of the rounds, and the target, if there is one."""

    what: str
    values: list  # one per round
    unit: str = ""  # "" for a ratio
    at_most: float | None = None
    at_least: float | None = None

    @property
    def median(self):
        """The median of the rounds, to which the target applies."""
        return float(np.median(self.values))

    @property
    def met(self):
        """Whether the target is met; None without one."""
        if self.at_most is not None:
            return self.median <= self.at_most
        return self.median >= self.at_least if self.at_least is not None else None

    def cells(self):
        """Cells of the page's table: what, median (min to max), target, met."""
        unit = f" {self.unit}" if self.unit else ""
        shown = f"{number(self.median)}{unit}"
        if len(self.values) > 1:
            shown += f" ({number(min(self.values))} to {number(max(self.values))})"
        target = "at most" if self.at_most is not None else "at least"
        limit = self.at_most if self.at_most is not None else self.at_least
        target = "" if limit is None else f"{target} {number(limit)}{unit}"
        return self.what, shown, target, {None: "", True: "yes", False: "**no**"}[self.met]


def number(value):
    """Format to about three significant digits; an exponent only below 0.001."""
    return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def seconds(function, wall=False, calls=1):
    """Mean seconds per call over `calls` in a row, the device synchronised before and after. wall: wall time
    instead of CPU time (always on CUDA).
    """
    clock = time.perf_counter if wall or torch.cuda.is_available() else time.process_time
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = clock()
    for _ in range(calls):
        function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (clock() - start) / calls


def in_turn(contestants, rounds, wall=False, calls=1):
    """Seconds per call, {name: (rounds,)}, of {name: function}: in each round every function in turn makes
    `calls` in a row; a first round is not counted.
    """
    times = {name: [] for name in contestants}
    for turn in range(1 + rounds):
        for name, function in contestants.items():
            taken = seconds(function, wall, calls)
            if turn:
                times[name].append(taken)
    return {name: np.array(taken) for name, taken in times.items()}


def milliseconds(what, taken, scale=1.0, **target):
    """A `Row` in ms of times in seconds."""
    return Row(what, list(1000 * taken * scale), "ms", **target)


def ratio(what, one, other, **target):
    """A `Row` of the ratios of two times, round by round."""
    return Row(what, list(one / other), **target)


def memory_of(expression, on_gpu=DEVICE.type == "cuda"):
    """Peak MB that each of several functions adds, all in one separate process: a list.

    expression: a call that returns them, such as "registration.work('ours')", those that need less first.
    on_gpu: measure GPU memory, not the process's.
    """
    code = f"from benchmarks import common; common.measure({expression!r}, {on_gpu})"
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(expression, on_gpu):
    """Print the peaks as JSON: what the process of `memory_of` runs."""
    torch.set_num_threads(1)
    module = expression.split(".")[0]
    functions = eval(expression, {module: import_module(f"benchmarks.{module}")})
    peaks = []
    before = torch.cuda.memory_allocated() / 1e6 if on_gpu else _resident("VmRSS")
    for function in functions:
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
            function()
            peaks.append(torch.cuda.max_memory_allocated() / 1e6 - before)
        else:
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak, VmHWM
            function()
            peaks.append(_resident("VmHWM") - before)
    print(json.dumps(peaks))


def _resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024 / 1e6


# --------------------------------------------------------------------------------------- synthetic data


def labels_like_a_heart(count, size):
    """Labels (count, size, size) uint8: a ring and a crescent, 11 % of the pixels, placed at random."""
    rng = np.random.default_rng(0)
    x, y = np.meshgrid(*[np.arange(size)] * 2, indexing="ij")
    labels = np.zeros((count, size, size), np.uint8)
    for label in labels:
        row, column = size * (0.5 + rng.uniform(-0.05, 0.05, 2))
        from_lv = np.hypot(x - row, y - column) / size
        label[np.hypot(x - row + 0.17 * size, y - column) / size < 0.15] = 3
        label[from_lv < 0.14] = 2
        label[from_lv < 0.09] = 1
    return labels


def cache_of(path, cases, frames, slices, size, empty=False):
    """A `Cache` of noise with labels at ED and ES, in the layout of `cardiac.cache`; empty: a sparse file."""
    count = frames * slices
    with h5py.File(path, "w") as file:
        images = file.create_dataset("images", (cases * count, size, size), np.float16)
        labels = file.create_dataset("labels", (cases * 2 * slices, size, size), np.uint8)
        images[-1], labels[-1] = 0, 0
        rng = np.random.default_rng(0)
        for case in range(0 if empty else cases):
            images[case * count : (case + 1) * count] = rng.random((count, size, size), np.float32)
            labels[case * 2 * slices : (case + 1) * 2 * slices] = labels_like_a_heart(2 * slices, size)
    known = {field.name: None for field in dataclasses.fields(CachedCase)}
    known |= {"split": "Training", "vendor": "A", "ed": 0, "es": frames // 3, "withheld": ()}
    known["shape"] = (size, size, slices, frames)
    places = ({"code": f"C{k}", "first": k * count, "first_label": k * 2 * slices} for k in range(cases))
    made_up = tuple(CachedCase(**{**known, **place}) for place in places)
    return Cache(SliceFile(path), Path(path).parent, "made up", size, 1.25, made_up)


def write_dataset(root, cases, shape, spacing=(1.4, 1.4, 9.0)):
    """Write noisy cines (16 bits, gzipped to about half) and expert labels in the layout of M&Ms."""
    rng = np.random.default_rng(0)
    x, y, z, frames = shape
    ring = labels_like_a_heart(z, max(x, y))[:, :x, :y].transpose(1, 2, 0)
    labels = np.zeros(shape, np.uint8)
    labels[..., [0, frames // 3]] = ring[..., None]
    noise = rng.normal(0, 8, (x, y, z, frames)).astype(np.float32)
    base = np.array([60, 200, 90, 180], np.float32)[ring][..., None] + noise
    rows = []
    for k in range(cases):
        code = f"A{k:05d}"
        folder = Path(root) / "Training" / "Labeled" / code
        folder.mkdir(parents=True)
        for name, array in (("sa", np.roll(base, 7 * k, 0)), ("sa_gt", np.roll(labels, 7 * k, 0))):
            kind = np.int16 if name == "sa" else np.uint8
            image = nib.Nifti1Image(array.astype(kind), np.diag([*spacing, 1]))
            image.header.set_zooms((*spacing, 0.04))
            nib.save(image, folder / f"{code}_{name}.nii.gz")
        rows.append((code, "Siemens", "A", 1, 0, frames // 3))
    with open(Path(root) / "211230_opendataset.csv", "w", newline="") as file:
        columns = ("External code", "VendorName", "Vendor", "Centre", "ED", "ES")
        csv.writer(file).writerows([columns, *rows])
    return Path(root)
