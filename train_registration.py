"""Step 1: train a network that registers the frames of one patient, on short-axis cine.

Unsupervised, plus the overlap of expert labels if both frames have them. At the end it is scored on the cases
of Validation and Testing: the label of ED warped to ES and compared with the expert's, in 3-D.
"""

import torch

from cardiac import losses, networks, parallel, propagation, report
from cardiac.augment import augment_pairs
from cardiac.cache import open_cache
from cardiac.checkpoint import weights_digest
from cardiac.evaluation import aligned
from cardiac.files import write_csv, write_text
from cardiac.parallel import from_first, in_first
from cardiac.parts import PARTS, Parts
from cardiac.run import cases_digest, choose_device, describe, run_folder, script
from cardiac.settings import RegistrationSettings, parse
from cardiac.slices import Pairs, SliceStore
from cardiac.training import fit
from cardiac.warp import integrate, resize_displacement, warp


class Registration:
    """The task of the training loop: pairs of slices, the loss of VoxelMorph, validation from ED to ES."""

    def __init__(self, settings, training, validation):
        self.settings, self.validation = settings, validation
        self.pairs = Pairs(training, settings.labelled_share)
        torch.manual_seed(settings.seed)
        self.network = networks.RegistrationNetwork(settings.guided, settings.width)

    def draw(self, step):
        """The pairs of slices of step `step`: a `PairBatch`."""
        batch = self.pairs.draw(self.settings.batch_size, self.settings.seed, step)
        return augment_pairs(batch, self.settings.seed, step) if self.settings.augment else batch

    def register(self, moving, fixed, regions):
        """Returns the velocity, its displacement (B, 2, H, W) in pixels, and `moving` with its regions, both
        warped, as one tensor (B, 4, H, W).
        """
        velocity = self.network(moving, fixed, regions)
        displacement = resize_displacement(integrate(velocity), fixed.shape[-2:])
        # image and labels go through one grid_sample
        return velocity, displacement, warp(torch.cat([moving, regions], dim=1), displacement)

    def losses(self, batch):
        """Image similarity, smoothness, labels' overlap (Balakrishnan et al., 2019) and difference."""
        regions, target = losses.one_hot(batch.moving_labels), losses.one_hot(batch.fixed_labels)
        velocity, _, warped = self.register(batch.moving, batch.fixed, regions)
        terms = {
            "image": self.similarity(warped[:, :1], batch.fixed),
            "smooth": losses.diffusion(velocity),
            "overlap": losses.overlap_loss(warped[:, 1:], target, batch.labelled),
        }
        settings = self.settings
        weights = {"image": 1, "smooth": settings.smoothness, "overlap": settings.dice_weight}
        if settings.difference_weight:
            terms["difference"] = losses.difference_loss(warped[:, 1:], target, batch.labelled)
            weights["difference"] = settings.difference_weight
        return {"loss": sum(weight * terms[name] for name, weight in weights.items()), **terms}

    def similarity(self, warped, fixed):
        """The image term: mean squared error, or local normalised cross-correlation."""
        if self.settings.similarity == "ncc":
            return losses.local_ncc(warped, fixed)
        return torch.nn.functional.mse_loss(warped, fixed)

    def validate(self):
        """Dice of ED's label warped to ES; the loss, of images and, if both are known, labels' overlap."""
        store, images, scores = self.validation, [], []
        for case in store.cases:
            ed, es = (store.frame(case, frame) for frame in (case.ed, case.es))
            labels, target = (store.expert_or_ignored(case, frame) for frame in (case.ed, case.es))
            displacement = networks.register(self.network, ed, es, labels)
            images.append(self.similarity(warp(ed, displacement), es))
            if len(case.expert) < 2:
                continue
            scores.append(losses.region_dice(propagation.warp_labels(labels, displacement), target))
        loss = torch.stack(images).mean().item()
        if not scores:
            return {"val_loss": loss, "score": -loss}
        score = torch.stack(scores).nanmean().item()
        loss += self.settings.dice_weight * (1 - score)
        return {"val_loss": loss, "val_dice": score, "score": score}


@script
def main(argv):
    settings = parse(RegistrationSettings, argv, __doc__, own=("registration",))
    device = choose_device(settings.device)
    cache = from_first(open_cache, settings)
    training, validation, _ = cache.training_and_validation(settings.seed, settings.held_out)
    # for config.json
    settings.held_out = sorted(case.code for case in validation if case.split == "Training")
    with in_first(run_folder(settings, "registration", cache.cases, training + validation)) as folder:
        store = SliceStore(cache, training, device, "training")
        task = Registration(settings, store, SliceStore(cache, validation, device, "validation"))
        steps = f"{settings.total_steps} steps of {settings.batch_size} pairs"
        print(f"registration: {steps} on {describe(device)}")
        tested = [case for case in cache.split("Validation", "Testing") if case.labelled]
        scored, made_from = folder / ".scored", cases_digest(tested)  # what quality.csv was made from
        if not parallel.RANK and not (scored.exists() and scored.read_text() == made_from):
            (folder / "quality.csv").unlink(missing_ok=True)
        if not fit(task, settings, folder, device, outcome="quality.csv"):
            return
        network, _ = propagation.load_registration(settings.out, device)
        parts = Parts(folder / PARTS, (weights_digest(network), settings.size, settings.spacing))
        rows = propagation.score_registration(network, cache, tested, settings, device, parts)
        report.draw_curves(folder)
        report.draw_registration(folder / "example.png", network, task.validation)
        write_csv(folder / "quality.csv", propagation.QUALITY, rows)
        write_text(scored, made_from)
        none = "no labelled case in Validation or Testing: quality.csv is empty"
        print(aligned(report.quality_lines(folder / "quality.csv")) if rows else none)


if __name__ == "__main__":
    raise SystemExit(main())
