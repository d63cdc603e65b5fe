"""Every error of this package, and its warning: which ranks, in which call, and what to do about it."""

from collections.abc import Mapping, Sequence

from ..errors import and_more

FEW_CALLS = 3  # missing ranks whose own call is named
LONGEST = 500  # characters of an exception that other ranks quote


def _named(ranks: Sequence[int], most: int = 16) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {and_more(ranks, most)}"


# ---- the clipping group

DESTROYED = "the process group was destroyed: build the Clipper anew"
NOT_INITIALISED = "group was given but torch.distributed is not initialised: call init_process_group"
NOT_ON_THIS_AXIS = (
    "split_over names a group that rank {rank} is not in: give every rank the group that it is in itself, as "
    "mesh['pp'] and dist.new_subgroups() do, or pass layout="
)
NOT_IN_GROUP = "rank {rank} is not in the clipping group: only the ranks of `group` may call"
NOT_ONE_DIM = "split_over takes 1-D mesh slices such as mesh['pp']; got a {ndim}-D mesh {mesh}"
NO_FLOAT64 = (
    "norms are reduced in float64, which {device} does not have, and this group reduces nowhere else: give it a "
    "backend for the CPU too, as in init_process_group('cpu:gloo,{kind}:{backend}')"
)


def differs(odd: Sequence[int], text: str, usual: int, usual_text: str) -> str:
    """Follows what an error says of a disagreement: the ranks that differ, and one of those that do not."""
    return f"; {_named(odd, 5)}: {text}; rank {usual}: {usual_text}"


# ---- a collective of ours that failed, or takes long

GIVEN_UP = "the others have given up"
GAVE_UP = "this rank gave up"
NO_ANSWER = "it does not answer"
ALL_FAILED = " on all of its ranks: see the backend's message"


def failed(call: str, story: str) -> str:
    return f"a collective of the clipping group failed{f' in {call}' if call else ''}{story}"


def missing(ranks: Sequence[int], joined: Sequence[int], calls: Mapping[int, str], stopped: Mapping[int, str]) -> str:
    """Of those who are missing, ``calls``: the other call in which some wait; ``stopped``: what some have raised."""
    others = [rank for rank in ranks if rank not in stopped]
    absent = f"; {_named(others)} did not join or died" if others else ""
    if stopped:
        return f": {'; '.join(stopped.values())}{absent}; an error on one rank must end it, or be raised on every rank"
    only = f", only {_named(joined)} did" if len(joined) <= len(ranks) else ""
    elsewhere = "".join(f", rank {rank} was in {call or 'another call'}" for rank, call in calls.items())
    return (
        f": {_named(ranks)} did not join or died{only}{elsewhere}; let every rank of the group make the same calls, "
        "and see the output of the missing ones"
    )


def stopped(rank: int, call: str, why: str) -> str:
    return f"rank {rank} stopped in {call}: {why}"


def late(ranks: Sequence[int], seconds: float) -> str:
    return f": {_named(ranks)} joined late, {seconds:.1f} s after the others"


def store_gone_too(error: RuntimeError) -> str:
    return f", and the job's store is gone too: {error}"


def altered(call: str) -> str:
    return (
        f"the message{f' of {call}' if call else ''} was altered on its way: its words are not those of their "
        "checksum. Memory or network of a rank is broken; nothing was clipped"
    )


def waits_for(rank: int, absent: Sequence[int], call: str, seconds: float) -> str:
    return (
        f"rank {rank} has waited for {seconds:.0f} s{f' in {call}' if call else ''}: {_named(absent)} "
        f"{'have' if len(absent) > 1 else 'has'} not joined. Every rank of the group must make the same calls"
    )


# ---- any collective that failed

NO_STORE = "name_lost_ranks() needs the job's store: call init_process_group first"
ALL_ALIVE = "a connection broke, or a rank was slower than the timeout allows; all ranks are alive"
FOLDER, LAUNCHER, RANK_0 = "the folder where ranks meet", "the launcher of rank 0", "rank 0"


def store_gone(holder: str) -> str:
    return f"the job's store is gone: {holder} has ended or cannot be reached"


def raised(rank: int, error: BaseException) -> str:
    return f"rank {rank} failed: {in_short(error)}"


def in_short(error: BaseException) -> str:
    """As other ranks quote it: on one line, at most ``LONGEST`` characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:LONGEST]


def no_answer(ranks: Sequence[int]) -> str:
    return f"no answer from {_named(ranks)}: dead, stopped or out of reach"


def only_some_clip(clipping: Sequence[int], call: str, others: Sequence[int]) -> str:
    return f"{_named(clipping)} waited in {call} of distclip, and {_named(others)} did not"
