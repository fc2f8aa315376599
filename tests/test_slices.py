"""What a step draws: the right frames of the right slice, with the labels that belong to them.

Every slice of the cache here is filled with the number of its row, so that a batch shows where it comes from.
"""

import dataclasses
import io

import h5py
import numpy as np
import pytest
import torch

from cardiac import slices as slices_module
from cardiac.cache import Cache, CachedCase, SliceFile
from cardiac.losses import IGNORED
from cardiac.propagation import Propagated
from cardiac.slices import LabelledSlices, Pairs, SliceStore, step_generator

CPU = torch.device("cpu")
SIDE = 16


def cached(code, slices, frames, ed, es, first, first_label):
    known = {field.name: None for field in dataclasses.fields(CachedCase)}
    known.update(code=code, split="Training", vendor="A", ed=ed, es=es, shape=(20, 20, slices, frames))
    return CachedCase(**{**known, "first": first, "first_label": first_label, "withheld": ()})


LAST = cached("LAST", 3, 5, ed=4, es=1, first=0, first_label=0)  # ED is the last frame
NONE = cached("NONE", 2, 4, None, None, first=15, first_label=None)
FIRST = cached("FIRST", 1, 3, ed=0, es=2, first=23, first_label=6)
CASES = [FIRST, NONE, LAST]  # not in the order of the file


@pytest.fixture
def cache(tmp_path):
    path = tmp_path / "numbered.h5"
    with h5py.File(path, "w") as file:
        rows = np.arange(26, dtype=np.float16).reshape(-1, 1, 1)
        file["images"] = np.ones((26, SIDE, SIDE), np.float16) * rows
        file["labels"] = np.ones((8, SIDE, SIDE), np.uint8) * np.arange(8, dtype=np.uint8).reshape(-1, 1, 1)
    return Cache(SliceFile(path), tmp_path, "numbered", SIDE, 1.0, (LAST, NONE, FIRST))


def origin(row):
    """(case, frame, slice) of a row of the file."""
    case = max((case for case in CASES if case.first <= row), key=lambda case: case.first)
    return case, *divmod(row - case.first, case.slices)


def draw_pairs(cache, labelled_share=0.5, steps=4, batch=256, **options):
    """Yield rows of moving and fixed, their label rows and whether both are labelled, of some steps."""
    pairs = Pairs(SliceStore(cache, options.get("cases", CASES), CPU), labelled_share)
    for step in range(steps):
        drawn = pairs.draw(batch, 0, step)
        assert drawn.moving.shape == drawn.fixed.shape == (batch, 1, SIDE, SIDE)
        assert drawn.moving.dtype == torch.float32
        corners = (drawn.moving[:, 0], drawn.fixed[:, 0], drawn.moving_labels, drawn.fixed_labels)
        values = [each[:, 0, 0].int().tolist() for each in corners]
        yield from zip(*values, drawn.labelled.tolist())


def expected_label(case, frame, z):
    if not case.labelled or frame not in (case.ed, case.es):
        return IGNORED
    return int(case.label_rows(frame)[z])


def test_a_pair_is_ed_and_another_frame_of_one_slice_either_way_round_with_its_own_labels(cache):
    seen = set()
    for moving, fixed, moving_label, fixed_label, labelled in draw_pairs(cache):
        (case, a, z), (other_case, b, other_z) = origin(moving), origin(fixed)
        assert (case.code, z) == (other_case.code, other_z)
        assert a != b
        assert moving_label == expected_label(case, a, z)
        assert fixed_label == expected_label(case, b, z)
        assert labelled == (case.labelled and {a, b} == {case.ed, case.es})
        if case.labelled:
            assert case.ed in (a, b)
        seen.add((case.code, z, a, b))
    for case in CASES:  # every frame, every slice, both directions
        frames = [(a, b) for a in range(case.frames) for b in range(case.frames) if a != b]
        allowed = [(a, b) for a, b in frames if not case.labelled or case.ed in (a, b)]
        assert {key for key in seen if key[0] == case.code} == {
            (case.code, z, a, b) for z in range(case.slices) for a, b in allowed
        }


def test_every_slice_is_as_likely_as_any_other(cache):
    counts = {}
    for moving, *_ in draw_pairs(cache, steps=12):
        case, _, z = origin(moving)
        counts[case.code, z] = counts.get((case.code, z), 0) + 1
    assert len(counts) == 6
    assert max(counts.values()) < 1.3 * min(counts.values())


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0.25), (0.5, 0.625), (1.0, 1.0)])
def test_the_share_of_pairs_with_two_labels(cache, share, expected):
    drawn = [labelled for *_, labelled in draw_pairs(cache, share, cases=[LAST])]
    assert np.mean(drawn) == pytest.approx(expected, abs=0.06)  # by chance ED meets ES in 1 of 4


@pytest.mark.parametrize("hidden", [LAST.ed, LAST.es])
def test_where_one_phase_is_unknown_no_pair_has_two_labels_or_is_drawn_more_often(cache, hidden):
    drawn = list(draw_pairs(cache, 1.0, cases=[dataclasses.replace(LAST, withheld=(hidden,))]))
    assert not any(labelled for *_, labelled in drawn)
    label_of = {hidden: {IGNORED}, LAST.es + LAST.ed - hidden: {0, 1, 2, 3, 4, 5}}
    both = 0
    for moving, fixed, moving_label, fixed_label, _ in drawn:
        frames = [origin(row)[1] for row in (moving, fixed)]
        both += set(frames) == {LAST.ed, LAST.es}
        for frame, label in zip(frames, (moving_label, fixed_label)):
            assert label in label_of.get(frame, {IGNORED})
    assert both / len(drawn) == pytest.approx(0.25, abs=0.06)


def test_a_case_of_one_frame_is_paired_with_itself(cache):
    still = dataclasses.replace(NONE, shape=(20, 20, 2, 1))
    assert all(moving == fixed for moving, fixed, *_ in draw_pairs(cache, cases=[still]))


def batch_of(source, seed, step):
    drawn = source.draw(8, seed, step)
    parts = dataclasses.astuple(drawn) if dataclasses.is_dataclass(drawn) else drawn
    return [part.clone() for part in parts]


@pytest.mark.parametrize("kind", ["pairs", "labelled"])
def test_what_a_step_draws_depends_on_seed_and_step_alone(cache, kind):
    def source():
        store = SliceStore(cache, CASES, CPU)
        return Pairs(store, 0.5) if kind == "pairs" else LabelledSlices(store)

    one, other = source(), source()
    torch.manual_seed(1)
    forwards = [batch_of(one, 7, step) for step in range(5)]
    torch.manual_seed(2)
    backwards = [batch_of(other, 7, step) for step in reversed(range(5))][::-1]
    for first, second in zip(forwards, backwards):
        assert all(torch.equal(a, b) for a, b in zip(first, second))
    others = (batch_of(one, *where)[0][:, 0, 0, 0] for where in ((7, 0), (7, 1), (8, 0), (1, 7)))
    assert len({tuple(rows.tolist()) for rows in others}) == 4


def test_generators_of_neighbouring_seeds_and_steps_differ():
    states = {step_generator(seed, step).initial_seed() for seed in range(10) for step in range(100)}
    assert len(states) == 1000


@pytest.mark.parametrize("place", ["device", "host", "file"])
def test_every_placement_gives_the_same_batches(cache, place):
    def batches(place):
        store = SliceStore(cache, CASES, CPU, place=place)
        labels = propagated((LAST.code, 1, 0), (LAST.code, 1, 1))
        sources = Pairs(store, 0.5), LabelledSlices(store), LabelledSlices(store, labels)
        return [batch_of(source, 0, step) for source in sources for step in range(3)]

    expected, found = batches(None), batches(place)
    for one, other in zip(found, expected):
        assert all(torch.equal(a, b) for a, b in zip(one, other))


def test_a_cache_that_is_built_anew_does_not_change_what_a_run_reads(cache):
    store = SliceStore(cache, CASES, CPU, place="file")
    rows = torch.tensor([3, 0, 7])
    before = store.images(rows)
    other = cache.path.with_name("other.h5")
    with h5py.File(other, "w") as file:
        file["images"] = np.zeros((40, SIDE, SIDE), np.float16)
    other.replace(cache.path)
    assert torch.equal(store.images(rows), before)


def test_slices_go_where_they_fit(monkeypatch):
    cuda, free = torch.device("cuda"), slices_module.TRAINING_BYTES + 1000  # room for training and 1000 more
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2 * free))
    assert [slices_module._place(size, cuda) for size in (499, 500, 10**15)] == ["device", "host", "file"]
    assert [slices_module._place(size, CPU) for size in (500, 10**15)] == ["device", "file"]


def test_four_fifths_of_the_free_memory_are_for_slices_and_labels_shared_by_processes(monkeypatch):
    def free(path):
        return io.StringIO("MemTotal:  9000 kB\nMemAvailable:   1000 kB\n")

    monkeypatch.setattr(slices_module, "open", free, raising=False)
    fits = 0.4 * 1000 * 1024
    assert [slices_module._place(size, CPU) for size in (fits - 1, fits)] == ["device", "file"]
    monkeypatch.setattr(slices_module, "ON_THIS_HOST", 2)
    assert [slices_module._place(size, CPU) for size in (fits / 2 - 1, fits / 2)] == ["device", "file"]


@pytest.mark.parametrize("place", ["device", "host", "file"])
def test_the_choice_is_by_their_bytes_and_printed(cache, monkeypatch, capsys, place):
    asked = []
    monkeypatch.setattr(slices_module, "_place", lambda size, device: asked.append(size) or place)
    SliceStore(cache, CASES, CPU, "training")
    assert asked == [26 * SIDE * SIDE * 2]
    line = capsys.readouterr().out
    assert line.startswith("training: 3 cases, 26 slices, 0.00 GB")
    assert {"device": "on the device", "host": "in host memory", "file": "in the file"}[place] in line


def drawn_slices(slices):
    """{(row, label)} of many draws."""
    images, labels, _ = zip(*(slices.draw(64, 0, step) for step in range(6)))
    images, labels = torch.cat(images)[:, 0, 0, 0].int(), torch.cat(labels)[:, 0, 0].int()
    return set(zip(images.tolist(), labels.tolist()))


EXPERT = {
    (int(row), int(label))
    for case in (LAST, FIRST)
    for frame in (case.ed, case.es)
    for row, label in zip(case.rows(frame), case.label_rows(frame))
}


def test_expert_slices_alone_come_with_their_own_labels(cache):
    slices = LabelledSlices(SliceStore(cache, CASES, CPU))
    assert len(slices) == slices.expert_count == 8
    assert drawn_slices(slices) == EXPERT  # the one filled with 0 is background, drawn like others


def propagated(*where):
    labels = np.ones((len(where), SIDE, SIDE), np.uint8) * np.arange(50, 50 + len(where)).reshape(-1, 1, 1)
    return Propagated(labels.astype(np.uint8), list(where), np.ones(len(where), np.float32))


def test_propagated_slices_are_drawn_beside_the_expert_ones_and_the_others_never(cache):
    where = ("LAST", 0, 2), ("FIRST", 1, 0), ("LAST", 0, 0)  # slice 1 of LAST has no label at ED
    slices = LabelledSlices(SliceStore(cache, CASES, CPU), propagated(*where))
    assert (slices.expert_count, len(slices)) == (8, 11)
    assert drawn_slices(slices) == EXPERT | {(2, 50), (24, 51), (0, 52)}


def test_propagated_slices_of_patients_held_out_for_validation_are_left_out(cache):
    where = ("FIRST", 1, 0), ("LAST", 0, 2), ("GONE", 3, 1)
    slices = LabelledSlices(SliceStore(cache, [LAST], CPU), propagated(*where))
    assert drawn_slices(slices) == {pair for pair in EXPERT if pair[0] < 15} | {(2, 51)}


def test_an_empty_set_of_propagated_slices_changes_nothing(cache):
    empty = Propagated(np.zeros((0, SIDE, SIDE), np.uint8), [], np.zeros(0, np.float32))
    assert drawn_slices(LabelledSlices(SliceStore(cache, CASES, CPU), empty)) == EXPERT


@pytest.mark.parametrize("expert_share", [0.0, 0.5])
@pytest.mark.parametrize("place", ["device", "host"])
def test_every_slice_comes_with_its_own_trust(cache, expert_share, place):
    labels = propagated(("LAST", 0, 2), ("GONE", 3, 1), ("FIRST", 1, 0), ("LAST", 0, 0))
    labels.trust = labels.labels + 100
    slices = LabelledSlices(SliceStore(cache, CASES, CPU, place=place), labels, expert_share)
    drawn = [slices.draw(64, 0, step) for step in range(6)]
    images, labels, trust = (torch.cat(each).flatten(1)[:, 0].int().tolist() for each in zip(*drawn))
    propagated_ones = {(2, 50, 150), (24, 52, 152), (0, 53, 153)}  # 51 is of a patient that is not trained on
    assert set(zip(images, labels, trust)) == {(*pair, 255) for pair in EXPERT} | propagated_ones
    count = sum(value >= 50 for value in labels)
    if expert_share:  # half of the draws, although they are fewer
        assert 150 < count < 240
    assert all(labels.count(value) > 16 for value in (50, 52, 53)), "each of them is drawn"


def test_the_share_of_expert_slices_holds_and_no_draw_is_out_of_range(cache, monkeypatch):
    where = [("LAST", 0, z) for z in range(3)]
    slices = LabelledSlices(SliceStore(cache, CASES, CPU), propagated(*where), expert_share=0.75)
    labels = torch.cat([slices.draw(256, 0, step)[1][:, 0, 0] for step in range(8)])
    assert (labels < 50).float().mean().item() == pytest.approx(0.75, abs=0.03)
    slices.rows, slices.expert_count = torch.zeros(16800, dtype=torch.long), 3300
    nearly_one = torch.full((2, 4), 1 - 2**-24)  # the largest that torch.rand draws
    monkeypatch.setattr(torch, "rand", lambda *size, generator: nearly_one)
    monkeypatch.setattr(slices, "labels", torch.zeros(16800, SIDE, SIDE, dtype=torch.uint8))
    slices.draw(4, 0, 0)
