"""The faults: where each strikes, what it does to one rank, and what must come of it.

A fault is one function of the loop, called on the guilty rank at one place of one step. Its contract says how the
guilty rank and the others must end, what the others' errors must say, and which parameters a rank that goes on must
hold. Adding a fault is adding one entry.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch

import distclip
from distclip.layouts.piece import local_tensor
from faults.loop import FAULTY_STEP, STEPS, Case, Injected, Loop

NONFINITE = ("skip", "raise", "propagate")
CALLS = ("step", "function")
VICTIM = "blocks.0.1.weight"  # cut by FSDP2 and by tensor parallelism, on four ranks too
COPIED = "blocks.0.0.weight"  # a norm's, which tensor parallelism leaves whole

# What a rank that went on must hold:
CLEAN = "as without the fault"
SKIPPED = "as without the step"
POISONED = "not finite alike"  # norms that are not finite on every rank, and the same parameters where there are copies
COUNTED = "what its gradients say"  # norms that are those of the gradients there were
APART = "apart, and told so"
ANY = "not judged"  # the guilty rank, where the others have ended

SAID = "a hook of this rank failed"
DONE = ("finished",)
REFUSED = ("LayoutError",)
BROKEN = ("RuntimeError",)
KILLED = ("died of SIGKILL",)


@dataclass(frozen=True, slots=True)
class Contract:
    """How ranks must end. ``says``: patterns that the error (or the reports) of every other rank must match."""

    others: tuple[str, ...]
    guilty: tuple[str, ...] = ()  # as the others, where empty
    says: tuple[str, ...] = ()
    guilty_says: tuple[str, ...] | None = None  # as the others, where None
    holds: str = ""
    guilty_holds: str | None = None

    def fates(self, is_guilty: bool) -> tuple[str, ...]:
        return self.guilty if is_guilty and self.guilty else self.others

    def patterns(self, is_guilty: bool) -> tuple[str, ...]:
        return self.guilty_says if is_guilty and self.guilty_says is not None else self.says

    def parameters(self, is_guilty: bool) -> str:
        return self.guilty_holds if is_guilty and self.guilty_holds is not None else self.holds


@dataclass(frozen=True, slots=True)
class Fault:
    """``act`` happens on the guilty rank at ``place`` of step ``step``, and ``others`` on the other ranks."""

    place: str  # "build", "loss", "gradients" or "call"
    act: Callable[[Loop], None]
    contract: Callable[[Case], Contract]
    step: int = FAULTY_STEP
    others: dict[str, Callable[[Loop], None]] = field(default_factory=dict)
    layouts: Sequence[str] = ("ddp", "fsdp2")
    calls: Sequence[str] = CALLS
    named: Sequence[bool] = (False,)  # whether the loop runs inside `name_lost_ranks()`
    verifies: bool = False  # whether the loop calls clipper.verify() before each step


# ---- what faults do ----------------------------------------------------------------------------------------


def poison(value: float) -> Callable[[Loop], None]:
    def act(loop: Loop) -> None:
        local_tensor(loop.named(VICTIM).grad).view(-1)[0] = value

    return act


def poison_loss(loop: Loop) -> None:
    loop.loss_scale = torch.nan


def lose_one(loop: Loop) -> None:
    loop.named(VICTIM).grad = None


def lose_all(loop: Loop) -> None:
    for p in loop.parameters:
        p.grad = None


def nothing(loop: Loop) -> None:
    pass


def twice(loop: Loop) -> None:
    loop.clip_and_step()
    loop.clip_and_step()


def measure_too(loop: Loop) -> None:
    loop.clipper.measure()
    loop.clip_and_step()


def other_step(loop: Loop) -> None:
    loop.clipper.load_state_dict(loop.clipper.state_dict() | {"steps": 8})
    loop.clip_and_step()


def other_setting(name: str, value: Any) -> Callable[[Loop], None]:
    """Another keyword of the Clipper, or another attribute of the loop."""

    def act(loop: Loop) -> None:
        if loop.case.call == "step" and name != "policy":
            loop.options[name] = value
        else:
            setattr(loop, name, value)

    return act


def other_parameters(loop: Loop) -> None:
    loop.model = torch.nn.ModuleList([loop.model, torch.nn.Linear(1, 1)])
    loop.parameters = loop.parameters[1:]


def flip(what: str, name: str, bit: int) -> Callable[[Loop], None]:
    """Flip one bit of one element of a parameter or of its gradient."""

    def act(loop: Loop) -> None:
        parameter = loop.named(name)
        tensor = local_tensor(parameter.grad if what == "gradient" else parameter).detach()
        tensor.view(-1)[3:4].view(torch.int32).bitwise_xor_(1 << bit)

    return act


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_inside(loop: Loop) -> None:
    """Another rank comes a second later, so that this one dies inside the all-reduce."""
    threading.Timer(0.5, die).start()
    loop.clip_and_step()


def come_late(loop: Loop) -> None:
    if loop.rank == (loop.case.guilty + 1) % loop.size:
        time.sleep(1.0)
    loop.clip_and_step()


def at_the_backward(hook: Callable[..., Any]) -> Callable[[Loop], None]:
    def act(loop: Loop) -> None:
        block = next(module for name, module in loop.model.named_modules() if name.endswith("blocks.0.1"))
        block.register_full_backward_pre_hook(hook)

    return act


def fail(*_: Any, **__: Any) -> NoReturn:
    raise Injected(SAID)


def fail_in_policy(loop: Loop) -> None:
    class Failing:
        needs, init, decide = loop.clipper.policy.needs, loop.clipper.policy.init, staticmethod(fail)

    loop.clipper.engine.progress.policy = Failing()
    loop.clip_and_step()


def fail_in_optimizer(loop: Loop) -> None:
    loop.optimizer.step = fail
    loop.clip_and_step()


def sleep(beyond: float) -> Callable[[Loop], None]:
    """Come ``beyond`` seconds after the group's timeout, or before it."""

    def act(loop: Loop) -> None:
        time.sleep(loop.case.timeout + beyond)
        loop.notes.resumed = time.monotonic()
        loop.clip_and_step()

    return act


# ---- what must come of them --------------------------------------------------------------------------------


def not_finite(kind: str, anywhere: bool = False) -> Callable[[Case], Contract]:
    """All ranks skip, raise or go on alike. ``anywhere``: backward has spread it, so that the first rank is named."""

    def contract(case: Case) -> Contract:
        name = r"\S+" if anywhere else VICTIM if case.call == "step" else r"parameter \d+ of shape \(20, 12\)"
        if anywhere and case.call == "function":
            name = r"parameter \d+ of shape \(.*\)"
        rank = r"\d" if anywhere else case.guilty
        reduced = f"has {kind} in its reduced gradient, held by ranks? {rank}"  # where FSDP has summed and cut it
        says = (f"{name} (on rank {rank} has {kind} in its gradient|{reduced})",)
        if case.nonfinite == "raise":
            return Contract(("NonFiniteError",), says=says)
        says = says if case.call == "step" else ()  # a function returns a norm and no culprit
        return Contract(DONE, says=says, holds=SKIPPED if case.nonfinite == "skip" else POISONED)

    return contract


def refused(*says: str, type: str = "LayoutError") -> Callable[[Case], Contract]:
    """Every rank gets the same error in the same call. "GUILTY" in ``says`` is the guilty rank's number."""

    def contract(case: Case) -> Contract:
        return Contract((type,), says=tuple(word.replace("GUILTY", str(case.guilty)) for word in says))

    return contract


def missing(what: str) -> Callable[[Case], Contract]:
    """Copies must all be there; a piece that nobody else holds counts as zeros."""

    def contract(case: Case) -> Contract:
        if case.layout == "ddp" or (case.layout == "tp" and what == "all"):
            return Contract(REFUSED, says=(f"rank {case.guilty}", "gradient"))
        return Contract(DONE, holds=COUNTED)

    return contract


def absent(case: Case) -> str:
    return f"rank {case.guilty} did not join"


def gone(case: Case) -> Contract:
    """The rank dies before or in the all-reduce."""
    return Contract(BROKEN, KILLED, (absent(case),), ())


def gone_in_backward(case: Case) -> Contract:
    """The collective that fails is DDP's, FSDP2's or DTensor's: an error of torch, which names an address."""
    return Contract(BROKEN, KILLED, (f"no answer from rank {case.guilty}: dead",) if case.named else (), ())


def failed_in_backward(case: Case) -> Contract:
    """The others' collective is one of torch, or of ours: that one names who did not join."""
    told = (f"rank {case.guilty} failed: .*{SAID}|{absent(case)}",)
    return Contract(BROKEN, ("Injected",), told if case.named else (), (SAID,))


def skipped(case: Case) -> Contract:
    """The guilty rank waits in a collective of torch, whose error names nobody by itself."""
    told = (f"{the_others(case)} waited in .* of distclip, and rank {case.guilty} did not|{absent(case)}",)
    return Contract(BROKEN, says=(absent(case),), guilty_says=told if case.named else ())


def skipped_last(case: Case) -> Contract:
    return Contract(BROKEN, DONE, (absent(case),), (), guilty_holds=ANY)


def added(case: Case) -> Contract:
    """The others wait in a collective of torch."""
    told = (f"rank {case.guilty} waited in .* of distclip, and {the_others(case)} did not",)
    return Contract(BROKEN, says=told if case.named else (), guilty_says=alone(case))


def added_last(case: Case) -> Contract:
    return Contract(DONE, BROKEN, (), alone(case), holds=CLEAN)


def alone(case: Case) -> tuple[str, ...]:
    """What the guilty rank is told that came without the others."""
    return (f"{the_others(case)} did not join or died, only rank {case.guilty} did",)


def the_others(case: Case) -> str:
    others = [str(rank) for rank in range(case.size) if rank != case.guilty]
    return f"rank{'s' if len(others) > 1 else ''} {', '.join(others)}"


def other_words(case: Case) -> Contract:
    """p = inf sends three words where the others send two: they wait for each other until the timeout."""
    return Contract(
        BROKEN,
        says=(f"{absent(case)} .*rank {case.guilty} was in .*norm_type=inf",),
        guilty_says=(*alone(case), "was in .*norm_type=2.0"),
    )


def goes_on(case: Case) -> Contract:
    return Contract(DONE, holds=CLEAN)


def late(case: Case) -> Contract:
    """Named as late, or as absent where it is later than the others had patience."""
    return Contract(BROKEN, says=(f"rank {case.guilty} (joined late|did not join)",))


def drifted(case: Case) -> Contract:
    """The same error in that step on every rank, with the parameter, and the rank where two others are alike."""
    return Contract(REFUSED, says=(named_copies(case),))


def told(case: Case) -> Contract:
    """The same warning in that step on every rank, which goes on."""
    return Contract(DONE, says=(named_copies(case),), holds=APART)


def named_copies(case: Case) -> str:
    alone = case.size > 2
    return f"have drifted apart in step .: {COPIED} on rank{f' {case.guilty} of ranks' if alone else 's '}"


def warned(case: Case) -> Contract:
    """No call follows that could raise; by how much the others are off the mean depends on how many they are."""
    return Contract(DONE, says=(), guilty_says=("copies of gradients differ",), holds=APART)


EVERYWHERE = ("ddp", "fsdp2", "tp")
STEP = ("step",)
FUNCTION = ("function",)
BOTH = (False, True)

FAULTS: dict[str, Fault] = {
    # numbers
    "NaN in a gradient": Fault("gradients", poison(torch.nan), not_finite("NaN"), layouts=EVERYWHERE),
    "inf in a gradient": Fault("gradients", poison(torch.inf), not_finite("inf"), layouts=EVERYWHERE),
    "NaN in the loss": Fault("loss", poison_loss, not_finite("NaN", anywhere=True), layouts=EVERYWHERE),
    "missing gradient": Fault("gradients", lose_one, missing("one"), layouts=EVERYWHERE),
    "rank without gradients": Fault("gradients", lose_all, missing("all"), layouts=EVERYWHERE),
    # calls
    "skipped call": Fault("call", nothing, skipped, named=BOTH),
    "skipped last call": Fault("call", nothing, skipped_last, step=STEPS - 1),
    "extra call": Fault("call", twice, added, named=BOTH),
    "extra last call": Fault("call", twice, added_last, step=STEPS - 1),
    "extra measure()": Fault("call", measure_too, refused("rank GUILTY"), calls=STEP),
    "wrong step": Fault("call", other_step, refused("rank GUILTY"), calls=STEP),
    # settings
    "other max_norm": Fault("gradients", other_setting("max_norm", 0.3), refused("max_norm"), calls=FUNCTION),
    "other norm_type": Fault("gradients", other_setting("norm_type", 3.0), refused("norm_type"), calls=FUNCTION),
    "norm_type inf": Fault("gradients", other_setting("norm_type", torch.inf), other_words, calls=FUNCTION),
    "Clipper of other policy": Fault(
        "build", other_setting("policy", distclip.MaxNorm(0.3)), refused("policy", type="ValueError"), calls=STEP
    ),
    "Clipper of other norm_type": Fault(
        "build", other_setting("norm_type", torch.inf), refused("norm_type", type="ValueError"), calls=STEP
    ),
    "Clipper of other nonfinite": Fault(
        "build",
        lambda loop: loop.options.update(nonfinite=NONFINITE[NONFINITE.index(loop.case.nonfinite) - 1]),
        refused("nonfinite", type="ValueError"),
        calls=STEP,
    ),
    "Clipper of other parameters": Fault("build", other_parameters, refused("of different names"), calls=STEP),
    "other parameters": Fault("gradients", other_parameters, refused("other parameters"), calls=FUNCTION),
    # copies that differ
    "bit flip in a parameter, verify()": Fault(
        "loss", flip("parameter", COPIED, 0), refused(COPIED), layouts=("ddp", "tp"), calls=STEP, verifies=True
    ),
    "bit flip in a gradient, verify()": Fault(
        "gradients", flip("gradient", COPIED, 23), refused(COPIED), layouts=("ddp", "tp"), calls=STEP, verifies=True
    ),
    "bit flip in a gradient": Fault(
        "gradients", flip("gradient", COPIED, 30), drifted, step=2, layouts=("ddp", "tp"), calls=STEP
    ),
    "bit flip in a gradient, last call": Fault(
        "gradients", flip("gradient", COPIED, 30), drifted, step=STEPS - 1, layouts=("ddp", "tp"), calls=STEP
    ),
    "low bit flip in a gradient": Fault(
        "gradients", flip("gradient", COPIED, 16), told, step=2, layouts=("ddp", "tp"), calls=STEP
    ),
    "bit flip in a gradient of a function": Fault(
        "gradients",
        flip("gradient", COPIED, 23),
        refused("copies of gradients differ", "rank GUILTY: stopped"),  # in the next call
        layouts=("ddp",),
        calls=FUNCTION,
    ),
    "bit flip in a gradient of a function, last call": Fault(
        "gradients", flip("gradient", COPIED, 23), warned, step=STEPS - 1, layouts=("ddp",), calls=FUNCTION
    ),
    # ranks that go
    "kill before the all-reduce": Fault("call", die, gone, layouts=EVERYWHERE),
    "kill in mid all-reduce": Fault("call", die_inside, gone, others={"call": come_late}, layouts=EVERYWHERE),
    "kill in the backward": Fault("loss", at_the_backward(die), gone_in_backward, named=BOTH),
    "exception in a backward hook": Fault("loss", at_the_backward(fail), failed_in_backward, named=BOTH),
    "exception in policy.decide": Fault("call", fail_in_policy, failed_in_backward, calls=STEP, named=BOTH),
    "exception in optimizer.step": Fault("call", fail_in_optimizer, failed_in_backward, named=BOTH),
    "slow rank, below the timeout": Fault("call", sleep(-2.5), goes_on),
    "slow rank, above the timeout": Fault("call", sleep(2.0), late),
}

CONTROLS: dict[str, Fault] = {
    CLEAN: Fault("build", nothing, goes_on),
    SKIPPED: Fault("call", nothing, goes_on, others={"call": nothing}),
}


def cases(
    sizes: Sequence[int] = (2, 4), nonfinite: Sequence[str] = NONFINITE, names: Sequence[str] | None = None
) -> list[Case]:
    """Every run there is: each fault in each of its layouts and loops, times sizes and policies."""
    return [
        Case(name, layout, size, call, policy, named=named)
        for name in names or FAULTS
        for layout in FAULTS[name].layouts
        for size in sizes
        for call in FAULTS[name].calls
        for named in FAULTS[name].named
        for policy in nonfinite
    ]
