"""What `distclip inspect` says of a plan: every parameter counted once, and the messages that are really sent."""

import re
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim import SGD, AdamW, RMSprop

import distclip
from distclip.doctor import inspection, plan_table
from distclip.doctor.target import sorted_out
from distclip.ranks.connections import Channel
from support import parallel
from support.parallel import Job, by_name, whole_values
from support.ranks import run_ranks

LAYOUTS = {
    2: [parallel.fsdp1_full, parallel.fsdp1_full_flat, parallel.tp, parallel.tp_sequence, parallel.pp_gpipe],
    4: [parallel.hsdp, parallel.fsdp2_tp, parallel.pp_fsdp2, parallel.ep_named, parallel.fsdp1_tp, parallel.by_hand],
}
WATCHED = [parallel.hsdp, parallel.pp_gpipe]
MORE = "more in calls 1, 2, 4, 8, ..."


def inspections() -> list[dict]:
    """Of every layout for so many ranks: of some with norms of parameters too."""
    asked = [(layout, None) for layout in LAYOUTS[dist.get_world_size()]]
    asked += [(layout, "parameters") for layout, _ in asked if layout in WATCHED]
    return [looked_at(layout(torch.float32, 30.0), watch) for layout, watch in asked]


def looked_at(job: Job, watch: str | None) -> dict:
    """The inspection, the elements of the whole model, and the lengths of all messages of the first and third call."""
    clipper = distclip.Clipper(job.parts, 1.0, watch=watch, **job.options)
    job.backward()
    plan = inspection.inspected(clipper, [], has_gradients=True)
    first, _, third = (sent_in(clipper.clip_, job) for _ in range(3))
    whole = sum(tensor.numel() for tensor in by_name(whole_values(job)).values())
    return {"plan": plan, "whole": whole, "realigns": job.realigns, "first": first, "third": third}


def sent_in(call: Callable[[], object], job: Job) -> list[int]:
    job.backward()
    """The lengths of what this rank sends."""
    sent = []

    def noting(begin):
        return lambda self, group, words, *more: sent.append(len(words)) or begin(self, group, words, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Channel, "begin", noting(Channel.begin))
        patch.setattr(Channel, "begin_all_to_all", noting(Channel.begin_all_to_all))
        call()
    return sent


@pytest.mark.parametrize("size", [2, 4])
def test_parameters_are_counted_once_and_messages_are_as_said(size):
    for cases in zip(*run_ranks(inspections, size), strict=True):
        first = cases[0]
        lines = plan_table.lines([case["plan"] for case in cases], every=True)
        said, numbers = first["plan"]["collectives"], first["plan"]["message"]["numbers"]
        assert f" {first['whole']:,} elements, on {size} ranks" in lines[0]
        assert first["third"] == [numbers], "compares nothing"
        assert first["first"][0] == numbers
        assert len(first["first"]) == said["per call"] + said.get(MORE, 0) + first["realigns"]
        assert all(case["plan"]["message"] == first["plan"]["message"] for case in cases)


def test_stages_and_experts_say_where_they_are():
    by_rank = run_ranks(inspections, 2)
    stages = next(cases for cases in zip(*by_rank, strict=True) if cases[0]["plan"]["parameters"][0]["where"])
    groups = plan_table.groups([case["plan"] for case in stages])
    assert [group.cells(2)[7] for group in groups] == ["pp=0", "pp=1"]


DOCUMENT = (Path(__file__).parents[2] / "docs/howto/doctor.md").read_text(encoding="utf-8")


def documented() -> dict:
    """The plan of the program that the page shows."""
    namespace: dict = {}
    exec(re.search(r"^```python\n(.*?)^```", DOCUMENT, re.DOTALL | re.MULTILINE)[1], namespace)
    target = sorted_out("mine:build", namespace["build"]())
    target.backward()
    return inspection.inspected(target.clipper, target.optimizers, has_gradients=True)


def test_the_page_shows_what_is_printed():
    shown = DOCUMENT[DOCUMENT.index("    MaxNorm(") :].split("\n\nParameters")[0]
    assert textwrap.dedent(shown).splitlines() == plan_table.lines(run_ranks(documented, 2), every=False)


def lines_of(model: nn.Module, *optimizers: torch.optim.Optimizer, **options) -> list[str]:
    clipper = distclip.Clipper(model, 1.0, **options)
    return plan_table.lines([inspection.inspected(clipper, optimizers, has_gradients=False)], every=True)


def test_one_process_has_no_message_and_parameters_have_a_line_each():
    lines = lines_of(nn.Linear(3, 2))
    assert lines[0] == "MaxNorm(max_norm=1.0) on the norm of order 2 of 2 parameters, 8 elements, on 1 rank"
    assert ["weight", "2x3", "6", "float32", "plain", "1"] in [line.split() for line in lines]
    assert "message: none, in one process" in lines
    assert "collectives: 0 per call" in lines
    assert any(line.startswith("gradients: none yet") for line in lines)
    assert lines_of(nn.Linear(3, 2), norm_type=float("inf"))[0].startswith("MaxNorm(max_norm=1.0) on the largest")


def folding_of(model: nn.Module, *optimizers: torch.optim.Optimizer, **options) -> dict[str, str]:
    lines = lines_of(model, *optimizers, **options)
    at = next(k for k, line in enumerate(lines) if line.startswith("optimizer"))
    return {line.split()[0]: " ".join(line.split()[1:]) for line in lines[at + 2 :]}


def test_which_optimizers_fold_and_why_not():
    model, other = nn.Linear(3, 2, bias=False), nn.Linear(1, 1)
    found = folding_of(
        model,
        AdamW(model.parameters(), fused=True),
        SGD(model.parameters(), 0.1),
        RMSprop(model.parameters()),
        torch.optim.Adam([*model.parameters(), *other.parameters()], fused=True),
    )
    assert found == {
        "AdamW": "yes",
        "SGD": "no it is not fused: pass fused=True",
        "RMSprop": "no it is none of torch's Adam, AdamW, SGD, Adagrad",
        "Adam": "no it holds parameters that this Clipper does not clip",
    }
    elsewhere = folding_of(model, AdamW(model.parameters(), fused=True), gradients="main_grad")
    assert elsewhere == {"AdamW": "no gradients are not in .grad"}


def test_where_no_optimizer_is_given_torchs_fused_ones_are_tried():
    names = {f"{kind}(fused=True)" for kind in ("AdamW", "Adam", "SGD", "Adagrad")}
    assert folding_of(nn.Linear(3, 2)) == dict.fromkeys(names, "yes")
    assert folding_of(nn.ReLU()) == dict.fromkeys(
        names, "no optimizer got an empty parameter list"
    )  # a stage may be so
