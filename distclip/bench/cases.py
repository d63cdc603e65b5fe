"""The table of cases, with the project's goals."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import distclip
from distclip.bench.case import Case
from distclip.bench.contests import (
    Tenths,
    clipping,
    cold,
    finer,
    functions,
    memory,
    optimizer_step,
    ten_steps,
    training_step,
)
from distclip.bench.place import Place
from distclip.bench.subject import Subject, ddp, fsdp2, plain

SMALL = partial(fsdp2, layers=24, width=64)
MEDIUM = partial(fsdp2, layers=12, width=256)
LARGE = partial(fsdp2, layers=4, width=1024)
BUCKETS = partial(ddp, matrices=600, width=10, views=True)
NO_VIEWS = partial(ddp, matrices=600, width=10, views=False)
PLAIN = partial(plain, tensors=48, elements=1 << 20)

ON_SMALL = "FSDP2, 24 layers of width 64, 288 parameters"
ON_MEDIUM = "FSDP2, 12 layers of width 256, 144 parameters"
ON_LARGE = "FSDP2, 4 layers of width 1024, 48 parameters"
ON_BUCKETS = "DDP with bucket views, 600 parameters of 10 x 10"
ON_NO_VIEWS = "DDP without bucket views, 600 parameters of 10 x 10"
ON_PLAIN = "one process, 48 parameters of 1 Mi elements"

EACH = distclip.PerParameter(1e-6)  # bounds that everything is clipped to
ADAGC = distclip.AdaGC(lambda_abs=1e-6, warm_up=3)
WATCHED = 'Clipper(watch="parameters")'
FINER: Sequence[tuple[str, str, Callable[[Place], Subject], float | None, dict[str, Any]]] = [
    ("watch-fsdp2-small-repeated", f"{ON_SMALL}: {WATCHED}", SMALL, 1.5, {"watch": "parameters"}),
    ("watch-fsdp2-small-fresh", f"{ON_SMALL}: {WATCHED}, fresh", SMALL, 1.5, {"watch": "parameters", "fresh": True}),
    ("watch-ddp-small", f"{ON_BUCKETS}: {WATCHED}", BUCKETS, None, {"watch": "parameters"}),
    ("watch-plain", f"{ON_PLAIN}: {WATCHED}", PLAIN, 1.15, {"watch": "parameters"}),
    ("by-parameter-fsdp2-small", f"{ON_SMALL}: each parameter clipped", SMALL, None, {"policy": Tenths("parameter")}),
    ("by-parameter-plain", f"{ON_PLAIN}: each parameter clipped", PLAIN, None, {"policy": Tenths("parameter")}),
    ("by-row-fsdp2-small", f"{ON_SMALL}: each row clipped", SMALL, None, {"policy": Tenths("row")}),
    ("per-parameter", f"{ON_SMALL}: PerParameter(MaxNorm)", SMALL, 1.5, {"policy": EACH}),
    ("per-parameter-fresh", f"{ON_SMALL}: PerParameter(MaxNorm), fresh", SMALL, 1.5, {"policy": EACH, "fresh": True}),
    ("adagc", f"{ON_SMALL}: AdaGC", SMALL, 1.5, {"policy": ADAGC}),
    ("exact-fsdp2-small", f"{ON_SMALL}: Clipper(exact=True)", SMALL, None, {"exact": True}),
    ("exact-plain", f"{ON_PLAIN}: Clipper(exact=True)", PLAIN, 2.0, {"exact": True}),
    ("agc", f"{ON_SMALL}: AGC", SMALL, None, {"policy": distclip.AGC(1e-6)}),
]
"""Name, what, subject, goal and settings of cases that need more than the norm of the model."""

CASES = [
    Case(
        name="cold",
        what="first call of clip_grad_norm_ on 1000 DTensors",
        build=partial(cold, tensors=1000),
        goal=100,
        rounds=4,
        warmups=0,
    ),
    Case(
        name="fsdp2-small-repeated",
        what=f"{ON_SMALL}: Clipper, gradients restored in place",
        build=partial(clipping, subject_of=SMALL),
        goal=5,
        rounds=60,
    ),
    Case(
        name="fsdp2-small-fresh",
        what=f"{ON_SMALL}: Clipper, each call after a backward",
        build=partial(clipping, subject_of=SMALL, fresh=True),
        goal=4.5,
        rounds=40,
    ),
    Case(
        name="fsdp2-small-function",
        what=f"{ON_SMALL}: what the function keeps of the Clipper's speed",
        build=partial(functions, subject_of=SMALL),
        goal=0.8,
        over=("clipper", "distclip"),
        rounds=60,
    ),
    Case(
        name="fsdp2-medium-repeated",
        what=f"{ON_MEDIUM}: Clipper, gradients restored in place",
        build=partial(clipping, subject_of=MEDIUM),
        goal=3,
        rounds=60,
    ),
    Case(
        name="fsdp2-medium-fresh",
        what=f"{ON_MEDIUM}: Clipper, each call after a backward",
        build=partial(clipping, subject_of=MEDIUM, fresh=True),
        goal=2.5,
        rounds=40,
    ),
    Case(
        name="fsdp2-medium-function",
        what=f"{ON_MEDIUM}: what the function keeps of the Clipper's speed",
        build=partial(functions, subject_of=MEDIUM),
        goal=0.8,
        over=("clipper", "distclip"),
        rounds=60,
    ),
    Case(
        name="fsdp2-large-unclipped",
        what=f"{ON_LARGE}: Clipper, norm below the bound",
        build=partial(clipping, subject_of=LARGE, clips=False),
        goal=2,
        rounds=40,
    ),
    Case(
        name="fsdp2-large-clipped",
        what=f"{ON_LARGE}: Clipper, norm above the bound",
        build=partial(clipping, subject_of=LARGE),
        goal=1.1,
        rounds=40,
    ),
    Case(
        name="ddp-small-function",
        what=f"{ON_BUCKETS}: function",
        build=partial(clipping, subject_of=BUCKETS, by="function"),
        goal=6.5,
        rounds=60,
    ),
    Case(
        name="ddp-small-clipper",
        what=f"{ON_BUCKETS}: Clipper, gradients restored in place",
        build=partial(clipping, subject_of=BUCKETS),
        goal=3.3,
        rounds=60,
    ),
    Case(
        name="ddp-small-fresh",
        what=f"{ON_BUCKETS}: Clipper, each call after a backward",
        build=partial(clipping, subject_of=BUCKETS, fresh=True),
        goal=2.5,
        rounds=40,
    ),
    Case(
        name="ddp-no-views",
        what=f"{ON_NO_VIEWS}: function",
        build=partial(clipping, subject_of=NO_VIEWS, by="function"),
        goal=1,
        rounds=60,
    ),
    Case(
        name="plain-unclipped",
        what=f"{ON_PLAIN}: function, norm below the bound",
        build=partial(clipping, subject_of=PLAIN, by="function", clips=False),
        goal=1.9,
        rounds=40,
        alone=True,
    ),
    Case(
        name="plain-clipped",
        what=f"{ON_PLAIN}: function, norm above the bound",
        build=partial(clipping, subject_of=PLAIN, by="function"),
        goal=0.95,
        rounds=40,
        alone=True,
    ),
    Case(
        name="adamw-unclipped",
        what=f"{ON_PLAIN}: Clipper.step over a bare step of fused AdamW, norm below the bound",
        build=partial(optimizer_step, subject_of=PLAIN, clips=False),
        goal=1.25,
        at_most=True,
        over=("distclip", "torch"),
        rounds=40,
        alone=True,
    ),
    Case(
        name="adamw-clipped",
        what=f"{ON_PLAIN}: Clipper.step over a bare step of fused AdamW, norm above the bound",
        build=partial(optimizer_step, subject_of=PLAIN, clips=True),
        goal=1.4,
        at_most=True,
        over=("distclip", "torch"),
        rounds=40,
        alone=True,
    ),
    Case(
        name="train-step-clipper",
        what="a training step of a GPT of 4 layers of width 256 with FSDP2: Clipper.step over no clipping",
        build=training_step,
        goal=1.03,
        at_most=True,
        over=("distclip", "torch"),
        rounds=60,
    ),
    Case(
        name="telemetry-fsdp2-small",
        what=f"{ON_SMALL}: ten training steps with a Log of all its norms over a Clipper that reports and logs no more",
        build=partial(ten_steps, subject_of=SMALL),
        goal=1.05,
        at_most=True,
        over=("distclip", "clipper"),
        rounds=20,
        warmups=1,
    ),
    *(
        Case(
            name=name,
            what=f"{what} over a Clipper of the model's norm alone",
            build=partial(finer, subject_of=subject_of, **settings),
            goal=goal,
            at_most=True,
            over=("distclip", "clipper"),
            rounds=40,
            alone=subject_of is PLAIN,
        )
        for name, what, subject_of, goal, settings in FINER
    ),
    *(
        Case(
            name=f"memory-{where}-{by}",
            what=f"{what}: most tensor memory held at one time, {by}, over what is allowed",
            build=partial(memory, subject_of=subject_of, by=by),
            goal=1,
            at_most=True,
            over=("distclip", "allowed"),
            unit="KiB",
            rounds=2,
            alone=where == "plain",
        )
        for where, what, subject_of in [("plain", ON_PLAIN, PLAIN), ("fsdp2-small", ON_SMALL, SMALL)]
        for by in ("clipper", "function")
    ),
]


def chosen(words: Sequence[str]) -> list[Case]:
    """The cases whose names start with one of ``words``; all if there are none."""
    return [case for case in CASES if not words or any(names(word, case) for word in words)]


def unknown(words: Sequence[str]) -> list[str]:
    """Those of ``words`` that name no case."""
    return [word for word in words if not any(names(word, case) for case in CASES)]


def names(word: str, case: Case) -> bool:
    return f"{case.name}-".startswith(f"{word}-")
