"""Registration against VoxelMorph 0.2 (its PyTorch part) and MONAI's VoxelMorph; label warp; local NCC.

VoxelMorph's networks need none of its dependencies; its __init__, which imports them, is bypassed:

    pip install --no-deps voxelmorph==0.2 && pip install monai

All use the same slices, the same loss (mean squared error + 0.01 x diffusion) and Adam.
"""

import contextlib
import warnings

import torch
import torch.nn.functional as F
from monai.networks.nets import VoxelMorph, VoxelMorphUNet
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import (
    CALLS,
    DEVICE,
    Row,
    in_turn,
    labels_like_a_heart,
    memory_of,
    milliseconds,
    ratio,
)
from cardiac import losses, networks, propagation
from cardiac.warp import integrate, resize_displacement, warp
from experiments.common import voxelmorph_networks

BATCH, SIZES = 16, (128, 192)
GUIDED, WIDE = "ours, guided by labels", "ours, guided, twice the channels"
ALIKE = " in our layout" if DEVICE.type == "cpu" else " in our layout and precision"


class Ours:
    """The project's network, as `train_registration.py` and `networks.register` run it.

    guided: with the labels of the moving slice as an input, as in the `strong` recipe, which carries labels
    by two such passes (`networks.Turned`). width: as in `--width`.
    """

    def __init__(self, size, guided=False, width=1):
        self.size = (size, size)
        network = networks.RegistrationNetwork(guided, width)
        self.network = network.to(DEVICE, memory_format=torch.channels_last)
        self.labels = torch.from_numpy(labels_like_a_heart(BATCH, size)).to(DEVICE)
        self.regions = losses.one_hot(self.labels)

    def train(self, moving, fixed):
        with networks.mixed_precision(DEVICE):
            velocity = self.network(moving, fixed, self.regions)
        warped = warp(moving, resize_displacement(integrate(velocity), self.size))
        return warped, velocity

    def register(self, moving, fixed):
        return warp(moving, networks.register(self.network, moving, fixed, self.labels))


class Theirs:
    """A network of VoxelMorph or MONAI, which returns the warped image and the field whose smoothness counts.

    As shipped: NCHW, on a GPU in float32 with convolutions in TF32. alike: in our memory layout,
    channels_last, and on a GPU in bfloat16 if ours is, so that ratios compare only the networks.
    """

    def __init__(self, network, alike=False, **registering):
        self.network, self.registering = network.to(DEVICE), registering
        self.context = networks.mixed_precision if alike else lambda device: contextlib.nullcontext()
        if alike:
            self.network.to(memory_format=torch.channels_last)

    def train(self, moving, fixed):
        with self.context(DEVICE):
            warped, field = self.network(moving, fixed)
        return warped.float(), field.float()

    def register(self, moving, fixed):
        with torch.no_grad(), self.context(DEVICE):
            return self.network(moving, fixed, **self.registering)[0]


def vxm_dense(alike=False, **options):
    network = voxelmorph_networks().VxmDense
    return lambda size: Theirs(network((size, size), **options), alike, registration=True)


def monai(alike=False):
    warnings.filterwarnings("ignore", "monai.networks.blocks.Warp")
    shape = 2, 2, 32, (16, 32, 32, 32, 32, 32), (16, 16)  # VxmDense's
    return lambda size: Theirs(VoxelMorph(VoxelMorphUNet(*shape), spatial_dims=2), alike)


CONTESTANTS = {  # name: function of the slice size that makes it
    "ours": Ours,
    GUIDED: lambda size: Ours(size, guided=True),
    WIDE: lambda size: Ours(size, guided=True, width=2),
    "VxmDense": vxm_dense(),
    "VxmDense, unet_half_res": vxm_dense(unet_half_res=True),
    "MONAI VoxelMorph": monai(),
    f"VxmDense{ALIKE}": vxm_dense(True),
    f"VxmDense, unet_half_res{ALIKE}": vxm_dense(True, unet_half_res=True),
    f"MONAI VoxelMorph{ALIKE}": monai(True),
}


def pair(size, batch=BATCH):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(2, batch, 1, size, size, generator=generator).to(DEVICE)


def step(contestant, size):
    """A function that makes one training step."""
    moving, fixed = pair(size)
    optimizer = torch.optim.Adam(contestant.network.parameters(), lr=1e-4)

    def one_step():
        warped, field = contestant.train(moving, fixed)
        loss = F.mse_loss(warped, fixed) + 0.01 * losses.diffusion(field)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return one_step


def inference(contestant, size):
    """A function that registers one batch."""
    moving, fixed = pair(size)
    return lambda: contestant.register(moving, fixed)


def work(name):
    """For `memory_of`: three registrations at both sizes, then three training steps at both."""
    kinds = [make(CONTESTANTS[name](size), size) for make in (inference, step) for size in SIZES]
    return [lambda kind=kind: [kind() for _ in range(3)] for kind in kinds]


def speed(size, rounds):
    """Rows of training step and inference."""
    networks_of = {name: make(size) for name, make in CONTESTANTS.items()}
    rows = []
    targets = {"step": {"VxmDense": 0.28}, "inference": {"VxmDense": 0.20}}
    for kind, make in (("step", step), ("inference", inference)):
        times = in_turn({name: make(each, size) for name, each in networks_of.items()}, rounds, calls=CALLS)
        for name in times:
            rows.append(milliseconds(f"{kind}, {size} x {size}: {name}", times[name]))
            if name in (GUIDED, WIDE):
                limit = {"at_most": targets[kind]["VxmDense"]} if name == GUIDED else {}
                compared = f"... {name.removeprefix('ours, ')} / VxmDense"
                rows.append(ratio(compared, times[name], times["VxmDense"], **limit))
            elif name != "ours":
                limit = {} if ALIKE in name else {"at_most": targets[kind].get(name, 1.0)}
                rows.append(ratio(f"... ours / {name}", times["ours"], times[name], **limit))
    return rows


def memory():
    """Rows of peak memory."""
    peaks = {name: memory_of(f"registration.work({name!r})") for name in CONTESTANTS}
    rows = []
    for k, what in enumerate(f"{kind}, {size} x {size}" for kind in ("inference", "step") for size in SIZES):
        rows.append(Row(f"memory, {what}: ours", [peaks["ours"][k]], "MB"))
        for name in list(peaks)[1:]:
            limit = {"at_most": 0.5} if name in (GUIDED, "VxmDense") else {}
            if name in (GUIDED, WIDE):
                compared = f"... {name.removeprefix('ours, ')} ({peaks[name][k]:.0f} MB) / VxmDense"
                rows.append(Row(compared, [peaks[name][k] / peaks["VxmDense"][k]], **limit))
                continue
            compared = f"... ours / {name} ({peaks[name][k]:.0f} MB)"
            rows.append(Row(compared, [peaks["ours"][k] / peaks[name][k]], **limit))
    return rows


def arithmetic(size, rounds):
    """Rows of our training step's arithmetic throughput, compared with that of a matrix product."""
    one_step = step(Ours(size), size)
    with FlopCounterMode(display=False) as counter:
        one_step()
    kind = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    side = 8192 if DEVICE.type == "cuda" else 1536
    matrix = torch.rand(side, side, device=DEVICE, dtype=kind)
    times = in_turn({"step": one_step, "product": lambda: matrix @ matrix}, rounds, calls=CALLS)
    speeds = counter.get_total_flops() / times["step"] / 1e9, 2 * side**3 / times["product"] / 1e9
    return [
        Row(f"convolutions of a step, {size} x {size}", [counter.get_total_flops() / 1e9], "GFLOP"),
        Row("throughput of the whole step", list(speeds[0]), "GFLOP/s"),
        Row("... step / a large matrix product", list(speeds[0] / speeds[1])),
    ]


def label_warp(size, rounds):
    """`propagation.warp_labels` against one-hot, VoxelMorph's warp of all classes and arg max."""
    labels = torch.from_numpy(labels_like_a_heart(BATCH, size)).to(DEVICE)
    generator = torch.Generator().manual_seed(0)
    coarse = 3 * torch.randn(BATCH, 2, 8, 8, generator=generator)
    field = F.interpolate(coarse, size=(size, size), mode="bicubic").to(DEVICE)
    transformer = voxelmorph_networks().layers.SpatialTransformer((size, size)).to(DEVICE)

    def theirs():
        regions = F.one_hot(labels.long(), 4).permute(0, 3, 1, 2).float()
        return transformer(regions, field).argmax(1)

    contestants = {"ours": lambda: propagation.warp_labels(labels, field), "theirs": theirs}
    times = in_turn(contestants, 3 * rounds, calls=CALLS)
    # VoxelMorph samples with align_corners=True and the same displacement in pixels: the same place
    differ = (propagation.warp_labels(labels, field) != theirs()).sum().item() / (labels > 0).sum().item()
    return [
        milliseconds(f"label warp, {size} x {size}: ours", times["ours"]),
        ratio("... ours / warp of one-hot labels, arg max", times["ours"], times["theirs"], at_most=0.2),
        Row("... differing pixels / labelled pixels", [100 * differ], "%"),
    ]


def voxelmorph_ncc(fixed, warped, window=9):
    """The formula of VoxelMorph's `losses.NCC`, on the device and in the precision of its input."""
    box = torch.ones(1, 1, window, window, dtype=fixed.dtype, device=fixed.device)
    images = (fixed, warped, fixed * fixed, warped * warped, fixed * warped)
    i, j, ii, jj, ij = (F.conv2d(image, box, padding=window // 2) for image in images)
    size = window**2
    mean_i, mean_j = i / size, j / size
    cross = ij - mean_j * i - mean_i * j + mean_i * mean_j * size
    variance_i = ii - 2 * mean_i * i + mean_i * mean_i * size
    variance_j = jj - 2 * mean_j * j + mean_j * mean_j * size
    return -torch.mean(cross * cross / (variance_i * variance_j + 1e-5))


def exact_ncc(warped, fixed, window=9):
    """`losses.local_ncc` in float64, computed otherwise: windows unfolded, two passes."""
    images = []
    for image in (warped.double(), fixed.double()):
        deviation, mean = torch.std_mean(image, dim=(-2, -1), keepdim=True, correction=0)
        images.append((image - mean) / (deviation + 1e-5))
    ones = torch.ones_like(images[0])
    windows = [F.unfold(each, window, padding=window // 2) for each in (*images, ones)]
    inside = windows[2]
    count = inside.sum(1, keepdim=True)
    first, second = (each - inside * (each.sum(1, keepdim=True) / count) for each in windows[:2])
    covariance, one, two = ((a * b).sum(1, keepdim=True) / count for a, b in
                            ((first, second), (first, first), (second, second)))
    return 1 - (covariance * covariance / (one * two + 1e-5)).mean()


def local_ncc(size, rounds):
    """Time with gradient, and error on slices with large flat patches, in a scanner's range of values."""
    moving, fixed = pair(size)
    moving.requires_grad_()

    def run(formula):
        return lambda: torch.autograd.grad(formula(moving, fixed), moving)

    times = in_turn({"ours": run(losses.local_ncc), "theirs": run(voxelmorph_ncc)}, rounds, calls=CALLS)
    patches = torch.from_numpy(labels_like_a_heart(2 * BATCH, size)).to(DEVICE)[:, None]
    scale, errors = torch.tensor([100.0, 1500.0, 700.0, 1300.0], device=DEVICE), {"ours": [], "theirs": []}
    for noise in (0.0, 0.01, 1.0):
        slices = scale[patches.long()] + noise * torch.randn_like(patches.float())
        one, other = slices[:BATCH], slices[BATCH:]
        errors["ours"].append(abs(losses.local_ncc(one, other) - exact_ncc(one, other)).item())
        exact = voxelmorph_ncc(one.double(), other.double())
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # its error, not TF32's
            errors["theirs"].append(abs(voxelmorph_ncc(one, other) - exact).item())
    return [
        milliseconds(f"local NCC with gradient, {size} x {size}: ours", times["ours"]),
        ratio("... ours / VoxelMorph's formula", times["ours"], times["theirs"], at_most=0.5),
        Row("... largest error against float64 on flat patches", [max(errors["ours"])], at_most=1e-3),
        Row("... the same error of VoxelMorph's formula", [max(errors["theirs"])]),
    ]


def sections(rounds):
    """(title, text, rows) of each table."""
    text = (
        f"Batch {BATCH}; a step is forward, loss, backward and Adam, with the same loss for all. Ours uses "
        f"PyTorch's channels_last layout; the others run as shipped and, where marked \"{ALIKE.strip()}\", "
        "with ours. On a CPU ours registers four slices at a time, the others all sixteen. MONAI's "
        "`half_res` does not work in two dimensions."
    )
    for size in SIZES:
        yield f"Registration, {size} x {size}", text, speed(size, rounds)
    yield "Registration: peak memory", "What three calls add, in a separate process.", memory()
    text = "Only the floating-point operations of the convolutions are counted, by PyTorch."
    yield "Registration: arithmetic throughput", text, arithmetic(128, rounds)
    rows = [row for size in SIZES for row in label_warp(size, rounds)]
    yield "Label warp", "Hearts cover 11 % of the pixels.", rows
    yield "Local NCC", "Window 9 x 9.", [row for size in SIZES for row in local_ncc(size, rounds)]
