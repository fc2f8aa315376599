"""NIfTI files: read defensively, as they come from outside; written so that they overlay their image."""

import gzip
import io
import logging
import math
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np

from cardiac import LABELS
from cardiac.files import file_error, printable, replacing

try:  # a zlib twice as fast: `pip install isal`
    from isal import isal_zlib as inflate
except ImportError:
    inflate = zlib

MAX_BYTES = 2 * 2**30  # bytes of one file after decoding; the largest scan of M&Ms takes 1.2 GiB as float64
MAX_GZIP_RATIO = 1100  # gzip compresses at most by a factor of 1032
CHUNK_BYTES = 2**18  # compressed bytes unpacked at a time: fits the CPU's cache, a quarter faster
EXTENT_MM = (1, 2000)  # plausible for a slice; otherwise the spacing is damaged or in another unit
UNREADABLE = (OSError, EOFError, ValueError, OverflowError, zlib.error, inflate.error,
              nib.spatialimages.HeaderDataError)


def read_header(path, dimensions=(4,)):
    """nibabel's header of a NIfTI file, of which at most the first 540 bytes are read.

    Raises InputError unless the voxels are real numbers, have one of these numbers of dimensions, and fit
    into the file: a header may claim terabytes, and nothing is allocated before this check.
    """
    try:
        with _open(path) as file:
            start = file.read(540)
        kind = nib.Nifti2Header if nib.Nifti2Header.may_contain_header(start) else nib.Nifti1Header
        if not kind.may_contain_header(start):
            raise ValueError("no NIfTI header in it")
        header = kind(start[: kind.sizeof_hdr], check=False)
        spacing = header["pixdim"][1:].copy()
        header.check_fix(logging.Logger("silent", logging.CRITICAL + 1), error_level=40)
        header["pixdim"][1:] = spacing  # check_fix turns 0 to 1 and drops signs, which `spacing_of` must see
        shape, dtype, offset = header.get_data_shape(), header.get_data_dtype(), int(header["vox_offset"])
        if header["magic"].item() != header.single_magic or offset < header.single_vox_offset:
            raise ValueError("its voxels are not in the same file")
        header.get_slope_inter()
    except UNREADABLE as error:
        raise file_error(path, f"not readable as NIfTI ({printable(error)}); download it again") from error
    if len(shape) not in dimensions:
        raise file_error(path, f"{len(shape)}-D ({sizes(shape)}), not {' or '.join(map(str, dimensions))}-D")
    if dtype.kind not in "iuf":
        kind = "RGB colours" if dtype.fields else dtype.name
        raise file_error(path, f"voxels are {kind}, not real numbers")
    if min(shape) < 1:
        raise file_error(path, f"empty volume ({sizes(shape)})")
    claimed, on_disk = math.prod(shape) * dtype.itemsize + offset, Path(path).stat().st_size
    if math.prod(shape) * max(dtype.itemsize, 4) + offset > MAX_BYTES:
        what = "no more than 2 GiB, as float32 or more, are read"
        raise file_error(path, f"header claims {claimed / 2**30:,.1f} GiB; {what}")
    if claimed > on_disk * (MAX_GZIP_RATIO if _is_gzip(path) else 1):
        raise file_error(path, f"truncated, or wrong header: {claimed:,} bytes claimed, {on_disk:,} present")
    return header


@np.errstate(all="ignore")  # overflow and NaN are found and refused here and below
def spacing_of(header, path):
    """Spacing in mm of X, Y and from slice to slice; InputError if spacing or affine are invalid."""
    spacing = np.asarray(header["pixdim"][1:4], float)
    if not (np.isfinite(spacing).all() and (spacing > 0).all()):
        raise file_error(path, f"spacing {sizes(spacing)} is not positive; fix pixdim in its header")
    spacing *= {1: 1000.0, 3: 0.001}.get(int(header["xyzt_units"]) & 7, 1.0)  # metres, micrometres
    extent = spacing[:2] * header.get_data_shape()[:2]
    if extent.min() < EXTENT_MM[0] or extent.max() > EXTENT_MM[1]:
        raise file_error(path, f"spacing {sizes(spacing)} mm, slices of {sizes(extent)} mm; fix its header")
    axes = axes_of(header, path)
    # The axes need not be orthogonal (in M&Ms they are not always), but they must span a volume.
    lengths = np.linalg.norm(axes, axis=0)
    if not (np.isfinite(axes).all() and abs(np.linalg.det(axes)) > 1e-6 * lengths.prod()):
        raise file_error(path, "affine is singular or not finite; fix its header")
    return tuple(float(mm) for mm in spacing)


@np.errstate(all="ignore")
def axes_of(header, path):
    """The voxel axes in mm, columns of (3, 3), in a header's affine; InputError if it has none."""
    try:
        return header.get_best_affine()[:3, :3]
    except UNREADABLE as error:
        raise file_error(path, f"affine not readable ({printable(error)}); fix its header") from error


@np.errstate(all="ignore")
def read_image(path, dimensions=(4,)):
    """The voxels of an image, as stored if they are unscaled integers of 8 or 16 bits, otherwise float32.

    Raises InputError if any is not finite, or if all are the same.
    """
    image = _read_voxels(path, read_header(path, dimensions))
    if image.dtype.kind == "f" or image.dtype.itemsize > 2:
        image = image.astype(np.float32, copy=False)
    low, high = image.min(), image.max()  # NaN where any voxel is
    if not (np.isfinite(low) and np.isfinite(high)):
        raise file_error(path, "NaN or infinite voxels; export it again")
    if low == high:
        raise file_error(path, f"constant image ({low:g} everywhere); download it again")
    return image


def _read_voxels(path, header):
    """Voxels in the units of the image: as stored, or scaled to floats if the header has a scale."""
    shape, dtype, offset = header.get_data_shape(), header.get_data_dtype(), int(header["vox_offset"])
    try:
        content = _read(path, offset + math.prod(shape) * dtype.itemsize)
        if header.get_slope_inter() in ((None, None), (1, 0)):
            return np.frombuffer(content, dtype, math.prod(shape), offset).reshape(shape, order="F")
        return np.asarray(nib.arrayproxy.ArrayProxy(io.BytesIO(content), header, mmap=False), np.float32)
    except UNREADABLE as error:
        raise file_error(path, f"truncated or damaged ({printable(error)}); download it again") from error


def _read(path, size):
    """The first `size` bytes of a file, unpacked if it is gzipped."""
    if _is_gzip(path):
        unpacker = inflate.decompressobj(zlib.MAX_WBITS | 16)
        content, position = np.empty(size + 1, np.uint8), 0
        with open(path, "rb") as file:
            while not unpacker.eof and position <= size and (packed := file.read(CHUNK_BYTES)):
                piece = unpacker.decompress(packed, size + 1 - position)
                content.data[position : position + len(piece)] = piece
                position += len(piece)
        if unpacker.eof and position == size:  # read to the end, where its checksum is verified
            return content.data[:size]
    with _open(path) as file:  # not gzipped, in several members, or with a wrong header
        content = file.read(size)
        file.read(1)  # verifies a checksum at the end; what follows the voxels is not read
    if len(content) < size:
        raise EOFError(f"{len(content):,} of {size:,} bytes")
    return content


def _is_gzip(path):
    return Path(path).suffix.lower() == ".gz"


def _open(path):
    return gzip.open(path) if _is_gzip(path) else open(path, "rb")


@np.errstate(all="ignore")
def read_label_values(path):
    """Values of a label file as uint8, each one of 0, 1, 2, 3."""
    voxels = _read_voxels(path, read_header(path, (3, 4)))
    values = voxels.astype(np.uint8, copy=False)
    if (values is not voxels and (values != voxels).any()) or values.max() > len(LABELS):
        unknown = (values != voxels) | (values > len(LABELS))
        examples = ", ".join(f"{value:g}" for value in np.unique(voxels[unknown])[:4])
        raise file_error(path, f"unknown label {examples}; labels are 0, 1, 2 and 3")
    return values


def write_labels(path, labels, like):
    """Write labels (3-D or 4-D, uint8) with the affine, zooms and units of the image at `like`."""
    image = nib.load(like)
    header = image.header.copy()
    header.set_data_dtype(np.uint8)
    header.set_slope_inter(1, 0)
    header["cal_min"] = header["cal_max"] = 0  # the display window of the image would show labels black
    with replacing(path) as temporary:
        nib.save(type(image)(labels.astype(np.uint8), image.affine, header), temporary)


def sizes(numbers):
    """Numbers as "3 x 4 x 5"."""
    return " x ".join(f"{number:g}" for number in numbers)
