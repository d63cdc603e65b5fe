"""Every error of this package: which optimizer or scaler cannot be clipped for, and what to call instead."""

TAKE_OVER = "call distclip.integrations.deepspeed.take_over(engine, policy)"
ATTACH = "call distclip.attach(optimizer, model, policy) once, and optimizer.step(), which then clips"
ACCELERATE = "Accelerator.clipper() of distclip.integrations.accelerate"


# ---- what is passed to step() -------------------------------------------------------------------------------


def no_optimizer() -> ValueError:
    return ValueError("step() needs the optimizers to step: step(optimizer), or call clip_() and step yourself")


def not_an_optimizer(kind: str) -> ValueError:
    return ValueError(f"step() takes optimizers one by one, got {kind}: step(*optimizers, scaler=scaler)")


def given_twice(kind: str) -> ValueError:
    return ValueError(f"step() was given the same {kind} twice: give it once")


def lbfgs() -> ValueError:
    return ValueError("LBFGS makes its gradients several times a step: call clip_() in its closure instead")


def runs_already(kind: str) -> RuntimeError:
    return RuntimeError(
        f"clip_() was called inside the closure of {kind}.step(), which cannot be skipped any more where gradients= "
        "says that gradients are not in .grad: compute the gradients before step(), without a closure"
    )


def step_replaced(kind: str) -> RuntimeError:
    return RuntimeError(
        f"the step of this {kind} was replaced by one that does not call that of its class, and nothing noticed its "
        "beginning: the step was not clipped; call the Clipper in that function instead"
    )


# ---- optimizers around optimizers ---------------------------------------------------------------------------


def deepspeed_steps_it(kind: str) -> ValueError:
    return ValueError(f"{kind} does not step itself, DeepSpeed's engine does: {TAKE_OVER}")


def adds_gradients_itself() -> ValueError:
    return ValueError("WSAM adds gradients to parameters itself, after the step inside: call clip_() in its closure")


def replaces_inner_step(kind: str) -> ValueError:
    return ValueError(
        f"{kind} replaces the step inside at each of its own, for its GradScaler: use {ACCELERATE}",
    )


def asks_to_commit(kind: str) -> ValueError:
    return ValueError(
        f"{kind} asks its manager inside step() whether to commit and heals there, which a skipped step would lose: "
        f"{ATTACH}"
    )


def gradients_inside_step(kind: str) -> ValueError:
    return ValueError(f"{kind} makes its gradients inside step(), after a clip before it: {ATTACH}")


def second_gradients(kind: str) -> ValueError:
    return ValueError(f"{kind} steps with second gradients, which a clip before step() does not see: {ATTACH}")


def accumulates(kind: str) -> ValueError:
    return ValueError(
        f"{kind} does nothing in step() while accelerate accumulates gradients, which would be clipped incomplete: "
        "call step() where accelerator.sync_gradients is true"
    )


def unscales_inside_step(kind: str, clipper: str) -> ValueError:
    return ValueError(f"{kind} unscales inside step(), and the norm would be that of scaled gradients: use {clipper}")


def two_inside(kind: str, first: str, second: str) -> ValueError:
    return ValueError(
        f"{kind} holds two optimizers of the same parameters, .{first} and .{second}, and which of them steps is not "
        f"known: call distclip.attach(optimizer.{first}, model, policy) with the one that does"
    )


# ---- a GradScaler -------------------------------------------------------------------------------------------


def update_missing() -> RuntimeError:
    return RuntimeError(
        "scaler.update() was not called since the last step, and new gradients would pass for unscaled: call it after "
        "every step, also after one that was skipped or raised"
    )


def unscaled_twice() -> ValueError:
    return ValueError(
        "a scaler would unscale a gradient twice: give each parameter to one optimizer and a gradient of its own"
    )
