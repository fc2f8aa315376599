"""Labels through time: expert labels of ED warped to the frames between, and how far each may be trusted."""

from dataclasses import dataclass

import h5py
import numpy as np
import torch
from scipy.ndimage import distance_transform_edt

from cardiac import LABELS, REGIONS
from cardiac.cases import load_labels
from cardiac.files import InputError, hdf5_dataset, writing_hdf5
from cardiac.losses import IGNORED, one_hot
from cardiac.metrics import dice, score_case
from cardiac.networks import register
from cardiac.parts import UNKEPT
from cardiac.slices import SliceStore
from cardiac.warp import compose, jacobian_determinant, warp
from cardiac.workers import worker_pool

NEAR_HEART_MM = 10  # folding counts within this distance of the labels, not over the whole image


def frames_between(start, end, frames):
    """The frames met going forward in time from `start` to `end`, both left out; time is a circle."""
    return [(start + step) % frames for step in range(1, (end - start) % frames)]


def nearer_to_ed(case, frame):
    """Whether a frame lies in the half of its interval, ED to ES or ES to ED, that is nearer to ED."""
    systole = (case.es - case.ed) % case.frames
    since = (frame - case.ed) % case.frames
    return 2 * since <= systole if since <= systole else 2 * (case.frames - since) <= case.frames - systole


def unlabelled_at_es(store):
    """Which slices (Z,) of the one case in `store` the expert left empty at ES."""
    (case,) = store.cases
    labels = store.expert(case, case.es)
    return ~(labels > 0).flatten(1).any(1).cpu().numpy()  # any() of uint8 is uint8


def warp_labels(labels, displacement):
    """Warp labels (B, H, W) uint8: soft, one arg max at the end (warping hard labels would erode them)."""
    regions = warp(one_hot(labels), displacement)
    share, region = regions.max(1)
    return torch.where(share > 1 - regions.sum(1), region + 1, 0).to(torch.uint8)


@dataclass
class Propagated:
    """Propagated labels (N, S, S) uint8, and of each slice (code, frame, slice) and its confidence."""

    labels: np.ndarray
    where: list
    confidence: np.ndarray

    def write(self, path, made_from):
        """Write labels.h5; `made_from` tells the registration and settings that it was made with."""
        codes, frames, slices = zip(*self.where) if self.where else ((), (), ())
        with writing_hdf5(path, self.labels.nbytes + 200 * len(codes) + 2**20) as file:
            file.create_dataset("labels", data=self.labels)
            file.create_dataset("case", data=np.array(codes, "S"))
            file.create_dataset("frame", data=np.array(frames, np.int32))
            file.create_dataset("slice", data=np.array(slices, np.int32))
            file.create_dataset("confidence", data=np.array(self.confidence, np.float32))
            file.attrs["made_from"] = made_from

    def of(self, case):
        """The propagated labels of a case: {frame: (Z, S, S) uint8}, IGNORED in slices without."""
        frames = {}
        for (code, frame, z), labels in zip(self.where, self.labels):
            if code == case.code:
                empty = np.full((case.slices, *labels.shape), IGNORED, np.uint8)
                frames.setdefault(frame, empty)[z] = labels
        return frames

    @classmethod
    def read(cls, path):
        """Read labels.h5. Raises InputError where there is none or it is not readable."""
        if not path.exists():
            raise InputError(f"{path}: there are no propagated labels; run propagate_labels.py before")
        try:
            names = ("labels", "case", "frame", "slice", "confidence")
            with h5py.File(path) as file:
                labels, *columns = (hdf5_dataset(file, name)[:] for name in names)
            kinds = "".join(each.dtype.kind for each in (labels, *columns))
            fits = kinds == "uSiif" and labels.ndim == 3 and len({*map(len, (labels, *columns))}) == 1
            if not fits or labels.max(initial=0) > len(LABELS):
                raise ValueError("its parts do not fit each other")
            codes, *columns = (each.tolist() for each in columns)
            where = [(code.decode("ascii"), *place) for code, *place in zip(codes, *columns[:2])]
            return cls(labels, where, np.array(columns[2], np.float32))
        except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
            raise InputError(
                f"{path}: not readable ({error}); run propagate_labels.py --overwrite"
            ) from error


def made_from(path):
    """What the labels.h5 at `path` was made from, or None where there is no readable one."""
    try:
        with h5py.File(path) as file:
            return str(file.attrs["made_from"])
    except (OSError, KeyError):
        return None


@torch.no_grad()
def carried_to_es(network, store):
    """Dice of ED's label with ES's, as it is and carried by the registration, mean over regions, for one
    case.
    """
    (case,) = store.cases
    ed, es = (store.frame(case, frame) for frame in (case.ed, case.es))
    source, target = (store.expert(case, frame) for frame in (case.ed, case.es))
    warped = warp_labels(source, register(network, ed, es))
    target = target.cpu().numpy()
    return [
        float(np.nanmean([dice(labels.cpu().numpy() == label, target == label) for label in LABELS.values()]))
        for labels in (source, warped)
    ]


@torch.no_grad()
def propagate_case(network, store, frames):
    """Carry ED's labels to `frames` of the one case in `store`.

    Returns labels (F, Z, S, S) uint8, confidence (F, Z) and folding percent (F, Z), numpy; both NaN in slices
    where ED has no label, which are unlabelled, not background. Confidence is the Dice of ED's label with
    itself after ED -> t -> ED, the way back registered anew, averaged over the slice's regions.
    """
    (case,), count, z = store.cases, len(frames), store.cases[0].slices
    ed = store.frame(case, case.ed).repeat(count, 1, 1, 1)
    labels = store.expert(case, case.ed).repeat(count, 1, 1)
    target = store.images(torch.from_numpy(np.concatenate([case.rows(frame) for frame in frames])))

    forth = register(network, ed, target)
    warped = warp_labels(labels, forth)
    back = register(network, target, ed)
    cycled = one_hot(warp_labels(labels, compose(forth, back)))
    source = one_hot(labels)
    areas = source.sum((-2, -1))
    agreement = 2 * (cycled * source).sum((-2, -1)) / (areas + cycled.sum((-2, -1))).clamp(min=1)
    present = areas > 0
    confidence = (agreement * present).sum(1) / present.sum(1)  # 0 / 0 is NaN: a slice without labels

    margin = NEAR_HEART_MM / store.cache.spacing
    near = _dilate((labels > 0) | (warped > 0), margin)
    folded = (jacobian_determinant(forth) <= 0) & near
    folding = 100 * folded.sum((-2, -1)) / near.sum((-2, -1))
    folding = torch.where(present.any(1), folding, torch.nan)
    arrays = (warped.view(count, z, *warped.shape[1:]), confidence.view(count, z), folding.view(count, z))
    return tuple(array.cpu().numpy() for array in arrays)


def _dilate(masks, pixels):
    """Masks (B, H, W) dilated by a square of so many pixels to every side."""
    width = 2 * round(pixels) + 1
    return torch.nn.functional.max_pool2d(masks[:, None].float(), width, 1, width // 2)[:, 0] > 0


# ------------------------------------------------------------------------- the registration's own quality

QUALITY = (
    "case", "vendor", "split", "region", "dice_before", "dice_after", "hd95_mm_before", "hd95_mm_after",
    "folding_percent", "sd_log_jacobian",
)  # fmt: skip


@torch.no_grad()
def score_registration(network, cache, cases, settings, device, parts=UNKEPT):
    """ED's label carried to ES against the expert's, in 3-D on each case's own grid: rows of quality.csv.

    "before" is the identity. Folding (det J <= 0) and the spread of log det J count within 10 mm of both
    labels. parts: where the scores of finished cases are kept.
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
    """ED's and ES's labels, ED's warped, all (X, Y, Z), spacing, Jacobian determinant (Z, X, Y)."""
    store = SliceStore(cache, [case], device, None)
    ed, es = (store.images(torch.from_numpy(store.cases[0].rows(frame))) for frame in (case.ed, case.es))
    displacement = own_grid_displacement(register(network, ed, es), case.grid(cache))
    labels = load_labels(case)
    source = torch.from_numpy(labels[case.ed].transpose(2, 0, 1).copy()).to(device)
    warped = warp_labels(source, displacement).cpu().numpy().transpose(1, 2, 0)
    determinant = jacobian_determinant(displacement).cpu().numpy()
    return labels[case.ed], labels[case.es], warped, case.spacing, determinant


def own_grid_displacement(displacement, grid):
    """Resample a displacement (Z, 2, S, S) of the cache to a case's own grid: (Z, 2, X, Y) in its pixels.

    Outside the crop it goes on with its value at the crop's edge, so that no fold appears there.
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
    return {
        region: {
            "dice_before": before[region]["dice"],
            "dice_after": after[region]["dice"],
            "hd95_mm_before": before[region]["hd95_mm"],
            "hd95_mm_after": after[region]["hd95_mm"],
            "folding_percent": folding,
            "sd_log_jacobian": spread,
        }
        for region in REGIONS
    }
