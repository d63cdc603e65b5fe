"""The judge: from how the ranks of a case ended, what was against its contract."""

import re
from collections.abc import Sequence
from math import inf, isclose, nan

from faults.catalogue import ANY, APART, CLEAN, CONTROLS, COUNTED, FAULTS, POISONED, SKIPPED, Contract
from faults.loop import STEPS, Case
from faults.stage import End, played

LATE = 5.0  # seconds past the group's timeout that a rank has to end

# What may be wrong, worst first:
WRONG = "silently wrong"
HANG = "hang"
FATE = "other end"
UNNAMED = "culprit not named"


class Judge:
    """Compares a case with runs of the same loop without the fault, which it makes once."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, Case], list[End]] = {}

    def breaches(self, case: Case, ends: Sequence[End]) -> list[str]:
        """What is against the contract, each with its kind first; empty if all is as it must be."""
        contract = FAULTS[case.fault].contract(case)
        found = []
        for rank, end in enumerate(ends):
            is_guilty = rank == case.guilty
            found += [f"{breach} [rank {rank}]" for breach in self._of_rank(case, contract, end, is_guilty)]
        return sorted(found + self._of_all(case, contract, ends), key=_severity)

    def _of_rank(self, case: Case, contract: Contract, end: End, is_guilty: bool) -> list[str]:
        found = []
        live = not end.fate.startswith("died")
        wanted = contract.fates(is_guilty)
        if end.fate.startswith("hung") or (live and end.fate != "finished" and end.seconds > case.timeout + LATE):
            found.append(f"{HANG}: {end.fate} after {end.seconds:.1f} s")
        elif end.fate not in wanted:
            kind = WRONG if end.fate == "finished" else FATE
            found.append(f"{kind}: {end.fate} where {' or '.join(wanted)} was due: {end.notes.message[:300]}")
        elif live:
            said = " ".join([end.notes.message, *end.notes.said])
            missed = [pattern for pattern in contract.patterns(is_guilty) if not re.search(pattern, said)]
            found += [f"{UNNAMED}: no {pattern!r} in {said[:300]!r}" for pattern in missed]
        return found

    def _of_all(self, case: Case, contract: Contract, ends: Sequence[End]) -> list[str]:
        """Of ranks that went on: are their norms true, and do they hold what they must?"""
        done = [rank for rank, end in enumerate(ends) if end.fate == "finished"]
        judged = {rank: contract.parameters(rank == case.guilty) for rank in done}
        judged = {rank: holds for rank, holds in judged.items() if holds != ANY}
        found = []
        if len(judged) == len(ends):
            found += self._norms(case, ends, set(judged.values()))
        for rank, holds in judged.items():
            if holds in CONTROLS and ends[rank].notes.parameters != self._without(holds, case)[rank].notes.parameters:
                found.append(f"{WRONG}: parameters are not {holds} [rank {rank}]")
        if case.layout == "ddp":
            alike = len({ends[rank].notes.parameters for rank in judged}) <= 1
            if alike == (APART in judged.values()):
                found.append(f"{WRONG}: replicas are {'alike' if alike else 'apart'}")
        return found

    def _norms(self, case: Case, ends: Sequence[End], holds: set[str]) -> list[str]:
        """The same bits on every rank, and what all shares of the gradients add up to."""
        if len({len(end.notes.norms) for end in ends}) > 1:
            return [f"{WRONG}: ranks made {[len(end.notes.norms) for end in ends]} steps"]
        steps = list(zip(*(end.notes.norms for end in ends), strict=True))
        found = [f"{WRONG}: norms {norms} in step {i}" for i, norms in enumerate(steps) if len(set(norms)) > 1]
        for i, (norm, *_) in enumerate(steps):
            true = sum(end.notes.squares[i] for end in ends) ** 0.5
            number = nan if norm == "nan" else inf if norm == "inf" else float.fromhex(norm)
            if not (isclose(number, true, rel_tol=1e-6) or (number != number and true != true)):
                found.append(f"{WRONG}: norm {number} in step {i} is {true}")
        if holds <= {POISONED} and all(norm[0] not in ("nan", "inf") for norm in steps):
            found.append(f"{WRONG}: every norm is finite")
        if holds <= {CLEAN, SKIPPED, COUNTED} and (len(steps) < STEPS - 1 or not ends[0].notes.clipped):
            found.append(f"{WRONG}: too little was clipped: {ends[0].notes.clipped} of {len(steps)} steps")
        return found

    def _without(self, control: str, case: Case) -> list[End]:
        """The ends of the loop of ``case`` without its fault."""
        same = Case(control, case.layout, case.size, case.call, "skip", case.timeout)
        if (control, same) not in self._known:
            self._known[control, same] = played(same)
        return self._known[control, same]


def _severity(breach: str) -> int:
    return [WRONG, HANG, FATE, UNNAMED].index(breach.partition(":")[0])


def kinds(breaches: Sequence[str]) -> set[str]:
    return {breach.partition(":")[0] for breach in breaches}
