"""Every setting of the four scripts: one field each, with its unit; the command lines are made from them."""

import argparse
import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from cardiac.files import InputError, Parser, read_json, redo_command
from cardiac.parallel import processes

MAX_WIDTH = 16  # times VoxelMorph's channels


def setting(default, help, **options):
    """A dataclass field that carries the help text and argparse options of its command-line flag."""
    return field(default=default, metadata={"help": help, **options})


LIMITS = {  # smallest and largest allowed value of each numeric setting
    "size": (16, 4096), "spacing": (0.05, 100), "seed": (0, 2**63 - 1), "lr": (1e-9, 1000),
    "width": (1, MAX_WIDTH), "batch_size": (1, 1e15), "epochs": (1, 1e15), "max_steps": (1, 1e15),
    "steps_per_epoch": (1, 1e15), "channels": (1, 1e15), "labelled_cases": (1, 1e15), "workers": (0, 1e15),
    "patience": (0, 1e15), "refine": (0, 1e15), "smoothness": (0, 1e15), "dice_weight": (0, 1e15),
    "difference_weight": (0, 1e15), "averaging": (0, 1), "labelled_share": (0, 1), "expert_share": (0, 1),
}
LABELLED_PHASES = setting("both", "phases whose expert labels are used; the others serve only for scoring",
                          choices=("ED", "ES", "both"))
LABELLED_CASES = setting(None, "use the labels of only N Training patients, chosen by seed (default: all)",
                         metavar="N")


@dataclass
class Settings:
    """The settings of all four scripts."""

    STRONG: ClassVar = {"crop": "motion"}  # the defaults that --recipe strong changes
    REDONE: ClassVar = False  # whether results are redone, not refused, if an earlier run has changed

    data: Path = setting(None, "dataset in the layout of M&Ms or ACDC", required=True)
    out: Path = setting(Path("runs"), "folder of this run")
    cache: Path = setting(None, "folder of slice caches (default: folder `cache` beside OUT)")
    device: str = setting("auto", "where to compute; auto: cuda if available",
                          choices=("auto", "cpu", "cuda"))
    size: int = setting(192, "side of the square slices, pixels (a multiple of 16)")
    spacing: float = setting(1.25, "in-plane spacing of the slices, mm")
    crop: str = setting("centre", "slices are centred on the image, or on what moves",
                        choices=("centre", "motion"))
    seed: int = setting(0, "random seed; what step n draws depends only on (seed, n)")
    recipe: str = setting("paper", "paper: the paper's method; strong: the defaults marked strong here",
                          choices=("paper", "strong"))
    workers: int = setting(0, "processes that read, unpack and score scans (0: one per core)")
    skip_bad: bool = setting(False, "leave out cases that cannot be read, instead of stopping")
    overwrite: bool = setting(False, "start over: remove what this script wrote in OUT before")

    def check(self):
        """Raise InputError for a value that cannot work, before any work is done."""
        for name, (least, largest) in LIMITS.items():
            value = getattr(self, name, None)
            if value != getattr(type(self), name, None) and not least <= value <= largest:
                flag = f"--{name.replace('_', '-')}"
                raise InputError(f"{flag} {value}: must be between {least:g} and {largest:g}")
        if self.size % 16:
            down = self.size // 16 * 16
            what = f"the networks halve it four times; use {down} or {down + 16}"
            raise InputError(f"--size {self.size}: {what}")
        if not all(isinstance(code, str) for code in getattr(self, "held_out", None) or ()):
            raise TypeError("held_out: not a list of codes")
        batch, shares = getattr(self, "batch_size", None), processes()
        if shares > 1 and batch is None:
            raise InputError("this script runs as one process; use torchrun only for training")
        if shares > 1 and batch % shares:
            raise InputError(f"--batch-size {batch}: {shares} processes cannot share it equally")


@dataclass
class TrainingSettings(Settings):
    """The settings of the training loop."""

    epochs: int = setting(100, "epochs of `steps_per_epoch` steps each, however many labels there are")
    steps_per_epoch: int = setting(200, "optimiser steps between two validations")
    max_steps: int = setting(None, "total number of steps of each network; overrides --epochs")
    batch_size: int = setting(16, "slices (segmentation) or pairs of slices (registration) per step")
    lr: float = setting(1e-3, "learning rate of Adam")
    labelled_phases: str = LABELLED_PHASES
    labelled_cases: int = LABELLED_CASES
    held_out: list = setting(
        None, "labelled Training patients to validate on (default: those of the run so far; at first none "
        "if Validation has cases of vendors with training labels, otherwise a fifth, chosen by seed)",
        type=str, nargs="+", metavar="CODE")
    augment: bool = setting(False, "a random transform for every sample (`augment.py`)")
    averaging: float = setting(0.0, "decay of the weights' average, which is validated and kept; 0: none")
    patience: int = setting(10, "lr falls to a tenth after more epochs than this without a lower val_loss")
    precision: str = setting(
        "auto", "number format of a step's convolutions; auto: bfloat16 on GPUs made for it, else float32; "
        "CPUs with AVX512_BF16 are faster in bfloat16, others many times slower",
        choices=("auto", "float32", "bfloat16"))
    profile: bool = setting(False, "write a trace of a few steps to the run's folder; print what takes time")

    @property
    def total_steps(self):
        """Optimiser steps of a finished run."""
        return self.max_steps or self.epochs * self.steps_per_epoch


@dataclass
class RegistrationSettings(TrainingSettings):
    """`train_registration.py`."""

    STRONG: ClassVar = {**Settings.STRONG, "augment": True, "averaging": 0.998, "dice_weight": 0.5,
                        "difference_weight": 20.0, "guided": True, "turned": True}
    similarity: str = setting("mse", "image term of the loss", choices=("mse", "ncc"))
    smoothness: float = setting(0.01, "weight of the velocity's diffusion (use 1.0 with ncc)")
    dice_weight: float = setting(0.05, "weight of the labels' overlap where both slices have expert labels")
    difference_weight: float = setting(0.0, "weight of the labels' squared difference, in the same slices")
    width: int = setting(1, "multiple of VoxelMorph's channels; 2: better labels in three times the time")
    guided: bool = setting(False, "the labels of the moving slice, where known, are an input of the network")
    turned: bool = setting(False, "carry labels by a pair's mean velocity, as it is and turned by 180 deg")
    labelled_share: float = setting(0.5, "share of pairs that are ED and ES, where both have expert labels")


@dataclass
class PropagationSettings(Settings):
    """`propagate_labels.py`."""

    STRONG: ClassVar = {**Settings.STRONG, "trust": True, "refine": 10}
    REDONE: ClassVar = True
    trust: bool = setting(False, "fuse ED's and ES's labels, weight all pixels, check all slices (trust.py)")
    refine: int = setting(0, "steps of Adam that fit each velocity to its own two images")
    frames: str = setting("systole", "systole: ED to ES; all: diastole too", choices=("systole", "all"))
    labelled_phases: str = LABELLED_PHASES
    labelled_cases: int = LABELLED_CASES
    nifti: bool = setting(False, "also write the labels as NIfTI, on each case's own grid")


@dataclass
class SegmentationSettings(TrainingSettings):
    """`train_segmentation.py`."""

    STRONG: ClassVar = {**Settings.STRONG, "augment": True, "averaging": 0.99, "dice_weight": 1.0,
                        "expert_share": 0.5}
    expert_share: float = setting(0.0, "share of expert slices among those drawn; 0: all are equally likely")
    dice_weight: float = setting(0.0, "weight of the soft Dice loss added to the cross-entropy")
    labels: str = setting("both", "labels to train on", choices=("original", "propagated", "both"))
    channels: int = setting(32, "channels of the U-Net's first level")


@dataclass
class EvaluationSettings(Settings):
    """`evaluate.py`."""

    STRONG: ClassVar = {**Settings.STRONG, "mirrored": True}
    data: Path = setting(None, "dataset to score, the run's own or another, in the layout of M&Ms or ACDC")
    predict: tuple = setting((), "segment these NIfTI files, or those in these folders; not with --data",
                             type=Path, nargs="+", metavar="PATH")
    channels: int = setting(32, "channels of the U-Net's first level")
    split: str = setting("Testing", "cases to score", choices=("Testing", "Validation", "Training"))
    mirrored: bool = setting(False, "average the predictions of four mirror images of each slice")
    all_frames: bool = setting(False, "predict every frame, not only ED and ES")
    largest_component: bool = setting(False, "also score largest components; --predict: write these")
    view: tuple = setting((), "also show this case in the report (repeatable)", type=str, action="append",
                          metavar="CODE")

    def check(self):
        """Raise InputError for a value that cannot work, before any work is done."""
        super().check()
        if bool(self.predict) == (self.data is not None):
            raise InputError("give either --data (a dataset to score) or --predict (scans to segment)")


# what later scripts take from earlier ones
SHARED = ("size", "spacing", "crop", "seed", "recipe", "labelled_phases", "labelled_cases", "channels",
          "skip_bad")
# specific to each call, never taken
PER_CALL = ("data", "out", "cache", "device", "workers", "overwrite", "labels", "profile")
MAY_CHANGE = ("epochs", "max_steps", "nifti", "skip_bad")  # taken, but may be changed when a run is resumed


def parse(kind, argv, description, own=(), earlier=()):
    """Settings of class `kind` from the command line and from the runs in OUT.

    own: this script's folders below OUT. A run in them is resumed: settings that are not typed are taken from
    it, and a typed one that contradicts it is an InputError (unless --overwrite). If this call does not write
    to it, a run still gives its settings, but typed ones may differ, unless they are SHARED or name the
    patients to validate on. earlier: folders of the preceding scripts, which give the SHARED settings, such
    as size and spacing, in the same way. If results are REDONE with another recipe than that of the run in
    `own`, what the recipes differ in is taken from the new one.
    """
    typed = vars(_command_line(kind, description, earlier).parse_args(argv))
    if "held_out" in typed:
        typed["held_out"] = sorted(set(typed["held_out"]))  # as runs store them
    settings = kind(**typed)
    known = dict.fromkeys(typed, "")  # name: the folder that gave its value
    labels = getattr(settings, "labels", "both")  # this call may train only one U-Net
    written = [folder for folder in own if labels in ("both", Path(folder).name)]
    others = [folder for folder in own if folder not in written]
    for folder in (*written, *others, *earlier):
        if folder in written and settings.overwrite:
            continue
        stored = _stored(settings.out / folder)
        if folder in earlier:
            stored = {name: value for name, value in stored.items() if name in SHARED}
        elif stored and not kind.REDONE:  # a setting that did not exist then is off, whatever the recipe
            stored = {**vars(kind()), **stored}
        if folder in others:  # typed settings may differ there
            stored.pop("skip_bad", None)  # the registration's counts
            same = SHARED if stored.get("held_out") is None else (*SHARED, "held_out")
            stored = {name: value for name, value in stored.items() if name in same or name not in known}
        if "epochs" in typed:  # not to be overridden by an earlier --max-steps
            stored.pop("max_steps", None)
        recipe = settings.recipe
        _merge(settings, known, stored, settings.out / folder, folder in written)
        if kind.REDONE and folder in earlier and settings.recipe != recipe:
            for name in (name for name in kind.STRONG if known.get(name) and name not in SHARED):
                del known[name]
                setattr(settings, name, getattr(kind, name))
    if settings.recipe == "strong":
        for name, value in kind.STRONG.items():
            if name not in known:
                setattr(settings, name, value)

    if settings.cache is None:
        settings.cache = settings.out.absolute().parent / "cache"
    try:
        settings.check()
    except TypeError as error:  # typed settings always have the right type
        raise InputError(f"{settings.out}: invalid settings in a config.json there ({error})") from error
    for flag, folder in (("--out", settings.out), ("--cache", settings.cache)):
        folder = folder.absolute()
        place = next(each for each in (folder, *folder.parents) if each.exists())
        if not (place.is_dir() and os.access(place, os.W_OK)):
            raise InputError(f"{flag} {folder}: {place} is not a writable folder")
    return settings


def _command_line(kind, description, earlier):
    """The parser made from the fields of `kind`; its result lacks what is not typed."""
    if earlier and description:
        shared = (name.replace("_", "-") for name in SHARED if hasattr(kind, name))
        description += f"\n\nTaken from the runs in OUT unless typed: {', '.join(shared)}"
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for item in dataclasses.fields(kind):
        options = dict(item.metadata)
        text = options.pop("help").replace("%", "%%")
        flag = "--" + item.name.replace("_", "-")
        if item.type is bool:
            text += f" (default: off{'; strong: on' if kind.STRONG.get(item.name) else ''})"
            parser.add_argument(flag, action="store_true", default=argparse.SUPPRESS, help=text)
            continue
        if item.default not in (None, ()):
            strong = f"; strong: {kind.STRONG[item.name]}" if item.name in kind.STRONG else ""
            text += f" (default: {item.default}{strong})"
        elif not (options.get("required") or "default:" in text):
            text += " (default: none)"
        if "choices" not in options:
            options.setdefault("metavar", item.type.__name__.upper())
        options.setdefault("type", item.type)
        parser.add_argument(flag, default=argparse.SUPPRESS, help=text, **options)
    return parser


def _stored(folder):
    """The settings {name: value} of the run in a folder; {} if there is none."""
    config = folder / "config.json"
    if not config.exists():
        return {}
    stored = read_json(config)
    if not isinstance(stored.get("settings"), dict):
        raise InputError(f"{config}: not the settings of a run; {redo_command(config)} --overwrite redoes it")
    return stored["settings"]


def _merge(settings, known, stored, folder, written):
    """Take settings that are not yet `known` from the `stored` ones of the run in `folder`; known ones,
    whether typed or from another run, must not contradict those, unless they MAY_CHANGE. Runs may differ in
    their seed: the first one counts. If results are REDONE, `stored` replaces all that is not typed. written:
    whether this call writes to `folder`.
    """
    for name in (item.name for item in dataclasses.fields(settings) if item.name not in PER_CALL):
        if name not in stored:
            continue
        value, flag = getattr(settings, name), "--" + name.replace("_", "-")
        giver = known.get(name)  # None: not yet known; "": the command line
        may_differ = (*MAY_CHANGE, "seed") if giver else MAY_CHANGE
        if giver is None or (giver and settings.REDONE):
            setattr(settings, name, stored[name])
            known[name] = f" of {folder}"
        elif value != stored[name] and name not in may_differ:
            what = "omit it, start over with --overwrite," if written else "omit it"
            what = "redo one of them with --overwrite," if giver else what
            elsewhere = "choose another --out" if written or giver else "use it with another --out"
            pair = value, stored[name]
            here, there = (f"no {flag}" if each is None else f"{flag} {each}" for each in pair)
            what = f"{here}{giver} contradicts {there} of {folder}; {what}"
            raise InputError(f"{what} or {elsewhere}")
