"""The two networks: shapes, widths of the papers, precision, and that training starts from the identity."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cardiac import networks
from cardiac.losses import one_hot
from cardiac.networks import (
    Mirrored,
    RegistrationNetwork,
    SegmentationNetwork,
    Turned,
    refine,
    register,
    segment,
)
from cardiac.warp import integrate, resize_displacement, warp


def pair(*size):
    """Moving and fixed slices, and labels of the moving ones, as regions."""
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(2, 1, *size, generator=generator) for _ in range(2)]
    return *images, one_hot(torch.randint(4, (2, *size), generator=generator))


def convolutions(module):
    return [m for m in module.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))]


@pytest.mark.parametrize("size", [(16, 16), (32, 48), (112, 112), (96, 64)])
def test_shapes_at_every_multiple_of_16(size):
    moving, fixed, regions = pair(*size)
    network = RegistrationNetwork()
    assert network(moving, fixed, regions).shape == (2, 2, size[0] // 2, size[1] // 2)
    assert register(network, moving, fixed, regions[:, 0].byte()).shape == (2, 2, *size)
    segmentation = SegmentationNetwork(2)
    assert segmentation(moving).shape == (2, 4, *size)
    assert segment(segmentation.eval(), moving).shape == (2, 4, *size)


@pytest.mark.parametrize(("width", "parameters"), [(1, 104_562), (2, 416_482)])
def test_registration_has_the_feature_widths_of_voxelmorph_and_stops_at_half_resolution(width, parameters):
    network = RegistrationNetwork(width=width)
    features = [
        (16, 32), (32, 32), (32, 32),  # encoder
        (32, 32), (64, 32), (64, 32), (64, 32),  # decoder, skips concatenated
        (32, 32), (32, 16), (16, 16),  # last
    ]
    expected = [(before * width, after * width) for before, after in features]
    found = [(c.in_channels, c.out_channels) for c in convolutions(network)]
    assert found == [(2, 16 * width), *expected, (16 * width, 2)]
    assert {c.kernel_size for c in convolutions(network)} == {(3, 3)}
    assert {m.negative_slope for m in network.modules() if isinstance(m, nn.LeakyReLU)} == {0.2}
    assert sum(p.numel() for p in network.parameters()) == parameters


@pytest.mark.parametrize("guided", [False, True])
def test_registration_is_voxelmorphs_diagram(guided):
    """Values and gradients: levels of convolution and activation, nearest upsampling, skips concatenated."""
    torch.manual_seed(0)
    network = RegistrationNetwork(guided).double()
    nn.init.normal_(network.velocity.weight)
    nn.init.normal_(network.velocity.bias)
    moving, fixed, regions = (each.double() for each in pair(32, 48))

    found = network(moving, fixed, regions)
    x, skips = torch.cat([moving, fixed, regions] if guided else [moving, fixed], 1), []
    for level in network.encoder:
        skips.append(level(x))
        x = F.max_pool2d(skips[-1], 2)
    for level in network.decoder[:-1]:
        x = torch.cat([F.interpolate(level(x), scale_factor=2, mode="nearest"), skips.pop()], 1)
    expected = network.velocity(network.last(network.decoder[-1](x)))
    weight = torch.randn(found.shape, dtype=float)
    parts = list(network.parameters())
    both = [torch.autograd.grad((each * weight).sum(), parts) for each in (found, expected)]
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*both, rtol=1e-4, atol=1e-4)


def test_segmentation_has_the_channels_of_the_paper():
    network = SegmentationNetwork()
    assert [level[0].out_channels for level in network.down] == [32, 64, 128, 256, 512]
    assert [(up.in_channels, up.out_channels) for up in network.up] == [
        (512, 256), (256, 128), (128, 64), (64, 32)
    ]
    assert {c.kernel_size for c in convolutions(network.down)} == {(3, 3)}
    assert (network.classify.in_channels, network.classify.out_channels) == (32, 4)
    assert network.classify.kernel_size == (1, 1)
    widths = [32, 64, 128, 256, 512]

    def double(before, after):  # two 3x3 convolutions without bias, two batch norms
        return 9 * before * after + 9 * after * after + 4 * after

    expected = sum(double(a, b) for a, b in zip([1, *widths], widths))
    expected += sum(4 * 2 * w * w + w + double(2 * w, w) for w in widths[:-1]) + 32 * 4 + 4
    assert sum(p.numel() for p in network.parameters()) == expected


@pytest.mark.parametrize("channels", [1, 2, 16])
def test_segmentation_scales_with_its_first_level(channels):
    widths = [level[0].out_channels for level in SegmentationNetwork(channels).down]
    assert widths == [channels * 2**k for k in range(5)]


def test_training_starts_from_the_identity():
    torch.manual_seed(0)
    network, (moving, fixed, regions) = RegistrationNetwork(), pair(32, 32)
    velocity = network(moving, fixed, regions)
    assert 0 < velocity.abs().max() < 1e-3
    assert not network.velocity.bias.any()
    assert network.velocity.weight.std().item() == pytest.approx(1e-5, rel=0.2)
    displacement = resize_displacement(integrate(velocity), (32, 32))
    assert displacement.abs().max() < 1e-2


def test_velocity_is_computed_in_float32_under_autocast():
    torch.manual_seed(0)
    network, (moving, fixed, regions) = RegistrationNetwork(), pair(32, 32)
    nn.init.normal_(network.velocity.weight, std=0.3)
    with torch.autocast("cpu", torch.bfloat16):
        velocity = network(moving, fixed, regions)
    assert velocity.dtype == torch.float32
    rounded = velocity.bfloat16().float()
    assert (velocity != rounded).float().mean() > 0.5, "the last convolution itself ran in bfloat16"
    velocity.square().mean().backward()
    assert all(p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize(
    ("device", "made_for_it", "precision", "expected"),
    [
        ("cpu", True, "auto", False),
        ("cuda", True, "auto", True),
        ("cuda", False, "auto", False),
        ("cuda", True, "float32", False),
        ("cuda", False, "bfloat16", True),
        ("cpu", False, "bfloat16", True),
        ("cpu", False, "float32", False),
    ],
)
def test_precision_is_that_of_the_device_unless_it_is_named(
    monkeypatch, device, made_for_it, precision, expected
):
    def supported(including_emulation):
        return made_for_it or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    monkeypatch.setattr(torch, "autocast", lambda *words, enabled: (words, enabled))
    found = networks.mixed_precision(torch.device(device), precision)
    assert found == ((device, torch.bfloat16), expected)


def test_swapping_the_slices_changes_the_velocity():
    torch.manual_seed(0)
    network, (moving, fixed, regions) = RegistrationNetwork(), pair(32, 32)
    one, other = network(moving, fixed, regions), network(fixed, moving, regions)
    assert not torch.allclose(one, other, atol=1e-9)


def test_only_a_guided_network_sees_the_labels():
    for guided in (False, True):
        torch.manual_seed(0)
        network, (moving, fixed, regions) = RegistrationNetwork(guided), pair(32, 32)
        with_labels, without = network(moving, fixed, regions), network(moving, fixed, 0 * regions)
        assert torch.equal(with_labels, without) != guided


def test_batches_do_not_change_what_inference_gives(monkeypatch):
    def in_batches(function, *arguments):
        for size in (64, 2):
            monkeypatch.setattr(networks, "_inference_batch", lambda images, size=size: size)
            yield function(*arguments)

    torch.manual_seed(0)
    moving, fixed = torch.rand(5, 1, 32, 32), torch.rand(5, 1, 32, 32)
    registration, segmentation = RegistrationNetwork(), SegmentationNetwork(2).eval()
    nn.init.normal_(registration.velocity.weight, std=0.1)
    labels = torch.zeros(5, 32, 32, dtype=torch.uint8)
    whole, parts = in_batches(register, registration, moving, fixed, labels)
    torch.testing.assert_close(whole, parts, atol=1e-4, rtol=1e-4)
    assert not whole.requires_grad
    whole, parts = in_batches(segment, segmentation, moving)
    torch.testing.assert_close(whole, parts, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(whole.sum(1), torch.ones(5, 32, 32))


def blobs(*places):
    """Images (B, 1, 32, 32), each a bright blob about one of these places (y, x)."""
    position = torch.stack(torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij"))
    offset = position - torch.tensor(places).view(-1, 2, 1, 1)
    return torch.exp(-offset.square().sum(1, keepdim=True) / 50)


def test_refining_fits_a_velocity_to_its_own_pair_whatever_else_is_in_the_batch():
    moving, fixed = blobs((16.0, 16.0), (14.0, 18.0)), blobs((18.0, 16.0), (14.0, 18.0))
    start = torch.zeros(2, 2, 16, 16)
    assert torch.equal(refine(start, moving, fixed, 0), start)
    found = refine(start, moving, fixed, 20)
    assert not found.requires_grad
    assert not start.any(), "the start is not changed"
    displacement = resize_displacement(integrate(found), (32, 32))
    assert (displacement[0, 0, 12:24, 12:20].mean() + 2).abs() < 0.4  # back to where the blob was
    left = (warp(moving, displacement) - fixed).square().mean((1, 2, 3))
    assert left[0] < 0.02 * (moving - fixed)[0].square().mean()
    assert found[1].abs().max() < 1e-3, "nothing to do there"
    torch.testing.assert_close(refine(start[:1], moving[:1], fixed[:1], 20), found[:1])
    smoother = refine(start, moving, fixed, 20, smoothness=10.0)
    assert smoother[0].diff(dim=-1).abs().mean() < 0.5 * found[0].diff(dim=-1).abs().mean()


def test_mirror_images_are_predicted_as_mirror_images():
    torch.manual_seed(0)
    network, (slices, *_) = SegmentationNetwork(2).eval(), pair(32, 48)
    plain, mirrored = (segment(each, slices) for each in (network, Mirrored(network)))
    assert not torch.allclose(segment(network, slices.flip(2)).flip(2), plain, atol=1e-4)
    for axes in ((2,), (3,), (2, 3)):
        torch.testing.assert_close(segment(Mirrored(network), slices.flip(axes)).flip(axes), mirrored)
    views = [segment(network, slices.flip(axes)).flip(axes) for axes in ((), (2,), (3,), (2, 3))]
    torch.testing.assert_close(mirrored, torch.stack(views).mean(0))


def test_a_pair_turned_by_180_degrees_has_the_velocity_turned():
    torch.manual_seed(0)
    network, slices = RegistrationNetwork(guided=True), pair(32, 48)
    nn.init.normal_(network.velocity.weight, std=0.1)

    def of_turned_slices(each):
        return -each(*(s.flip(2, 3) for s in slices)).flip(2, 3)

    plain, turned = network(*slices), Turned(network)(*slices)
    assert not torch.allclose(of_turned_slices(network), plain, atol=1e-3)
    torch.testing.assert_close(of_turned_slices(Turned(network)), turned)
    torch.testing.assert_close(turned, (plain + of_turned_slices(network)) / 2)


def test_every_parameter_learns():
    slices = pair(32, 32)
    guided = RegistrationNetwork(guided=True)
    for network, inputs in (
        (RegistrationNetwork(), slices),
        (guided, slices),
        (SegmentationNetwork(2), slices[:1]),
    ):
        network(*inputs).square().sum().backward()
        assert all(p.grad is not None and p.grad.any() for p in network.parameters() if p.dim() > 1)


def test_a_segmentation_begins_with_background_as_frequent_as_it_is():
    torch.manual_seed(0)
    shares = SegmentationNetwork(8)(torch.rand(4, 1, 32, 32)).softmax(1).mean((0, 2, 3))
    assert 0.75 < shares[0] < 0.95
    assert (shares[1:] > 0.01).all()
