"""Registration-based label propagation for 2-D cardiac MRI segmentation.

Cine MRI has 20 to 30 frames per heartbeat and expert labels on two of them. A network learns to register
the frames of a patient; its displacement fields carry the labels to the frames in between; a U-Net learns
from expert and propagated labels. README.md says in which order to read the modules.
"""

LABELS = {"LV": 1, "MYO": 2, "RV": 3}  # M&Ms order: left ventricular cavity, myocardium, right ventricle
REGIONS = tuple(LABELS)
CLASSES = 1 + len(LABELS)  # with background
