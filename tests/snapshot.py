"""The contents of an OUT folder, in a form that is the same whether or not the run was interrupted."""

import csv
import hashlib
import io
import json

import h5py
import nibabel as nib
import numpy as np
import torch

from cardiac.parts import PARTS, read_part

TIMING = {"seconds", "samples_per_second", "waiting_percent", "memory_gb"}  # columns of log.csv


def snapshot(out):
    """{relative path: content} of every file below `out`, hidden ones too."""
    files = sorted(path for path in out.rglob("*") if path.is_file())
    return {path.relative_to(out).as_posix(): content(path) for path in files}


def differences(one, other):
    """The differences of two snapshots, as lines; empty if they are equal."""
    lines = [f"only in the first: {name}" for name in sorted(one.keys() - other.keys())]
    lines += [f"only in the second: {name}" for name in sorted(other.keys() - one.keys())]
    return lines + [f"different: {name}" for name in sorted(one) if one[name] != other.get(name, one[name])]


def content(path):
    """A file's content: h5, NIfTI and pt as arrays and values, log.csv without times, others byte by byte.

    config.json without the folders of the run, which differ. Raises if the file is incomplete.
    """
    if path.name == "log.csv":
        rows = csv.DictReader(io.StringIO(path.read_text()))
        return [{name: text for name, text in row.items() if name not in TIMING} for row in rows]
    if path.name == "config.json":
        config = json.loads(path.read_text())
        return {**config, "settings": {**config["settings"], "out": None, "cache": None}}
    if path.suffix == ".pt":
        return _plain(torch.load(path, weights_only=True))
    if path.suffix == ".h5":
        with h5py.File(path) as file:
            return {"attributes": _plain(dict(file.attrs)), **{name: _plain(file[name][()]) for name in file}}
    if path.name.endswith(".nii.gz"):
        image = nib.load(path)
        return image.header.binaryblock, _plain(np.asanyarray(image.dataobj))
    if PARTS in str(path.parent):
        return _plain(read_part(path))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _plain(value):
    """Arrays as digests of their bytes, times left out."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items() if key not in TIMING}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if isinstance(value, torch.Tensor):
        value = value.contiguous().numpy()
    if isinstance(value, (np.ndarray, np.generic)):
        return str(value.dtype), value.shape, hashlib.sha256(value.tobytes()).hexdigest()
    return value
