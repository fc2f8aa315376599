"""Labels through time: expert labels of ED (and ES) warped to the frames between."""

import json
from collections import defaultdict
from dataclasses import dataclass, replace

import h5py
import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import distance_transform_edt

from cardiac import LABELS, REGIONS, trust
from cardiac.cases import load_labels
from cardiac.checkpoint import load_network
from cardiac.files import InputError, digest, hdf5_dataset, read_json, redo_command, writing_hdf5
from cardiac.losses import IGNORED, box_mean, one_hot, region_dice
from cardiac.metrics import score_case
from cardiac.networks import RegistrationNetwork, Turned, displacements, refine, register, velocities
from cardiac.parts import NO_PARTS
from cardiac.settings import MAX_WIDTH
from cardiac.slices import SliceStore
from cardiac.warp import compose, jacobian_determinant, warp
from cardiac.workers import worker_pool

# Folding is measured within this distance of the labels, not over the whole image: along either axis in
# `carry`, as Euclidean distance in `_score_own_grid`.
NEAR_HEART_MM = 10


def load_registration(out, device):
    """The trained registration network of the run in `out`, ready for inference, and its `Progress`."""
    folder = out / "registration"
    trained = read_json(folder / "config.json") if (folder / "best.pt").exists() else {}
    settings = trained.get("settings", {})
    width = settings.get("width", 1)
    if width not in range(1, MAX_WIDTH + 1):
        config = folder / "config.json"
        what = f"invalid width {width}; {redo_command(config)} --overwrite retrains it"
        raise InputError(f"{config}: {what}")
    network = RegistrationNetwork(settings.get("guided", False), int(width))
    progress = load_network(network, folder / "best.pt", device)
    return Turned(network).eval() if settings.get("turned", False) else network, progress


def frames_between(start, end, frames):
    """The frames between `start` and `end`, exclusive, going forward in time, which wraps around."""
    return [(start + step) % frames for step in range(1, (end - start) % frames)]


def intervals(case, frames):
    """The frames to label: [(start, end, frames)] of systole and, if `frames` is "all", diastole.

    start, end: "ED" and "ES" in order of time. A phase without a known label is labelled as part of systole.
    """
    systole = (case.ed, *frames_between(case.ed, case.es, case.frames), case.es)
    found = [("ED", "ES", [frame for frame in systole if frame not in case.expert])]
    if frames == "all":
        found.append(("ES", "ED", frames_between(case.es, case.ed, case.frames)))
    return found


def harden(regions):
    """Labels (..., H, W) uint8 from soft shares (..., 3, H, W) of LV, MYO and RV; the rest is background."""
    share = regions.amax(-3)  # comparisons take a quarter of the time of `max` with indices
    # 1, LV; 2 where LV is not the largest; 3, RV, where MYO is not either; 0 where background is
    lv, myo = (regions.select(-3, k) < share for k in (0, 1))
    return (1 + lv.to(torch.uint8) + (lv & myo)) * (share > 1 - regions.sum(-3))


def warp_labels(labels, displacement):
    """Warp labels (B, H, W) uint8: soft, with one arg max at the end (warped hard labels would erode)."""
    return harden(warp(one_hot(labels), displacement))


@dataclass
class Propagated:
    """Propagated labels (N, S, S) uint8; `where`: (code, frame, slice) of each; `confidence`: of each.

    trust: (N, S, S) uint8, of every pixel, 255 for 1; None: full trust, as for expert labels.
    """

    labels: np.ndarray
    where: list
    confidence: np.ndarray
    trust: np.ndarray | None = None

    def write(self, path, made_from):
        """Write labels.h5; `made_from` identifies the registration and settings used."""
        codes, frames, slices = zip(*self.where) if self.where else ((), (), ())
        with writing_hdf5(path, 2 * self.labels.nbytes + 200 * len(codes) + 2**20) as file:
            file.create_dataset("labels", data=self.labels)
            if self.trust is not None:
                file.create_dataset("trust", data=self.trust)
            file.create_dataset("case", data=np.array(codes, "S"))
            file.create_dataset("frame", data=np.array(frames, np.int32))
            file.create_dataset("slice", data=np.array(slices, np.int32))
            file.create_dataset("confidence", data=np.array(self.confidence, np.float32))
            file.attrs["made_from"] = made_from

    def digest(self):
        """A digest of what a network is trained on: labels, their places and trust."""
        arrays = [each for each in (self.labels, self.trust) if each is not None]
        return digest(json.dumps(self.where), *map(np.ascontiguousarray, arrays))

    def of(self, case):
        """The propagated labels of a case: {frame: (Z, S, S) uint8}, IGNORED in slices without any."""
        shape = case.slices, *self.labels.shape[1:]
        frames = defaultdict(lambda: np.full(shape, IGNORED, np.uint8))
        for (code, frame, z), labels in zip(self.where, self.labels):
            if code == case.code:
                frames[frame][z] = labels
        return dict(frames)

    @classmethod
    def read(cls, path):
        """Read labels.h5. Raises InputError if there is none or it is not readable."""
        if not path.exists():
            raise InputError(f"{path}: there are no propagated labels; run propagate_labels.py first")
        try:
            names = ("labels", "case", "frame", "slice", "confidence")
            with h5py.File(path) as file:
                labels, *columns = (hdf5_dataset(file, name)[:] for name in names)
                trust = hdf5_dataset(file, "trust")[:] if "trust" in file else None
            kinds = "".join(each.dtype.kind for each in (labels, *columns))
            fits = kinds == "uSiif" and labels.ndim == 3 and len({*map(len, (labels, *columns))}) == 1
            trusted = trust is None or (trust.dtype == np.uint8 and trust.shape == labels.shape)
            if not (fits and trusted) or labels.max(initial=0) > len(LABELS):
                raise ValueError("its datasets do not fit together")
            codes, *columns = (each.tolist() for each in columns)
            where = [(code.decode("ascii"), *place) for code, *place in zip(codes, *columns[:2])]
            return cls(labels, where, np.array(columns[2], np.float32), trust)
        except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
            what = f"not readable ({error}); propagate_labels.py --overwrite redoes it"
            raise InputError(f"{path}: {what}") from error


def made_from(path):
    """What the labels.h5 at `path` was made from, or None if there is no readable one."""
    try:
        with h5py.File(path) as file:
            return str(file.attrs["made_from"])
    except (OSError, KeyError):
        return None


@torch.no_grad()
def carried_to_es(network, store):
    """[Dice of ED's label with ES's, Dice after carrying it to ES] of one case, mean over regions."""
    (case,) = store.cases
    ed, es = (store.frame(case, frame) for frame in (case.ed, case.es))
    source, target = (store.expert(case, frame) for frame in (case.ed, case.es))
    warped = warp_labels(source, register(network, ed, es, source))
    return [region_dice(labels, target).nanmean().item() for labels in (source, warped)]


@dataclass
class Carried:
    """The expert labels of one phase, carried to F frames of a case of Z slices; on the device."""

    regions: torch.Tensor  # (F, Z, 3, S, S) soft shares of LV, MYO, RV
    residual: torch.Tensor  # (F, Z, S, S) image difference after warping, mean of 5 x 5 pixels
    unrefined: torch.Tensor  # (F, Z, S, S) the same by the network alone, without `refine`
    confidence: torch.Tensor  # (F, Z) Dice of the label with itself after the round trip
    folding: torch.Tensor  # (F, Z) percent of det J <= 0 near the heart
    pixels: torch.Tensor  # (Z, 3) pixels of each region in the source

    @property
    def present(self):
        """(Z,) bool, slices with a label; in others, confidence and folding are NaN."""
        return (self.pixels > 0).any(1)


@torch.no_grad()
def carry(network, store, source, frames, steps=0):
    """Carry the expert labels of frame `source` to `frames` of the one case in `store`: `Carried`.

    steps: of `networks.refine`, on the way there. The way back is a new registration, by the network alone,
    with moving and fixed swapped: exp(-v) would undo exp(v) by construction.
    """
    (case,), count = store.cases, len(frames)
    moving = store.frame(case, source).repeat(count, 1, 1, 1)
    labels = store.expert(case, source).repeat(count, 1, 1)
    fixed = store.images(torch.from_numpy(np.concatenate([case.rows(frame) for frame in frames])))

    def image_difference(displacement):
        return box_mean((warp(moving, displacement) - fixed)[:, 0].abs(), window=5)

    velocity, source_regions = velocities(network, moving, fixed, labels), one_hot(labels)
    forth = displacements(velocity, fixed.shape[-2:])
    residual = unrefined = image_difference(forth)
    if steps:
        forth = displacements(refine(velocity, moving, fixed, steps), fixed.shape[-2:])
        residual = image_difference(forth)
    regions = warp(source_regions, forth)
    carried = harden(regions)
    back = register(network, fixed, moving, carried)
    round_trip = one_hot(warp_labels(labels, compose(forth, back)))  # one interpolation: two would erode
    areas = source_regions.sum((-2, -1))
    shared = (round_trip * source_regions).sum((-2, -1))
    agreement = 2 * shared / (areas + round_trip.sum((-2, -1))).clamp(min=1)
    shown = areas > 0  # regions
    confidence = (agreement * shown).sum(1) / shown.sum(1)  # 0 / 0 is NaN: no label

    near = _dilate((labels > 0) | (carried > 0), NEAR_HEART_MM / store.cache.spacing)
    folded = (jacobian_determinant(forth) <= 0) & near
    folding = 100 * folded.sum((-2, -1)) / near.sum((-2, -1))
    folding = torch.where(shown.any(1), folding, torch.nan)
    shape = (count, case.slices)
    parts = (part.unflatten(0, shape) for part in (regions, residual, unrefined, confidence, folding))
    return Carried(*parts, areas[: case.slices])


@dataclass
class PropagatedFrames:
    """Propagated labels of F successive frames of a case, as numpy arrays."""

    labels: np.ndarray  # (F, Z, S, S) uint8
    trust: np.ndarray  # (F, Z, S, S) uint8, 255 for 1
    confidence: np.ndarray  # (F, Z), NaN in slices without a source: unlabelled, not background
    folding: np.ndarray  # (F, Z) percent
    source: list  # (F, Z) of "ED", "ES", "ED+ES", ""
    fault: list  # (F, Z) reasons why a slice with a source is not kept, else ""


def propagate_interval(network, store, start, end, frames, trusted, steps=0):
    """Labels of successive `frames` between two phases of the one case in `store`: a `PropagatedFrames`.

    As in the paper: ED's labels warped (ES's if ED's are unknown), with their Dice after the round trip as
    confidence. `trusted`: labels fused, weighted and checked as in `trust.py`. steps: as for `carry`.
    """
    (case,) = store.cases
    known = [phase for phase in ("ED", "ES") if case.phases[phase] in case.expert]
    used = known if trusted else known[:1]
    carried = {phase: carry(network, store, case.phases[phase], frames, steps) for phase in used}
    folding = torch.stack([each.folding for each in carried.values()]).nan_to_num(-1).amax(0)
    span = (case.phases[end] - case.phases[start]) % case.frames
    elapsed = torch.tensor([(frame - case.phases[start]) % case.frames / span for frame in frames])
    elapsed = elapsed.to(store.device)
    fault = [[""] * case.slices for _ in frames]
    if trusted:
        regions, pixel_trust, sources = trust.fuse(carried, {start: 1 - elapsed, end: elapsed})
        labels = harden(regions)
        ends = [store.expert(case, case.phases[p]) if p in known else None for p in (start, end)]
        sourced = torch.stack(list(sources.values())).any(0)
        shown = torch.stack([each.present for each in carried.values()]).any(0)
        fault = trust.faults(labels, ends, elapsed, folding, shown & ~sourced, store.cache.spacing**2)
        confidence = trust.expected_dice(labels, pixel_trust)
    else:
        ((phase, only),) = carried.items()
        labels, confidence = harden(only.regions), only.confidence
        pixel_trust = torch.ones_like(only.residual)
        sourced = only.present.expand(len(frames), -1)
        sources = {phase: sourced}
    parts = (torch.where(sourced, each, torch.nan).cpu().numpy() for each in (confidence, folding))
    pixel_trust = (255 * pixel_trust).round().to(torch.uint8)
    arrays = labels.cpu().numpy(), pixel_trust.cpu().numpy(), *parts
    return PropagatedFrames(*arrays, trust.joined_names(sources, "+"), fault)


def _dilate(masks, pixels):
    """Masks (B, H, W) dilated by `pixels` to every side, as a square."""
    half, width = round(pixels), 2 * round(pixels) + 1
    masks = F.max_pool2d(masks[:, None].float(), (width, 1), 1, (half, 0))  # one axis after the other
    return F.max_pool2d(masks, (1, width), 1, (0, half))[:, 0] > 0


# ----------------------------------------------------------------------- quality of the registration itself

QUALITY_SCORES = ("dice_before", "dice_after", "hd95_mm_before", "hd95_mm_after", "folding_percent",
                  "sd_log_jacobian")
QUALITY = ("case", "vendor", "split", "region", *QUALITY_SCORES)


@torch.no_grad()
def score_registration(network, cache, cases, settings, device, parts=NO_PARTS):
    """ED's label carried to ES against the expert's, in 3-D on each case's own grid: rows of quality.csv.

    "before" is the identity. Folding (det J <= 0) and the spread of log det J are taken within 10 mm of
    either label. parts: where the scores of finished cases are kept.
    """
    rows = []
    with worker_pool(settings.workers, len(cases)) as run:
        results = parts.results(
            run, _score_own_grid, cases, lambda case: _to_own_grid(network, cache, case, device)
        )
        for case, scores in zip(cases, results):
            for region in REGIONS:
                start = {"case": case.code, "vendor": case.vendor, "split": case.split, "region": region}
                rows.append({**start, **scores[region]})
    return rows


def _to_own_grid(network, cache, case, device):
    """Input of `_score_own_grid`: labels of ED, ES and ED warped (X, Y, Z), spacing, det J (Z, X, Y)."""
    # only two frames are read; ED's label is used even if it is withheld from training
    store = SliceStore(cache, [replace(case, withheld=())], device, place="file")
    ed, es = (store.frame(store.cases[0], frame) for frame in (case.ed, case.es))
    found = register(network, ed, es, store.expert(store.cases[0], case.ed))
    displacement = own_grid_displacement(found, case.grid(cache))
    labels = load_labels(case)
    source = torch.from_numpy(labels[case.ed].transpose(2, 0, 1).copy()).to(device)
    warped = warp_labels(source, displacement).cpu().numpy().transpose(1, 2, 0)
    determinant = jacobian_determinant(displacement).cpu().numpy()
    return labels[case.ed], labels[case.es], warped, case.spacing, determinant


def own_grid_displacement(displacement, grid):
    """Resample a displacement (Z, 2, S, S) of the cache to a case's own grid: (Z, 2, X, Y) in its pixels.

    Outside the crop it keeps its value at the crop's edge, so that no fold appears there.
    """
    planes = grid.from_slices(displacement.cpu().numpy(), "edge")
    planes *= (grid.target / np.array(grid.spacing))[:, None, None]
    return torch.from_numpy(planes.astype(np.float32)).to(displacement.device)


def _score_own_grid(source, target, warped, spacing, determinant):
    union = ((source > 0) | (target > 0)).transpose(2, 0, 1)
    # slices are infinitely far apart: 10 mm within the plane
    near = distance_transform_edt(~union, sampling=(1e6, *spacing[:2])) <= NEAR_HEART_MM
    folding = 100 * float((determinant[near] <= 0).mean())
    spread = float(np.log(determinant[near].clip(1e-3)).std())
    before, after = score_case(source, target, spacing), score_case(warped, target, spacing)
    found = {}
    for region in REGIONS:
        scores = [each[region][name] for name in ("dice", "hd95_mm") for each in (before, after)]
        found[region] = dict(zip(QUALITY_SCORES, (*scores, folding, spread)))
    return found
