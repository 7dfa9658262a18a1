"""Several processes of one run (torchrun): rows divided among them, gathered again, and one state on all of them.

Every function is an identity where torch.distributed is not initialised, or in a group of one process. All processes
must call it, in the same order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from tad_plugin.core.state import SampleState
from tad_plugin.errors import ConfigError, explain

__all__ = [
    "ALONE",
    "Ranks",
    "agree",
    "barrier",
    "broadcast",
    "gather_rows",
    "merge_rows",
    "ranks",
    "shard",
    "share_state",
]

# Rows that :func:`merge_rows` sends at a time.
_CHUNK = 8192


class Ranks(NamedTuple):
    """Which process this is.

    Attributes:
        rank: in [0, size).
        size: number of processes.
    """

    rank: int
    size: int

    @property
    def first(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0


ALONE = Ranks(0, 1)


def ranks() -> Ranks:
    """This process among those of the default group; :data:`ALONE` without one."""
    if not (dist.is_available() and dist.is_initialized()):
        return ALONE
    return Ranks(dist.get_rank(), dist.get_world_size())


def shard(length: int, of: Ranks) -> slice:
    """The rows of a process: contiguous, in the order of the ranks, and at most one more than any other has."""
    share, more = divmod(length, of.size)
    start = of.rank * share + min(of.rank, more)
    return slice(start, start + share + (of.rank < more))


def gather_rows(part: Tensor) -> Tensor:
    """The rows of all processes, in the order of the ranks. Processes may hold different numbers of rows.

    Args:
        part: [m, ...]; all but m is the same everywhere.

    Returns:
        [sum of m, ...] on the device of ``part``; ``part`` itself in a single process.
    """
    of = ranks()
    if of.size == 1:
        return part
    sent = _sent(part)
    own = torch.tensor([len(sent)], device=sent.device)
    counts = [torch.empty_like(own) for _ in range(of.size)]
    dist.all_gather(counts, own)
    lengths = [int(count) for count in counts]
    # Ragged rows are not gathered by every backend: all send as many as the longest has.
    padded = sent.new_zeros(max(lengths), *sent.shape[1:])
    padded[: len(sent)] = sent
    found = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(found, padded)
    rows = torch.cat([other[:length] for other, length in zip(found, lengths, strict=True)])
    return _received(rows, part)


def broadcast(tensor: Tensor) -> None:
    """Copies the values of the first process into ``tensor``, in place."""
    if ranks().size > 1:
        sent = _sent(tensor)
        dist.broadcast(sent, 0)
        tensor.copy_(_received(sent, tensor))


def merge_rows(rows: Tensor, visits: Tensor) -> None:
    """Gives each process the rows of the process that visited them most often, in place; of equals the first.

    Rows that were visited equally often everywhere stay.

    Args:
        rows: float [N, D].
        visits: int32 [N], how often this process visited each row; becomes the largest number.
    """
    of = ranks()
    if of.size == 1:
        return
    most, fewest = _sent(visits), _sent(visits)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    dist.all_reduce(fewest, dist.ReduceOp.MIN)
    differ = (most != fewest).nonzero().flatten()
    owner = torch.where(_sent(visits) == most, of.rank, of.size)
    dist.all_reduce(owner, dist.ReduceOp.MIN)
    for index in differ.split(_CHUNK):
        here = index.to(rows.device)
        part = _sent(rows[here].float())
        part[owner[index] != of.rank] = 0
        dist.all_reduce(part)
        rows[here] = _received(part, rows).to(rows.dtype)
    visits.copy_(_received(most, visits))


def share_state(state: SampleState) -> None:
    """Gives each process the state of the first one, in place.

    All processes compute the same decisions, but sums on cards may round differently.
    """
    if ranks().size > 1:
        named = [part[key] for part in (state._extra, state._factors) for key in sorted(part)]
        for tensor in (*(state[name] for name in state.FIELDS), *named):
            broadcast(tensor)
        state.version += 1


def agree(what: str, value: str) -> None:
    """Raises ConfigError, in all processes, if ``value`` is not the same everywhere. ``what`` names it."""
    of = ranks()
    if of.size == 1:
        return
    found: list[str] = [""] * of.size
    dist.all_gather_object(found, value)
    if len(set(found)) > 1:
        shown = "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(found[:4]))
        do = "Pass the same arguments to attach() on every rank: all samples, not those of the rank alone"
        raise ConfigError(explain(f"the same {what} on all {of.size} ranks", shown, do))


def barrier() -> None:
    """Waits until every process is here."""
    if ranks().size > 1:
        dist.barrier()


def _sent(tensor: Tensor) -> Tensor:
    """A contiguous copy that the backend can send: NCCL takes tensors of a card only, and no backend takes bools."""
    copy = tensor.detach().to(torch.uint8 if tensor.dtype == torch.bool else tensor.dtype, copy=True).contiguous()
    if dist.get_backend() == "nccl" and copy.device.type != "cuda":
        return copy.to(torch.device("cuda", torch.cuda.current_device()))
    return copy


def _received(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor.to(like.device, torch.bool if like.dtype == torch.bool else tensor.dtype)
