"""Step 2: carry the expert labels of ED to the frames between ED and ES, with the registration of step 1."""

import itertools
import shutil

import numpy as np
from tqdm import tqdm

from cardiac import propagation, report, trust
from cardiac.cache import open_cache
from cardiac.cases import load_labels
from cardiac.checkpoint import weights_digest
from cardiac.files import InputError, write_csv
from cardiac.nifti import write_labels
from cardiac.parts import NO_PARTS, PARTS, Parts
from cardiac.preprocessing import most_likely, one_hot
from cardiac.run import cases_digest, choose_device, describe, run_folder, script, training_digest
from cardiac.settings import PropagationSettings, parse
from cardiac.slices import SliceStore

COLUMNS = ("case", "vendor", "frame", "slice", "source", "confidence", "folding_percent", "kept")


@script
def main(argv):
    settings = parse(PropagationSettings, argv, __doc__, own=("propagation",), earlier=("registration",))
    device = choose_device(settings.device)
    network, trained = propagation.load_registration(settings.out, device)
    if not (settings.out / "registration" / "quality.csv").exists():
        print(f"the registration is not finished; using its best weights so far, of step {trained.step}")
    cache = open_cache(settings)
    cases = [case for case in cache.split("Training") if case.labelled]
    if not cases:
        raise InputError(f"{cache.root}: no case of Training has labels; there is nothing to propagate")
    rules = f"registration of step {trained.step}, {weights_digest(network)}, {settings.frames}, "
    rules += f"{settings.recipe}, trust {trust.RULES_VERSION if settings.trust else None}"
    rules += f", refined {settings.refine}" if settings.refine else ""
    made_from = f"{rules}, {cases_digest(cases)}, {training_digest(cases)}"
    with run_folder(settings, "propagation", cache.cases) as folder:
        path = folder / "labels.h5"
        if propagation.made_from(path) == made_from:
            print(f"{path}: finished; use --overwrite to redo it")
            propagated = propagation.Propagated.read(path)
        else:
            path.unlink(missing_ok=True)
            shutil.rmtree(folder / "nifti", ignore_errors=True)
            what = f"{len(cases)} cases, registration of step {trained.step}"
            what += f", refined by {settings.refine} steps" if settings.refine else ""
            print(f"propagation: {what}, on {describe(device)}")
            parts = Parts(folder / PARTS, (rules, settings.size, settings.spacing))
            propagated, rows = propagate(network, cache, cases, settings, device, parts)
            columns = (*COLUMNS, "fault") if settings.trust else COLUMNS
            write_csv(folder / "quality.csv", columns, rows)
            report.draw_cine(folder / "cine.gif", cache, cases, propagated)
            propagated.write(path, made_from)  # last: it marks the run as finished
        for case in tqdm(cases, "nifti", unit="case") if settings.nifti else ():
            target = folder / "nifti" / f"{case.code}_sa_propagated.nii.gz"
            if not target.exists():
                write_labels(target, on_own_grid(cache, case, propagated), case.image)


def propagate(network, cache, cases, settings, device, parts=NO_PARTS):
    """Propagated labels of all `cases` (a `Propagated`) and the rows of quality.csv.

    parts: where the results of finished cases are kept.
    """
    results = parts.results(
        itertools.starmap, propagate_case, cases, lambda case: (network, cache, case, settings, device)
    )
    found = []
    for case, result in zip(tqdm(cases, "propagating", unit="case"), results):
        found.append(result)
        if result["gain"]:
            before, after = result["gain"]
            tqdm.write(f"{case.code}: Dice of ED's label carried to ES {after:.3f} (identity {before:.3f})")
    gains = [result["gain"] for result in found if result["gain"]]
    if gains:
        before, after = np.mean(gains, axis=0)
        print(f"ED's label carried to ES, mean of {len(gains)}: Dice {after:.3f}, identity {before:.3f}")
    rows = [row for result in found for row in result["rows"]]
    kept = [row for row in rows if row["kept"]]
    confidence = np.array([row["confidence"] for row in kept], np.float32)
    if rows:
        mean = f", mean confidence {confidence.mean():.3f}" if kept else ""
        print(f"{len(kept)} slices propagated{mean}, {len(rows) - len(kept)} left out "
              "(no label to carry, or kept = 0 in quality.csv)")
    else:
        print("no frame lies between ED and ES: nothing is propagated, and the files are empty")
    labels, trusts = (np.concatenate([result[name] for result in found]) for name in ("labels", "trust"))
    where = [(row["case"], row["frame"], row["slice"]) for row in kept]
    return propagation.Propagated(labels, where, confidence, trusts if settings.trust else None), rows


def propagate_case(network, cache, case, settings, device):
    """A dict: "rows" of quality.csv; "labels", "trust" (N, S, S) of slices kept; "gain": `carried_to_es`."""
    store = SliceStore(cache, [case], device)
    gain = propagation.carried_to_es(network, store) if len(case.expert) == 2 else None
    rows, maps = [], [np.zeros((2, 0, cache.size, cache.size), np.uint8)]
    for start, end, frames in propagation.intervals(case, settings.frames):
        if not frames:
            continue
        options = settings.trust, settings.refine
        found = propagation.propagate_interval(network, store, start, end, frames, *options)
        kept = np.zeros(found.confidence.shape, bool)
        for f, z in np.ndindex(kept.shape):
            kept[f, z] = found.source[f][z] and not found.fault[f][z]
            row = {"case": case.code, "vendor": case.vendor, "frame": frames[f], "slice": z}
            row |= {"source": found.source[f][z], "confidence": float(found.confidence[f, z])}
            row |= {"folding_percent": float(found.folding[f, z]), "kept": int(kept[f, z])}
            rows.append({**row, "fault": found.fault[f][z]})
        maps.append(np.stack([found.labels[kept], found.trust[kept]]))
    labels, trusts = np.concatenate(maps, axis=1)
    return {"rows": rows, "gain": gain, "labels": labels, "trust": trusts}


def on_own_grid(cache, case, propagated):
    """Labels (X, Y, Z, T) uint8 of a case: expert at ED and ES, propagated between, 0 elsewhere."""
    labels = np.zeros(case.shape, np.uint8, order="F")
    grid = case.grid(cache)
    for frame, slices in propagated.of(case).items():
        labels[..., frame] = most_likely(grid.from_slices(one_hot(slices))).transpose(1, 2, 0)
    experts = load_labels(case)
    for frame in case.expert:
        labels[..., frame] = experts[frame]
    return labels


if __name__ == "__main__":
    raise SystemExit(main())
