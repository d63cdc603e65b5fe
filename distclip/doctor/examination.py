"""A check, in step on all ranks: each runs it, rank 0 judges what all have found, and all learn that."""

from collections.abc import Callable, Sequence

from distclip.doctor import refusals
from distclip.doctor.finding import Check, Finding, Unfit, Unusable
from distclip.doctor.meeting import GRACE, Meeting, Record, said_alike
from distclip.errors import FAILURES
from distclip.ranks.lost_ranks import of_backend
from distclip.train.complaint import complain


def hold(meeting: Meeting, check: Check) -> Finding:
    """What came of ``check``: the same on every rank that can still be told."""
    meeting.tell(check.name, attempt(check.run))
    seconds = meeting.timeout + check.patience
    if meeting.rank == 0:
        records = meeting.hear(check.name, seconds)
        finding = trouble(check.name, records, seconds) or check.judge(check.name, records)  # type: ignore[arg-type]  # none is None
        meeting.publish(check.name, finding.to_dict())
        return finding
    told = meeting.learn(check.name, seconds)
    if told is None:
        text = refusals.absent([0], 2 * seconds + GRACE)
        if meeting.rank == 1:  # in place of rank 0, which shows what is found
            complain(f"{check.name}: {text}")
        return Finding(name=check.name, state="wrong", text=text, ends=True, code=1)
    return Finding(**told)


def attempt(run: Callable[[], Record]) -> Record:
    """What ``run`` returns, or why it failed, for the others to know."""
    try:
        return run()
    except Unfit as reason:
        return {"unfit": str(reason)}
    except Unusable as error:
        return {"error": str(error), "kind": "unusable"}
    except FAILURES as error:
        said = " ".join(str(error).split())
        if of_backend(error) or of_backend(error.__cause__):
            return {"error": said.partition(" This is typically caused")[0], "kind": "backend"}
        return {"error": f"{type(error).__name__}: {said}", "kind": "own"}


def trouble(name: str, records: Sequence[Record | None], timeout: float) -> Finding | None:
    """The finding where some rank could not finish the check; None where all have."""
    absent = [rank for rank, record in enumerate(records) if record is None]
    there = {rank: record for rank, record in enumerate(records) if record is not None}
    errors = {rank: record for rank, record in there.items() if "error" in record}
    unfit = [record["unfit"] for record in there.values() if "unfit" in record]
    if not absent and not errors:
        return Finding(name=name, state="left out", text=unfit[0]) if unfit else None
    kinds = {record["kind"] for record in errors.values()}
    if "unusable" in kinds:
        return Finding(name=name, state="wrong", text=causes(errors, len(records), "unusable"), ends=True, code=2)
    parts = [refusals.absent(absent, timeout if not errors else GRACE)] if absent else []
    own = causes(errors, len(records), "own")
    parts += [own] if own else []
    parts = parts or [causes(errors, len(records), "backend")]  # by which it only notices what another rank does
    alike = not absent and kinds == {"own"} and len(errors) == len(records)
    return Finding(name=name, state="wrong", text="; ".join(parts), ends=not alike, code=1)


def causes(errors: dict[int, Record], world: int, kind: str) -> str:
    """The errors of this kind, and which ranks had them, unless all had the same."""
    numbers = [rank for rank, record in errors.items() if record["kind"] == kind]
    alike = said_alike([errors[rank] for rank in numbers], "error")
    if len(alike) == 1 and len(numbers) == world:
        return str(next(iter(alike)))
    return "; ".join(f"{refusals.ranks([numbers[k] for k in places])}: {said}" for said, places in alike.items())
