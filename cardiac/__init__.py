"""Registration-based label propagation for 2-D cardiac MRI segmentation.

Cine MRI has 20 to 30 frames a heartbeat and expert labels on two of them. A network learns to register the
frames of one patient; its displacement fields carry the labels to the frames between; a U-Net learns from
both.

The modules, in the order in which the data meets them: `nifti`, `cases`, `layouts` (what lies on disk),
`preprocessing`, `building` and `cache` (slices of one size and spacing in one HDF5 file), `slices` and
`augment` (batches on the device), `warp`, `networks`, `losses` (the method), `checkpoint` and `training` (the
loop), `propagation` and `trust` (labels through time), `metrics`, `evaluation`, `predict`, `report` and
`page` (what is looked at). `heart`, `phantom` and `demo` make a dataset with a known truth and run everything
on it; `settings` and `run` are what the scripts share, `files`, `parts` and `workers` what keeps results
whole, `parallel` is for several GPUs, `check` looks at a dataset.
"""

LABELS = {"LV": 1, "MYO": 2, "RV": 3}  # M&Ms order: left ventricular cavity, myocardium, right ventricle
REGIONS = tuple(LABELS)
CLASSES = 1 + len(LABELS)  # with background
