"""Slices of the cache as tensors, on the device if they fit, and the batches that both networks draw.

Everything a step draws comes from a generator seeded only by (seed, step): a resumed run draws what an
uninterrupted one would have, without a random state in the checkpoint. Processes that share a batch each draw
the indices of the whole batch, but read only their part.
"""

import dataclasses

import numpy as np
import torch

from cardiac.building import places_of
from cardiac.losses import IGNORED
from cardiac.parallel import ON_THIS_HOST, share

# bytes of GPU memory left to training besides its slices: enough for 16 of 192 x 192, 32 channels, float32
TRAINING_BYTES = 3e9


def step_generator(seed, step):
    """A CPU generator whose draws depend only on (seed, step), and are the same on every device."""
    state = np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


class SliceStore:
    """Slices of some cases of a cache: on the device if they fit, else in host memory, else in the file.

    cases: the cases, with their rows renumbered for this store. labels: (M + 1, S, S) uint8 on the device;
    the last row is all IGNORED, so that row -1 stands for "no expert label". what: a name to print with size
    and place. place: "device", "host" or "file"; by default the first that has room. gather_device: where
    `take_rows` gathers batches, the device or, for "host" and "file", the CPU.
    """

    def __init__(self, cache, cases, device, what=None, place=None):
        self.cache, self.device = cache, device
        ranges = [(case.first, case.first + case.slices * case.frames) for case in cases]
        label_ranges = [(c.first_label, c.first_label + 2 * c.slices) for c in cases if c.ed is not None]
        places, counts = places_of(cases)
        self.cases = [dataclasses.replace(case, **places[case.code]) for case in cases]
        rows = counts["images"]
        shape = (rows, cache.size, cache.size)
        place = place or _place(rows * cache.size**2 * 2, device)
        self.place, self.gather_device = place, device if place == "device" else torch.device("cpu")
        if place == "file":
            self._rows = torch.cat([torch.arange(*each) for each in ranges])
        else:
            self._images = _read_images(cache, ranges, shape, self.gather_device)
        labels = np.full((counts["labels"] + 1, *shape[1:]), IGNORED, np.uint8)
        cache.file.read("labels", label_ranges, labels)
        self.labels = torch.from_numpy(labels).to(device)
        if what:
            at = {"device": f"on the device ({device.type})", "host": "in host memory", "file": "in the file"}
            size = rows * cache.size**2 * 2 / 1e9
            print(f"{what}: {len(cases)} cases, {rows} slices, {size:.2f} GB {at[place]}", flush=True)

    def images(self, rows):
        """Slices (B, 1, S, S) float32, on the device, of these rows, (B,) on the CPU."""
        if self.place == "file":
            slices = np.empty((len(rows), self.cache.size, self.cache.size), np.float16)
            self.cache.file.read("images", ((row, row + 1) for row in self._rows[rows].tolist()), slices)
            return self._to_device(torch.from_numpy(slices))[:, None].float()
        return self.take_rows(self._images, rows)[:, None].float()

    def take_rows(self, tensor, rows):
        """These rows, (B,) on the CPU, of a tensor in `gather_device`, brought to the device."""
        if self.place == "device":
            return tensor[rows.to(self.device, non_blocking=True)]
        return self._to_device(tensor[rows])

    def _to_device(self, tensor):
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()  # copied while the CPU continues
        return tensor.to(self.device, non_blocking=True)

    def frame(self, case, frame):
        """All slices of a frame of one of this store's cases: (Z, 1, S, S) float32 on the device."""
        return self.images(torch.from_numpy(case.rows(frame)))

    def expert(self, case, frame):
        """The expert labels of ED or ES of one of this store's cases: (Z, S, S) uint8 on the device."""
        return self.labels[torch.from_numpy(case.label_rows(frame)).to(self.device)]

    def expert_or_ignored(self, case, frame):
        """`expert`, or all IGNORED in a frame without known expert labels."""
        if frame in case.expert:
            return self.expert(case, frame)
        return self.labels[-1:].expand(case.slices, -1, -1)


def _read_images(cache, ranges, shape, device):
    """These ranges of rows of a cache as one tensor of `shape` on the device.

    Case by case to a GPU: the host may have less memory.
    """
    if device.type == "cpu":
        read = np.empty(shape, np.float16)  # in large pages, if the system has them: torch's are small
        cache.file.read("images", ranges, read)
        return torch.from_numpy(read)
    images = torch.empty(shape, dtype=torch.float16, device=device)
    for rows, part in zip(ranges, images.split([stop - start for start, stop in ranges])):
        read = np.empty(part.shape, np.float16)
        cache.file.read("images", [rows], read)
        part.copy_(torch.from_numpy(read))
    return images


def _place(size, device):
    """Where `size` bytes of slices and as many of labels and trust fit: "device", "host" or "file"."""
    if device.type == "cuda" and 2 * size + TRAINING_BYTES < torch.cuda.mem_get_info(device)[0]:
        return "device"
    with open("/proc/meminfo") as file:  # free memory and what the file cache can release
        available = next(int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
    if 2 * size < 0.8 * 1024 * available / ON_THIS_HOST:
        return "device" if device.type == "cpu" else "host"
    return "file"


@dataclasses.dataclass
class PairBatch:
    """Slices (B, 1, S, S) to register, and their labels (B, S, S), IGNORED where there are none."""

    moving: torch.Tensor
    fixed: torch.Tensor
    moving_labels: torch.Tensor
    fixed_labels: torch.Tensor
    labelled: torch.Tensor  # (B,) bool: expert labels on both


class Pairs:
    """Pairs of frames of one slice: ED with any other frame, either way round.

    If the expert labels of ED and ES are both known, `labelled_share` of the pairs are these two, plus any
    that the random frame gives. Cases without any label contribute two random frames.
    """

    def __init__(self, store, labelled_share):
        self.store, self.labelled_share = store, labelled_share
        columns = []
        for case in store.cases:
            frames = (case.ed, case.es) if case.labelled else (-1, -1)
            for z in range(case.slices):
                labels = [case.label_rows(f)[z] if f in case.expert else -1 for f in frames]
                columns.append((case.first + z, case.slices, case.frames, *frames, *labels))
        self.table = torch.tensor(columns).T

    def draw(self, batch_size, seed, step):
        """This process's share of the pairs of one step: a `PairBatch`."""
        generator = step_generator(seed, step)
        which = share(torch.randint(self.table.shape[1], (batch_size,), generator=generator))
        chance = share(torch.rand(4, batch_size, generator=generator), 1)
        first, stride, frames, ed, es, ed_label, es_label = self.table[:, which]
        labelled = (ed_label >= 0) & (es_label >= 0)
        anchor = torch.where(ed >= 0, ed, (chance[0] * frames).long())
        other = (anchor + 1 + (chance[1] * (frames - 1)).long()) % frames
        other = torch.where(labelled & (chance[2] < self.labelled_share), es, other)
        rows = torch.stack([first + anchor * stride, first + other * stride])
        other_label = torch.where(other == es, es_label, -1)
        labels = torch.stack([ed_label, other_label])
        swap = chance[3] < 0.5
        rows, labels = torch.where(swap, rows.flip(0), rows), torch.where(swap, labels.flip(0), labels)
        device = self.store.device
        images = self.store.images(rows.flatten())
        label_maps = self.store.labels[labels.flatten().to(device, non_blocking=True)]
        both = (labels >= 0).all(0).to(device, non_blocking=True)
        return PairBatch(*images.chunk(2), *label_maps.chunk(2), both)


class LabelledSlices:
    """Slices with labels, expert or propagated.

    rows: (N,) of the store's images, the expert's first; labels: (N, S, S) uint8 and trust: (P + 1, S, S)
    uint8, of the P propagated ones and, in the last row, full trust for all others (without trust maps this
    row only); both in the store's `gather_device`. expert_share: share of expert slices among those drawn; 0:
    all slices are equally likely.
    """

    def __init__(self, store, propagated=None, expert_share=0.0):
        self.store, self.expert_share = store, expert_share
        places = [(case, frame) for case in store.cases for frame in case.expert]
        self.rows = torch.from_numpy(np.concatenate([case.rows(frame) for case, frame in places]))
        labels = [store.expert(case, frame).cpu() for case, frame in places]
        self.expert_count = len(self.rows)
        trust = np.full((1, *labels[0].shape[1:]), 255, np.uint8)
        if propagated is not None:
            cases = {case.code: case for case in store.cases}
            # patients held out for validation have propagated labels too
            used = np.array([code in cases for code, _, _ in propagated.where], bool)
            rows = [cases[code].rows(frame)[z] for code, frame, z in propagated.where if code in cases]
            self.rows = torch.cat([self.rows, torch.tensor(rows, dtype=torch.long)])
            labels.append(torch.from_numpy(propagated.labels[used]))
            if propagated.trust is not None:
                trust = np.concatenate([propagated.trust[used], trust])
        self.labels = torch.cat(labels).to(store.gather_device)
        self.trust = torch.from_numpy(trust).to(store.gather_device)

    def __len__(self):
        return len(self.rows)

    def draw(self, batch_size, seed, step):
        """This process's share of a step: images (B, 1, S, S), labels and trust (B, S, S) uint8."""
        generator = step_generator(seed, step)
        which = torch.randint(len(self), (batch_size,), generator=generator)
        propagated = len(self) - self.expert_count
        if self.expert_share > 0 and propagated:
            chance = torch.rand(2, batch_size, generator=generator)
            # rounded down before adding: the sum of floats could round up to len(self)
            one, other = ((chance[1] * count).long() for count in (self.expert_count, propagated))
            which = torch.where(chance[0] < self.expert_share, one, self.expert_count + other)
        which = share(which)
        trust = torch.where(which < self.expert_count, -1, which - self.expert_count)
        trust = trust.clamp(max=len(self.trust) - 1)  # without trust maps, the row of full trust
        store = self.store
        labels, trust = store.take_rows(self.labels, which), store.take_rows(self.trust, trust)
        return store.images(self.rows[which]), labels, trust
