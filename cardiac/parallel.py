"""Data parallelism: the processes started by `torchrun --nproc_per_node=N` share the batch of every step.

Each process takes its part of the batch that a single process would draw, gradients and losses are averaged,
and only the first process validates, prints and writes. The registration's losses equal those of a single
process except for rounding. The segmentation's differ slightly: batch norm, soft Dice and the cross-entropy,
which is weighted by trust, see only a process's own part of the batch. Without torchrun there is one process,
and nothing here does anything.
"""

import contextlib
import datetime
import os
import sys

import torch
import torch.distributed as dist

from cardiac.files import InputError

LAUNCHED = dist.is_torchelastic_launched()  # by torchrun, which tells each process its rank
RANK = int(os.environ["RANK"]) if LAUNCHED else 0
LOCAL_RANK = int(os.environ["LOCAL_RANK"]) if LAUNCHED else 0  # on this host: the GPU to use
ON_THIS_HOST = int(os.environ["LOCAL_WORLD_SIZE"]) if LAUNCHED else 1
TIMEOUT = datetime.timedelta(hours=12)  # the first process may build a cache while the others wait


@contextlib.contextmanager
def process_group():
    """Join torchrun's process group, if it started this process; all but the first are mute in the block.

    The group is not destroyed afterwards: `exit_process` ends the process.
    """
    if not LAUNCHED or dist.is_initialized():
        yield
        return
    # both by name: with a GPU, PyTorch would use only NCCL, which cannot send tensors on the CPU
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=TIMEOUT)
    with contextlib.ExitStack() as stack:
        if RANK:
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        yield


def exit_process(code):
    """End this process of torchrun, whose work is done, without waiting for the others, as NCCL would, and
    without Python's shutdown.

    During that, torch 2.14 sometimes aborts ("terminate called without an active exception", seen on the
    CPU), and torchrun then kills the others, including the first, which may still be scoring.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def processes():
    """How many processes share the work."""
    return dist.get_world_size() if dist.is_initialized() else 1


def share(whole, dim=0):
    """This process's part of a tensor with the samples of the whole batch along `dim`."""
    return whole.chunk(processes(), dim)[RANK] if processes() > 1 else whole


def process_mean(value):
    """The mean of a scalar tensor over the processes, which must all call this; it carries no gradient."""
    if processes() > 1:
        value = value.detach() / processes()
        dist.all_reduce(value)
    return value


def average_gradients(network, losses):
    """Average `network`'s gradients over the processes in one all-reduce; returns the averaged losses."""
    if processes() == 1:
        return losses
    gradients = [weight.grad for weight in network.parameters()]
    parts = [*gradients, *(value.detach().float() for value in losses.values())]
    message = torch.cat([part.reshape(-1) for part in parts]).div_(processes())
    dist.all_reduce(message)
    averaged = [new.view_as(part) for new, part in zip(message.split([p.numel() for p in parts]), parts)]
    torch._foreach_copy_(gradients, averaged[: len(gradients)])
    return dict(zip(losses, averaged[len(gradients) :]))


def from_first(function, *arguments):
    """The result, or InputError, of `function(*arguments)`, which only the first process calls."""
    if processes() == 1:
        return function(*arguments)
    result = error = None
    if RANK == 0:
        try:
            result = function(*arguments)
        except InputError as raised:
            error = raised
    message = [result, error]
    dist.broadcast_object_list(message)
    result, error = message
    if error:
        raise error
    return result


@contextlib.contextmanager
def in_first(manager):
    """Enter a context manager in the first process only; every process gets what it yields."""
    with contextlib.ExitStack() as stack:
        yield from_first(stack.enter_context, manager)
