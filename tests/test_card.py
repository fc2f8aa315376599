"""The CUDA path without a GPU, on one simulated on the CPU (`card.py`): whatever the scripts do on a GPU is
on the right device, and no training step waits for it.
"""

import contextlib
import pickle

import pytest
import torch
from card import STAGED, Card, simulated_gpu
from conftest import NEEDS_GPU, NO_GPU, SHORT

import evaluate
import propagate_labels
import train_registration
import train_segmentation
from cardiac import training
from cardiac.cache import open_cache
from cardiac.checkpoint import load_network
from cardiac.files import read_csv
from cardiac.networks import RegistrationNetwork
from cardiac.propagation import propagate_interval
from cardiac.settings import RegistrationSettings, SegmentationSettings
from cardiac.slices import LabelledSlices, Pairs, SliceStore

CUDA = torch.device("cuda")
pytestmark = pytest.mark.usefixtures("no_pictures")
CARDS = [  # a context manager, which yields the `Cards`, or None if the GPU is real
    pytest.param(simulated_gpu, id="made"),
    pytest.param(contextlib.nullcontext, id="real", marks=NEEDS_GPU),
]


WAITS = {
    "item": lambda there, here: there.sum().item(),
    "truth": lambda there, here: bool(there.sum() > 0),
    "cpu": lambda there, here: there.cpu(),
    "to": lambda there, here: there.to("cpu", non_blocking=True),
    "tolist": lambda there, here: there.tolist(),
    "nonzero": lambda there, here: there.nonzero(),
    "mask": lambda there, here: there[there > 0],
    "masked assignment": lambda there, here: there.__setitem__(there > 0, torch.ones(3, device="cuda")),
    "equal": lambda there, here: torch.equal(there, there + 1),
    "unique": lambda there, here: there.unique(),
    "upload": lambda there, here: here.to("cuda"),
    "large upload": lambda there, here: torch.ones(2**16).to("cuda", non_blocking=True),
    "copy there": lambda there, here: there.copy_(here),
    "copy back": lambda there, here: here.copy_(there),
    "tensor": lambda there, here: torch.tensor([1.0], device="cuda"),
    "new_tensor": lambda there, here: there.new_tensor([1.0]),
}


def test_the_card_behaves_as_a_card():
    with simulated_gpu() as card:
        there, here = torch.ones(3, device="cuda"), torch.ones(3)
        assert there.device.type == "cuda"
        assert (there * 2).is_cuda
        assert not (here * 2).is_cuda
        both = [there, here]
        for wrong in (lambda: there + here, lambda: there[torch.tensor([0])], lambda: torch.stack(both)):
            with pytest.raises(RuntimeError, match="same device"):
                wrong()
        for wrong, why in ((there.numpy, "numpy"), (lambda: pickle.dumps(there), "another process")):
            with pytest.raises(TypeError, match=why):
                wrong()
        there[there > 5] = 0
        there[torch.zeros(1, dtype=torch.long, device="cuda")] = torch.ones(1, device="cuda")
        here.to("cuda", non_blocking=True)
        torch.ones(2**16).pin_memory().to("cuda", non_blocking=True)
        there.copy_(there * 1)
        assert not card.waits
        assert card.uploads == 2
        for number, wait in enumerate(WAITS, start=1):
            WAITS[wait](there, here)
            assert len(card.waits) == number, wait
        image, weight = torch.ones(1, 1, 8, 8, device="cuda"), torch.ones(1, 1, 3, 3, device="cuda")
        with torch.autocast("cuda", torch.bfloat16):
            assert torch.nn.functional.conv2d(image, weight).dtype is torch.bfloat16
        total = there.requires_grad_().square().sum()
        total.backward()
        assert there.grad.is_cuda
        assert there.grad.tolist() == [2, 2, 2]


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("recipe", ["paper", "strong", "strong --labelled-phases ED"])
def test_the_scripts_run_on_it(recipe, card, tiny_data, tmp_path, capsys):
    words = ["--data", str(tiny_data), "--out", str(tmp_path / "run"), "--workers", "1", "--device", "cuda"]
    first = ["--recipe", *recipe.split(), "--size", "32", "--spacing", "2", *SHORT.split()]
    scan = str(next(tiny_data.rglob("*_sa.nii.gz")))
    with card() as made:
        assert train_registration.main([*words, *first]) == 0
        assert train_registration.main([*words, "--max-steps", "5"]) == 0  # resumes from last.pt
        assert propagate_labels.main([*words, "--frames", "all", "--nifti"]) == 0
        assert train_segmentation.main([*words, *SHORT.split(), "--channels", "2"]) == 0
        assert evaluate.main([*words, "--all-frames"]) == 0
        assert evaluate.main([*words[2:], "--predict", scan]) == 0
    if made:
        assert made.peak_resets == 4, "each training reports its own peak"
    assert capsys.readouterr().out.count("on cuda (made of the CPU)" if made else "on cuda (") == 8
    for log in (tmp_path / "run").rglob("log.csv"):
        assert all(0 < float(row["waiting_percent"]) < 100 for row in read_csv(log)), log


@pytest.fixture(scope="module")
def cache(tiny_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("card")
    return open_cache(RegistrationSettings(data=tiny_data, cache=folder, size=32, spacing=2.0, workers=1))


def task_of(kind, recipe, cache, place=None):
    """A task of the training loop with the settings of a recipe, its data on the GPU."""
    small = {"channels": 2} if kind is SegmentationSettings else {}  # bfloat16 is slow on most CPUs
    settings = kind(recipe=recipe, batch_size=4, steps_per_epoch=1000, **small)
    for name, value in kind.STRONG.items() if recipe == "strong" else ():
        setattr(settings, name, value)
    names = ("Training", "Validation")
    stores = [SliceStore(cache, cache.split(name), CUDA, place=place) for name in names]
    if kind is RegistrationSettings:
        return train_registration.Registration(settings, *stores)
    return train_segmentation.Segmentation(settings, LabelledSlices(stores[0]), stores[1])


def begun(task, folder):
    """The run of a task on the GPU, after two steps: what the first ones make and keep exists."""
    run = training.Run(task, task.settings, folder, CUDA)
    run.begin()
    for _ in range(2):
        run.step()
    return run


UPLOADS = {
    (RegistrationSettings, "paper"): 3,
    (RegistrationSettings, "strong"): 6,
    (SegmentationSettings, "paper"): 3,
    (SegmentationSettings, "strong"): 8,
}


@pytest.mark.parametrize("recipe", ["paper", "strong"])
@pytest.mark.parametrize("kind", [RegistrationSettings, SegmentationSettings])
@pytest.mark.parametrize("place", ["device", "host", "file"])
@pytest.mark.cuda
@NO_GPU
def test_no_step_synchronises_with_a_real_card(kind, recipe, place, cache, tmp_path):
    run = begun(task_of(kind, recipe, cache, place), tmp_path)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            run.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("recipe", ["paper", "strong"])
@pytest.mark.parametrize("kind", [RegistrationSettings, SegmentationSettings])
def test_a_step_does_not_wait_for_the_card(kind, recipe, cache, tmp_path):
    with simulated_gpu() as card:
        task = task_of(kind, recipe, cache)
        run = begun(task, tmp_path)
        found = []
        watched = task.network.encoder[1] if kind is RegistrationSettings else task.network.down[1]
        watched.register_forward_hook(lambda module, inputs, output: found.append(output.dtype))
        task.network.register_forward_hook(lambda module, inputs, output: found.append(output.dtype))
        card.waits.clear()
        card.uploads = 0
        for _ in range(5):
            run.step()
        assert card.waits == []
        assert card.uploads == 5 * UPLOADS[kind, recipe], "only the random numbers of a step, no images"
        ends = torch.float32 if kind is RegistrationSettings else torch.bfloat16  # velocity, logits
        assert found == 5 * [torch.bfloat16, ends]


@pytest.mark.parametrize("place", ["device", "host", "file"])
def test_drawing_does_not_wait_for_the_card(place, cache):
    with simulated_gpu() as card:
        store = SliceStore(cache, cache.split("Training"), CUDA, place=place)
        pairs, slices = Pairs(store, 0.5), LabelledSlices(store)
        assert isinstance(slices.labels, Card) == (place == "device")
        card.waits.clear()
        batch = pairs.draw(64, 0, 0)
        images, labels, trust = slices.draw(128, 0, 0)
        assert all(each.is_cuda for each in (batch.moving, images, labels, trust))
        assert min(batch.moving.numel() * 2, labels.numel()) > STAGED
        assert card.waits == []


@pytest.mark.parametrize("steps", [0, 2])
def test_propagation_waits_no_longer_for_more_frames(cache, trained_run, steps):
    case = next(case for case in cache.split("Training") if len(case.expert) == 2)
    waits = []
    with simulated_gpu() as card:
        network = RegistrationNetwork()
        load_network(network, trained_run[1] / "registration" / "best.pt", CUDA)
        store = SliceStore(cache, [case], CUDA)
        frames = [frame for frame in range(case.frames) if frame not in case.expert]
        assert len(frames) >= 3
        for count in (1, 1, 3):  # the first fills the caches
            card.waits.clear()
            propagate_interval(network, store, "ED", "ES", frames[:count], True, steps)
            waits.append(len(card.waits))
    assert waits[1] == waits[2] <= 24
