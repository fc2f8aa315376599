"""Step 4: score the trained models on scans they have not seen, by region and vendor: the paper's Table 1.

With --predict, segment scans without labels instead: masks, volumes of every frame, ejection fraction.
"""

import re
import shutil

from tqdm import tqdm

from cardiac import evaluation, networks, page, predict, report
from cardiac.cache import open_cache, withhold
from cardiac.checkpoint import load_network, restore, weights_digest
from cardiac.evaluation import MODELS
from cardiac.files import InputError, digest, read_json, write_csv, write_json, write_text
from cardiac.parts import PARTS, Parts
from cardiac.propagation import made_from as labels_made_from
from cardiac.run import cases_digest, choose_device, dataset_identity, describe, run_folder, script
from cardiac.settings import EvaluationSettings, SegmentationSettings, parse

SCORE_SETTINGS = ("all_frames", "largest_component", "mirrored")  # settings that scores depend on


@script
def main(argv):
    folders = [f"segmentation/{model}" for model in MODELS]
    settings = parse(EvaluationSettings, argv, __doc__, earlier=folders)
    device = choose_device(settings.device)
    if settings.predict:
        scans = predict.find_scans(settings.predict)
        models = finished_models(settings, device)
        model = list(models)[-1]  # propagated, if there is one
        predict.predict_scans(scans, model, *models[model], settings, device)
        return
    models = finished_models(settings, device)
    cache = open_cache(settings)
    cases = [case for case in cache.split(settings.split) if case.labelled]
    if not cases:
        there = dict.fromkeys(case.split for case in cache.cases if case.labelled)
        other = f"--split can be {' or '.join(there)}" if there else "nor in any other split"
        print(f"no labelled case in {settings.split}: nothing to score; {other}")
        return
    unknown = set(settings.view) - {case.code for case in cases}
    if unknown:
        raise InputError(f"--view {sorted(unknown)[0]}: no such case in {settings.split} of {settings.data}")
    trained = training_runs(models, settings.out / "segmentation")
    run = next(iter(trained.values()))  # what is used of it is the same for both
    own = dataset_identity(cache.cases) == run["dataset"]
    if own:  # scored on all labels, but shown with those known in training
        cache = withhold(cache, run["settings"])
    place = "evaluation" if own else f"evaluation/{safe_name(cache.name)}"
    with run_folder(settings, place, cache.cases) as folder:
        out = settings.out if own else None
        made_from, shown = scores_inputs(settings, models, cases), report_inputs(settings, cache, out)
        summary = folder / "summary.json"
        done = read_json(summary) if summary.exists() else {}
        if done.get("made_from") != made_from:
            summary.unlink(missing_ok=True)  # written last: it marks the run as finished
            score(models, cache, cases, settings, device, folder)
        elif done.get("shown") == shown and (folder / "report.html").exists():
            print(f"{folder}: finished; use --overwrite to redo it\n\n{(folder / 'table.md').read_text()}")
            return
        largest = folder / "cases_largest.csv" if settings.largest_component else None
        rows = [path and evaluation.read_scores(path) for path in (folder / "cases.csv", largest)]
        results = evaluation.Results(*rows, cache, cases, settings.split, trained, own)
        write_results(folder, results)
        page.write_report(folder, results, settings.view, settings.all_frames, out)
        print(f"\nto look at: {folder / 'report.html'}")
        write_json(summary, {"made_from": made_from, "shown": shown, **results.summary()})


def training_runs(models, folder):
    """{model: its "steps" and "best" score, and its config.json} of finished models, from runs in `folder`.

    Raises InputError where they were not trained on the same cases.
    """
    runs = {}
    for model, (_, progress) in models.items():
        config = read_json(folder / model / "config.json")
        config["settings"] = vars(SegmentationSettings()) | config["settings"]  # older runs have fewer
        runs[model] = {"steps": progress.step, "best": progress.best, **config}
    for name in ("dataset", "cases"):
        if len({run[name] for run in runs.values() if run.get(name)}) > 1:
            what = "the two networks were not trained on the same cases"
            raise InputError(f"{folder}: {what}; train_segmentation.py --overwrite retrains both")
    return runs


def scores_inputs(settings, models, cases):
    """What the scores depend on, for summary.json."""
    used = {name: getattr(settings, name) for name in ("split", *SCORE_SETTINGS)}
    weights = {model: {"steps": p.step, "weights": weights_digest(n)} for model, (n, p) in models.items()}
    return {**used, "cases": cases_digest(cases), "models": weights}


def report_inputs(settings, cache, out):
    """What the report depends on besides the scores, for summary.json; out: as for `page.write_report`."""
    training = page.training_files(out).values() if out else ()
    return {"dataset": cache.name, "cases": cases_digest(cache.cases), "skipped": list(cache.skipped),
            "propagated": labels_made_from(out / "propagation" / "labels.h5") if out else None,
            "training": bool(out) and digest(*(path.read_bytes() for path in training)),
            "view": list(settings.view)}


def score(models, cache, cases, settings, device, folder):
    """Predict and score the cases with every model: writes predictions/ and cases.csv below `folder`."""
    rows, earlier = [], [*folder.glob("*_largest.csv"), *folder.glob("overlays_*.png")]
    earlier += [path for name in ("predictions", PARTS) for path in folder.glob(f"{name}/*")
                if path.name not in models]
    for path in earlier:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for model, (network, progress) in models.items():
        print(f"{model}, {progress.step} steps: {len(cases)} cases of {settings.split} on {describe(device)}")
        predictions = folder / "predictions" / model
        what = (getattr(settings, name) for name in ("size", "spacing", *SCORE_SETTINGS))
        parts = Parts(folder / PARTS / model, (weights_digest(network), *what))
        scored = evaluation.score_model(model, network, cache, cases, settings, device, predictions, parts)
        rows += tqdm(scored, model, total=6 * len(cases), unit="score")
        wanted = {evaluation.prediction_path(predictions, case.code) for case in cases}
        for path in set(predictions.glob(evaluation.prediction_path(predictions, "*").name)) - wanted:
            path.unlink()  # of another split
    whole, largest = zip(*rows)
    write_csv(folder / "cases.csv", evaluation.CASES, whole)
    if settings.largest_component:
        write_csv(folder / "cases_largest.csv", evaluation.CASES, largest)


def write_results(folder, results):
    """Write tables and figures; print Table 1."""
    write_csv(folder / "table.csv", evaluation.TABLE, results.table)
    write_csv(folder / "table_paper.csv", evaluation.TABLE, results.table_paper)
    write_csv(folder / "clinical.csv", evaluation.CLINICAL, results.clinical)
    write_csv(folder / "agreement.csv", evaluation.AGREEMENT, results.agreement)
    write_csv(folder / "comparison.csv", evaluation.COMPARISON, results.comparison)
    paragraphs = [text for text in (results.gain(), results.caption()) if text]
    cells = results.cells(results.table)
    table = evaluation.aligned(cells, markdown=True)
    write_text(folder / "table.md", "\n\n".join([table, *paragraphs]) + "\n")
    print("", evaluation.aligned(cells), "", sep="\n")
    if results.largest:
        write_csv(folder / "table_largest.csv", evaluation.TABLE, results.table_largest)
        cells = results.cells(results.table_largest)
        print("largest component of each region only:", evaluation.aligned(cells), "", sep="\n")
    print(*paragraphs, sep="\n")
    report.draw_dice(folder / "dice.png", results)
    report.draw_bland_altman(folder / "bland_altman.png", results)
    report.draw_overlays(folder, results)


def safe_name(name):
    """A dataset's name made fit for a folder, and different from all names in evaluation/."""
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", name)
    return f"{name}_" if name in ("", "predictions") else name


def finished_models(settings, device):
    """{model: (network, `Progress`)} of the models in OUT whose run is finished."""
    models = {}
    for model in MODELS:
        folder = settings.out / "segmentation" / model
        best, last, outcome = (folder / name for name in ("best.pt", "last.pt", "example.png"))
        if not (best.exists() or last.exists()):
            continue
        progress = restore(last, device)
        if not (best.exists() and outcome.exists()):
            print(f"{model}: not finished (step {progress.step}); left out")
            continue
        network = networks.SegmentationNetwork(settings.channels)
        load_network(network, best, device)
        models[model] = networks.Mirrored(network) if settings.mirrored else network, progress
    if not models:
        folder = settings.out / "segmentation"
        raise InputError(f"{folder}: no finished model; run train_segmentation.py first")
    return models


if __name__ == "__main__":
    raise SystemExit(main())
