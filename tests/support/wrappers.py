"""Optimizers around optimizers, built as the published ones are: made anew at each call, so that torch knows no class.

torch puts its hooks into a class when the first of its objects calls ``Optimizer.__init__``: what a wrapper that never
does so hears must not depend on what ran before in the process.
"""

from collections import OrderedDict, defaultdict
from types import SimpleNamespace

import torch
from torch.optim import SGD, Optimizer


def lookahead(base, k: int = 2):
    """timm's: no Optimizer.__init__, the groups and the state of the base, hooks that nobody calls."""

    class Lookahead(Optimizer):
        def __init__(self):
            self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
            self._base_optimizer, self.param_groups, self.defaults = base, base.param_groups, base.defaults
            self.state, self.steps = defaultdict(dict), 0

        @torch.no_grad()
        def step(self, closure=None):
            loss = self._base_optimizer.step(closure)
            self.steps += 1
            if self.steps % k == 0:
                for p in (p for group in self.param_groups for p in group["params"]):
                    slow = self.state[p].setdefault("slow", torch.zeros_like(p))
                    slow.add_(p - slow, alpha=0.5)
                    p.copy_(slow)
            return loss

        def zero_grad(self, set_to_none=True):
            self._base_optimizer.zero_grad(set_to_none)

    return Lookahead()


def lookahead_without_hooks(base):
    """torch_optimizer's: not even the dictionaries of hooks."""
    wrapper = lookahead(base)
    del wrapper._optimizer_step_pre_hooks, wrapper._optimizer_step_post_hooks
    return wrapper


def patched_lookahead(base):
    """pytorch_optimizer's: patches the class by itself; so does unpickling in torch."""
    wrapper = lookahead(base)
    wrapper._patch_step_function()
    return wrapper


def schedule_free(base):
    """schedulefree's: no Optimizer at all, moves parameters before and after the step inside."""

    class ScheduleFreeWrapper:
        def __init__(self):
            self.base, self.k = base, 0

        param_groups = property(lambda self: self.base.param_groups)
        state = property(lambda self: self.base.state)

        def zero_grad(self, set_to_none=True):
            self.base.zero_grad(set_to_none)

        @torch.no_grad()
        def step(self, closure=None):
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            held = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
            averages = [p.clone() for p in held]
            for p in held:
                p.copy_(self.state[p].setdefault("z", p.clone()))
            self.base.step()
            self.k += 1
            for p, average in zip(held, averages, strict=True):
                self.state[p]["z"].copy_(p)
                p.copy_(average.lerp(p, 1 / self.k))
            return loss

    return ScheduleFreeWrapper()


def accumulating(base, every: int = 2):
    """Accelerate's and Colossal-AI's: the outer step does nothing but every second time."""

    class Accumulating(Optimizer):
        def __init__(self):
            self.optimizer, self.calls = base, 0

        param_groups = property(lambda self: self.optimizer.param_groups)

        def step(self, closure=None):
            self.calls += 1
            return self.optimizer.step(closure) if self.calls % every == 0 else None

        def zero_grad(self, set_to_none=True):
            if self.calls % every == 0:
                self.optimizer.zero_grad(set_to_none)

    return Accumulating()


def proxy(base):
    """Lightning's and Fabric's: its class takes the class of what it wraps for a base."""

    class Proxy:
        def __init__(self):
            self._optimizer, self._strategy = base, SimpleNamespace(precision=None)
            self.__class__ = type("LightningSGD", (Proxy, type(base)), {})

        def step(self, closure=None):
            return self._optimizer.step(closure or (lambda: None))

        def __getattr__(self, name):
            return getattr(self._optimizer, name)

    return Proxy()


def fault_tolerant(base, commits=lambda step: True):
    """torchft's: asks its manager inside step(), which may load healed weights then."""

    class Manager:
        asked = 0

        def should_commit(self):
            self.asked += 1
            return commits(self.asked - 1)

    class OptimizerWrapper(Optimizer):
        def __init__(self):
            self.optim, self.manager, self.defaults = base, Manager(), base.defaults

        param_groups = property(lambda self: self.optim.param_groups)
        state = property(lambda self: self.optim.state)

        def zero_grad(self, set_to_none=True):
            self.optim.zero_grad(set_to_none)

        def step(self, closure=None):
            if self.manager.should_commit():
                self.optim.step()

    return OptimizerWrapper()


def sharpness_aware(base, rho: float = 0.05):
    """SAM: its own step perturbs, takes gradients in the closure, and steps the base with those."""

    class SAM(Optimizer):
        def __init__(self):
            super().__init__(base.param_groups, {})
            self.base_optimizer = base
            self.param_groups = base.param_groups

        @torch.no_grad()
        def first_step(self, zero_grad=False):
            held = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
            norm = torch.stack([p.grad.norm() for p in held]).norm()
            for p in held:
                self.state[p]["old"] = p.clone()
                p.add_(p.grad * (rho / (norm + 1e-12)))
            if zero_grad:
                self.zero_grad()

        @torch.no_grad()
        def second_step(self, zero_grad=False):
            for p in (p for group in self.param_groups for p in group["params"]):
                if "old" in self.state[p]:
                    p.copy_(self.state[p]["old"])
            self.base_optimizer.step()
            if zero_grad:
                self.zero_grad()

        def step(self, closure=None):
            assert closure is not None, "SAM needs a closure"
            self.first_step(zero_grad=True)
            with torch.enable_grad():
                closure()
            self.second_step()

    return SAM()


def private(base, scale: float = 7.0):
    """Opacus': the gradients that the base takes are made inside step()."""

    class DPOptimizer(Optimizer):
        def __init__(self):
            self.original_optimizer, self.defaults = base, base.defaults

        param_groups = property(lambda self: self.original_optimizer.param_groups)
        state = property(lambda self: self.original_optimizer.state)

        def zero_grad(self, set_to_none=True):
            self.original_optimizer.zero_grad(set_to_none)

        def pre_step(self, closure=None):
            for p in (p for group in self.param_groups for p in group["params"]):
                p.grad = p.grad * scale
            return True

        def step(self, closure=None):
            if closure is not None:
                closure()
            return self.original_optimizer.step() if self.pre_step() else None

    return DPOptimizer()


def scaled(base):
    """A GradScaler and an optimizer in one."""

    class ScaledOptimizer:
        def __init__(self):
            self.inner, self.scaler = base, torch.amp.GradScaler("cpu", init_scale=1.0)

        param_groups = property(lambda self: self.inner.param_groups)

        def zero_grad(self, set_to_none=True):
            self.inner.zero_grad(set_to_none)

        def step(self):
            self.scaler.scale(torch.ones(()))
            self.scaler.step(self.inner)
            self.scaler.update()

    return ScaledOptimizer()


def together(*bases):
    """Several in a list, each with parameters of its own, as Muon beside Adam: no Optimizer.__init__."""

    class Together:
        def __init__(self):
            self.optimizers = list(bases)
            self.param_groups = [group for base in bases for group in base.param_groups]

        def step(self):
            for base in self.optimizers:
                base.step()

        def zero_grad(self, set_to_none=True):
            for base in self.optimizers:
                base.zero_grad(set_to_none)

    return Together()


class ByHand(SGD):
    """Clips by its own float64 norm just before it steps, and does nothing where that is not finite: the oracle."""

    bound = 1.0

    def step(self, closure=None):
        found = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.cat([p.grad.double().flatten() for p in found]).norm()
        if not norm.isfinite():
            return None
        for p in found:
            p.grad.mul_(min(1.0, self.bound / (norm.item() + 1e-6)))
        return super().step(closure)
