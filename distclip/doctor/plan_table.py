"""The inspections of all ranks as one table: a line for parameters that lie alike."""

from collections.abc import Callable, Sequence
from typing import Any

from distclip.doctor.meeting import Record, said_alike
from distclip.doctor.refusals import ranks
from distclip.doctor.table import table

ALIKE = ("placements", "where", "replicas", "dtype", "device")
HEADS = ("parameters", "elements", "on each rank", "dtype", "device", "placements", "replicas", "where", "such as")
HEADS_OF_EACH = ("name", "shape", "here", "dtype", "placements", "replicas", "where")


def lines(records: Sequence[Record], every: bool) -> list[str]:
    """The plan of all ranks in words; ``every``: with each parameter of rank 0."""
    return [
        summary(records),
        "",
        *table(HEADS, [group.cells(len(records)) for group in groups(records)]),
        "",
        *(each_parameter(records[0]) if every else []),
        *short(records, runs_of, "gradients"),
        *short(records, message_of, "message"),
        *short(records, collectives_of, "collectives"),
        *folding(records),
    ]


def summary(records: Sequence[Record]) -> str:
    first, world = records[0], len(records)
    whole = sum(p["here"] / p["replicas"] for record in records for p in record["parameters"])
    names = {(p["name"], p["where"]) for record in records for p in record["parameters"]}
    p = first["norm_type"]
    order = "the largest element" if p == "inf" else f"the norm of order {p:g}"
    on = f"{world} rank{'s' if world > 1 else ''}"
    return f"{first['policy']} on {order} of {len(names)} parameters, {round(whole):,} elements, on {on}"


class Group:
    """Parameters that lie alike on some ranks."""

    def __init__(self, first: dict[str, Any]) -> None:
        self.first = first
        self.elements: dict[str, int] = {}  # by name
        self.here: dict[int, int] = {}  # by rank

    def add(self, rank: int, parameter: dict[str, Any]) -> None:
        self.elements[parameter["name"]] = parameter["elements"]
        self.here[rank] = self.here.get(rank, 0) + parameter["here"]

    def cells(self, world: int) -> tuple[str, ...]:
        fewest, most, first = min(self.here.values()), max(self.here.values()), self.first
        here = f"{most:,}" if fewest == most else f"{fewest:,} to {most:,}"
        where = first["where"] if first["where"] is not None else "not said"
        on = where or ("" if len(self.here) == world else ranks(list(self.here)))
        return (
            str(len(self.elements)),
            f"{sum(self.elements.values()):,}",
            here,
            first["dtype"],
            first["device"],
            first["placements"],
            f"{first['replicas']} of {world}",
            on,
            next(iter(self.elements)),
        )


def groups(records: Sequence[Record]) -> list[Group]:
    """Parameters that lie alike together, in the order of the ranks and of the model."""
    found: dict[tuple[Any, ...], Group] = {}
    for rank, record in enumerate(records):
        for parameter in record["parameters"]:
            key = tuple(parameter[name] for name in ALIKE)
            found.setdefault(key, Group(parameter)).add(rank, parameter)
    return list(found.values())


def each_parameter(record: Record) -> list[str]:
    """Every parameter of one rank."""
    rows = [
        (
            p["name"],
            "x".join(map(str, p["shape"])),
            f"{p['here']:,}",
            p["dtype"],
            p["placements"],
            str(p["replicas"]),
            p["where"] or "",
        )
        for p in record["parameters"]
    ]
    return ["on rank 0:", *table(HEADS_OF_EACH, rows), ""]


def short(records: Sequence[Record], say: Callable[[Record], str], what: str) -> list[str]:
    """One line, or one for each group of ranks that differ."""
    alike = said_alike([{"said": say(record)} for record in records], "said")
    return [f"{what}{'' if len(alike) == 1 else f' on {ranks(who)}'}: {said}" for said, who in alike.items()]


def runs_of(record: Record) -> str:
    found = record["runs"]
    if found is None:
        return "none yet: without backward() in what build() returns, their neighbours in memory are not known"
    merged = "one run" if found["runs"] == 1 else f"{found['runs']} runs"
    return f"{found['gradients']}, summed and scaled in {merged} of neighbours in memory"


def message_of(record: Record) -> str:
    found = record["message"]
    if not found["numbers"]:
        return "none, in one process"
    norms = "one for the norm" if found["norms"] == 1 else f"{found['norms']} for norms"
    others = "the other" if found["numbers"] - found["norms"] == 1 else "the others"
    return f"{found['numbers']} numbers ({found['bytes']} bytes) on {found['on']}: {norms}, {others} for agreement"


def collectives_of(record: Record) -> str:
    first, *others = record["collectives"].items()
    return ", ".join([f"{first[1]} {first[0]}", *(f"{number} {when}" for when, number in others)])


def folding(records: Sequence[Record]) -> list[str]:
    """Which optimizers apply the coefficient while they step, and why not the others; by rank 0."""
    rows = [(each["optimizer"], each["folds"], each["why"]) for each in records[0]["optimizers"]]
    return ["", *table(("optimizer", "applies coef", "why not"), rows)]
