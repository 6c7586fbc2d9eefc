"""The invariant mode: the same bits of all weights on any number of ranks.

A sum of floats depends on the order of its terms. Here the terms are the gradients of fixed
micro-batches of the global batch, and the order is one tree, whoever has which of its leaves: on each
level the neighbours 2i and 2i + 1 are added up to i of the next level, and a last one without a
neighbour moves up as it is. Seven micro-batches are ((0 + 1) + (2 + 3)) + ((4 + 5) + 6).

The rest has to be the same on any number of ranks, too: the kernels (one kind of processor or GPU,
`training.deterministic`), the number of threads that share a kernel on the CPU (one), and the samples,
augmentation and dropout of a micro-batch, which depend on its place in the global batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from agrivision.data.order import share
from agrivision.distributed import Ranks, peers_may_fail
from agrivision.errors import ConfigurationError
from agrivision.phase import WAITING, phase

Node = tuple[int, int]  # level above the leaves, place among the nodes of that level

_ALIGNMENT = 16  # elements: vectorised kernels take another path, and another order, elsewhere


class Tree:
    """The sum of lists of tensors over a number of leaves, each list added to its neighbour's.

    Nodes come from left to right. One that has its neighbour, or has none to wait for, moves up at
    once, so that no more than one sum a level is held.

    Args:
        leaves: of the whole tree, 1 or more.

    Attributes:
        open: the sums that wait for a neighbour, from left to right; in the end the root alone.
    """

    def __init__(self, leaves: int) -> None:
        self.open: list[tuple[Node, list[Tensor]]] = []
        self._leaves, self._height = leaves, (leaves - 1).bit_length()

    def push(self, node: Node, tensors: list[Tensor]) -> None:
        """Add the node that follows on the right; a left neighbour's tensors are added to in place."""
        level, place = node
        while level < self._height:
            if place % 2:
                if not self.open or self.open[-1][0] != (level, place - 1):
                    break  # its neighbour is another rank's
                left = self.open.pop()[1]
                if left:
                    torch._foreach_add_(left, tensors)
                tensors = left
            elif (place + 1) << level < self._leaves:
                break  # its neighbour is still to come
            level, place = level + 1, place // 2
        self.open.append(((level, place), tensors))


def subtrees(leaves: Iterable[int], total: int) -> list[Node]:
    """The largest nodes of a tree of `total` leaves that some neighbouring leaves make up."""
    tree = Tree(total)
    for leaf in leaves:
        tree.push((0, leaf), [])
    return [node for node, _ in tree.open]


class CanonicalGradients:
    """Adds up what the micro-batches of a global batch give, in the order of one tree.

    That is gradients, changes of floating-point buffers (BatchNorm's running statistics) and losses,
    all in the parameters' dtype. A rank adds up the subtrees that its micro-batches make up: one, where
    ranks and micro-batches are powers of two, else a few. Then each rank gets an equal part of every
    subtree's sum from the others, completes the tree for this part, and all get all parts. Both ways
    numbers are moved and none is added, so the backend's own order of summation plays no role.

    Memory, in multiples of one gradient of the model and whatever the number of ranks: one for each
    subtree of this rank, held between the steps (the first is what `Parameter.grad` looks into); while
    micro-batches are added one more for each level of the tree on which a sum waits, at most
    log2(micro-batches of the rank); while the ranks exchange about one more for each subtree.

    Args:
        model: on its device, in its memory format, without a wrapper; frozen parameters stay out.
        ranks: connected.
        micro_batches: of the global batch, over all ranks.
        losses: how many loss sums come with each micro-batch.

    Attributes:
        mine: the micro-batches of this rank, in the order in which they must be added.

    Raises:
        ConfigurationError: fewer micro-batches than ranks.
    """

    def __init__(self, model: nn.Module, ranks: Ranks, *, micro_batches: int, losses: int = 3) -> None:
        world = ranks.world
        if micro_batches < world.size:
            raise ConfigurationError(
                f"{micro_batches} micro-batches in a global batch cannot be divided among {world.size}"
                " ranks: lower training.micro_batch_size"
            )
        everything = range(micro_batches)
        self.mine = everything[share(micro_batches, world.rank, world.size)]
        self._world, self._count = world, micro_batches
        self._nodes = [
            subtrees(everything[share(micro_batches, rank, world.size)], micro_batches)
            for rank in range(world.size)
        ]
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._buffers = list(model.buffers())
        self._floating = [n for n, buffer in enumerate(self._buffers) if buffer.is_floating_point()]
        self._before = [buffer.clone() for buffer in self._buffers]
        sample = self._parameters[0]
        self._flat = _Flat(
            [
                *self._parameters,
                *(self._buffers[n] for n in self._floating),
                torch.empty(losses, device="meta"),
            ],
            rows=len(self._nodes[world.rank]),
            parts=world.size,
            like=sample,
        )
        # The leaf that a subtree begins with is the one that the others are added to.
        self._firsts = {
            place << level: row for row, (level, place) in enumerate(self._nodes[world.rank])
        }
        self._restart()

    def _restart(self) -> None:
        self._tree, self._next = Tree(self._count), self.mine.start

    @torch.no_grad()
    def begin(self) -> None:
        """Before the forward pass of each micro-batch: no gradients, buffers as before the step."""
        for parameter in self._parameters:
            parameter.grad = None
        if self._buffers:
            if self._next == self.mine.start:
                torch._foreach_copy_(self._before, self._buffers)
            else:
                torch._foreach_copy_(self._buffers, self._before)

    @torch.no_grad()
    def add(self, index: int, losses: Tensor) -> None:
        """After the backward pass of a micro-batch: take its gradients, buffers and losses.

        A parameter that took no part has a gradient of zero.

        Args:
            index: of the micro-batch, one of `mine`, in their order.
            losses: (losses,), sums over its samples.

        Raises:
            ValueError: it is not this micro-batch's turn.
        """
        if index != self._next or index not in self.mine:
            raise ValueError(f"micro-batch {index} is added in the place of {self._next}")
        self._next += 1
        leaf = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters]
        after, before = ([group[n] for n in self._floating] for group in (self._buffers, self._before))
        changes = torch._foreach_sub(after, before) if after else []
        leaf += [value.to(leaf[0].dtype) for value in (*changes, losses)]
        row = self._firsts.get(index)
        if row is not None:
            held = self._flat.views[row]
            torch._foreach_copy_(held, leaf)
            leaf = held
        self._tree.push((0, index), leaf)

    @torch.no_grad()
    def finish(self) -> Tensor:
        """After the last micro-batch: gradients and buffers of the global batch, the same on all ranks.

        `Parameter.grad` is the sum over the micro-batches. Buffers are what they were, plus the mean
        of what the micro-batches added to them; integers (batches tracked) are what one made of them.
        A CUDA device is not waited for.

        Returns:
            The losses, summed over the micro-batches: (losses,).

        Raises:
            ValueError: a micro-batch is missing.
            PeerLost: another rank is gone.
        """
        if self._next != self.mine.stop:
            raise ValueError(f"micro-batch {self._next} is missing")
        self._restart()
        if self._world.size > 1:
            with phase(WAITING), peers_may_fail():
                self._exchange()
        sums = self._flat.views[0]
        for parameter, gradient in zip(self._parameters, sums, strict=False):
            parameter.grad = gradient
        changes = sums[len(self._parameters) : -1]
        if changes:
            torch._foreach_div_(changes, self._count)
            floating = [self._buffers[n] for n in self._floating]
            torch._foreach_copy_(floating, [self._before[n] for n in self._floating])
            torch._foreach_add_(floating, changes)
        return sums[-1].clone()

    def _exchange(self) -> None:
        """Complete the tree over all ranks, into the first row of the flat memory."""
        rows, size = self._flat.rows, self._world.size
        part = rows.shape[1] // size
        received: list[list[Tensor]] = [[] for _ in range(size)]
        for turn in range(max(map(len, self._nodes))):
            senders = [rank for rank, nodes in enumerate(self._nodes) if turn < len(nodes)]
            sends = self._world.rank in senders
            parts = rows.new_empty(len(senders), part)
            dist.all_to_all_single(
                parts.view(-1),
                rows[turn] if sends else rows.new_empty(0),
                [part if rank in senders else 0 for rank in range(size)],
                [part if sends else 0] * size,
            )
            for rank, values in zip(senders, parts, strict=True):
                received[rank].append(values)
        tree = Tree(self._count)
        for nodes, sums in zip(self._nodes, received, strict=True):
            for node, values in zip(nodes, sums, strict=True):
                tree.push(node, [values])
        dist.all_gather_into_tensor(rows[0], tree.open[0][1][0])


class _Flat:
    """Memory that holds a list of tensors in one piece, several times over.

    Args:
        tensors: whose shapes and strides the views have; where they have gaps, without.
        rows: how often.
        parts: a row can be cut into so many equal parts.
        like: dtype and device.

    Attributes:
        rows: (rows, n), the memory.
        views: of each row, the tensors that look into it.
    """

    def __init__(self, tensors: Sequence[Tensor], *, rows: int, parts: int, like: Tensor) -> None:
        shapes = [torch.empty_like(tensor, device="meta") for tensor in tensors]
        offsets = [0]
        for tensor in shapes:
            offsets.append(offsets[-1] + _aligned(tensor.numel()))
        length = parts * _aligned(-(-offsets[-1] // parts))
        self.rows = torch.zeros(rows, length, dtype=like.dtype, device=like.device)
        self.views = [
            [
                self.rows.as_strided(tensor.shape, tensor.stride(), row * length + offset)
                for tensor, offset in zip(shapes, offsets, strict=False)
            ]
            for row in range(rows)
        ]


def _aligned(elements: int) -> int:
    return -(-elements // _ALIGNMENT) * _ALIGNMENT
