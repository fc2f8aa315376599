"""Segmentation against MONAI's BasicUNet of the same widths, and the data path against its CacheDataset.

On the CPU with smaller batches, so that a round takes seconds; the widths are the paper's.
"""

import copy
import math
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from monai import transforms
from monai.data import CacheDataset, DataLoader
from monai.networks.nets import BasicUNet

import train_registration
import train_segmentation
from benchmarks.common import CALLS, DEVICE, Row, cache_of, in_turn, labels_like_a_heart, milliseconds, ratio
from cardiac import augment, networks
from cardiac.settings import RegistrationSettings, SegmentationSettings
from cardiac.slices import LabelledSlices, SliceStore
from cardiac.training import Run

BATCH, SIZE = (16, 192) if DEVICE.type == "cuda" else (4, 128)
CHANNELS = 32
WIDTHS = [CHANNELS * 2**level for level in range(5)] + [CHANNELS]


def step(network, batch=BATCH, size=SIZE):
    """A function that makes one training step with cross-entropy."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(batch, 1, size, size, generator=generator).to(DEVICE)
    labels = torch.from_numpy(labels_like_a_heart(batch, size)).long().to(DEVICE)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4)

    def one_step():
        with networks.mixed_precision(DEVICE):
            logits = network(images)
        loss = F.cross_entropy(logits.float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return one_step


def steps(rounds):
    """Rows of a training step."""
    unet = {"spatial_dims": 2, "in_channels": 1, "out_channels": 4, "features": WIDTHS}
    contestants = {
        "ours": networks.SegmentationNetwork(CHANNELS).to(DEVICE, memory_format=torch.channels_last),
        "BasicUNet": BasicUNet(**unet).to(DEVICE),
        "BasicUNet with batch norm and ReLU": BasicUNet(**unet, norm="batch", act="relu").to(DEVICE),
    }
    name = "BasicUNet with batch norm and ReLU"
    alike = copy.deepcopy(contestants[name]).to(memory_format=torch.channels_last)
    contestants[f"{name}, in our layout"] = alike
    times = in_turn({name: step(each.train()) for name, each in contestants.items()}, rounds, calls=CALLS)
    rows = [milliseconds("a step: ours", times["ours"])]
    for name in list(times)[1:]:
        limit = {} if "our layout" in name else {"at_most": 1.0}
        rows.append(ratio(f"... ours / {name}", times["ours"], times[name], **limit))
    return rows


def tasks(folder, precision="auto"):
    """The two tasks of the training scripts, augmented, on made-up slices."""
    cache = cache_of(folder / "tasks.h5", 4, 12, 8, SIZE)
    store = SliceStore(cache, cache.cases, DEVICE)
    options = {"augment": True, "size": SIZE, "steps_per_epoch": 10**6, "precision": precision}
    registration = RegistrationSettings(**options, batch_size=16)
    segmentation = SegmentationSettings(**options, batch_size=BATCH, channels=CHANNELS)
    yield "registration", train_registration.Registration(registration, store, store)
    yield "segmentation", train_segmentation.Segmentation(segmentation, LabelledSlices(store), store)


def begun(task, folder):
    """The training loop's run of a task, about to make its first step."""
    run = Run(task, task.settings, folder, DEVICE)
    run.begin().bar.disable = True
    return run


def data_share(task, folder, rounds):
    """Time of drawing a step's batch, transforms included, and of the whole step as the loop makes it."""
    count, run = iter(range(10**6)), begun(task, folder)
    return in_turn({"draw": lambda: task.draw(next(count)), "step": run.step}, rounds, calls=CALLS)


def precisions(folder, rounds):
    """Rows of the loop's step in bfloat16 and in float32, both networks."""
    steps, rows = {}, []
    for precision in ("float32", "bfloat16"):
        (place := folder / precision).mkdir()
        for name, task in tasks(place, precision):
            steps.setdefault(name, {})[precision] = begun(task, place).step
    for name, each in steps.items():
        times = in_turn(each, rounds, calls=CALLS)
        rows.append(milliseconds(f"{name}: a step in float32", times["float32"]))
        rows.append(ratio("... in bfloat16 / in float32", times["bfloat16"], times["float32"]))
    return rows


def their_loader(store, batch):
    """MONAI's CacheDataset and DataLoader, with its transforms closest to `augment.augment_slices`."""
    images, labels = store.images(torch.arange(64)).cpu().numpy(), store.labels[:64, None].cpu().numpy()
    both = {"keys": ("image", "label")}
    random = [
        transforms.EnsureTyped(**both),
        transforms.Rand2DElasticd(
            **both, prob=1, spacing=(store.cache.size / 8,) * 2, magnitude_range=(0, 4), rotate_range=math.pi,
            scale_range=(0.2, 0.2), translate_range=0.08 * store.cache.size, mode=("bilinear", "nearest"),
            padding_mode="border",
        ),
        transforms.RandFlipd(**both, prob=0.5, spatial_axis=0),
        transforms.RandAdjustContrastd("image", prob=1, gamma=(0.6, 1.65)),
        transforms.RandScaleIntensityd("image", factors=0.3, prob=1),
        transforms.RandShiftIntensityd("image", offsets=0.09, prob=1),
        transforms.RandBiasFieldd("image", prob=1, coeff_range=(0, 0.2)),
        transforms.RandGaussianSmoothd("image", prob=1, sigma_x=(0.1, 1), sigma_y=(0.1, 1)),
        transforms.RandRicianNoised("image", prob=1, std=0.05, sample_std=True),
    ]
    items = [{"image": image, "label": label} for image, label in zip(images, labels)]
    dataset = CacheDataset(items, transforms.Compose(random), progress=False)
    return DataLoader(dataset, batch_size=batch, shuffle=True, num_workers=0)


def data_path(folder, rounds):
    """Rows of drawing batches of 32 at 192 x 192 in one process."""
    size, batch = 192, 32
    cache = cache_of(folder / "path.h5", 4, 6, 8, size)
    store = SliceStore(cache, cache.cases, DEVICE)
    slices, loader = LabelledSlices(store), their_loader(store, batch)
    drawn = slices.draw(batch, 0, 0)

    def ours():
        for k in range(64 // batch):
            augment.augment_slices(*slices.draw(batch, 0, k), 0, k)

    def theirs():
        for each in loader:
            each["image"].to(DEVICE)

    times = in_turn({"ours": ours, "theirs": theirs}, rounds)
    alone = in_turn({"alone": lambda: augment.augment_slices(*drawn, 0, 0)}, rounds)["alone"]
    rates = (64 / times[name] for name in ("ours", "theirs"))
    return [
        milliseconds("a random transform for each of 32 samples, 192 x 192", alone),
        *(Row(f"samples per second, drawn and transformed: {name}", list(rate)) for name, rate in
          zip(("ours", "MONAI CacheDataset + DataLoader"), rates)),
        Row("... ours / MONAI's", list(times["theirs"] / times["ours"]), at_least=5.0),
    ]


def sections(rounds):
    """(title, text, rows) of each table."""
    text = f"Batch {BATCH}, {SIZE} x {SIZE}, {CHANNELS} channels at the first level. BasicUNet as shipped has"
    text += " instance norm and LeakyReLU."
    yield "Segmentation: a training step", text, steps(rounds)
    with tempfile.TemporaryDirectory() as folder:
        limit = 0.05 if DEVICE.type == "cuda" else 0.10
        rows = []
        for name, task in tasks(Path(folder)):
            times = data_share(task, Path(folder), 3 * rounds if name == "registration" else rounds)
            draw = float(np.median(times["draw"]))
            rows.append(milliseconds(f"{name}: choosing and transforming a batch", times["draw"]))
            rows.append(Row("... drawing / the whole step", list(draw / times["step"]), at_most=limit))
        text = f"Registration: 16 pairs, segmentation: {BATCH} slices, {SIZE} x {SIZE}, in memory, with the"
        text += " random transforms of the `strong` recipe."
        yield "Data path: its share of a step", text, rows
        fast = DEVICE.type == "cuda" or "avx512_bf16" in Path("/proc/cpuinfo").read_text()
        text = "The same steps as in the previous section; `--precision` chooses."
        yield "Precision of a step", text, precisions(Path(folder), rounds) if fast else None
        text = "64 slices in batches of 32, in one process; MONAI's transforms are its closest equivalents."
        yield "Data path against MONAI's", text, data_path(Path(folder), rounds)
