"""Step 4: score the trained models on scans they have not seen, by region and vendor: the paper's Table 1."""

from tqdm import tqdm

from cardiac import evaluation, networks, report
from cardiac.cache import open_cache
from cardiac.files import InputError, read_json, write_csv, write_json, write_text
from cardiac.run import choose_device, describe, run_folder, script
from cardiac.settings import EvaluationSettings, parse
from cardiac.training import Progress, load_network, read_checkpoint

MODELS = ("original", "propagated")


@script
def main(argv):
    folders = [f"segmentation/{model}" for model in MODELS]
    settings = parse(EvaluationSettings, argv, __doc__, earlier=folders)
    device = choose_device(settings.device)
    models = finished_models(settings, device)
    cache = open_cache(settings)
    cases = [case for case in cache.split(settings.split) if case.labelled]
    if not cases:
        there = dict.fromkeys(case.split for case in cache.cases if case.labelled)
        print(f"no labelled case in {settings.split}: nothing to score; --split can be {' or '.join(there)}")
        return
    with run_folder(settings, "evaluation", cache.cases) as folder:
        steps = {model: progress.step for model, (_, progress) in models.items()}
        made_from = {
            "split": settings.split,
            "all_frames": settings.all_frames,
            "models": {model: {"steps": p.step, "best": p.best} for model, (_, p) in models.items()},
        }
        summary = folder / "summary.json"
        if summary.exists() and read_json(summary).get("made_from") == made_from:
            print(f"{folder}: finished; --overwrite starts anew\n\n{(folder / 'table.md').read_text()}")
            return
        summary.unlink(missing_ok=True)  # written last: what it is there for is finished

        rows = []
        for model, (network, progress) in models.items():
            print(f"{model}: {len(cases)} cases of {settings.split}, {progress.step} steps, on {describe(device)}")
            predictions = folder / "predictions" / model
            scored = evaluation.score_model(model, network, cache, cases, settings, device, predictions)
            rows += tqdm(scored, model, total=6 * len(cases), unit="score")
        write_csv(folder / "cases.csv", evaluation.CASES, rows)
        tables = {
            score: [evaluation.table_row(model, [r for r in rows if r["model"] == model], score) for model in models]
            for score in ("dice", "paper_dice")
        }
        write_csv(folder / "table.csv", evaluation.TABLE, tables["dice"])
        write_csv(folder / "table_paper.csv", evaluation.TABLE, tables["paper_dice"])
        seen = {case.vendor for case in cache.split("Training") if case.labelled}
        caption = evaluation.caption(cache, cases, settings, rows, seen)
        write_text(folder / "table.md", evaluation.table_text(tables["dice"], steps, seen, True) + f"\n\n{caption}\n")
        report.draw_overlays(folder, cache, cases, rows)
        print(f"\n{evaluation.table_text(tables['dice'], steps, seen)}\n\n{caption}")
        write_json(summary, {"made_from": made_from, "table": tables["dice"], "table_paper": tables["paper_dice"]})


def finished_models(settings, device):
    """{model: (network, `Progress`)} of the models in OUT whose run is finished."""
    models = {}
    for model in MODELS:
        folder = settings.out / "segmentation" / model
        if not (folder / "best.pt").exists():
            continue
        progress = Progress(**read_checkpoint(folder / "last.pt", device)["progress"])
        if not (folder / "example.png").exists():
            print(f"{model}: not finished (step {progress.step}); left out")
            continue
        network = networks.SegmentationNetwork(settings.channels)
        load_network(network, folder / "best.pt", device)
        models[model] = network, progress
    if not models:
        raise InputError(f"{settings.out / 'segmentation'}: no finished model; run train_segmentation.py before")
    return models


if __name__ == "__main__":
    raise SystemExit(main())
