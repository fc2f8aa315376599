"""What the benchmarks share: contestants in turn, ratios with their spread, peak memory, made-up data.

A ratio is taken round by round, both contestants on the same input, in one process and on one thread; shown
are the median and, in brackets, the smallest and largest of the rounds. On the CPU what counts is the time of
the processor, which other processes on a shared machine do not change much; on CUDA, and where a disk is
waited for, that of the clock on the wall.
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
CALLS = 20 if DEVICE.type == "cuda" else 1  # in a row: one of a few milliseconds says little of a card


def strong(kind, **words):
    """Settings of the strong recipe."""
    return kind(**{**kind.STRONG, "recipe": "strong", **words})


@dataclasses.dataclass
class Row:
    """One line of a table: what was measured, the values of the rounds, and the target, if there is one."""

    what: str
    values: list  # one a round
    unit: str = ""  # "" for a ratio
    at_most: float | None = None
    at_least: float | None = None

    @property
    def median(self):
        """The figure that counts."""
        return float(np.median(self.values))

    @property
    def met(self):
        """Whether the target is met; None without one."""
        if self.at_most is not None:
            return self.median <= self.at_most
        return self.median >= self.at_least if self.at_least is not None else None

    def cells(self):
        """What the page shows: what, median (min to max), target, met."""
        unit = f" {self.unit}" if self.unit else ""
        shown = f"{number(self.median)}{unit}"
        if len(self.values) > 1:
            shown += f" ({number(min(self.values))} to {number(max(self.values))})"
        target = "at most" if self.at_most is not None else "at least"
        limit = self.at_most if self.at_most is not None else self.at_least
        target = "" if limit is None else f"{target} {number(limit)}{unit}"
        return self.what, shown, target, {None: "", True: "yes", False: "**no**"}[self.met]


def number(value):
    """Three significant digits, without exponents where it can be read."""
    return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def seconds(function, wall=False, calls=1):
    """The time of a call, of so many in a row; waits for the device before and after. wall: time on the wall,
    not of the CPU.
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
    """Seconds of a call of each of {name: function}: `calls` in a row of one, then of the next, for `rounds`
    rounds after one that does not count.
    """
    times = {name: [] for name in contestants}
    for turn in range(1 + rounds):
        for name, function in contestants.items():
            taken = seconds(function, wall, calls)
            if turn:
                times[name].append(taken)
    return {name: np.array(taken) for name, taken in times.items()}


def milliseconds(what, taken, scale=1.0, **target):
    """A row of times."""
    return Row(what, list(1000 * taken * scale), "ms", **target)


def ratio(what, one, other, **target):
    """A row of the ratio of two times, round by round."""
    return Row(what, list(one / other), **target)


def memory_of(expression, on_card=DEVICE.type == "cuda"):
    """MB that each of some functions adds at its peak, in one process of its own: a list.

    expression: a call, such as "registration.work('ours')", that gives them, those that need less first.
    on_card: whether memory of the card counts, or the process's.
    """
    code = f"from benchmarks import common; common.measure({expression!r}, {on_card})"
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(expression, on_card):
    """What the process of `memory_of` runs."""
    torch.set_num_threads(1)
    module = expression.split(".")[0]
    functions = eval(expression, {module: import_module(f"benchmarks.{module}")})
    peaks = []
    before = torch.cuda.memory_allocated() / 1e6 if on_card else _resident("VmRSS")
    for function in functions:
        if on_card:
            torch.cuda.reset_peak_memory_stats()
            function()
            peaks.append(torch.cuda.max_memory_allocated() / 1e6 - before)
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
            function()
            peaks.append(_resident("VmHWM") - before)
    print(json.dumps(peaks))


def _resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024 / 1e6


# ----------------------------------------------------------------------------------------- data made up


def labels_like_a_heart(count, size):
    """Labels (count, size, size) uint8: a ring and a crescent, 11 % of the pixels, each somewhere else."""
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
    """A `Cache` of noise with labels at ED and ES, laid out as `cardiac.cache` does; empty: a sparse file."""
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
    """Cines of noise and an expert's labels in the layout of M&Ms, 16 bits, gzipped to about half."""
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
