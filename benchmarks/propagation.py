"""Propagation and evaluation: time of a whole dataset, and what it is spent on."""

import contextlib
import io
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import torch

import propagate_labels
from benchmarks.common import DEVICE, Row, cache_of, in_turn, milliseconds, ratio, strong, write_dataset
from benchmarks.data import opened, settings_for
from cardiac import evaluation, networks, propagation
from cardiac.cases import load_labels
from cardiac.settings import PropagationSettings

CASES = 150  # labelled training patients of M&Ms


def propagating_a_case(cache):
    """A function that propagates the first case of a cache under the strong recipe."""
    settings = strong(PropagationSettings)
    network = networks.Turned(networks.RegistrationNetwork(guided=True)).eval()
    network.to(DEVICE, memory_format=torch.channels_last)

    def propagate():
        with contextlib.redirect_stderr(io.StringIO()):
            propagate_labels.propagate_case(network, cache, cache.cases[0], settings, DEVICE)

    return propagate


def calls_of(function, *names):
    """A function that repeats the calls of `function` to the named functions of `propagation`."""
    made = []

    def recording(called):
        def recorded(*arguments):
            made.append((called, arguments))
            return called(*arguments)

        return recorded

    with contextlib.ExitStack() as patches:
        for name in names:
            patches.enter_context(mock.patch.object(propagation, name, recording(getattr(propagation, name))))
        function()
    return lambda: [called(*arguments) for called, arguments in made]


def propagating(folder, rounds):
    """Rows of propagating a case, and a dataset as large as M&Ms."""
    whole = propagating_a_case(cache_of(folder / "slices.h5", 1, 25, 10, 192))
    times = in_turn({
        "whole": whole,
        "registering": calls_of(whole, "velocities", "displacements", "register"),
        "refining": calls_of(whole, "refine"),
    }, rounds)
    limit = {"at_most": 60.0} if DEVICE.type == "cuda" else {}
    return [
        milliseconds("propagating a case", times["whole"]),
        ratio("... of which registering", times["registering"], times["whole"]),
        ratio("... of which refining the velocities", times["refining"], times["whole"]),
        Row(f"a whole M&Ms: {CASES} such cases", list(CASES * times["whole"]), "s", **limit),
    ]


def evaluating(folder, rounds):
    """Rows of the parts of evaluating a case."""
    data = write_dataset(folder / "MnM", 1, (256, 216, 10, 25))
    cache = opened(settings_for(data, folder / "cache", 192))
    (case,) = cache.cases
    network = networks.SegmentationNetwork(32).to(DEVICE, memory_format=torch.channels_last).eval()
    store = evaluation.SliceStore(cache, [case], DEVICE)
    labels = load_labels(case)
    prediction = np.zeros(case.shape, np.uint8, order="F")
    for frame, label in labels.items():
        prediction[..., frame] = np.roll(label, 2, 0)  # shifted labels: a good prediction
    grid, slices = case.grid(cache), torch.rand(case.slices, 4, 192, 192).softmax(1)
    soft = np.stack([labels[case.ed] == k for k in range(4)]).astype(np.float32)
    times = in_turn({
        "network": lambda: [networks.segment(network, store.frame(store.cases[0], t)) for t in labels],
        "grid": lambda: [grid.from_slices(slices[:, 1:].transpose(0, 1).numpy()) for _ in labels],
        "worker": lambda: evaluation._write_and_score(
            case, prediction, dict.fromkeys(labels, soft), folder / "prediction.nii.gz", False),
        "read": lambda: load_labels(case),
    }, rounds)
    return [
        milliseconds("evaluating a case, ED and ES: the U-Net", times["network"]),
        milliseconds("... resampling to the case's own grid", times["grid"]),
        milliseconds("... in a worker process: reading, scoring, writing", times["worker"]),
        ratio("... of which reading the expert's labels", times["read"], times["worker"]),
    ]


def sections(rounds):
    """(title, text, rows) of each table."""
    with tempfile.TemporaryDirectory() as folder:
        text = (
            "The frames between ED and ES of a cine of 25 frames and 10 slices of 192 x 192; labels of both "
            "phases carried, refined and fused."
        )
        yield "Propagation", text, propagating(Path(folder), rounds)
        text = "A case of 256 x 216 x 10 x 25 from slices of 192 x 192, U-Net of 32 channels."
        yield "Evaluation", text, evaluating(Path(folder), rounds)
