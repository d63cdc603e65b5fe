"""A step that a framework calls changes nothing where it must be skipped, and the gradients come back."""

import copy
import gc
from weakref import ref

import pytest
import torch
from torch.optim import SGD, Adagrad, Adam, AdamW

from distclip.stepping import guard, skip_next_step, withhold
from ranks import same_bits

YES, NO = torch.tensor(True), torch.tensor(False)


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


def test_a_flag_of_a_step_that_never_came_is_taken_back(monkeypatch):
    monkeypatch.setattr("distclip.stepping.reads_are_free", lambda device: False)
    model, optimizer = net_and(Adam, fused=True)
    backward(model)
    skip_next_step([optimizer], YES)
    skip_next_step([optimizer], NO)
    assert changed(model, optimizer)
    assert "found_inf" not in vars(optimizer)


def test_a_gradient_made_meanwhile_is_kept():
    model, optimizer = net_and()
    backward(model)
    give_back = withhold(optimizer)
    assert model.weight.grad is model.bias.grad is None
    model.weight.grad = other = torch.ones(2, 3)
    give_back()
    assert model.weight.grad is other
    assert model.bias.grad is not None


@pytest.mark.parametrize("kind", [Adam, AdamW, Adagrad, SGD])
@pytest.mark.parametrize("skip", [YES, NO])
def test_fused_optimizers_are_told_on_the_device(kind, skip, monkeypatch):
    monkeypatch.setattr("distclip.stepping.reads_are_free", lambda device: False)
    model, optimizer = net_and(kind, fused=True)
    backward(model)
    skip_next_step([optimizer], skip)
    assert model.weight.grad is not None
    assert vars(optimizer)["found_inf"].item() == float(skip)
    assert changed(model, optimizer) == (not skip)
    assert "found_inf" not in vars(optimizer)
    assert changed(model, optimizer)


def test_an_exception_ends_the_step_too():
    class Failing(SGD):
        def step(self, closure=None):
            raise OSError("disk")

    model, optimizer = net_and(Failing)
    backward(model)
    skip_next_step([optimizer], YES)
    with pytest.raises(OSError, match="disk"):
        optimizer.step()
    assert model.weight.grad is not None


def test_a_guard_hears_of_every_end_and_can_be_removed():
    model, optimizer = net_and()
    ends = []
    remove = guard(optimizer, ends.append)
    backward(model)
    optimizer.step()
    type(optimizer).step(optimizer)  # past the instance: torch's hook is left
    assert set(map(id, ends)) == {id(optimizer)}
    assert len(ends) == 3
    remove()
    optimizer.step()
    assert len(ends) == 3
    assert "step" not in vars(optimizer)


def test_optimizers_are_not_kept_alive():
    _, optimizer = net_and()
    skip_next_step([optimizer], YES)
    optimizer.step()
    alive = ref(optimizer)
    del optimizer
    gc.collect()
    assert alive() is None
