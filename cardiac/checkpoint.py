"""Checkpoints: plain tensors, and the progress of a run."""

import dataclasses
import io
import math
import operator
import zipfile

import torch

from cardiac.files import InputError, digest, redo_command, write_bytes


@dataclasses.dataclass
class Progress:
    """The progress of a run: what a checkpoint holds besides weights, optimiser and schedule."""

    step: int = 0
    best: float = -math.inf  # score of best.pt
    seconds: float = 0.0  # of training, in all
    sums: dict = dataclasses.field(default_factory=dict)  # of losses, over the steps of the current epoch
    rows: list = dataclasses.field(default_factory=list)  # of log.csv


def write_checkpoint(path, state):
    """Write a checkpoint of plain tensors and Python values, atomically."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_bytes(path, buffer.getbuffer())


def read_checkpoint(path, device):
    """Read a file from `write_checkpoint`. It may be untrusted: nothing in it is executed.

    Raises InputError if there is none or it is not a checkpoint.
    """
    if not path.exists():
        raise InputError(f"{path}: there is no such checkpoint; run {redo_command(path)} first")
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(part.file_size for part in archive.infolist()) > path.stat().st_size:
                raise ValueError("it unpacks to more than its size")
        state = torch.load(path, map_location=device, weights_only=True)
        progress = Progress(**state["progress"])
        if operator.index(progress.step) < 0 or math.isnan(progress.best):
            raise ValueError("its progress is not valid")
    except Exception as error:  # a broken or hostile file can raise anything; none of it is worth a traceback
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:100]
        what = f"not a checkpoint of this program ({reason})"
        raise InputError(f"{path}: {what}; {redo_command(path)} --overwrite retrains it") from error
    return state


def restore(path, device, **parts):
    """Load a checkpoint into a run's `parts`, name = object (a network, ...); returns its `Progress`."""
    state = read_checkpoint(path, device)
    for name, part in parts.items():
        try:
            part.load_state_dict(state[name])
        except Exception as error:  # as above
            what = f"its {name} has another architecture (another --channels?)"
            raise InputError(f"{path}: {what}; {redo_command(path)} --overwrite retrains it") from error
    return Progress(**state["progress"])


def load_network(network, path, device):
    """Load a checkpoint's weights into `network`, ready for inference; returns its `Progress`."""
    progress = restore(path, device, network=network)
    network.to(device, memory_format=torch.channels_last).eval()
    return progress


def weights_digest(network):
    """A digest of a network's weights, not of its training time; a wrapper (`Turned`) changes it."""
    state = network.state_dict().items()
    return digest(*(piece for name, value in state for piece in (name, value.cpu().numpy().tobytes())))
