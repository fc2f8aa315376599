"""Mixed precision and other devices against float32 on the CPU: same weights, same batches, stated bounds.

The networks are trained a little first: at the start every displacement is 0 and anything would agree.
"""

import pytest
import torch
from conftest import NEEDS_GPU

import train_registration
import train_segmentation
from cardiac.cache import open_cache
from cardiac.losses import one_hot
from cardiac.settings import RegistrationSettings, SegmentationSettings
from cardiac.slices import LabelledSlices, SliceStore
from cardiac.warp import integrate, resize_displacement

CPU, STEPS = torch.device("cpu"), 60


def registration(cache, device):
    words = RegistrationSettings(batch_size=8, similarity="ncc", smoothness=1.0, guided=True)
    words.difference_weight = 20.0
    return train_registration.Registration(words, *stores(cache, device))


def segmentation(cache, device):
    words = SegmentationSettings(batch_size=8, channels=8, dice_weight=1.0)
    store, validation = stores(cache, device)
    return train_segmentation.Segmentation(words, LabelledSlices(store), validation)


def stores(cache, device):
    return tuple(SliceStore(cache, cache.split(name), device) for name in ("Training", "Validation"))


@pytest.fixture(scope="module", params=[registration, segmentation], ids=lambda task: task.__name__)
def learnt(request, tiny_data, tmp_path_factory):
    """(function that makes the task, cache, weights after some steps in float32 on the CPU)."""
    folder = tmp_path_factory.mktemp("precision")
    cache = open_cache(RegistrationSettings(data=tiny_data, cache=folder, size=32, spacing=2.0, workers=1))
    task = request.param(cache, CPU)
    task.network.to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(task.network.parameters(), lr=3e-3)
    for step in range(STEPS):
        optimizer.zero_grad()
        task.losses(task.draw(step))["loss"].backward()
        optimizer.step()
    return request.param, cache, task.network.state_dict()


def outcome(learnt, device, mixed):
    """Losses (N,) of some batches, the gradient of their sum, and what inference gives, all on the CPU."""
    make, cache, weights = learnt
    task = make(cache, device)
    task.network.load_state_dict(weights)
    task.network.to(device, memory_format=torch.channels_last)  # as the training loop has it
    losses = []
    for step in range(STEPS, STEPS + 4):
        with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
            losses.append(task.losses(task.draw(step))["loss"])
    assert all(loss.dtype == torch.float32 for loss in losses)
    torch.stack(losses).sum().backward()
    gradient = torch.cat([weight.grad.flatten() for weight in task.network.parameters()])
    case = task.validation.cases[0]
    ed, es = (task.validation.frame(case, frame) for frame in (case.ed, case.es))
    task.network.eval()
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=mixed):
        if make is registration:
            regions = one_hot(task.validation.expert(case, case.ed))
            found = resize_displacement(integrate(task.network(ed, es, regions)), ed.shape[-2:])
        else:
            found = task.network(ed).float().softmax(1)
    return torch.stack(losses).detach().cpu(), gradient.cpu(), found.cpu()


# Loss (relative), cosine of gradients, displacement in pixels, probability. Measured in bfloat16 on the CPU:
# 0.0018, 0.9999, 0.006 and 0.019.
BOUNDS = {
    ("cpu", True): (0.003, 0.99, 0.05, 0.03),
    ("cuda", False): (0.003, 0.99, 0.05, 0.03),  # its convolutions round to TF32
    ("cuda", True): (0.006, 0.98, 0.1, 0.06),
}
WAYS = [pytest.param(*way, marks=NEEDS_GPU if way[0] == "cuda" else []) for way in BOUNDS]


@pytest.mark.parametrize(("device", "mixed"), WAYS)
def test_losses_gradients_and_inference_agree_with_float32_on_the_cpu(learnt, device, mixed):
    if mixed and device == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip("this GPU does not compute in bfloat16")
    loss, cosine, pixels, probability = BOUNDS[device, mixed]
    expected, found = outcome(learnt, CPU, False), outcome(learnt, torch.device(device), mixed)
    torch.testing.assert_close(found[0], expected[0], atol=0, rtol=loss)
    assert torch.cosine_similarity(found[1], expected[1], 0) > cosine
    atol = pixels if learnt[0] is registration else probability
    torch.testing.assert_close(found[2], expected[2], atol=atol, rtol=0)
    assert found[2].std() > 2 * atol, "the result varies by more than the tolerance"
