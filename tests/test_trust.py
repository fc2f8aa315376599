"""Trust: high where both phases agree and the image fits, low elsewhere; and what counts as a fault."""

import pytest
import torch

from cardiac import trust
from cardiac.propagation import Carried

SIDE = 40
GRID = torch.stack(torch.meshgrid(*[torch.arange(float(SIDE))] * 2, indexing="ij"))


def ring(inner=6.0, outer=10.0, centre=(20.0, 20.0)):
    """Labels (S, S): an LV of radius `inner` in a myocardium up to `outer`."""
    r = (GRID - torch.tensor(centre).view(2, 1, 1)).norm(dim=0)
    return torch.where(r < inner, 1, torch.where(r < outer, 2, 0)).to(torch.uint8)


def carried(labels, residual=0.0, present=(True,)):
    """What `carry` would return for labels (F, Z, S, S)."""
    regions = torch.stack([labels == k for k in (1, 2, 3)], 2).float()
    flat = torch.ones(labels.shape)
    confidence = torch.where(torch.tensor(present), 1.0, torch.nan).expand(labels.shape[:2])
    areas = regions[0].sum((-2, -1)) * torch.tensor(present)[:, None]
    residual = residual * flat
    return Carried(regions, residual, residual, confidence, torch.zeros(labels.shape[:2]), areas)


def fuse(ed, es, elapsed):
    elapsed = torch.tensor(elapsed)
    return trust.fuse({"ED": ed, "ES": es}, {"ED": 1 - elapsed, "ES": elapsed})


def frames(*labels):
    """Labels (F, 1, S, S) of one slice."""
    return torch.stack(labels)[:, None]


def test_two_phases_that_agree_are_trusted_and_where_they_do_not_the_nearer_one_decides():
    small, large = ring(6), ring(8)
    regions, certainty, sources = fuse(carried(frames(small)), carried(frames(small)), [0.5])
    assert torch.equal(regions[0, 0].argmax(0)[small == 1], torch.zeros(int((small == 1).sum())).long())
    assert torch.allclose(certainty, torch.ones_like(certainty))
    assert sources["ED"].all()
    assert sources["ES"].all()
    for elapsed, nearer in ((0.2, small), (0.8, large)):
        regions, certainty, _ = fuse(carried(frames(small)), carried(frames(large)), [elapsed])
        assert torch.equal(regions[0, 0, 0] > 0.5, nearer == 1)
        assert torch.allclose(certainty[0, 0][small != large], torch.tensor(0.8)), "its share of the guesses"
        assert torch.allclose(certainty[0, 0][small == large], torch.tensor(1.0))


def test_an_image_that_does_not_fit_costs_trust_and_weight():
    small, large = ring(6), ring(8)
    bad = carried(frames(small), residual=3 * trust.RESIDUAL_SCALE)
    regions, _, _ = fuse(bad, carried(frames(large)), [0.5])
    assert torch.equal(regions[0, 0, 0] > 0.5, large == 1), "the one that fits decides"
    _, certainty, _ = fuse(bad, bad, [0.5])
    assert torch.allclose(certainty, torch.full_like(certainty, torch.e**-3))


def test_a_label_that_does_not_come_back_as_itself_costs_the_whole_slice():
    bad = carried(frames(ring()))
    bad.confidence = torch.tensor([[0.25]])
    _, certainty, _ = fuse(bad, bad, [0.5])
    assert torch.allclose(certainty, torch.tensor(0.25))


def test_a_slice_that_one_phase_lacks_is_the_other_ones_in_the_nearer_half_and_trusted_less_with_time():
    labels = frames(ring(), ring(), ring())
    missing = carried(torch.zeros_like(labels), residual=0.2, present=(False,))
    _, certainty, sources = fuse(carried(labels), missing, [0.25, 0.5, 0.75])
    assert sources["ED"][:, 0].tolist() == [True, True, False]
    assert not sources["ES"].any()
    assert certainty[:, 0, 0, 0].tolist() == pytest.approx([0.75, 0.5, 0])


@pytest.mark.parametrize("alone", ["ED", "ES"])
def test_a_slice_that_one_phase_lacks_is_given_up_once_from_where_the_images_are_more_like_the_other(alone):
    labels = frames(*[ring()] * 5)
    missing = carried(torch.zeros_like(labels), residual=0.2, present=(False,))
    there = carried(labels)
    for differences, still in (
        ((0.1, 0.1, 0.3, 0.3, 0.3), 2),
        ((0.1, 0.25, 0.1, 0.3, 0.3), 3),  # one frame that does not fit is not the end
        ((0.3, 0.1, 0.1, 0.1, 0.1), 4),
        ((0.3, 0.3, 0.3, 0.3, 0.3), 0),
        ((0.0, 0.0, 0.0, 0.0, 0.0), 4),  # only the nearer half
    ):
        # worse where the label lies, better in the slice as a whole
        for order in ([0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [2, 0, 1, 4, 3]):  # away from the phase, towards it
            there.unrefined = torch.tensor(differences)[order].view(5, 1, 1, 1) * (labels > 0)
            away = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.6])[order]
            phases = {alone: there, "ES" if alone == "ED" else "ED": missing}
            nearness = {phase: 1 - away if phase == alone else away for phase in phases}
            _, _, sources = trust.fuse(phases, nearness)
            assert sources[alone][:, 0].tolist() == [k < still for k in order]


def test_one_known_phase_is_trusted_by_its_fit_alone():
    labels = frames(ring(), ring())
    nearness = {"ES": torch.tensor([0.5, 0.0])}
    regions, certainty, sources = trust.fuse({"ES": carried(labels, residual=trust.RESIDUAL_SCALE)}, nearness)
    assert torch.allclose(regions[:, :, 0], (labels == 1).float())
    assert torch.allclose(certainty, torch.full_like(certainty, torch.e**-1))
    assert sources["ES"].all()


def test_the_expected_dice_is_that_of_a_label_whose_pixels_are_wrong_as_often_as_trust_says():
    labels = frames(ring(), torch.zeros_like(ring()))
    assert trust.expected_dice(labels, torch.ones(labels.shape))[0].item() == pytest.approx(1)
    assert trust.expected_dice(labels, torch.ones(labels.shape))[1].isnan()
    rim = (ring(5, 11) == 2) & (ring() == 1)  # the outermost pixels of LV, each right by a coin toss
    certainty = torch.where(rim, 0.5, 1.0).expand(labels.shape)
    draws = torch.rand((500, *rim.shape), generator=torch.Generator().manual_seed(0)) < 0.5
    truth = torch.where(rim & draws, 2, ring())
    scores = []
    for label in (1, 2):
        shared = ((truth == label) & (ring() == label)).sum((-2, -1))
        scores.append(2 * shared / ((truth == label).sum((-2, -1)) + (ring() == label).sum()))
    expected = trust.expected_dice(labels, certainty)[0].item()
    assert expected == pytest.approx(torch.stack(scores).mean().item(), abs=0.01)


def heart(slices=5, rv_from=1, base_first=True):
    """Labels (Z, S, S) of a stack whose base has a larger wall, and an RV in slices from the base on."""
    stack = torch.stack([ring(6 - z / 2, 10 - z / 2) for z in range(slices)])
    crescent = (ring(5, 6, (20.0, 34.0)) > 0) & (stack == 0)
    stack[rv_from : slices - 1][crescent[rv_from : slices - 1]] = 3
    return stack if base_first else stack.flip(0)


@pytest.mark.parametrize("base_first", [True, False])
def test_where_es_is_not_known_the_outermost_slices_lose_regions_as_the_heart_shortens(base_first):
    labels = heart(base_first=base_first).expand(3, -1, -1, -1)
    remaining = torch.tensor([1.0, 0.5, 0.0])
    regions, certainty, sources = trust.fuse({"ED": carried(labels, present=(True,) * 5)}, {"ED": remaining})
    assert sources["ED"].all()
    shares = regions.amax((-2, -1))  # (F, Z, 3): every region that is shown has pixels of its own
    shares = shares if base_first else shares.flip(1)
    assert (shares[0, :, :2] == 1).all()
    assert shares[0, :, 2].tolist() == [0, 1, 1, 1, 0]
    base, apex = (torch.tensor(trust.GONE_AT_ES[end]) for end in ("base", "apex"))
    for frame, share in enumerate(remaining):
        left = 1 - (1 - share) * torch.stack([base, apex])
        assert torch.allclose(shares[frame, [0, 4], :2], left[:, :2])
        assert torch.allclose(shares[frame, [1, 3], 2], left[:, 2]), "the RV's outermost, not the stack's"
        assert (shares[frame, 1:4, :2] == 1).all()
        assert shares[frame, 2, 2] == 1
    es = certainty[2] if base_first else certainty[2].flip(0)
    rv = labels[0] == 3 if base_first else labels[0].flip(0) == 3
    assert torch.allclose(es[1][rv[1]], base[2]), "likelier gone than there: background, by that probability"
    assert torch.allclose(es[3][rv[3]], 1 - apex[2]), "likelier there than gone"


def test_es_alone_and_short_stacks_keep_what_they_show():
    for phase, slices in (("ES", 5), ("ED", 2)):
        labels = heart(slices).expand(2, -1, -1, -1)
        whole = carried(labels, present=(True,) * slices)
        regions, _, sources = trust.fuse({phase: whole}, {phase: torch.tensor([0.5, 0.0])})
        assert torch.equal(regions, whole.regions)
        assert sources[phase].all()


def test_regions_of_two_slices_and_what_two_phases_know_do_not_shrink():
    labels = heart(rv_from=2)  # an RV of two slices in a stack of five
    gone = trust.loss_probability(torch.stack([(labels == k).sum((1, 2)) for k in (1, 2, 3)], 1))
    assert (gone[:, 2] == 0).all()
    assert (gone[[0, 4], :2] > 0).all()
    known = carried(heart().expand(1, -1, -1, -1), present=(True,) * 5)
    regions, _, _ = fuse(known, known, [0.9])
    assert torch.allclose(regions, known.regions)


def test_a_small_slice_beyond_the_base_does_not_turn_the_stack_round():
    pixels = torch.tensor([[0, 0, 60], [90, 150, 150], [80, 140, 120], [60, 110, 80], [20, 70, 0]])
    gone = trust.loss_probability(pixels)
    assert gone[0, 2].item() == pytest.approx(trust.GONE_AT_ES["base"][2])
    assert gone[3, 2].item() == pytest.approx(trust.GONE_AT_ES["apex"][2])


def test_the_base_is_the_larger_half_of_all_slices_that_show_anything():
    pixels = torch.tensor([[10, 50, 0], [60, 100, 0], [70, 110, 20], [50, 90, 30], [0, 0, 0]])
    gone = trust.loss_probability(pixels)
    assert gone[3, 0].item() == pytest.approx(trust.GONE_AT_ES["base"][0])
    assert gone[0, 0].item() == pytest.approx(trust.GONE_AT_ES["apex"][0])


def test_enclosed():
    whole, opened = ring(), ring()
    opened[20:, 20:][opened[20:, 20:] == 2] = 0  # a quarter of the wall is missing
    both = torch.stack([whole, opened, torch.zeros_like(whole)])
    assert trust.enclosed(both).tolist() == [True, False, False]


@pytest.mark.parametrize("turns", range(4))
def test_an_lv_that_is_open_to_one_side_alone_is_not_enclosed(turns):
    opened = torch.zeros(SIDE, SIDE, dtype=torch.uint8)
    opened[14:26, 14:26] = 2
    opened[15:25, 15:25] = 1
    assert trust.enclosed(opened)
    few = opened.clone()
    few[14, 20:22] = 0  # 2 of the 40 pixels around it
    assert trust.enclosed(few.rot90(turns))
    opened[14, 20:23] = 0
    assert not trust.enclosed(opened.rot90(turns))


def faults(labels, ends, folding=0.0, elapsed=None):
    labels = frames(*labels)
    elapsed = torch.linspace(0, 1, len(labels) + 2)[1:-1] if elapsed is None else elapsed
    ends = [end if end is None else end[None] for end in ends]
    given_up = torch.zeros(labels.shape[:2], dtype=bool)
    found = trust.faults(labels, ends, elapsed, torch.full(labels.shape[:2], folding), given_up, 2.0)
    return [row[0] for row in found]


def test_a_heart_that_contracts_smoothly_is_without_fault():
    # the wall keeps its area
    steps = [ring(inner, (inner**2 + 64) ** 0.5) for inner in (9, 8, 7, 6, 5)]
    assert faults(steps[1:-1], (steps[0], steps[-1])) == ["", "", ""]
    assert faults(steps[1:-1], (steps[0], None)) == ["", "", ""]
    assert faults(steps[1:-1], (steps[0], steps[-1]), folding=1.0) == ["folding"] * 3


def test_each_fault_is_named():
    opened = ring()
    opened[20:, 20:][opened[20:, 20:] == 2] = 0
    assert faults([ring(), opened, ring()], (ring(), ring()))[1] == "LV open; wall area"
    assert faults([ring(), ring(6, 14), ring()], (ring(), ring())) == ["", "wall area", ""]
    assert "LV area jumps" in faults([ring(), ring(9, 12), ring()], (ring(), ring()))[1]
    assert faults([ring(), opened], (opened, opened))[1] == "", "open in the source: no fault"
    assert faults([opened], (ring(), opened)) == [""], "nor if it is open at only one end"


def beating(cavity, wall):
    """Labels (S, S) with so many pixels of LV and, around it, of myocardium."""
    order = (GRID - 20.3).norm(dim=0).flatten().argsort()
    labels = torch.zeros(SIDE * SIDE, dtype=torch.uint8)
    labels[order[:cavity]], labels[order[cavity : cavity + wall]] = 1, 2
    return labels.view(SIDE, SIDE)


@pytest.mark.parametrize(("elapsed", "expected"), [(0.0, 480), (0.5, 400), (1.0, 320)])
def test_a_wall_may_be_off_by_15_percent_and_40_mm2_of_what_lies_between_its_ends(elapsed, expected):
    ends, allowed = (beating(300, 480), beating(300, 320)), round(0.15 * expected + 20)  # pixels of 2 mm2
    for change, fault in ((allowed, ""), (allowed + 1, "wall area")):
        for wall in (expected + change, expected - change):
            assert faults([beating(300, wall)], ends, elapsed=torch.tensor([elapsed])) == [fault]


@pytest.mark.parametrize(("change", "fault"), [(87, ""), (88, "LV area jumps")])
def test_an_lv_may_be_off_its_neighbours_by_15_percent_of_the_largest_and_40_mm2(change, fault):
    ends = beating(450, 300), beating(150, 300)  # 87.5 pixels: .15 x 450 + 20
    for cavity in (300 + change, 300 - change):
        assert faults([beating(cavity, 300)], ends) == [fault]


def test_areas_that_are_unknown_at_one_end_are_not_compared():
    assert faults([ring(6, 14)], (ring(), None)) == [""]
    assert faults([ring(6, 14)], (ring(), torch.zeros_like(ring()))) == [""]


def test_what_is_open_is_named_where_one_end_alone_shows_the_slice():
    opened, none = ring(), torch.zeros_like(ring())
    opened[20:, 20:][opened[20:, 20:] == 2] = 0
    assert faults([opened], (ring(), none)) == faults([opened], (ring(), None)) == ["LV open"]
    assert faults([opened], (opened, none)) == [""]


def test_a_label_that_vanishes_and_one_that_is_given_up_are_told_apart():
    none = torch.zeros_like(ring())
    assert faults([none], (ring(), none)) == ["no label left"]
    assert faults([none], (none, none)) == [""], "there was none to carry"
    given_up = torch.ones(1, 1, dtype=bool)
    ends = (ring()[None], none[None])
    found = trust.faults(frames(ring()), ends, torch.tensor([0.7]), torch.zeros(1, 1), given_up, 2.0)
    assert found == [["given up"]]
