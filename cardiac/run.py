"""How a script starts and ends: errors as one line, exit codes, signals, the device, the folder of a run."""

import contextlib
import dataclasses
import functools
import json
import os
import shutil
import signal
import sys
from concurrent.futures import BrokenExecutor

import torch

from cardiac import parallel
from cardiac.files import InputError, digest, locked, printable, read_json, write_json
from cardiac.parts import PARTS

# in this order by --overwrite: first what marks progress, last the settings
REMOVAL_ORDER = {"last.pt": -1, "labels.h5": -1, "summary.json": -1, PARTS: -1, "config.json": 1}


class Terminated(BaseException):
    """Raised on SIGTERM. Like KeyboardInterrupt, no `except Exception` swallows it."""


SIGNAL_ERRORS = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}
# CUDA's messages, in errors other than OutOfMemoryError, for a full GPU and one that torch cannot use
GPU_FULL = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
GPU_UNUSABLE = ("no kernel image is available", "busy or unavailable")
EMPTIED = set()  # folders that --overwrite has emptied in this run of a script


def script(main):
    """Turn `main(argv)` into a script's entry point: errors by the user are one line on stderr, exit code 2.

    Ctrl-C exits with 130 and SIGTERM with 143, as in a shell; both unwind the stack, so that temporary files
    are removed and the training loop saves. Under torchrun the first process reports errors common to all.
    """

    def run(argv):
        arrived = []
        EMPTIED.clear()

        def leave(number, frame):
            arrived.append(number)
            raise SIGNAL_ERRORS[number]

        try:
            with _handlers(leave), parallel.process_group():
                main(argv)
            return 0
        except BaseException as error:
            if parallel.RANK and "closed by peer" in str(error):
                return 1  # the first process has ended and reports why
            # compiled code hit by the signal may have turned it into another exception
            error = SIGNAL_ERRORS[arrived[0]]() if arrived else error
            found = _exit_message(error)
            if not found:
                raise
            message, code = found
            only_here = not isinstance(error, (InputError, *SIGNAL_ERRORS.values()))
        if code > 2:
            message += "; the same command resumes from here"
            if EMPTIED:
                message += ", without --overwrite"
        if parallel.RANK == 0 or only_here:
            print(f"{os.path.basename(sys.argv[0])}: {printable(message)}", file=sys.stderr)
        return code

    @functools.wraps(main)
    def entry(argv=None):
        code = run(argv)
        if parallel.LAUNCHED:
            parallel.exit_process(code)
        return code

    return entry


def _exit_message(error):
    """(one line, exit code) for an error that ends a script; None for a bug, which keeps its traceback."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
    if isinstance(error, Terminated):
        return "terminated", 143
    if isinstance(error, InputError):
        return str(error), 2
    text = str(error)
    if isinstance(error, torch.cuda.OutOfMemoryError) or any(words in text for words in GPU_FULL):
        return "out of GPU memory: lower --size, --batch-size, --channels or --width, or use --device cpu", 2
    if any(words in text for words in GPU_UNUSABLE):
        what = "free the GPU, install a PyTorch that is built for it, or use --device cpu"
        return f"{text.splitlines()[0]}: {what}", 2
    # a worker killed by the kernel leaves only a BrokenExecutor; the text is torch's
    if isinstance(error, (MemoryError, BrokenExecutor)) or "can't allocate memory" in text:
        return "out of memory: lower --size, --batch-size or --workers", 2
    if isinstance(error, OSError):
        reason = error.strerror or str(error) or type(error).__name__
        return f"{error.filename or 'a file'}: {reason.splitlines()[0]}", 2
    return None


@contextlib.contextmanager
def _handlers(handler):
    """Let `handler` handle Ctrl-C and SIGTERM inside the block; possible only in the main thread."""
    previous = {}
    with contextlib.suppress(ValueError):
        previous = {number: signal.signal(number, handler) for number in SIGNAL_ERRORS}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before or signal.SIG_DFL)  # None: not set by Python


@contextlib.contextmanager
def deferred_signals():
    """Defer Ctrl-C and SIGTERM inside the block; yields `stop_if_signalled(save)`, to call between steps.

    It saves and exits if a signal has arrived. A second signal exits at once, without saving.
    """
    arrived = []

    def note(number, frame):
        if arrived:
            raise SIGNAL_ERRORS[number]
        arrived.append(number)

    def stop_if_signalled(save):
        if arrived:
            save()
            raise SIGNAL_ERRORS[arrived[0]]

    with _handlers(note):
        yield stop_if_signalled


def choose_device(name):
    """The torch device for `--device auto|cpu|cuda`; under torchrun each process has its own GPU."""
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: there is no CUDA device that torch can use; try --device auto")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and parallel.LAUNCHED:
        gpus = torch.cuda.device_count()
        if gpus < parallel.ON_THIS_HOST:
            what = f"{parallel.ON_THIS_HOST} processes, but this machine has {gpus} CUDA device(s)"
            raise InputError(f"torchrun started {what}; lower --nproc_per_node")
        torch.cuda.set_device(parallel.LOCAL_RANK)
    if name == "cuda":
        torch.zeros(1, device=name).item()  # an unusable GPU is an error before any work is done
    return torch.device(name)


def describe(device):
    """One line about a device: the GPU's name, or the number of CPU threads."""
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    return f"cpu ({torch.get_num_threads()} threads)"


@contextlib.contextmanager
def run_folder(settings, name, cases, learned=None, labels=None):
    """Yield the folder OUT/name, locked for the block, with the settings in its config.json.

    cases, learned, labels: as for `check_run`. With --overwrite the folder is emptied first.
    """
    folder = settings.out / name
    with run_lock(settings, name):
        folder.mkdir(parents=True, exist_ok=True)
        if settings.overwrite:
            _empty(folder)
        made_of = check_run(settings, name, cases, learned, labels)
        write_json(folder / "config.json", {"settings": dataclasses.asdict(settings), **made_of})
        yield folder
        shutil.rmtree(folder / PARTS, ignore_errors=True)  # no longer needed: the run is finished


def amend_config(folder, **settings):
    """Change settings in the config.json of the run in `folder`."""
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", {**config, "settings": config["settings"] | settings})


def run_lock(settings, name):
    """Lock the folder OUT/name for this process (a context manager); InputError if another one holds it."""
    folder = settings.out / name
    busy = f"{folder}: another process is writing there; wait for it or choose another --out"
    return locked(settings.out / f".{name.replace('/', '-')}.lock", busy)


def _empty(folder):
    """Remove a run; if killed meanwhile, what is left counts as a run that has not begun."""
    for path in sorted(folder.iterdir(), key=lambda path: REMOVAL_ORDER.get(path.name, 0)):
        if not path.is_dir():
            path.unlink()
        elif not (path / "config.json").exists():  # another run's: evaluation/NAME
            shutil.rmtree(path)
    EMPTIED.add(folder)


def remove_runs(settings, names):
    """Remove all runs OUT/name that a call with --overwrite redoes, before it redoes the first.

    Otherwise, if interrupted, the second would count as finished, although it no longer matches the first.
    """
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(run_lock(settings, name))
        for folder in (settings.out / name for name in names):
            if folder.exists():
                _empty(folder)


def check_run(settings, name, cases, learned=None, labels=None, compare_only=False):
    """What identifies the run in the folder OUT/name, for its config.json: {"dataset", "cases", "labels"}.

    cases: of the dataset; learned: those trained and validated on, with their labels, None without training;
    labels: `Propagated.digest` of the propagated labels trained on, None without any. Raises InputError if
    the folder holds a run on others, unless --overwrite is to remove it. compare_only: this call does not
    write to the run: its propagated labels do not matter, nor does --overwrite.
    """
    config = settings.out / name / "config.json"
    learned = None if learned is None else training_digest(learned)
    made_of = {"dataset": dataset_identity(cases), "cases": learned}
    made_of |= {} if compare_only else {"labels": labels}
    stored = read_json(config) if config.exists() and (compare_only or not settings.overwrite) else made_of
    redo = "use --labels both --overwrite" if compare_only else "use --overwrite"
    advice = {"dataset": f"another dataset; {redo}",
              "cases": f"cases of Training or Validation that have since changed or been added; {redo}",
              "labels": "other propagated labels; use --labels propagated --overwrite"}
    for what, identity in made_of.items():
        if stored.get(what, identity) != identity:
            raise InputError(f"{config.parent}: holds a run on {advice[what]} or choose another --out")
    return {what: identity for what, identity in made_of.items() if what in stored}  # older runs have fewer


def dataset_identity(cases):
    """What identifies a dataset: a digest of the codes of its training cases (or of all, if it has none).

    Only of those, so that Validation and Testing may be unpacked later.
    """
    training = [case for case in cases if case.split == "Training"]
    return digest("\n".join(sorted(case.code for case in training or cases)))


def cases_digest(cases):
    """A digest of the cases that a result was made from: codes, entries in the table, files."""
    return digest(json.dumps([case.identity() for case in cases]))


def training_digest(cases):
    """A digest of what is learnt from these cases, `CachedCase.training_identity`."""
    return digest(json.dumps([case.training_identity() for case in cases]))
