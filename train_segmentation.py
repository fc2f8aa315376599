"""Step 3: train the paper's 2-D U-Net on the expert labels only (`original`) and with the propagated ones.

Both train for the same number of steps, so that only the labels differ. The best checkpoint and the schedule
depend only on Validation cases of vendors with training labels or, if there are none, on held-out training
patients; Validation cases of other vendors decide nothing.
"""

import torch

from cardiac import REGIONS, losses, networks, report
from cardiac.augment import augment_slices
from cardiac.building import PREPROCESSING
from cardiac.cache import open_cache
from cardiac.checkpoint import load_network, weights_digest
from cardiac.evaluation import MODELS
from cardiac.files import InputError, read_json
from cardiac.parallel import from_first, in_first
from cardiac.propagation import Propagated, load_registration, made_from
from cardiac.run import (
    check_run,
    choose_device,
    describe,
    remove_runs,
    run_folder,
    script,
    training_digest,
)
from cardiac.settings import SegmentationSettings, parse
from cardiac.slices import LabelledSlices, SliceStore
from cardiac.training import fit


class Segmentation:
    """The task of the training loop: labelled slices, cross-entropy, Dice by case.

    logged: cases of `validation` whose scores decide nothing, since no label of their vendor was trained on.
    """

    def __init__(self, settings, slices, validation, logged=()):
        self.settings, self.slices, self.validation = settings, slices, validation
        self.logged = {case.code for case in logged}
        torch.manual_seed(settings.seed)
        self.network = networks.SegmentationNetwork(settings.channels)

    def draw(self, step):
        """The slices, labels and trust of step `step`."""
        batch = self.slices.draw(self.settings.batch_size, self.settings.seed, step)
        return augment_slices(*batch, self.settings.seed, step) if self.settings.augment else batch

    def losses(self, batch):
        """Cross-entropy over labelled pixels, and soft Dice if it has a weight, both weighted by trust."""
        images, labels, trust = batch
        logits, trust = self.network(images), trust / 255
        entropy = losses.cross_entropy(logits, labels, trust)
        if not self.settings.dice_weight:
            return {"loss": entropy}
        overlap = losses.soft_dice_loss(logits, labels, trust)
        return {"loss": entropy + self.settings.dice_weight * overlap, "entropy": entropy, "overlap": overlap}

    def validate(self):
        """Cross-entropy, which drives the learning rate, and Dice of LV, MYO and RV, by case and phase, of
        cases that decide; Dice of the others.
        """
        store, entropy, deciding, logged = self.validation, [], [], []
        for case in store.cases:
            decides = case.code not in self.logged
            for frame in case.expert:
                labels = store.expert(case, frame)
                probabilities = networks.segment(self.network, store.frame(case, frame))
                scores = losses.region_dice(probabilities.argmax(1), labels)
                (deciding if decides else logged).append(scores)
                if decides:
                    entropy.append(losses.cross_entropy(probabilities.clamp(min=1e-7).log(), labels))
        by_region = torch.stack(deciding).nanmean(0)
        row = {"val_loss": torch.stack(entropy).mean().item()}
        row |= {f"val_dice_{region}": value.item() for region, value in zip(REGIONS, by_region)}
        if logged:
            row["unseen_dice"] = torch.stack(logged).nanmean().item()
        return {**row, "score": by_region.nanmean().item()}


def read_propagated(settings):
    """The propagated labels, or None if they are not asked for, or if there are none, which is printed."""
    if settings.labels == "original":
        return None
    path = settings.out / "propagation"
    propagated = Propagated.read(path / "labels.h5")
    made_with = read_json(path / "config.json")["settings"]
    for name in (*PREPROCESSING, "labelled_phases", "labelled_cases"):
        here = getattr(settings, name)
        if made_with.get(name, here) != here:
            what = f"{name} is {made_with[name]} there, {here} here"
            raise InputError(f"{path}: {what}; run propagate_labels.py first")
    if (settings.out / "registration" / "best.pt").exists():
        network, _ = load_registration(settings.out, torch.device("cpu"))
        source = made_from(path / "labels.h5") or ""
        if weights_digest(network) not in source and not holds_run(settings, propagated):
            raise InputError(f"{path}: from another registration than OUT's; run propagate_labels.py first")
    if len(propagated.labels):
        return propagated
    reason = "nothing was propagated: no frame lies between ED and ES, or no slice was kept"
    if settings.labels == "propagated":
        raise InputError(f"{path}: {reason}; use --labels original")
    print(f"{reason}; training only `original`")
    return None


def check_cases(settings, cases):
    """Raise InputError if the propagated labels were made from other cases or labels than these."""
    path = settings.out / "propagation" / "labels.h5"
    labelled = [case for case in cases if case.labelled]
    if training_digest(labelled) not in (made_from(path) or ""):
        what = "made from Training cases or labels that have since changed, or by an earlier version"
        raise InputError(f"{path}: {what}; run propagate_labels.py first")


def holds_run(settings, propagated):
    """Whether OUT holds a training run on these very labels, which can be resumed."""
    config = settings.out / "segmentation" / "propagated" / "config.json"
    known = config.exists() and not settings.overwrite
    return known and read_json(config).get("labels") == propagated.digest()


@script
def main(argv):
    places = {name: f"segmentation/{name}" for name in MODELS}
    settings = parse(SegmentationSettings, argv, __doc__, own=places.values(), earlier=("registration",))
    device = choose_device(settings.device)
    propagated = read_propagated(settings)
    names = MODELS if settings.labels == "both" else (settings.labels,)
    redone = [places[name] for name in names] if settings.overwrite else []
    if propagated is None:
        names = ("original",)
    cache = from_first(open_cache, settings)
    training, validation, unseen = cache.training_and_validation(settings.seed, settings.held_out)
    # for config.json
    settings.held_out = sorted(case.code for case in validation if case.split == "Training")
    training = [case for case in training if case.labelled]
    learned = cache.cases, training + validation
    digests = {"original": None, "propagated": propagated and propagated.digest()}
    for name, place in places.items():  # before the first of them is trained
        if place not in redone:
            from_first(check_run, settings, place, *learned, digests[name], name not in names)
    if propagated:
        check_cases(settings, cache.split("Training"))
    store = SliceStore(cache, training, device, "training")
    slices = {  # before the validation, which gets the GPU memory that they leave
        name: LabelledSlices(store, propagated if name == "propagated" else None, settings.expert_share)
        for name in names
    }
    validation = SliceStore(cache, validation + unseen, device, "validation")
    from_first(remove_runs, settings, redone)
    settings.overwrite = False
    for name in names:
        with in_first(run_folder(settings, places[name], *learned, digests[name])) as folder:
            expert_count = slices[name].expert_count
            print(f"{name}: {expert_count} expert slices + {len(slices[name]) - expert_count} propagated, "
                  f"{settings.total_steps} steps of {settings.batch_size} on {describe(device)}")
            task = Segmentation(settings, slices[name], validation, logged=unseen)
            if fit(task, settings, folder, device, outcome="example.png"):
                load_network(task.network, folder / "best.pt", device)
                report.draw_curves(folder)
                report.draw_segmentation(folder / "example.png", task.network, validation)


if __name__ == "__main__":
    raise SystemExit(main())
