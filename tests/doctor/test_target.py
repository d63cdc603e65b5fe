"""What `--model` names, and what it returns: taken apart by type, or refused in one line."""

import pytest
import torch
from torch import nn

import distclip
from distclip.doctor.finding import Unusable
from distclip.doctor.target import called, imported, sorted_out


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nowhere:build", r"nowhere cannot be imported \(ModuleNotFoundError: No module named 'nowhere'\)"),
        ("broken:build", r"broken cannot be imported \(ZeroDivisionError: division by zero\)"),
        ("torn:build", r"torn cannot be imported \(SyntaxError"),
        ("doctor.mine:lost", "doctor.mine has no lost"),
        ("doctor.mine:nothing", "doctor.mine:nothing is NoneType, not a function that builds the model"),
        ("doctor.mine:layers.lost", "doctor.mine has no layers.lost"),
    ],
)
def test_a_name_that_is_no_function_is_refused(name, said, monkeypatch, tmp_path):
    (tmp_path / "broken").with_suffix(".py").write_text("1 / 0")
    (tmp_path / "torn").with_suffix(".py").write_text("def build(:")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Unusable, match=f"^--model: {said}"):
        imported(name)


def test_modules_of_the_current_folder_can_be_imported(monkeypatch, tmp_path):
    (tmp_path / "of_this_folder").with_suffix(".py").write_text("def build(): return 7")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["/nowhere"])
    assert imported("of_this_folder:build")() == 7


def model() -> nn.Module:
    return nn.Linear(2, 1)


def test_a_model_alone_gets_a_clipper():
    target = sorted_out("mine:build", model())
    assert len(target.clipper.engine.plan.pieces) == 2
    assert (list(target.optimizers), target.backward) == ([], None)


def test_parts_optimizers_and_backward_are_told_apart_in_any_order():
    parts = [model(), model()]
    optimizer = torch.optim.SGD(parts[0].parameters(), 0.1)
    target = sorted_out("mine:build", (print, parts, optimizer))
    assert len(target.clipper.engine.plan.pieces) == 4
    assert (list(target.optimizers), target.backward) == ([optimizer], print)


def test_a_module_that_is_a_sequence_is_one_module():
    target = sorted_out("mine:build", nn.ModuleList([model(), model()]))
    assert [piece.name for piece in target.clipper.engine.plan.pieces] == ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_a_clipper_of_the_users_is_kept():
    clipper = distclip.Clipper(model(), distclip.AutoClip())
    assert sorted_out("mine:build", (clipper, print)).clipper is clipper


@pytest.mark.parametrize("returned", [3, None, (), print, (print, print), "a", (model(), 3), (model(), print, len)])
def test_what_is_no_model_is_refused(returned):
    with pytest.raises(Unusable, match=r"^--model: mine:build\(\) returned \w+, not a module"):
        sorted_out("mine:build", returned)


def test_an_error_of_the_users_says_where():
    def build():
        raise KeyError("batch")

    with pytest.raises(RuntimeError, match=r"^mine:build\(\) of --model raised KeyError: 'batch' at .*test_target.py:"):
        called(build, "mine:build()")
    with pytest.raises(KeyboardInterrupt):
        called(interrupt, "mine:build()")


def interrupt():
    raise KeyboardInterrupt
