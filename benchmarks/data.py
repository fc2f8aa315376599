"""Building, opening and loading the slice cache, its memory, and training from the file."""

import contextlib
import gzip
import io
import os
import tempfile
from pathlib import Path

import numpy as np
import torch

import train_registration
from benchmarks.common import CALLS, CPU, DEVICE, Row, cache_of, in_turn, memory_of, ratio, write_dataset
from benchmarks.reading import read
from cardiac import nifti
from cardiac.cache import open_cache
from cardiac.networks import mixed_precision
from cardiac.settings import RegistrationSettings
from cardiac.slices import Pairs, SliceStore
from cardiac.workers import worker_pool


def settings_for(data, cache, size, spacing=1.25, workers=1):
    paths = {"data": Path(data), "cache": Path(cache)}
    return RegistrationSettings(**paths, size=size, spacing=spacing, workers=workers)


def opened(settings):
    """`open_cache` without what it prints."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return open_cache(settings)


def build(folder, rounds, cases, workers):
    """Rows of building against reading and unpacking the same files, both in `workers` processes."""
    data = write_dataset(folder / f"Build{cases}", cases, (256, 216, 10, 25))
    files = sorted(data.rglob("*.nii.gz"))
    settings = settings_for(data, folder / "cache", 192, workers=workers)

    def ours():
        (folder / "cache" / f"{data.name}.h5").unlink(missing_ok=True)
        opened(settings)

    def nibabel():
        with worker_pool(workers, len(files)) as run:
            list(run(read, ((path,) for path in files)))

    def unpack():
        for path in files:
            gzip.decompress(path.read_bytes())

    contestants = {"ours": ours, "nibabel": nibabel} | ({"unpack": unpack} if workers == 1 else {})
    # the CPU time of this process does not include its workers'
    times = in_turn(contestants, rounds, wall=workers > 1)
    where = "" if workers == 1 else f", in {workers} processes, wall time"
    rows = [
        Row(f"building the cache, per case{where}", list(times["ours"] / cases), "s"),
        Row(f"reading the files with nibabel, per case{where}", list(times["nibabel"] / cases), "s"),
        ratio(f"building / reading{where}", times["ours"], times["nibabel"], at_most=1.3),
    ]
    if workers == 1:
        rows.append(ratio("unpacking only / reading", times["unpack"], times["nibabel"]))
    return rows


def opening(folder, rounds):
    """Rows of opening a cache of 345 cases of 26 frames and 10 slices."""
    data = write_dataset(folder / "Many", 345, (24, 24, 10, 26))
    settings = settings_for(data, folder / "cache", 16, 2.0)
    slices = sum(case.slices * case.frames for case in opened(settings).cases)
    times = in_turn({"open": lambda: opened(settings)}, rounds, wall=True)["open"]
    what = f"opening a cache of {slices:,} slices, 345 cases, wall time"
    return [Row(what, list(times), "s", at_most=1.0)]


def loading(folder, rounds):
    """Rows of loading a cache to the device against reading as many bytes of the file."""
    cache = cache_of(folder / "load.h5", 6, 25, 10, 192)
    size = os.path.getsize(cache.path)
    with open(cache.path, "rb", buffering=0) as file:
        os.fsync(file.fileno())

        def read():
            file.seek(0)
            file.readinto(np.empty(size, np.uint8))

        def load():
            SliceStore(cache, cache.cases, DEVICE)

        def cold(function):
            def first():
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                function()

            return first

        warm = in_turn({"load": load, "read": read}, rounds)
        disk = in_turn({"load": cold(load), "read": cold(read)}, rounds, wall=True)
    rows = []
    for where, times in (("the page cache", warm), ("the disk, wall time", disk)):
        rows.append(Row(f"loading from {where}", list(size / times["load"] / 1e9), "GB/s"))
        rows.append(Row("... loading / reading the file", list(times["read"] / times["load"]), at_least=0.8))
    return rows


def drawing(path, cases):
    """For `memory_of`: a hundred batches from the file of a simulated dataset, 25 frames of 10 slices."""
    cache = cache_of(path, cases, 25, 10, 192, empty=True)
    pairs = Pairs(SliceStore(cache, cache.cases, CPU, place="file"), 0.5)

    def draw():
        for step in range(100):
            pairs.draw(16, 0, step)

    return [draw]


def building(data, folder):
    """For `memory_of`: building a cache."""
    return [lambda: opened(settings_for(data, folder, 128))]


def memory(folder):
    """Rows of peak memory with a small and with a large dataset."""
    drawn, built = {}, {}
    for n in (35, 345):
        drawn[n] = memory_of(f"data.drawing({str(folder / f'{n}.h5')!r}, {n})", on_gpu=False)[0]
    for n in (4, 24):
        data = write_dataset(folder / f"Memory{n}", n, (128, 128, 8, 12))
        expression = f"data.building({str(data)!r}, {str(folder / 'memory')!r})"
        built[n] = memory_of(expression, on_gpu=False)[0]
    return [
        Row("drawing from the file, 35 cases x 25 frames (0.6 GB)", [drawn[35]], "MB"),
        Row("drawing from the file, 345 cases x 25 frames (6.4 GB)", [drawn[345]], "MB"),
        Row("... more than with 35 cases", [drawn[345] - drawn[35]], "MB", at_most=20.0),
        Row("building, 4 cases", [built[4]], "MB"),
        Row("building, 24 cases", [built[24]], "MB"),
        Row("... more than with 4 cases", [built[24] - built[4]], "MB", at_most=20.0),
    ]


def from_file(folder, rounds):
    """Rows of registration steps: slices on the device, in a cached file, and in a file read from disk."""
    cache = cache_of(folder / "small.h5", 6, 20, 8, 112)
    settings = RegistrationSettings(size=112, spacing=1.75)
    stores = {place: SliceStore(cache, cache.cases, DEVICE, place=place) for place in ("device", "file")}
    task = train_registration.Registration(settings, stores["device"], stores["device"])
    task.network.to(DEVICE, memory_format=torch.channels_last).train()
    optimizer = torch.optim.Adam(task.network.parameters(), lr=1e-4)
    count = iter(range(10**6))
    with open(cache.path, "rb") as file:
        os.fsync(file.fileno())

        def step(place, disk=False):
            task.pairs.store = stores[place]
            if disk:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            batch = task.draw(next(count))
            with mixed_precision(DEVICE):
                loss = task.losses(batch)["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        resident = {"device": lambda: step("device")}
        warm = in_turn({**resident, "file": lambda: step("file")}, 4 * rounds, calls=CALLS)
        disk = in_turn({**resident, "file": lambda: step("file", True)}, 4 * rounds, wall=True, calls=CALLS)
    return [
        Row("a step, resident", list(1000 * warm["device"]), "ms"),
        ratio("from the file, in the page cache / resident", warm["file"], warm["device"], at_most=1.15),
        ratio("from the disk / resident, wall time", disk["file"], disk["device"], at_most=1.15),
    ]


def sections(rounds):
    """(title, text, rows) of each table."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        text = "From cines of 256 x 216 x 10 x 25 and their labels, gzipped to half, to slices of 192 x 192; "
        text += f"ours unpacks with {nifti.inflate.__name__}."
        yield "Cache: building", text, build(folder, rounds, 4, 1) + build(folder, rounds, 24, 2)
        text = "Headers and index are read, sources compared. Slices are 16 x 16, since none is read."
        yield "Cache: opening", text, opening(folder, rounds)
        text = "1,500 slices of 192 x 192 into newly allocated memory."
        yield "Cache: loading", text, loading(folder, rounds)
        text = "Peak memory added by the work in a separate process. Draws are from sparse files (simulated)."
        yield "Memory", text, memory(folder)
        text = "Registration, 16 pairs of 112 x 112. From the disk: with its cached pages dropped."
        yield "Training from the file", text, from_file(folder, rounds)
