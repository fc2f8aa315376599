"""A CUDA GPU simulated on the CPU: it finds, without a GPU, what would fail on one or wait for it.

A `Card` is a tensor that claims to be on cuda:0 but has its values on the CPU. An operation on tensors of
both devices raises (also indexing by a CPU tensor, which a GPU would copy), NumPy cannot read it, and it
cannot be passed to another process. What makes the CPU wait for a GPU is counted: values and sizes that
depend on results, copies from the GPU, and copies to it that are not `non_blocking` or, above 64 KB, not
pinned. Autocast is the CPU's.
"""

import contextlib
import time
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from cardiac import losses, run, warp

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
INDEXING = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default, torch.ops.aten.index_put.default)
WAITING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
MADE_THERE = {
    torch.arange, torch.empty, torch.eye, torch.full, torch.linspace, torch.ones, torch.rand, torch.randint,
    torch.randn, torch.randperm, torch.zeros,
}
COPIED_THERE = {torch.tensor, torch.as_tensor}
PLACE = (str, torch.device)
STAGED = 2**16  # bytes that the driver copies without waiting, pinned or not


class Card(torch.Tensor):
    """A tensor on the simulated GPU; its values are in `numbers`, a tensor on the CPU."""

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, numbers):
        place = {"strides": numbers.stride(), "storage_offset": numbers.storage_offset()}
        return torch.Tensor._make_wrapper_subclass(cls, numbers.size(), dtype=numbers.dtype, **place)

    def __init__(self, numbers):
        self.numbers = numbers

    @classmethod
    def __torch_dispatch__(cls, operation, types, arguments=(), options=None):
        options = dict(options or {})
        tensors = [each for each in tree_leaves((arguments, options)) if isinstance(each, torch.Tensor)]
        on_both_sides = any(not isinstance(each, Card) and each.dim() for each in tensors)
        waits = WAITING & set(operation.tags)
        if operation in INDEXING:  # by a mask: waits for its count, unless one number is assigned
            by_mask = any(each is not None and each.dtype == torch.bool for each in arguments[1])
            waits = by_mask and not (len(arguments) > 2 and arguments[2].dim() == 0)
        if operation is torch.ops.aten.copy_.default:
            CARDS.copied(from_card=isinstance(arguments[1], Card), to_card=isinstance(arguments[0], Card),
                         blocking=not (arguments[2:] or [False])[0])
        elif on_both_sides:
            raise RuntimeError(f"{operation}: expected all tensors to be on the same device")
        if waits:
            CARDS.waits.append(operation.__name__)
        if "device" in options:
            options["device"] = CPU
        result = operation(*_to_cpu(arguments), **_to_cpu(options))
        if operation._schema.is_mutable:  # in place: the tensor itself
            return arguments[0] if operation._schema.returns else None
        return _to_card(result)

    def __repr__(self, **options):
        return f"Card({self.numbers})"

    def __reduce_ex__(self, protocol):
        raise TypeError("a tensor on cuda is passed to another process")


class Cards(TorchFunctionMode):
    """Returns a `Card` for what is created on or moved to cuda, an ordinary tensor for what is moved back."""

    def __init__(self):
        super().__init__()
        self.waits, self.uploads, self.peak_resets = [], 0, 0

    def peak_reset(self, device):
        """Count a reset of the peak memory."""
        self.peak_resets += 1

    def copied(self, from_card, to_card, blocking):
        """Count a copy between the devices."""
        self.uploads += to_card and not from_card
        if from_card and not to_card:
            self.waits.append("a copy to the CPU")
        elif to_card and not from_card and blocking:
            self.waits.append("a copy to the GPU that is not non_blocking")

    def __torch_function__(self, function, types, arguments=(), options=None):
        options = dict(options or {})
        on_card = bool(arguments) and isinstance(arguments[0], Card)
        there = torch.device(options.get("device") or CPU).type == "cuda"
        if there and function in MADE_THERE | COPIED_THERE:
            if function in COPIED_THERE:
                self.copied(False, True, blocking=True)
            return Card(function(*arguments, **{**options, "device": CPU}))
        if function is torch.Tensor.to:
            places = [each for each in (*arguments[1:], *options.values()) if isinstance(each, PLACE)]
            if places:
                return self._move(torch.device(places[0]).type == "cuda", *arguments, **options)
        elif function is torch.Tensor.pin_memory:
            pinned = arguments[0].clone()
            pinned.pinned_here = True
            return pinned
        elif on_card and function is torch.Tensor.cpu:
            return self._move(False, *arguments)
        elif on_card and function is torch.Tensor.tolist:
            self.copied(True, False, blocking=True)
            return arguments[0].numbers.tolist()
        elif on_card and function is torch.Tensor.new_tensor:
            self.copied(False, True, blocking=True)
            return Card(function(arguments[0].numbers, *arguments[1:], **options))
        elif on_card and function in (torch.Tensor.numpy, torch.Tensor.__array__):
            raise TypeError("cannot convert a tensor on cuda to numpy; use Tensor.cpu() before")
        return function(*arguments, **options)

    def _move(self, to_card, tensor, *arguments, **options):
        here = isinstance(tensor, Card)
        blocking = not (options.get("non_blocking") or arguments[2:3] == (True,))
        staged = tensor.nbytes <= STAGED or hasattr(tensor, "pinned_here")
        self.copied(here, to_card, blocking or not staged)
        numbers = _to_cpu(tensor) if to_card or not here else tensor.numbers.clone()
        arguments = [each for each in arguments if not isinstance(each, PLACE)]
        options = {name: each for name, each in options.items() if not isinstance(each, PLACE)}
        moved = numbers.to(CPU, *arguments, **options).detach()
        if here == to_card and moved.data_ptr() == numbers.data_ptr():
            return tensor
        return Card(moved) if to_card else moved


CARDS = Cards()


def _to_cpu(tree):
    return tree_map(lambda each: each.numbers if isinstance(each, Card) else each, tree)


def _to_card(tree):
    return tree_map(lambda each: Card(each) if isinstance(each, torch.Tensor) else each, tree)


def _forget():
    for kept in (warp._pixels, warp._growth, losses._averaging_matrix):
        kept.cache_clear()


@contextlib.contextmanager
def simulated_gpu():
    """Simulate a GPU within the block; yields its `Cards`: counts of waits, uploads and peak resets."""
    load, save, generator, future = torch.load, torch.save, torch.Generator, torch.__future__
    overwrite = future.get_overwrite_module_params_on_conversion()

    class Generator:
        def __new__(cls, device="cpu"):
            return generator()

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = time.perf_counter()

        def elapsed_time(self, later):
            return 1000 * (later.at - self.at)

    class Autocast(torch.autocast):
        def __init__(self, device_type, *arguments, **options):
            super().__init__("cpu", *arguments, **options)

    def loaded(path, map_location=None, **options):
        state = load(path, map_location="cpu", **options)
        return _to_card(state) if torch.device(map_location or CPU).type == "cuda" else state

    def saved(state, *arguments):
        with torch.no_grad():
            save(_to_cpu(state), *arguments)

    # patched only in `cardiac.run`: torch itself would look for a driver
    seen = mock.Mock(wraps=torch, device=torch.device)
    seen.cuda = mock.Mock(wraps=torch.cuda, OutOfMemoryError=torch.cuda.OutOfMemoryError)
    seen.cuda.is_available = mock.Mock(return_value=True)
    seen.cuda.get_device_name = mock.Mock(return_value="made of the CPU")
    with contextlib.ExitStack() as stack:
        for place, name, stand_in in (
            (run, "torch", seen),
            (torch, "load", loaded),
            (torch, "save", saved),
            (torch, "Generator", Generator),
            (torch, "autocast", Autocast),
            (torch.cuda, "Event", Event),
            (torch.cuda, "mem_get_info", lambda device: (10**11, 10**11)),
            (torch.cuda, "is_bf16_supported", lambda including_emulation: True),
            (torch.cuda, "max_memory_allocated", lambda device: 10**9),
            (torch.cuda, "reset_peak_memory_stats", CARDS.peak_reset),
        ):
            stack.enter_context(mock.patch.object(place, name, stand_in))
        future.set_overwrite_module_params_on_conversion(True)
        stack.callback(future.set_overwrite_module_params_on_conversion, overwrite)
        _forget()
        stack.callback(_forget)
        CARDS.__init__()
        yield stack.enter_context(CARDS)
