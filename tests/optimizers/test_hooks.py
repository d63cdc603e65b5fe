"""A step that a framework calls changes nothing where it must be skipped, and the gradients come back."""

import copy
import gc
from weakref import ref

import pytest
import torch
from torch.optim import SGD, Adagrad, Adam, AdamW

from distclip.optimizers.hooks import guard, parameters_of, skip_next_step, watch, withhold
from support.ranks import same_bits

YES, NO = torch.tensor(True), torch.tensor(False)


class Nested(SGD):
    """torch runs the hooks of a step once for each class whose step() calls that of its base."""

    def step(self, closure=None):
        loss = super().step(closure)
        for parameter in parameters_of(self):  # what a decay of its own does
            if parameter.grad is not None:
                parameter.data.add_(parameter.grad)
        return loss


def net_and(kind=SGD, **options):
    model = torch.nn.Linear(3, 2)
    return model, kind(model.parameters(), lr=0.1, **options)


def backward(model) -> None:
    model(torch.ones(4, 3)).square().sum().backward()


def changed(model, optimizer, *args) -> bool:
    before = copy.deepcopy(model.state_dict())
    optimizer.step(*args)
    return not same_bits([before, model.state_dict()])


def test_one_step_is_skipped_and_no_more():
    model, optimizer = net_and(momentum=0.9)
    backward(model)
    gradient = model.weight.grad
    skip_next_step([optimizer], YES)
    assert not changed(model, optimizer)
    assert model.weight.grad is gradient
    assert not optimizer.state
    assert changed(model, optimizer)
    for skip in (NO, YES, YES, NO):
        skip_next_step([optimizer], skip)
        assert changed(model, optimizer) == (not skip)


def test_nothing_is_installed_where_nothing_is_skipped():
    _, optimizer = net_and()
    skip_next_step([optimizer], NO)
    assert "step" not in vars(optimizer)


def test_from_inside_the_closure():
    model, optimizer = net_and()

    def closure():
        optimizer.zero_grad()
        backward(model)
        skip_next_step([optimizer], YES)
        return 7.0

    before = copy.deepcopy(model.state_dict())
    assert optimizer.step(closure) == 7.0
    assert same_bits([before, model.state_dict()])
    assert model.weight.grad is not None
    assert changed(model, optimizer)


def test_a_step_that_never_came_is_forgotten():
    model, optimizer = net_and()
    backward(model)
    skip_next_step([optimizer], YES)
    backward(model)  # the framework gave up, and starts anew
    fresh = model.weight.grad
    skip_next_step([optimizer], NO)
    assert changed(model, optimizer)
    assert model.weight.grad is fresh


def test_a_flag_of_a_step_that_never_came_is_taken_back():
    model, optimizer = net_and(Adam, fused=True)
    backward(model)
    skip_next_step([optimizer], YES, on_device=True)
    skip_next_step([optimizer], NO, on_device=True)
    assert changed(model, optimizer)
    assert "found_inf" not in vars(optimizer)


def test_a_gradient_made_meanwhile_is_kept():
    model, optimizer = net_and()
    backward(model)
    give_back = withhold(parameters_of(optimizer))
    assert model.weight.grad is model.bias.grad is None
    model.weight.grad = other = torch.ones(2, 3)
    give_back()
    assert model.weight.grad is other
    assert model.bias.grad is not None


@pytest.mark.parametrize("kind", [Adam, AdamW, Adagrad, SGD])
@pytest.mark.parametrize("skip", [YES, NO])
def test_fused_optimizers_are_told_on_the_device(kind, skip):
    model, optimizer = net_and(kind, fused=True)
    backward(model)
    skip_next_step([optimizer], skip, on_device=True)
    assert model.weight.grad is not None
    assert vars(optimizer)["found_inf"].item() == float(skip)
    assert changed(model, optimizer) == (not skip)
    assert "found_inf" not in vars(optimizer)
    assert changed(model, optimizer)


def test_a_fused_optimizer_that_heeds_no_found_inf_is_not_left_to_it():
    """The flag was set, and the step made all the same."""
    model, optimizer = net_and(Adagrad, fused=True)
    optimizer._step_supports_amp_scaling = False
    backward(model)
    skip_next_step([optimizer], YES, on_device=True)
    assert "found_inf" not in vars(optimizer)
    assert not changed(model, optimizer)
    assert changed(model, optimizer)


def test_an_exception_ends_the_step_too():
    class Failing(SGD):
        def step(self, closure=None):
            closure()
            raise OSError("disk")

    model, optimizer = net_and(Failing)
    watch(optimizer)
    backward(model)
    with pytest.raises(OSError, match="disk"):
        optimizer.step(lambda: skip_next_step([optimizer], YES))
    assert model.weight.grad is not None


def test_a_guard_hears_of_every_end_and_can_be_removed():
    model, optimizer = net_and()
    ends = []
    remove = guard(optimizer, ends.append)
    backward(model)
    optimizer.step()
    type(optimizer).step(optimizer)  # past the instance: torch's hook is left
    assert set(map(id, ends)) == {id(optimizer)}
    assert len(ends) == 2
    remove()
    optimizer.step()
    assert len(ends) == 2
    assert "step" not in vars(optimizer)


def test_optimizers_are_not_kept_alive():
    _, optimizer = net_and()
    skip_next_step([optimizer], YES)
    optimizer.step()
    alive = ref(optimizer)
    del optimizer
    gc.collect()
    assert alive() is None


def test_a_guard_forgets_whom_it_told_where_a_scheduler_has_wrapped_the_step_since():
    class Told:
        def over(self, optimizer):
            raise AssertionError

    _, optimizer = net_and()
    told = Told()
    alive, remove = ref(told), guard(optimizer, told.over)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    remove()
    del told
    gc.collect()
    assert alive() is None
    optimizer.step()


@pytest.mark.parametrize(("watched", "where"), [(False, "before"), (True, "before"), (True, "closure")])
def test_a_step_that_calls_the_step_of_its_base_is_skipped_to_its_end(watched, where):
    SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)  # makes the hooks of the base class run as well
    model, optimizer = net_and(Nested)
    if watched:
        watch(optimizer)
    backward(model)
    gradient = model.weight.grad
    if where == "before":
        skip_next_step([optimizer], YES)
        assert not changed(model, optimizer)
    else:
        assert not changed(model, optimizer, lambda: skip_next_step([optimizer], YES))
    assert model.weight.grad is gradient
    assert changed(model, optimizer)


def test_a_guard_hears_of_a_step_that_calls_the_step_of_its_base_once():
    SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    model, optimizer = net_and(Nested)
    heard = []
    guard(optimizer, lambda _: heard.append("over"), lambda *_: heard.append("begin"))
    backward(model)
    optimizer.step()
    optimizer.step()
    assert heard == ["begin", "over"] * 2


@pytest.mark.parametrize("watched", [False, True])
def test_a_parameter_in_two_optimizers_is_skipped_by_both(watched):
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizers = [SGD([weight], lr=1.0) for _ in range(2)]
    if watched:
        list(map(watch, optimizers))
    weight.grad = gradient = torch.ones(1)
    skip_next_step(optimizers, YES)
    for optimizer in optimizers:
        optimizer.step()
        assert weight.grad is gradient
    assert weight.item() == 0.0
    optimizers[0].step()
    assert weight.item() == -1.0


def test_gradients_stay_until_the_step_that_is_watched_begins():
    model, optimizer = net_and()
    watch(optimizer)
    backward(model)
    skip_next_step([optimizer], YES)
    assert model.weight.grad is not None
    assert not changed(model, optimizer)
    assert model.weight.grad is not None
    assert changed(model, optimizer)
