"""The user's own model: built, run backward and verified on all ranks, and inspected."""

from collections.abc import Sequence
from functools import partial

from distclip.doctor import inspection, plan_table, target
from distclip.doctor.finding import Check, Finding
from distclip.doctor.meeting import STARTING, Record, said_alike
from distclip.doctor.refusals import ranks
from distclip.train.place import limit_waits

YOURS, PLAN = "your model", "plan"
UNVERIFIED = "built, and not verified: build() returned no function backward()"


def importable(name: str) -> Check:
    """Before the ranks join, which a mistaken name need not wait for."""

    def run() -> Record:
        target.imported(name)
        return {}

    return Check(name="import", run=run, judge=lambda title, records: Finding(name=title), patience=STARTING)


def check(name: str, timeout: float, *, verifies: bool, every: bool) -> Check:
    """``verifies``: a backward is run, and the layout proved on its gradients; else it is only run."""
    run = partial(measured, name, timeout, verifies)
    return Check(name=YOURS if verifies else PLAN, run=run, judge=partial(judge, every=every))


def measured(name: str, timeout: float, verifies: bool) -> Record:
    """What this rank's Clipper finds on the user's model."""
    found = target.build(name)
    limit_waits(timeout)
    norm = None
    if found.backward is not None:
        target.called(found.backward, "backward()")
        if verifies:
            found.clipper.verify()
            norm = float(found.clipper.measure().norm).hex()
    plan = inspection.inspected(found.clipper, found.optimizers, has_gradients=found.backward is not None)
    return {"norm": norm, "verifies": verifies, "plan": plan}


def judge(name: str, records: Sequence[Record], every: bool) -> Finding:
    plans = [record["plan"] for record in records]
    more, norms = plan_table.lines(plans, every), said_alike(records, "norm")
    facts = {"norm": records[0]["norm"], "ranks": plans}
    if len(norms) > 1:
        text = "; ".join(f"{float.fromhex(said):.9g} on {ranks(who)}" for said, who in norms.items())
        return Finding(name=name, state="wrong", text=f"the norm differs: {text}", more=more, facts=facts)
    text, norm = "", records[0]["norm"]
    if records[0]["verifies"]:
        text = UNVERIFIED if norm is None else f"verified; the norm is {float.fromhex(norm):.7g}, the same bits on all"
    return Finding(name=name, text=text, more=more, facts=facts)
