"""Plan: made once from the parameters; says what is summed together, where, and whether ranks talk at all.

Which collectives run, and their shape, follow from the plan and never from which gradients exist: a rank without
tokens for its experts, with an empty shard or with gradients that are None contributes zeros and takes part; where it
lacks the gradient of a copy that all hold, ranks disagree. What a plan learns from gradients is where they lay in this
rank's memory, which no other rank needs to know.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from math import inf
from warnings import warn
from zlib import crc32

import torch
from torch import Tensor

from ..errors import FAILURES, LayoutError
from ..gradients.look import Local, look_at
from ..gradients.realign import is_candidate, realign
from ..gradients.runs import WIDE, Gathered, Memory, shares_of
from ..gradients.sharing import first_shared, refused
from ..gradients.storage import Store
from ..kernels import largest, local_norms, norms_on_host, power_sum, triton
from ..kernels.device import has_float64
from ..kernels.transfer import sent
from ..layouts.layout import Holding, LayoutFn, LayoutReader
from ..layouts.piece import Held, Piece, holders_of, once
from ..ranks.compare import who_differs
from ..ranks.group import Axis, ClippingGroup
from ..ranks.message import Reduced, Word, reduce_norm, root
from .measured import Measured, Norms

REALIGNED = 1 << 14  # tag of the second all-reduce of a call that had to realign gradients
SHOWN = 5  # names in an error
LEAST_P = 1 / 16  # below, the root of what 1e15 gradients of 3e38 add up to leaves float64
APART = 1e-6  # of the norm: the same gradients have norms that are within 4e-7 of each other, by any of our kernels
SAY_SO = (
    "reduce gradients before clipping (leave no_sync for the last backward), say split_over=[mesh['pp']] or layout=... "
    "where ranks hold different parameters, group=... where they train apart, or go on from the last checkpoint if a "
    "copy was damaged"
)
TAG_STEP = 0x9E37  # odd, so that different tags stay different modulo 2**16


@dataclass(frozen=True, slots=True)
class Plan:
    """Built by :meth:`of`. Keeps no parameter and no gradient alive."""

    pieces: tuple[Piece, ...]
    sources: tuple[int, ...]  # of each piece: in the gradient of which holder it lies
    group: ClippingGroup
    p: float
    replicas: tuple[int, ...]  # of each piece
    weights: Tensor  # (len(pieces),) float64 on `device`: 1 / replicas, or 1 when no rank talks to another
    device: torch.device
    on_host: bool  # whether all gradients and the words are on the CPU
    wide: bool  # whether this rank has float64 parameters
    unweighted: bool  # whether nothing is held twice, so that all weights are 1
    common: tuple[bool, ...]  # which pieces every rank of the group must know
    by_axis: tuple[int, ...]  # pieces that other ranks do not hold only because split_over says so
    code: int  # hash of the common pieces
    asks: bool  # whether two words more ask all ranks for misplaced gradients and float64: the same on all ranks
    heeds: bool  # whether the answers can be yes on a rank other than this one, so that they must be read
    copied: bool  # whether every rank of the group holds a copy of all pieces, as under DDP, and no other pieces
    memory: Memory = field(default_factory=Memory, compare=False)

    @classmethod
    def of(
        cls,
        listed: Sequence[Held],
        p: float,
        group: ClippingGroup,
        split_over: Sequence[Axis] = (),
        layout: LayoutFn | None = None,
        asks: bool = False,
    ) -> "Plan":
        """Read every piece's layout; a parameter listed twice counts once. No collective.

        Its sources are ``holders_of(listed)``. ``asks`` makes the words travel that say whether gradients are
        misplaced, also where this rank's cannot be.
        """
        kept = once(listed)
        pieces = tuple(item.piece for item in kept)
        position = {id(holder): k for k, holder in enumerate(holders_of(kept))}
        reader = LayoutReader(group, split_over, layout)
        holdings = [reader.read(item, i) for i, item in enumerate(kept)]
        digest = blake2b(_described(zip(pieces, holdings, strict=True)).encode(), digest_size=6)
        device = group.device_for(item.holder for item in kept)
        replicas = tuple(holding.layout.replicas for holding in holdings)
        triton.check_choice(piece.device for piece in pieces)
        heeds = group.size > 1 and (bool(split_over or layout) or any(map(is_candidate, pieces)))
        return cls(
            pieces=pieces,
            sources=tuple(position[id(item.holder)] for item in kept),
            group=group,
            p=p,
            replicas=replicas,
            weights=sent(torch.tensor(replicas, dtype=torch.float64).reciprocal(), device),
            device=device,
            on_host=all(d.type == "cpu" for d in (device, *(piece.device for piece in pieces))),
            wide=any(piece.dtype in WIDE for piece in pieces),
            unweighted=all(number == 1 for number in replicas),
            common=tuple(holding.common for holding in holdings),
            by_axis=tuple(i for i, holding in enumerate(holdings) if holding.by_axis),
            code=int.from_bytes(digest.digest()),
            asks=asks or heeds,
            heeds=heeds,
            copied=group.size > 1 and set(replicas) == {group.size} and not (split_over or layout),
        )

    def label(self, index: int) -> str:
        """What errors call piece ``index``."""
        return self.pieces[index].label(index)

    def measure(
        self,
        gradients: Sequence[Tensor | None],
        store: Store | None = None,
        tag: int = 0,
        eager: bool = False,
        same: bool = False,
        fault: LayoutError | None = None,
        call: str = "",
    ) -> Measured:
        """Measure ``gradients``, one for each source, None where there is none.

        One all-reduce if the group has one. Where its answers say that gradients wait to be realigned, that is done,
        handed to ``store`` if it is given, and measured again; ``eager`` realigns first, which
        every rank must then do. ``same``: they are the very tensors of the last time.
        Waits for an accelerator only to read those answers, where they can be yes. ``tag`` is mixed into the agreement
        word; ``call`` is what errors say of this rank where others do not agree. An error of this rank is raised after
        it has taken part, and so is a ``fault`` that it is given, with what the others say.
        """
        error = fault
        if eager:
            gradients, found = self._realigned(gradients, store)
            error = error or found
        gathered, local, norms, reduced = self._reduced(gradients, error, tag, call, same)
        wide = self.wide or gathered.wide
        if self.heeds:
            _, disagree, (misplaced, wide) = reduced.read()
            if misplaced and not disagree:
                gradients, error = self._realigned(gradients, store)
                gathered, local, norms, reduced = self._reduced(gradients, error, tag + REALIGNED, call)
                eager = True
        if local is not None:
            if local.error is not None:
                raise LayoutError(f"{fault}{reduced.who}") if local.error is fault else local.error
            gradients = _replaced(gradients, local.instead, store)
        dtype = torch.float64 if wide else torch.float32
        can_overflow = wide or 7 < self.p < inf or self.p < LEAST_P
        return Measured(gradients, gathered.runs, norms, reduced, eager, dtype, can_overflow)

    def look(self, gradients: Sequence[Tensor | None], error: LayoutError | None = None) -> Local:
        """Look at ``gradients``, one for each source, None where there is none."""
        parts: list[Tensor] = []
        indices: list[int] = []
        instead: dict[int, Tensor] = {}
        misplaced = 0
        for i, (piece, source) in enumerate(zip(self.pieces, self.sources, strict=True)):
            gradient = gradients[source]
            if gradient is None:
                continue
            seen = look_at(piece, gradient)
            if seen.problem is not None:
                error = error or LayoutError(f"the gradient of {self.label(i)} {seen.problem}")
            elif seen.values is None:
                misplaced += 1
            else:
                parts.append(seen.values)
                indices.append(i)
            if seen.instead is not None:
                instead[source] = seen.instead
        if error is None:
            error = self._shared(parts, indices)
        return Local(parts, indices, misplaced, instead, error)

    def _shared(self, parts: Sequence[Tensor], indices: Sequence[int]) -> LayoutError | None:
        """What is wrong where two gradients have elements of memory in common."""
        pair = first_shared(parts)
        return None if pair is None else refused(*(self.label(indices[k]) for k in pair))

    def compare_copies(self, norm: float, own: Word | None, call: str, warns: bool = True) -> None:
        """Where every rank holds all gradients: remember it if those of this one were not those of all in ``call``.

        ``norm`` is that of all ranks, finite, and ``own`` what this one has put in, a number. Some ranks see a
        difference and some do not, by how far theirs are from the mean: the next call tells all of them. There may be
        no next one, so that a rank that sees it ``warns``.
        """
        if not self.copied or own is None:
            return
        mine = float(own) if self.p == inf else float(root(float(own) * self.group.size, self.p))
        if abs(mine - norm) > APART * norm:
            self.memory.fault = LayoutError(
                f"copies of gradients differ between ranks since {call}, and here had a norm of {mine:.7g}: {SAY_SO}"
            )
            if warns:
                warn(f"{self.memory.fault}. The next call raises on every rank", RuntimeWarning, stacklevel=3)

    def norms(self, measured: Measured, of: Collection[int] | None = None) -> Norms:
        """The norm of each gradient that was measured: at hand on accelerators, made now on the host.

        ``of``: the pieces that matter, all if None; there may be norms of others too.
        """
        if measured.norms is not None:
            return measured.norms
        local = self.look(measured.gradients)
        kept = [(part, i) for part, i in zip(local.parts, local.indices, strict=True) if of is None or i in of]
        return self._norms([part for part, _ in kept], [i for _, i in kept])

    def _reduced(
        self,
        gradients: Sequence[Tensor | None],
        error: LayoutError | None,
        tag: int,
        call: str,
        same: bool = False,
    ) -> tuple[Gathered, Local | None, Norms | None, Reduced]:
        """Sum what this rank has and make it global; Local where the gradients had to be looked at one by one.

        Where the host knows at once that ranks disagree, all of them ask who it is. What torch raises here, of a
        gradient whose memory was freed for example, is raised after the others were told.
        """
        try:
            gathered, local = self._gathered(gradients, error, same)
            norms = None if self.on_host else self._norms(gathered.parts(), gathered.indices)
            mine = self._sum_gathered(gathered) if norms is None else self._sum_of(norms)
        except FAILURES as failed:
            found, questions = self._named(gradients, failed), (False, self.wide) if self.asks else ()
            tell_others(self.group, self.device, self.p, questions, found, call)
            if found is failed:
                raise
            raise found from failed
        misplaced, faulty = (False, False) if local is None else (local.misplaced > 0, local.error is not None)
        questions = (misplaced, self.wide or gathered.wide) if self.asks else ()
        missing = self._missing(gradients) if len(gathered.indices) < len(self.pieces) else ()
        code = self.code + tag * TAG_STEP + (crc32(repr(missing).encode()) if missing else 0)
        reduced = reduce_norm(self.group, mine, self.p, code, faulty, questions, self.copied, call)
        if reduced.disagree is True:
            mine_is = self._account(call, missing, None if local is None else local.error)
            reduced = replace(reduced, who=who_differs(self.group, self.device, mine_is))
        return gathered, local, norms, reduced

    def _named(self, gradients: Sequence[Tensor | None], failed: Exception) -> Exception:
        """What ``failed``, by the name of the gradient where a look at each of them tells."""
        try:
            return self.look(gradients).error or failed
        except FAILURES:
            return failed

    def _missing(self, gradients: Sequence[Tensor | None]) -> tuple[int, ...]:
        """Gradients that are not here, of parameters that every rank holds whole: they are on all ranks or on none.

        By their places among the common pieces, which are the same everywhere. Not those that may be terms of a sum not
        made yet, in which a missing term is zero.
        """
        size = self.group.size
        if size == 1:
            return ()
        common = (i for i, is_common in enumerate(self.common) if is_common)
        copied = ((k, i) for k, i in enumerate(common) if self.replicas[i] == size and not is_candidate(self.pieces[i]))
        return tuple(k for k, i in copied if gradients[self.sources[i]] is None)

    def _account(self, call: str, missing: Sequence[int], error: LayoutError | None) -> str:
        """What this rank has to say for itself where ranks do not agree."""
        if error is not None:
            return f"stopped: {str(error).partition(': ')[0]}"  # what to do about it is said on that rank
        common = [i for i, is_common in enumerate(self.common) if is_common]
        lacks = ", ".join(self.label(common[k]) for k in missing[:SHOWN])
        more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
        said = [call, f"{len(common)} parameters (hash {self.code:x})"]
        return ", ".join([*filter(None, said), *([f"without a gradient of {lacks}{more}"] if missing else [])])

    def _gathered(
        self, gradients: Sequence[Tensor | None], error: LayoutError | None, same: bool
    ) -> tuple[Gathered, Local | None]:
        if error is None:
            gathered = self.memory.gather(gradients, same)
            if gathered is not None:
                return gathered, None
        local = self.look(gradients, error)
        gathered = self.memory.remember(gradients, local, self.pieces, self.sources, self.replicas)
        if gathered is not None:
            return gathered, local
        spans = [(k, None) for k in range(len(local.parts))]
        shares = shares_of(self.replicas[i] for i in local.indices)
        wide = any(part.dtype in WIDE for part in local.parts)
        return Gathered(local.parts, shares, local.parts, spans, local.indices, wide), local

    def _sum_gathered(self, gathered: Gathered) -> float:
        """The sum of powers over replicas, or the largest norm, of gradients on the CPU."""
        runs = gathered.runs
        if self.p == inf:
            return largest(runs)
        amounts = []
        for replicas, these in gathered.shares:
            alike = runs if len(these) == len(runs) else [runs[k] for k in these]
            amounts.append(power_sum(alike, self.p) / replicas)
        return sum(amounts, 0.0)

    def _sum_of(self, norms: Norms) -> Word:
        """The same from the norms of all gradients, where the words are reduced."""
        if self.p == inf:
            mine = norms.norms.max() if len(norms.indices) else norms.norms.new_zeros(())
        elif self.p == 2 and self.unweighted:
            mine = torch.dot(norms.norms, norms.norms)
        else:
            weights = self.weights
            if len(norms.indices) < len(self.pieces):  # a list of indices would be copied to the device, and waited for
                every = weights.unbind()
                weights = torch.stack([every[i] for i in norms.indices]) if norms.indices else weights[:0]
            mine = torch.dot(norms.norms.pow(self.p), weights)
        return mine.item() if self.device.type == "cpu" else mine

    def _norms(self, parts: Sequence[Tensor], indices: Sequence[int]) -> Norms:
        """Norms of ``parts``, which are those of the pieces ``indices``."""
        devices = {t.device for t in parts}
        if len(devices) == 1:
            return Norms(self._norms_on(devices.pop(), parts), indices, parts)
        found: dict[int, Tensor] = {}
        for device in devices:
            here = [i for i, t in enumerate(parts) if t.device == device]
            norms = self._norms_on(device, [parts[i] for i in here])
            found |= zip(here, norms.unbind(), strict=True)
        every = [found[i] for i in range(len(parts))]
        return Norms(torch.stack(every) if every else self.weights.new_zeros(0), indices, parts)

    def _norms_on(self, device: torch.device, parts: Sequence[Tensor]) -> Tensor:
        """Norms of ``parts``, all of them on ``device``, brought to the plan's own."""
        norms = local_norms(parts, self.p) if has_float64(device) else norms_on_host(parts, self.p)
        return sent(norms, self.device)

    def _realigned(
        self, gradients: Sequence[Tensor | None], store: Store | None
    ) -> tuple[Sequence[Tensor | None], LayoutError | None]:
        try:
            moved = realign(self.pieces, [gradients[source] for source in self.sources])
        except LayoutError as error:  # raised once this rank has taken part in the next all-reduce
            return gradients, error
        new = {s: g for s, g in zip(self.sources, moved, strict=True) if g is not None and g is not gradients[s]}
        return _replaced(gradients, new, store), None


def tell_others(
    group: ClippingGroup,
    device: torch.device,
    p: float,
    questions: Sequence[bool],
    error: Exception,
    call: str,
) -> None:
    """Take part in the all-reduce of the others without an own sum, so that they raise as well: here it was ``error``.

    ``device`` and the number of ``questions`` must be those of the others.
    """
    nothing: Word = 0.0 if device.type == "cpu" else torch.zeros((), dtype=torch.float64, device=device)
    reduced = reduce_norm(group, nothing, p, 0, True, questions, call=call)
    if reduced.disagree is True:
        who_differs(group, device, stopped_by(error))


def stopped_by(error: Exception) -> str:
    """What a rank says of an error of its own; what to do about it is said on that rank."""
    kind = "" if isinstance(error, (RuntimeError, ValueError)) else f"{type(error).__name__} "
    return f"stopped: {kind}{str(error).partition(chr(10))[0]}"


def _replaced(
    gradients: Sequence[Tensor | None], instead: dict[int, Tensor], store: Store | None
) -> Sequence[Tensor | None]:
    """``gradients`` with those in ``instead``, which are stored too."""
    if not instead:
        return gradients
    if store is not None:
        for source, gradient in instead.items():
            store(source, gradient)
    return [instead.get(source, gradient) for source, gradient in enumerate(gradients)]


def _described(holdings: Iterable[tuple[Piece, Holding]]) -> str:
    """What ranks must have in common."""
    lines: list[str] = []
    kinds: dict[tuple[int, torch.dtype], str] = {}  # pieces that lie alike have one holding
    for piece, holding in holdings:
        if not holding.common:
            continue
        kind = kinds.get((id(holding), piece.dtype))
        if kind is None:
            placements = () if piece.spec is None else piece.spec.placements
            kind = kinds[id(holding), piece.dtype] = f"{piece.dtype}|{placements}|{holding.layout.replicas}"
        whole = piece.is_dtensor or (piece.spec is None and not piece.flat_over)
        shape = piece.shape if whole else piece.size  # local shapes of pieces differ between ranks
        lines.append(f"{piece.name}|{shape}|{kind}")
    return ";".join(lines)
