"""Step 2: carry the expert labels of ED to the frames between ED and ES, with the registration of step 1."""

import hashlib
import shutil

import numpy as np
from tqdm import tqdm

from cardiac import networks, propagation, report
from cardiac.cache import most_likely, one_hot, open_cache
from cardiac.cases import load_labels
from cardiac.files import write_csv
from cardiac.losses import IGNORED
from cardiac.nifti import write_labels
from cardiac.run import choose_device, describe, run_folder, script
from cardiac.settings import PropagationSettings, parse
from cardiac.slices import SliceStore
from cardiac.training import load_network

COLUMNS = ("case", "vendor", "frame", "slice", "source", "confidence", "folding_percent", "kept")


@script
def main(argv):
    settings = parse(PropagationSettings, argv, __doc__, own=("propagation",), earlier=("registration",))
    device = choose_device(settings.device)
    network = networks.RegistrationNetwork()
    weights = settings.out / "registration" / "best.pt"
    trained = load_network(network, weights, device)
    cache = open_cache(settings)
    cases = [case for case in cache.split("Training") if case.labelled]
    # of the weights alone: the file has the run's clock in it too
    parts = b"".join(part.cpu().numpy().tobytes() for part in network.state_dict().values())
    digest = hashlib.sha256(parts).hexdigest()[:16]
    made_from = f"registration of step {trained.step}, {digest}, {settings.frames}, {settings.recipe}"
    with run_folder(settings, "propagation", cache.cases) as folder:
        path = folder / "labels.h5"
        if propagation.made_from(path) == made_from:
            print(f"{path}: finished; --overwrite starts anew")
            propagated = propagation.Propagated.read(path)
        else:
            path.unlink(missing_ok=True)
            shutil.rmtree(folder / "nifti", ignore_errors=True)
            print(
                f"propagation: {len(cases)} cases, registration of step {trained.step}, on {describe(device)}"
            )
            propagated, rows = propagate(network, cache, cases, settings, device)
            write_csv(folder / "quality.csv", COLUMNS, rows)
            report.draw_cine(folder / "cine.gif", cache, cases, propagated)
            propagated.write(path, made_from)  # last: what it is there for is finished
        for case in tqdm(cases, "nifti", unit="case") if settings.nifti else ():
            target = folder / "nifti" / f"{case.code}_sa_propagated.nii.gz"
            if not target.exists():
                write_labels(target, on_own_grid(cache, case, propagated), case.image)


def propagate(network, cache, cases, settings, device):
    """Propagated labels of all `cases` (a `Propagated`) and the rows of quality.csv.

    Under the strong recipe a slice with a label at ED and none at ES, out of which the base moves at an
    unknown time, is kept in the half of the interval that is nearer to ED.
    """
    labels, where, confidences, rows, gains = [], [], [], [], []
    for case in tqdm(cases, "propagating", unit="case"):
        store = SliceStore(cache, [case], device)
        frames = propagation.frames_between(case.ed, case.es, case.frames)
        if settings.frames == "all":
            frames += propagation.frames_between(case.es, case.ed, case.frames)
        gains.append(propagation.carried_to_es(network, store))
        tqdm.write(
            f"{case.code}: Dice of ED's label carried to ES {gains[-1][1]:.3f} (identity {gains[-1][0]:.3f})"
        )
        if not frames:
            continue
        warped, confidence, folding = propagation.propagate_case(network, store, frames)
        leaves = propagation.unlabelled_at_es(store) & (settings.recipe == "strong")
        for k, frame in enumerate(frames):
            for z in range(case.slices):
                labelled = bool(confidence[k, z] == confidence[k, z])  # NaN: ED has no label in this slice
                kept = labelled and not (leaves[z] and not propagation.nearer_to_ed(case, frame))
                row = {"case": case.code, "vendor": case.vendor, "frame": frame, "slice": z}
                row |= {"source": "ED" if labelled else "", "confidence": float(confidence[k, z])}
                rows.append({**row, "folding_percent": float(folding[k, z]), "kept": int(kept)})
                if kept:
                    labels.append(warped[k, z])
                    where.append((case.code, frame, z))
                    confidences.append(confidence[k, z])
    before, after = np.mean(gains, axis=0)
    print(f"ED's label carried to ES, {len(gains)} patients: mean Dice {after:.3f}, identity {before:.3f}")
    if not labels:
        print("no frame lies between ED and ES: nothing is propagated, and the files are empty")
    else:
        print(f"{len(labels)} slices propagated, mean confidence {np.mean(confidences):.3f}, "
              f"{len(rows) - len(labels)} left out (no label at ED, or kept = 0 in quality.csv)")  # fmt: skip
    arrays = np.array(labels, np.uint8).reshape(-1, cache.size, cache.size)
    return propagation.Propagated(arrays, where, np.array(confidences, np.float32)), rows


def on_own_grid(cache, case, propagated):
    """Labels (X, Y, Z, T) uint8 of a case: expert at ED and ES, propagated between, 0 elsewhere."""
    labels = np.zeros(case.shape, np.uint8)
    grid = case.grid(cache)
    for frame, slices in propagated.of(case).items():
        slices = np.where(slices == IGNORED, 0, slices)
        labels[..., frame] = most_likely(grid.from_slices(one_hot(slices))).transpose(1, 2, 0)
    for frame, expert in load_labels(case).items():
        labels[..., frame] = expert
    return labels


if __name__ == "__main__":
    raise SystemExit(main())
