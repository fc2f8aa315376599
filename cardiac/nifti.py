"""Labels as NIfTI files that overlay their image exactly."""

import nibabel as nib
import numpy as np

from cardiac.files import replacing


def write_labels(path, labels, like):
    """Write labels (3-D or 4-D, uint8) with the affine, zooms and units of the image at `like`."""
    image = nib.load(like)
    header = image.header.copy()
    header.set_data_dtype(np.uint8)
    header.set_slope_inter(1, 0)
    header["cal_min"] = header["cal_max"] = 0  # the display window of the image would show labels black
    with replacing(path) as temporary:
        nib.save(type(image)(labels.astype(np.uint8), image.affine, header), temporary)
