"""A CUDA card made of the CPU: where there is no card, it finds what would fail on one or wait for it.

A `Card` is a tensor that says it lies on cuda:0 and has its numbers on the CPU. As with a card, an operation
on tensors of both sides raises and NumPy cannot read it. What would make the processor wait for the card, and
copies from it and to it, are counted. Autocast is the CPU's.
"""

import collections
import contextlib
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from cardiac import run

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
ATEN = torch.ops.aten
WAITING = {ATEN._local_scalar_dense.default, ATEN.nonzero.default, ATEN.masked_select.default}
FACTORIES = {
    torch.arange, torch.as_tensor, torch.empty, torch.eye, torch.full, torch.linspace, torch.ones, torch.rand,
    torch.randint, torch.randn, torch.randperm, torch.tensor, torch.zeros,
}  # fmt: skip
PLACE = (str, torch.device)


class Card(torch.Tensor):
    """A tensor on the card; its numbers are in `numbers`, a tensor on the CPU."""

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
        scattered = any(not isinstance(each, Card) and each.dim() for each in tensors)
        by_mask = operation is ATEN.index.Tensor and any(i is not None and i.dtype == torch.bool
                                                         for i in arguments[1])  # fmt: skip
        if operation in WAITING or by_mask:
            CARDS.waits.append(operation.__name__)
        if scattered and operation is not ATEN.copy_.default:
            raise RuntimeError(f"{operation}: expected all tensors to be on the same device")
        if "device" in options:
            options["device"] = CPU
        result = operation(*_numbers(arguments), **_numbers(options))
        if operation._schema.is_mutable:  # in place: the tensor itself
            return arguments[0] if operation._schema.returns else None
        return _cards(result)

    def __repr__(self, **options):
        return f"Card({self.numbers})"

    def __reduce_ex__(self, protocol):
        return self.numbers.detach().__reduce_ex__(protocol)


class Cards(TorchFunctionMode):
    """Makes a `Card` of what is made on cuda or moved there, and an ordinary tensor of what is moved back."""

    def __init__(self):
        super().__init__()
        self.waits, self.copies = [], collections.Counter()

    def __torch_function__(self, function, types, arguments=(), options=None):
        options = dict(options or {})
        on_card = bool(arguments) and isinstance(arguments[0], Card)
        if function in FACTORIES and torch.device(options.get("device") or CPU).type == "cuda":
            return Card(function(*arguments, **{**options, "device": CPU}))
        if function is torch.Tensor.to:
            places = [each for each in (*arguments[1:], *options.values()) if isinstance(each, PLACE)]
            if places:
                return self._move(torch.device(places[0]).type == "cuda", *arguments, **options)
        elif on_card and function is torch.Tensor.cpu:
            return self._move(False, *arguments)
        elif on_card and function is torch.Tensor.tolist:
            self.waits.append("tolist")
            return arguments[0].numbers.tolist()
        elif on_card and function is torch.Tensor.new_tensor:
            return Card(function(arguments[0].numbers, *arguments[1:], **options))
        elif on_card and function in (torch.Tensor.numpy, torch.Tensor.__array__):
            raise TypeError("cannot convert a tensor on cuda to numpy; use Tensor.cpu() before")
        return function(*arguments, **options)

    def _move(self, to_card, tensor, *arguments, **options):
        here, numbers = isinstance(tensor, Card), _numbers(tensor)
        self.copies["to the card" if to_card else "from the card"] += here != to_card
        if here and not to_card:
            self.waits.append("to the CPU")
            numbers = numbers.clone()
        arguments = [each for each in arguments if not isinstance(each, PLACE)]
        options = {name: each for name, each in options.items() if not isinstance(each, PLACE)}
        moved = numbers.to(CPU, *arguments, **options).detach()
        if here == to_card and moved.data_ptr() == numbers.data_ptr():
            return tensor
        return Card(moved) if to_card else moved


CARDS = Cards()


def _numbers(tree):
    return tree_map(lambda each: each.numbers if isinstance(each, Card) else each, tree)


def _cards(tree):
    return tree_map(lambda each: Card(each) if isinstance(each, torch.Tensor) else each, tree)


@contextlib.contextmanager
def made_of_the_cpu():
    """For the block, this machine has a card; gives its `Cards`, which count: `waits`, `copies`."""
    load, generator, future = torch.load, torch.Generator, torch.__future__
    overwrite = future.get_overwrite_module_params_on_conversion()

    class Generator:
        def __new__(cls, device="cpu"):
            return generator()

    class Autocast(torch.autocast):
        def __init__(self, device_type, *arguments, **options):
            super().__init__("cpu", *arguments, **options)

    def loaded(path, map_location=None, **options):
        state = load(path, map_location="cpu", **options)
        return _cards(state) if torch.device(map_location or CPU).type == "cuda" else state

    # seen by the scripts alone: torch itself would look for a driver
    seen = mock.Mock(wraps=torch, device=torch.device)
    seen.cuda = mock.Mock(wraps=torch.cuda, OutOfMemoryError=torch.cuda.OutOfMemoryError)
    seen.cuda.is_available = mock.Mock(return_value=True)
    seen.cuda.get_device_name = mock.Mock(return_value="made of the CPU")
    with contextlib.ExitStack() as stack:
        for place, name, stand_in in (
            (run, "torch", seen),
            (torch, "load", loaded),
            (torch, "Generator", Generator),
            (torch, "autocast", Autocast),
            (torch.cuda, "mem_get_info", lambda device: (10**11, 10**11)),
            (torch.cuda, "max_memory_allocated", lambda device: 10**9),
        ):
            stack.enter_context(mock.patch.object(place, name, stand_in))
        future.set_overwrite_module_params_on_conversion(True)
        stack.callback(future.set_overwrite_module_params_on_conversion, overwrite)
        CARDS.waits.clear()
        CARDS.copies.clear()
        yield stack.enter_context(CARDS)
