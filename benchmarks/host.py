"""The CPU's part of the work, for which a GPU would wait: Python and PyTorch's dispatch.

A step on two slices of 16 x 16 takes little arithmetic, but the same PyTorch operations as one on many large
slices. Its time is roughly what the CPU needs to keep a GPU busy; if measured on a CPU, kernel launches and
the casts of mixed precision, which the CPU does without, come on top.
"""

import contextlib
import io
import tempfile
from pathlib import Path
from unittest import mock

import torch

import train_registration
import train_segmentation
from benchmarks.common import DEVICE, Row, cache_of, in_turn, milliseconds, strong
from benchmarks.propagation import CASES, propagating_a_case
from cardiac import networks
from cardiac.settings import RegistrationSettings, SegmentationSettings
from cardiac.slices import LabelledSlices, SliceStore
from cardiac.training import Run

SIZE, BATCH, CALLS = 16, 2, 20
BATCHES_OF_A_GPU = mock.patch.object(networks, "_inference_batch", return_value=64)


def work(folder):
    """{what: function}: a step of each training, as in the training loop, and propagating a case."""
    cache = cache_of(folder / "small.h5", 4, 25, 10, SIZE)
    store = SliceStore(cache, cache.cases, DEVICE)
    settings = strong(RegistrationSettings, steps_per_epoch=10**6, batch_size=BATCH)
    registration = train_registration.Registration(settings, store, store)
    settings = strong(SegmentationSettings, steps_per_epoch=10**6, batch_size=BATCH, channels=8)
    segmentation = train_segmentation.Segmentation(settings, LabelledSlices(store), store)
    found = {}
    for name, task in (("registration", registration), ("segmentation", segmentation)):
        run = Run(task, task.settings, folder, DEVICE)
        run.begin().bar.disable = True
        found[f"{name}: a step"] = run.step
    propagate = propagating_a_case(cache)

    def propagating():
        with BATCHES_OF_A_GPU:
            propagate()

    return {**found, "propagating a case": propagating}


def operations(function):
    """The number of PyTorch operations in a call, without those that they call themselves."""
    with torch.profiler.profile() as profiler:
        function()
    found = [event for event in profiler.events() if event.name.startswith("aten::")]
    return sum(e.cpu_parent is None or not e.cpu_parent.name.startswith("aten::") for e in found)


def sections(rounds):
    """(title, text, rows) of the table."""
    quiet = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(quiet):
        functions = work(Path(folder))
        times = in_turn(functions, rounds, calls=CALLS)
        rows = []
        for name, function in functions.items():
            rows.append(milliseconds(name, times[name]))
            rows.append(Row("... PyTorch operations, views included", [operations(function)]))
    registration_step, segmentation_step, a_case = times.values()
    minutes, seconds = 20_000 * (registration_step + 2 * segmentation_step) / 60, CASES * a_case
    rows.append(Row("training: 20,000 steps of each of the three networks", list(minutes), "min"))
    rows.append(Row(f"propagating a whole M&Ms: {CASES} such cases", list(seconds), "s"))
    text = (
        f"The same work on slices of {SIZE} x {SIZE}, {BATCH} per step, 25 frames of 10 slices per case, "
        "strong recipe: its time is roughly the processor's part, for which a GPU waits"
        + ("." if DEVICE.type == "cuda" else "; kernel launches come on top.")
    )
    yield "Overhead of the processor, for which a GPU would wait", text, rows
