"""Step 2: carry the expert labels of ED to the frames between ED and ES, with the registration of step 1."""

import copy
import hashlib
import shutil

import numpy as np
import torch
from tqdm import tqdm

from cardiac import propagation, report
from cardiac.cache import most_likely, one_hot, open_cache
from cardiac.cases import load_labels
from cardiac.files import write_csv
from cardiac.losses import IGNORED
from cardiac.nifti import write_labels
from cardiac.run import choose_device, describe, run_folder, script
from cardiac.settings import PropagationSettings, RegistrationSettings, parse
from cardiac.slices import SliceStore
from train_registration import Registration

COLUMNS = ("case", "vendor", "frame", "slice", "source", "confidence", "folding_percent", "kept")


@script
def main(argv):
    settings = parse(PropagationSettings, argv, __doc__, own=("propagation",), earlier=("registration",))
    device = choose_device(settings.device)
    network, trained = propagation.load_registration(settings.out, device)
    cache = open_cache(settings)
    cases = [case for case in cache.split("Training") if case.labelled]
    # of the weights alone: the file has the run's clock in it too
    parts = b"".join(part.cpu().numpy().tobytes() for part in network.state_dict().values())
    digest = hashlib.sha256(parts).hexdigest()[:16]
    made_from = f"registration of step {trained.step}, {digest}, {settings.frames}, {settings.recipe}"
    made_from += f", trust {settings.trust}, refined {settings.refine}"
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
            columns = (*COLUMNS, "fault") if settings.trust else COLUMNS
            write_csv(folder / "quality.csv", columns, rows)
            report.draw_cine(folder / "cine.gif", cache, cases, propagated)
            propagated.write(path, made_from)  # last: what it is there for is finished
        for case in tqdm(cases, "nifti", unit="case") if settings.nifti else ():
            target = folder / "nifti" / f"{case.code}_sa_propagated.nii.gz"
            if not target.exists():
                write_labels(target, on_own_grid(cache, case, propagated), case.image)


def propagate(network, cache, cases, settings, device):
    """Propagated labels of all `cases` (a `Propagated`) and the rows of quality.csv."""
    parts, where, rows, gains = [], [], [], []
    for case in tqdm(cases, "propagating", unit="case"):
        store = SliceStore(cache, [case], device)
        if len(case.expert) == 2:
            gains.append(propagation.carried_to_es(network, store))
            before, after = gains[-1]
            tqdm.write(f"{case.code}: Dice of ED's label carried to ES {after:.3f} (identity {before:.3f})")
        refined = refine(network, store, settings) if settings.refine else network
        for start, end, frames in propagation.intervals(case, settings.frames):
            if not frames:
                continue
            found = propagation.propagate_interval(refined, store, start, end, frames, settings.trust)
            for f, z in np.ndindex(found.confidence.shape):
                row = {"case": case.code, "vendor": case.vendor, "frame": frames[f], "slice": z}
                row |= {"source": found.source[f][z], "confidence": float(found.confidence[f, z])}
                row |= {"folding_percent": float(found.folding[f, z]), "fault": found.fault[f][z]}
                rows.append({**row, "kept": int(bool(row["source"] and not row["fault"]))})
                if rows[-1]["kept"]:
                    where.append((case.code, frames[f], z))
                    parts.append(
                        [
                            each[f, z]
                            for each in (found.labels, found.confidence, found.trust)
                            if each is not None
                        ]
                    )
    if gains:
        before, after = np.mean(gains, axis=0)
        print(
            f"ED's label carried to ES, {len(gains)} patients: mean Dice {after:.3f}, identity {before:.3f}"
        )
    labels, confidence, *trust = zip(*parts) if parts else ((), ())
    if not parts:
        print("no frame lies between ED and ES: nothing is propagated, and the files are empty")
    else:
        print(f"{len(labels)} slices propagated, mean confidence {np.mean(confidence):.3f}, "
              f"{len(rows) - len(labels)} left out (no label at ED, or kept = 0 in quality.csv)")  # fmt: skip
    shape = (-1, cache.size, cache.size)
    maps = [np.array(each, np.uint8).reshape(shape) for each in (labels, *trust)]
    return propagation.Propagated(maps[0], where, np.array(confidence, np.float32), *maps[1:]), rows


def refine(network, store, settings):
    """A copy of the network after `settings.refine` steps on the one patient in `store`: ED and ES, whose
    labels are known, and every other frame, at a tenth of the training's learning rate.
    """
    words = ["--data", str(settings.data), "--out", str(settings.out)]
    trained = parse(RegistrationSettings, words, None, own=("registration",))
    task = Registration(trained, store, store)
    task.network = copy.deepcopy(network)
    optimizer = torch.optim.Adam(task.network.parameters(), lr=0.1 * trained.lr)
    for step in range(settings.refine):
        optimizer.zero_grad()
        task.losses(task.draw(step))["loss"].backward()
        optimizer.step()
    return task.network


def on_own_grid(cache, case, propagated):
    """Labels (X, Y, Z, T) uint8 of a case: expert at ED and ES, propagated between, 0 elsewhere."""
    labels = np.zeros(case.shape, np.uint8)
    grid = case.grid(cache)
    for frame, slices in propagated.of(case).items():
        slices = np.where(slices == IGNORED, 0, slices)
        labels[..., frame] = most_likely(grid.from_slices(one_hot(slices))).transpose(1, 2, 0)
    experts = load_labels(case)
    for frame in case.expert:
        labels[..., frame] = experts[frame]
    return labels


if __name__ == "__main__":
    raise SystemExit(main())
