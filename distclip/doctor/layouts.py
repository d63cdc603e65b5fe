"""The true norm on every layout, beside torch's own answer, live: the table of the README on the user's ranks."""

from collections.abc import Callable, Sequence
from functools import partial
from math import inf, isclose

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from distclip import Clipper
from distclip.doctor.finding import Check, Finding
from distclip.doctor.meeting import Record, said_alike
from distclip.doctor.place import Site
from distclip.doctor.refusals import ranks
from distclip.doctor.subjects import LAYOUTS, Subject
from distclip.train.place import limit_waits

NEAR = 1e-5  # of the norm: the same gradients in fp32, computed in another order
LONGEST = 44  # characters of an error of torch


def checks(site: Site) -> list[Check]:
    return [Check(name=name, run=partial(measure, build, site), judge=judge) for name, build in LAYOUTS.items()]


def measure(build: Callable[[Site], Subject], site: Site) -> Record:
    """What this rank's Clipper, torch and one process find: the same norm, before and after clipping to half of it."""
    subject = build(site)
    limit_waits(site.timeout)
    subject.backward()
    oracle = subject.oracle()
    clipper = Clipper(subject.parts, 0.5 * oracle, **subject.options)
    ours = float(clipper.measure().norm)
    torchs = answer_of_torch(subject)
    clipper.verify()
    clipper.clip_()
    return {"oracle": oracle, "ours": ours.hex(), "after": clipper.measure().norm.item(), "torch": torchs}


def answer_of_torch(subject: Subject) -> float | str:
    """The norm by torch's own function, or its error."""
    try:
        norm: Tensor = torch.nn.utils.clip_grad_norm_(subject.parameters(), inf)
    except (RuntimeError, ValueError) as error:
        return f"raises {type(error).__name__}: {str(error).splitlines()[0]}"
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


def judge(name: str, records: Sequence[Record]) -> Finding:
    oracle, ours = records[0]["oracle"], said_alike(records, "ours")
    norm = float.fromhex(records[0]["ours"])
    torchs = [record["torch"] for record in records]
    facts = {"norm": norm, "oracle": oracle, "torch": torchs, "after": records[0]["after"]}
    columns = (f"{oracle:.7g}", f"{norm:.7g}", as_seen(torchs, oracle))
    text = ""
    if len(ours) > 1:
        text = "; ".join(f"{float.fromhex(said):.9g} on {ranks(who)}" for said, who in ours.items())
        text = f"the norm has other bits on each rank: {text}"
    elif not isclose(norm, oracle, rel_tol=NEAR):
        text = f"the norm is {norm:.9g}, and in one process {oracle:.9g}"
    elif not isclose(records[0]["after"], 0.5 * oracle, rel_tol=NEAR):
        text = f"clipped to {0.5 * oracle:.9g}, gradients have the norm {records[0]['after']:.9g}"
    return Finding(name=name, state="wrong" if text else "ok", text=text, columns=columns, facts=facts)


def as_seen(torchs: Sequence[float | str], oracle: float) -> str:
    """torch's answer in a few words."""
    first = torchs[0]
    if any(isinstance(each, str) for each in torchs):
        said = next(each for each in torchs if isinstance(each, str))
        return said if len(said) <= LONGEST else f"{said[: LONGEST - 3]}..."
    numbers = [float(each) for each in torchs]
    if all(isclose(number, oracle, rel_tol=NEAR) for number in numbers):
        return "right"
    shown = f"{first:.7g}" if len(set(numbers)) == 1 else f"{min(numbers):.7g} to {max(numbers):.7g}, by rank"
    return f"wrong: {shown}"
