"""One thread per process and no GPU except for `pytest -m cuda`, so that runs repeat bit for bit; and one
tiny run that tests share (to read, not to change).
"""

import os

import pytest
import torch
from datasets import write_mms

import propagate_labels
import train_registration
import train_segmentation
from cardiac import report

TINY = "--size 32 --spacing 2 --workers 1 --device cpu"
SHORT = "--steps-per-epoch 2 --max-steps 4 --batch-size 4"
NO_GPU = pytest.mark.skipif("not torch.cuda.is_available()", reason="needs a CUDA device: pytest -m cuda")
NEEDS_GPU = (pytest.mark.cuda, NO_GPU)


def pytest_configure(config):
    # most tests compare runs bit for bit, which a GPU does not guarantee
    if config.option.markexpr.strip() != "cuda":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def no_pictures(monkeypatch):
    """For tests of numbers: figures are not rendered, which would take a quarter of a tiny run."""
    monkeypatch.setattr(report, "save_figure", lambda figure, path: path.write_bytes(b"not drawn"))


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """A dataset of 7 cases in the M&Ms layout: read it, do not change it."""
    return write_mms(tmp_path_factory.mktemp("tiny") / "MnM")


@pytest.fixture(scope="session")
def trained_run(tiny_data, tmp_path_factory):
    """(data, out) of a tiny run: registered, propagated and both segmentations trained, nothing evaluated."""
    out = tmp_path_factory.mktemp("trained") / "run"
    words = ["--data", str(tiny_data), "--out", str(out), "--workers", "1"]
    assert train_registration.main([*words, *TINY.split(), *SHORT.split()]) == 0
    assert propagate_labels.main(words) == 0
    assert train_segmentation.main([*words, *SHORT.split(), "--channels", "2"]) == 0
    return tiny_data, out
