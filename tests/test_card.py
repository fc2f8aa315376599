"""The CUDA path where there is no card, on one made of the CPU (`card.py`): whatever the scripts do on a card
lies on the right side, and no step of training waits for it.
"""

import pytest
import torch
from card import made_of_the_cpu
from conftest import SHORT

import evaluate
import propagate_labels
import train_registration
import train_segmentation
from cardiac import training
from cardiac.cache import open_cache
from cardiac.checkpoint import load_network
from cardiac.networks import RegistrationNetwork
from cardiac.propagation import propagate_interval
from cardiac.settings import RegistrationSettings, SegmentationSettings
from cardiac.slices import LabelledSlices, SliceStore

CUDA = torch.device("cuda")


def test_the_card_behaves_as_a_card():
    with made_of_the_cpu() as card:
        there, here = torch.ones(3, device="cuda"), torch.ones(3)
        assert there.device.type == "cuda"
        assert (there * 2).is_cuda
        assert not (here * 2).is_cuda
        both = [there, here]
        for wrong in (lambda: there + here, lambda: there[torch.tensor([0])], lambda: torch.stack(both)):
            with pytest.raises(RuntimeError, match="same device"):
                wrong()
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
        assert not card.waits
        for number, wait in enumerate((there.sum().item, there.cpu, there.tolist, there.nonzero), start=1):
            wait()
            assert len(card.waits) == number, wait
        there[there > 0]
        assert len(card.waits) == 5
        image, weight = torch.ones(1, 1, 8, 8, device="cuda"), torch.ones(1, 1, 3, 3, device="cuda")
        with torch.autocast("cuda", torch.bfloat16):
            assert torch.nn.functional.conv2d(image, weight).dtype is torch.bfloat16
        total = there.requires_grad_().square().sum()
        total.backward()
        assert there.grad.is_cuda
        assert there.grad.tolist() == [2, 2, 2]


@pytest.mark.parametrize("recipe", ["paper", "strong", "strong --labelled-phases ED"])
def test_the_scripts_run_on_it(recipe, tiny_data, tmp_path, capsys):
    words = ["--data", str(tiny_data), "--out", str(tmp_path / "run"), "--workers", "1", "--device", "cuda"]
    first = ["--recipe", *recipe.split(), "--size", "32", "--spacing", "2", *SHORT.split()]
    scan = str(next(tiny_data.rglob("*_sa.nii.gz")))
    with made_of_the_cpu():
        assert train_registration.main([*words, *first]) == 0
        assert train_registration.main([*words, "--max-steps", "5"]) == 0  # goes on from last.pt
        assert propagate_labels.main([*words, "--frames", "all", "--nifti"]) == 0
        assert train_segmentation.main([*words, *SHORT.split(), "--channels", "2"]) == 0
        assert evaluate.main([*words, "--all-frames"]) == 0
        assert evaluate.main([*words[2:], "--predict", scan]) == 0
    assert capsys.readouterr().out.count("on cuda (made of the CPU)") == 8


@pytest.fixture(scope="module")
def cache(tiny_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("card")
    return open_cache(RegistrationSettings(data=tiny_data, cache=folder, size=32, spacing=2.0, workers=1))


def task_of(kind, recipe, cache):
    """A task of the training loop with the settings of a recipe, its data on the card."""
    settings = kind(recipe=recipe, batch_size=4, steps_per_epoch=1000)
    for name, value in kind.STRONG.items() if recipe == "strong" else ():
        setattr(settings, name, value)
    stores = [SliceStore(cache, cache.split(name), CUDA) for name in ("Training", "Validation")]
    if kind is RegistrationSettings:
        return train_registration.Registration(settings, *stores)
    return train_segmentation.Segmentation(settings, LabelledSlices(stores[0]), stores[1])


@pytest.mark.parametrize("recipe", ["paper", "strong"])
@pytest.mark.parametrize("kind", [RegistrationSettings, SegmentationSettings])
def test_a_step_does_not_wait_for_the_card(kind, recipe, cache, tmp_path):
    with made_of_the_cpu() as card:
        task = task_of(kind, recipe, cache)
        run = training.Run(task, task.settings, tmp_path, CUDA)
        run.begin()
        for _ in range(2):
            run.step()
        card.waits.clear()
        card.copies.clear()
        for _ in range(5):
            run.step()
        assert card.waits == []
        assert not card.copies["from the card"]
        assert card.copies["to the card"] <= 5 * 8, "the numbers that a step draws, and no pictures"


def test_propagation_waits_no_longer_for_more_frames(cache, trained_run):
    case = next(case for case in cache.split("Training") if len(case.expert) == 2)
    waits = []
    with made_of_the_cpu() as card:
        network = RegistrationNetwork()
        load_network(network, trained_run[1] / "registration" / "best.pt", CUDA)
        store = SliceStore(cache, [case], CUDA)
        frames = [frame for frame in range(case.frames) if frame not in case.expert]
        assert len(frames) >= 3
        for count in (1, 3):
            card.waits.clear()
            propagate_interval(network, store, "ED", "ES", frames[:count], trusted=True)
            waits.append(len(card.waits))
    assert waits[0] == waits[1] <= 20
