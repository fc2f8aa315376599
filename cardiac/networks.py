"""The two networks, and inference with them: VoxelMorph's U-Net for registration at half resolution, and the
paper's 2-D segmentation U-Net.

Both take slices whose sides are multiples of 16, since both halve them four times.
"""

import torch
import torch.nn.functional as F
from torch import nn

from cardiac import CLASSES
from cardiac.losses import diffusion, one_hot
from cardiac.warp import integrate, remove_folds, resize_displacement, warp

BACKGROUND_LOGIT = 3.0  # initial bias of the segmentation: background has 87 % of the probability


class RegistrationNetwork(nn.Module):
    """Maps two slices to the stationary velocity between them, at half resolution.

    Encoder, decoder and last convolutions of VoxelMorph (Balakrishnan et al., 2019): per level a 3x3
    convolution and LeakyReLU 0.2, max-pooling, nearest-neighbour upsampling, concatenated skips. The decoder
    stops at half resolution, where the last convolutions and the integration cost a quarter.

    guided: the moving slice's labels, known wherever labels are to be carried, are an input too, so that the
    network only has to find their outlines in the fixed slice. width: multiple of VoxelMorph's channels.
    """

    def __init__(self, guided=False, width=1):
        super().__init__()
        self.guided = guided
        fine, coarse = 16 * width, 32 * width  # channels
        levels = [1 + CLASSES if guided else 2, fine, coarse, coarse, coarse]
        self.encoder = nn.ModuleList(map(_convolution, levels, levels[1:]))
        # channels of a level and of its skip; at half resolution the finest skip is unused
        both = 2 * coarse
        self.decoder = nn.ModuleList(_convolution(before, coarse) for before in (coarse, both, both, both))
        self.last = nn.Sequential(*map(_convolution, (coarse, coarse, fine), (coarse, fine, fine)))
        self.velocity = nn.Conv2d(fine, 2, 3, padding=1)
        nn.init.normal_(self.velocity.weight, std=1e-5)  # training starts from the identity
        nn.init.zeros_(self.velocity.bias)

    def forward(self, moving, fixed, regions):
        """moving, fixed: (B, 1, H, W); regions: (B, 3, H, W) LV, MYO and RV of `moving`, 0 if unknown.

        Returns the velocity (B, 2, H/2, W/2), float32, in half-resolution pixels.
        """
        x = torch.cat([moving, fixed, regions] if self.guided else [moving, fixed], dim=1)
        # the finest level has no skip: pooling before the activation gives the same at a quarter of its cost
        convolution, activation = self.encoder[0]
        x, skips = activation(F.max_pool2d(convolution(x), 2)), []
        for level in self.encoder[1:]:
            x = level(x)
            skips.append(x)
            x = F.max_pool2d(x, 2)
        for level, skip in zip(self.decoder[:-2], reversed(skips[1:])):
            x = torch.cat([F.interpolate(level(x), scale_factor=2, mode="nearest"), skip], dim=1)
        # as above, but the most expensive level: without storing the upsampled and concatenated maps
        convolution, activation = self.decoder[-1]
        x = self.last(activation(_up_and_join(convolution, self.decoder[-2](x), skips[0])))
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 is too coarse to integrate
            return F.conv2d(x.float(), self.velocity.weight.float(), self.velocity.bias.float(), padding=1)


def _up_and_join(convolution, coarse, skip):
    """The 3x3 `convolution` of `coarse`, upsampled by 2 (nearest neighbour), concatenated with `skip`.

    Since upsampling repeats values, a transposed 4x4 convolution of stride 2 with sums of the weights gives
    the same, except for rounding, with 4 products instead of 9.
    """
    coarse_weight, skip_weight = convolution.weight.split((coarse.shape[1], skip.shape[1]), dim=1)
    summed = F.avg_pool2d(coarse_weight.flip(2, 3), 2, stride=1, padding=1, divisor_override=1)
    up = F.conv_transpose2d(coarse, summed.transpose(0, 1), convolution.bias, stride=2, padding=1)
    return up.add_(F.conv2d(skip, skip_weight, padding=1))


class Turned(nn.Module):
    """Test-time augmentation: the mean velocity of a pair as it is and turned by 180 degrees."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, *slices):
        """Arguments and velocity (B, 2, H/2, W/2) as for `RegistrationNetwork`."""
        turned = self.network(*(each.flip(2, 3) for each in slices)).flip(2, 3)
        return (self.network(*slices) - turned) / 2  # turning reverses the vectors


class SegmentationNetwork(nn.Module):
    """The paper's 2-D U-Net (Ronneberger et al., 2015), as in its section 3.3.

    `channels` at the first level, doubled at each of four max-poolings; two 3x3 convolutions with batch norm
    and ReLU per level; transposed convolutions up; 1x1 convolution to background, LV, MYO and RV. Unlike the
    paper's, it starts from the background's prior.
    """

    def __init__(self, channels=32):
        super().__init__()
        widths = [channels * 2**level for level in range(5)]
        self.down = nn.ModuleList(map(_double_convolution, [1, *widths], widths))
        widths.reverse()
        up = zip(widths, widths[1:])
        self.up = nn.ModuleList(nn.ConvTranspose2d(below, width, 2, stride=2) for below, width in up)
        self.merge = nn.ModuleList(_double_convolution(2 * width, width) for width in widths[1:])
        self.classify = nn.Conv2d(channels, CLASSES, 1)
        begin_with_background(self.classify.bias)

    def forward(self, x):
        """x: slices (B, 1, H, W). Returns logits (B, 4, H, W)."""
        skips = []
        for level in self.down[:-1]:
            x = level(x)
            skips.append(x)
            x = F.max_pool2d(x, 2)
        x = self.down[-1](x)
        for up, merge, skip in zip(self.up, self.merge, reversed(skips)):
            x = merge(torch.cat([skip, up(x)], dim=1))
        return self.classify(x)


def begin_with_background(bias):
    """Set the bias (4,) of the last convolution to the background's prior (Lin et al., 2017, section 3.3).

    Nine of ten pixels are background. Without this start, a network first learns that by suppressing its
    features, and a narrow one may lose a region for good.
    """
    nn.init.zeros_(bias)
    nn.init.constant_(bias[:1], BACKGROUND_LOGIT)


class Mirrored(nn.Module):
    """Test-time augmentation: the mean probabilities of four mirror images of a slice."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        """x: slices (B, 1, H, W). Returns logits (B, 4, H, W): the log of the averaged probabilities."""
        axes = ((), (2,), (3,), (2, 3))
        views = [self.network(x.flip(each)).float().softmax(1).flip(each) for each in axes]
        return torch.stack(views).mean(0).clamp(min=1e-12).log()


def _convolution(before, after):
    convolution = nn.Conv2d(before, after, 3, padding=1)
    nn.init.kaiming_normal_(convolution.weight, a=0.2)  # He et al., 2015, nearly as VoxelMorph's Keras layers
    nn.init.zeros_(convolution.bias)
    return nn.Sequential(convolution, nn.LeakyReLU(0.2, inplace=True))


def _double_convolution(before, after):
    layers = []
    for channels in (before, after):  # no bias: batch norm has its own
        layers += [nn.Conv2d(channels, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU(True)]
    return nn.Sequential(*layers)


def mixed_precision(device, precision="auto"):
    """The autocast context of networks: float32 or bfloat16, as `precision` says; "auto" is bfloat16 on GPUs
    that support it natively (Ampere and later), else float32.
    """
    if precision == "auto":
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bfloat16" if native else "float32"
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


def _inference_batch(images):
    """Slices at a time: many, to fill a GPU, or few, whose activations stay in a CPU's cache."""
    return 64 if images.is_cuda else 4


@torch.no_grad()
def velocities(network, moving, fixed, labels):
    """The velocities (B, 2, h, w) of a registration network from `moving` to `fixed`, both (B, 1, H, W).

    labels: (B, H, W) of `moving`, IGNORED where unknown, for a guided network.
    """
    batches = (each.split(_inference_batch(moving)) for each in (moving, fixed, one_hot(labels)))
    with mixed_precision(moving.device):
        return torch.cat([network(*slices) for slices in zip(*batches)])


def refine(velocity, moving, fixed, steps, smoothness=0.03, lr=0.1):
    """Refine each network velocity (B, 2, h, w) by `steps` of Adam on its own two images (B, 1, H, W):
    squared difference + smoothness x diffusion. Returns velocities (B, 2, h, w).

    Instance-specific optimisation (Balakrishnan et al., 2019). A network trained on ED's and ES's labels
    expects all of the motion between them, and carries labels too far into the frames in between. A step
    changes a velocity by at most about `lr` pixels of its grid.
    """
    if not steps:
        return velocity
    parts, batch_size = [], 4 * _inference_batch(moving)  # activations are few here
    batches = (each.split(batch_size) for each in (velocity, moving, fixed))
    for start, source, target in zip(*batches):
        with torch.enable_grad():
            found = start.clone().requires_grad_()
            # the loss is summed over pixels, so that a pixel's gradient does not shrink with batch or size:
            # eps is negligible where the images differ, and stops Adam from moving where they agree
            optimizer = torch.optim.Adam([found], lr=lr, eps=1e-3)
            for _ in range(steps):
                displacement = resize_displacement(integrate(found), target.shape[-2:])
                image = F.mse_loss(warp(source, displacement), target)
                optimizer.zero_grad()
                (target.numel() * (image + smoothness * diffusion(found))).backward()
                optimizer.step()
        parts.append(found.detach())
    return torch.cat(parts)


@torch.no_grad()
def displacements(velocity, size):
    """Displacements (B, 2, H, W), pixels, of velocities (B, 2, h, w), by `remove_folds`; size = (H, W)."""
    return torch.cat([remove_folds(part, size) for part in velocity.split(_inference_batch(velocity))])


def register(network, moving, fixed, labels, steps=0):
    """Displacements (B, 2, H, W), pixels, that warp `moving` onto `fixed`; see `velocities` and `refine`."""
    velocity = refine(velocities(network, moving, fixed, labels), moving, fixed, steps)
    return displacements(velocity, moving.shape[-2:])


@torch.no_grad()
def segment(network, images):
    """Softmax probabilities (B, 4, H, W) of slices (B, 1, H, W), float32."""
    with mixed_precision(images.device):
        parts = [network(part).float().softmax(1) for part in images.split(_inference_batch(images))]
    return torch.cat(parts)
