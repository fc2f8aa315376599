"""Files that are complete or absent, folders used by one process at a time, errors a user can act on."""

import argparse
import contextlib
import csv
import fcntl
import hashlib
import io
import json
import os
from pathlib import Path

import h5py


class InputError(Exception):
    """Something the user gave is wrong. The message is one line: which file, what is wrong, what to do."""


def printable(text):
    """A path, message or value from outside as printable text on one line, escaped if necessary."""
    text = str(text)
    return text if text.isprintable() else ascii(text)


def joined(values, comma=", "):
    """Values joined for a message."""
    return comma.join(str(value) for value in values)


def file_error(path, what):
    """An InputError about a file: which one, and what is wrong."""
    return InputError(f"{printable(path)}: {what}")


class Parser(argparse.ArgumentParser):
    """A command-line parser that raises InputErrors, one line each like all others."""

    def error(self, message):
        raise InputError(f"{' '.join(message.split())}; see --help")


@contextlib.contextmanager
def _named(path):
    """Add the file's name to an OSError raised in the block; a full disk leaves it out."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@contextlib.contextmanager
def replacing(path):
    """Yield a temporary path beside `path`; rename it to `path` if the block succeeds, otherwise remove it.

    The file is fsynced before the rename and its folder after it, so that a file with the final name is
    complete even after a power cut. The temporary name keeps the suffix (nibabel relies on it) and is always
    the same, so that the next process overwrites what a killed one left behind.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        with _named(path):
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def writing_hdf5(path, size):
    """`replacing` for an HDF5 file of up to `size` bytes, reserved in advance: yields it open for writing.

    HDF5 does not survive a full disk: the process crashes when the file is closed, without a message.
    """
    empty = io.BytesIO()
    h5py.File(empty, "w").close()
    with replacing(path) as temporary:
        with open(temporary, "wb", buffering=0) as file:
            file.write(empty.getvalue())
            os.posix_fallocate(file.fileno(), 0, size)
        with h5py.File(temporary, "r+") as file:
            yield file


def write_in_place(path, pieces):
    """Write {offset: bytes or a C-contiguous array} into the file at `path`, and fsync it."""
    with _named(path), open(path, "rb+") as file:
        for offset, piece in pieces.items():
            file.seek(offset)
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())


def hdf5_dataset(file, name):
    """Dataset `name` of an open, possibly untrusted HDF5 file; ValueError if it is not safe to read.

    It must be stored in the file itself, not behind a link, and claim no more bytes than the file has (text
    of variable length could claim any number).
    """
    if not isinstance(file.get(name, getlink=True), h5py.HardLink):
        raise ValueError(f"no dataset {name} in it")
    found = file[name]
    if not isinstance(found, h5py.Dataset) or found.external or found.is_virtual or found.dtype.hasobject:
        raise ValueError(f"{name} is not a plain dataset")
    if found.nbytes > os.path.getsize(file.filename):
        raise ValueError(f"{name} claims {found.nbytes:,} bytes, more than the file has")
    return found


def digest(*pieces):
    """Sixteen hexadecimal digits of the SHA-256 of texts, bytes or C-contiguous arrays, joined."""
    found = hashlib.sha256()
    for piece in pieces:
        found.update(piece.encode() if isinstance(piece, str) else piece)
    return found.hexdigest()[:16]


def write_bytes(path, data):
    """Write `data` (bytes) to `path` atomically."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_text(path, text):
    """Write `text` (str) to `path` as UTF-8, atomically."""
    write_bytes(path, text.encode())


def redo_command(path):
    """The command that redoes the run, and no other, to which the file at `path` belongs."""
    folder = Path(path).parent
    if folder.parent.name == "segmentation" and folder.name in ("original", "propagated"):
        return f"train_segmentation.py --labels {folder.name}"
    if folder.parent.name in ("evaluation", "predictions"):  # of a dataset or scan, whatever that is called
        return "evaluate.py"
    scripts = {"registration": "train_registration.py", "propagation": "propagate_labels.py"}
    return scripts.get(folder.name, "evaluate.py")


def write_json(path, value):
    """Write a JSON value, indented, keys in the order given; NaN, which JSON lacks, as null."""
    text = json.dumps(value, default=str)
    value = json.loads(text, parse_constant=lambda word: None if word == "NaN" else float(word))
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path):
    """Read a JSON object; InputError if the file does not contain one."""
    try:
        value = json.loads(Path(path).read_text())
        if not isinstance(value, dict):
            raise ValueError("not an object")
        return value
    except (ValueError, OSError) as error:
        what = f"not readable as JSON ({error}); {redo_command(path)} --overwrite redoes it"
        raise InputError(f"{path}: {what}") from error


def write_csv(path, columns, rows):
    """Write rows (mappings) as CSV with these columns. NaN is an empty cell; floats have six decimals, or
    twelve if they are close to 0.

    Text that a spreadsheet would run as a formula is written with a quote in front of it.
    """
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({column: _cell(row.get(column)) for column in columns})
    write_text(path, buffer.getvalue())


def read_csv(path):
    """Read a CSV file written by `write_csv` as a list of dicts of strings, without the quotes it added."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return [{name: text and text.removeprefix("'") for name, text in row.items()} for row in rows]


def _cell(value):
    if value is None or (isinstance(value, float) and value != value):
        return ""
    if isinstance(value, float):
        return f"{value:.{6 if value == 0 or abs(value) >= 1e-4 else 12}f}"
    if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r", "'"):
        return "'" + value
    return value


@contextlib.contextmanager
def locked(path, busy=None, wait=False):
    """Hold an exclusive lock on the file `path` for the block.

    If another process holds it: with `wait`, print `busy` and wait; otherwise raise InputError(`busy`). The
    kernel releases the lock of a process that dies, so a killed run leaves no lock behind.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                raise InputError(busy) from None
            print(busy, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def sync_folder(folder):
    """Fsync a folder, that is, the names in it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
