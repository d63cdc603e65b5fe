"""distclip.integrations.transformers: Trainer on two ranks beside one process that is clipped by hand."""

import os
import re
import warnings
from functools import cache
from importlib.util import find_spec
from math import nan

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

import distclip
from distclip import AutoClip, MaxNorm, ValueClip
from integrations.launches import once
from support.layouts import ROWS, batch, build
from support.own_policy import OwnGate, OwnRunningMean
from support.ranks import run_ranks, same_bits

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers", reason="needs the extra: pip install 'distclip[transformers]'")
pytest.importorskip("accelerate", reason="Trainer needs accelerate: pip install 'distclip[transformers]'")

from transformers import Trainer, TrainerCallback, TrainingArguments  # noqa: E402

from distclip.integrations.transformers import FILE, take_over  # noqa: E402

STEPS = 12
BOUND = 1.25  # between the norms of the run
BAD = 5  # the step whose targets are NaN on rank 1
POLICIES = {
    "max_norm": MaxNorm(BOUND),
    "autoclip": AutoClip(50),
    "value": ValueClip(0.05),
    "by unit": OwnRunningMean(),
}


class Model(nn.Module):
    """What Trainer calls: keywords in, a dictionary with the loss out. One parameter is frozen and quantized."""

    def __init__(self):
        super().__init__()
        self.net = build()
        self.quantized = nn.Parameter(torch.arange(5, dtype=torch.uint8), requires_grad=False)

    def forward(self, words, labels):
        outputs = self.net(words)
        return {"loss": (outputs - labels).square().mean(), "logits": outputs}


def adamw(model):
    return AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, eps=1e-4, weight_decay=0.0)


def rows(batches, bad=None):
    """The rows of these global batches, in their order; Trainer gives the first half of each batch to rank 0."""
    found = []
    for step in range(batches):
        words, targets = batch(step)
        if step == bad:
            targets[ROWS // 2 :] = nan
        found += [{"words": w, "labels": t} for w, t in zip(words, targets, strict=True)]
    return found


@cache
def alone(policy, accumulated=1, bad=None):
    """Norms, number of steps taken and parameters of one process; MaxNorm and ValueClip by their definitions."""
    model = build()
    optimizer = adamw(model)
    clipper = distclip.Clipper(model, POLICIES[policy])
    data = rows(STEPS * accumulated, bad)
    norms, taken = [], 0
    for step in range(STEPS):
        for micro in range(accumulated):
            start = (step * accumulated + micro) * ROWS
            words, targets = (torch.stack([row[k] for row in data[start : start + ROWS]]) for k in ("words", "labels"))
            ((model(words) - targets).square().mean() / accumulated).backward()
        norm = torch.cat([p.grad.flatten().double() for p in model.parameters()]).norm()
        for p in model.parameters():
            if policy == "max_norm":
                p.grad.mul_(min(1.0, BOUND / (norm.item() + 1e-6)))
            elif policy == "value":
                p.grad.clamp_(-0.05, 0.05)
        if policy in ("autoclip", "by unit"):
            clipper.clip_()
        if norm.isfinite():
            optimizer.step()
            taken += 1
        optimizer.zero_grad()
        norms.append(norm.item())
    return norms, taken, [p.detach() for p in model.parameters()]


# ---- two ranks -----------------------------------------------------------------------------------------------


def trainer_in(folder, accumulated=1, bad=None, kind=Trainer, **arguments):
    """A Trainer in the group of `run_ranks`."""
    rank, size = str(dist.get_rank()), str(dist.get_world_size())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    settings = {
        "output_dir": folder,
        "use_cpu": True,
        "ddp_backend": "gloo",
        "per_device_train_batch_size": ROWS // 2,
        "gradient_accumulation_steps": accumulated,
        "train_sampling_strategy": "sequential",
        "max_steps": STEPS,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    model = Model()
    optimizer = adamw(model)
    return kind(
        model,
        TrainingArguments(**settings | arguments),
        train_dataset=rows(STEPS * accumulated, bad),
        optimizers=(optimizer, LambdaLR(optimizer, lambda _: 1.0)),
    )


def logged(trainer):
    return [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]


def train(folder, policy, accumulated=1, bad=None, **arguments):
    trainer = trainer_in(folder, accumulated, bad, **arguments)
    take_over(trainer, POLICIES[policy])
    trainer.train()
    parameters = [p.detach().clone() for p in trainer.model.net.parameters()]
    return logged(trainer), trainer.lr_scheduler.last_epoch, parameters


def resume(folder):
    """The norms and bounds after a checkpoint, in the run that made it and in one that starts from it."""

    def go(resume_from):
        trainer = trainer_in(folder, bad=BAD, save_strategy="steps", save_steps=8)
        clipping = take_over(trainer, AutoClip(50), max_consecutive_skips=3)
        trainer.train(resume_from_checkpoint=resume_from)
        state = clipping.clipper.state_dict()
        return logged(trainer)[8:], clipping.clipper.report.to_dict(), state["policy"]["norms"][-13:], state["steps"]

    whole = go(None)
    names = sorted(os.listdir(os.path.join(folder, "checkpoint-8")))
    again = go(os.path.join(folder, "checkpoint-8"))
    dist.barrier()
    if dist.get_rank() == 0:
        os.remove(os.path.join(folder, "checkpoint-8", FILE))
    dist.barrier()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        anew = go(os.path.join(folder, "checkpoint-8"))
    return whole, again, names, anew, [str(w.message) for w in caught if FILE in str(w.message)]


def damaged(folder):
    """The errors of resuming from files that are no state of this policy, each with the same Trainer's next train()."""
    trainer_of = lambda: trainer_in(folder, max_steps=2, save_strategy="steps", save_steps=1)  # noqa: E731
    first = trainer_of()
    take_over(first, AutoClip(50, window=8))
    first.train()
    checkpoint = os.path.join(folder, "checkpoint-1")
    with open(os.path.join(checkpoint, FILE), "rb") as stream:
        state = stream.read()
    found = {}
    for name, content in {
        "empty": b"",
        "cut": state[: len(state) // 2],
        "cut at its end": state[:-30],
        "garbled": b"garbage" * 100,
        "garbled inside": state[:200] + bytes(200) + state[400:],
        "another window": state,
    }.items():
        dist.barrier()
        if dist.get_rank() == 0:
            with open(os.path.join(checkpoint, FILE), "wb") as stream:
                stream.write(content)
        dist.barrier()
        trainer = trainer_of()
        clipping = take_over(trainer, AutoClip(50, window=4))
        try:
            trainer.train(resume_from_checkpoint=checkpoint)
        except ValueError as error:
            found[name] = str(error)
        trainer.args.save_strategy = "no"
        trainer.train()
        found[f"{name}, then"] = clipping.clipper.state_dict()["steps"]
    return found


class OwnLoop(Trainer):
    """Steps without asking for the norm, but for the first time."""

    def _run_epoch(self, model, train_dataloader, **_):
        for step, inputs in enumerate(train_dataloader):
            self.accelerator.backward(model(**inputs)["loss"])
            if step == 0:
                self._get_grad_norm(model)
            if step == 2:
                self.control.should_training_stop = True
            self.optimizer.step()
            self.control = self.callback_handler.on_step_end(self.args, self.state, self.control)


class SetsMaxNorm(TrainerCallback):
    def on_step_end(self, args, *_, **__):
        args.max_grad_norm = 1.0


def errors(folder):
    found = {}

    def note(name, call):
        try:
            call()
        except (ValueError, RuntimeError) as error:
            found[name] = f"{type(error).__name__}: {error}"

    note("two owners", lambda: take_over(trainer_in(folder, max_grad_norm=1.0), 1.0))
    note("layerwise", lambda: take_over(trainer_in(folder, optim="galore_adamw_layerwise"), 1.0))
    trainer = trainer_in(folder, max_steps=2)
    note("signals", lambda: take_over(trainer, OwnGate()))
    clipping = take_over(trainer, 1.0)
    note("twice", lambda: take_over(trainer, 1.0))
    trainer.train()
    note("clip_", clipping.clipper.clip_)
    trainer.args.max_grad_norm = 1.0
    note("two owners later", trainer.train)
    trainer.args.max_grad_norm = 0.0
    first = clipping.clipper
    meanwhile = trainer_in(folder)
    take_over(meanwhile, 1.0)
    meanwhile.add_callback(SetsMaxNorm())
    note("two owners meanwhile", meanwhile.train)
    trainer.train()  # a second training, whose model is wrapped already
    found["trained again"] = clipping.clipper is not first and clipping.clipper.state_dict()["steps"] == 2
    removed = trainer_in(folder)
    removed.remove_callback(take_over(removed, 1.0))
    note("removed", removed.train)
    removed = trainer_in(folder, max_steps=2)
    clipping = take_over(removed, 1.0)
    removed.train()
    removed.remove_callback(clipping)
    removed.model = removed.model_wrapped = Model()
    note("removed later", removed.train)
    own = trainer_in(folder, kind=OwnLoop)
    take_over(own, 1.0)
    note("own loop", own.train)
    note("no deepspeed", lambda: take_over(trainer_in(folder), 1.0, deepspeed=print))
    trainer.is_deepspeed_enabled = True
    trainer._get_grad_norm = None
    note("deepspeed", lambda: take_over(trainer, 1.0))
    return found


def everything(folder):
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    return {
        "runs": {policy: train(folder, policy) for policy in POLICIES},
        "accumulated": {policy: train(folder, policy, accumulated=2) for policy in ("max_norm", "autoclip")},
        "bad": train(folder, "autoclip", bad=BAD),
        "bf16": train(folder, "max_norm", bf16=True)[0],
        "compiled": train(folder, "max_norm", torch_compile=True, torch_compile_backend="eager"),
        "resumed": resume(folder),
        "damaged": damaged(os.path.join(folder, "damaged")),
        "errors": errors(folder),
        # last: it patches torch
        "deepspeed": with_deepspeed(os.path.join(folder, "deepspeed")) if find_spec("deepspeed") else None,
    }


def with_deepspeed(folder):
    """A run that saves, and one that starts from its checkpoint: DeepSpeed's integration, the norm in Trainer's log."""
    warnings.simplefilter("ignore")
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    from distclip.integrations import deepspeed as ours

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    config = {"train_micro_batch_size_per_gpu": ROWS // 2, "gradient_clipping": 0.0, "zero_optimization": {"stage": 2}}
    same = {"learning_rate": 1e-3, "adam_epsilon": 1e-4, "lr_scheduler_type": "constant"}  # as adamw()
    saved = {"save_strategy": "steps", "save_steps": 8}

    def go(resume_from):
        trainer = trainer_in(folder, bad=BAD, deepspeed=config, **same, **saved)
        clipping = take_over(trainer, AutoClip(50), deepspeed=ours.take_over)
        trainer.train(resume_from_checkpoint=resume_from)
        parameters = [p.detach().clone() for p in trainer.model.net.parameters()]
        run = logged(trainer), trainer.lr_scheduler.last_epoch, parameters
        return run, clipping.clipper.report.to_dict(), clipping.clipper.state_dict()

    return go(None), go(os.path.join(folder, "checkpoint-8"))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("trainer"))
    return once(tmp_path_factory, "transformers", lambda: run_ranks(everything, 2, folder, fresh=True))


def agrees(results, expected):
    """Two ranks gave the same bits, and those of one process within what fp32 can."""
    assert same_bits(results)
    (norms, taken, parameters), (expected_norms, expected_taken, expected_parameters) = results[0], expected
    assert norms == pytest.approx(expected_norms, rel=1e-6, nan_ok=True)
    assert taken == expected_taken
    for mine, theirs in zip(parameters, expected_parameters, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("policy", POLICIES)
def test_training_and_its_log_are_those_of_one_process(ranks, policy):
    agrees([each["runs"][policy] for each in ranks], alone(policy))
    norms = alone(policy)[0]
    assert min(norms) < BOUND < max(norms)


@pytest.mark.parametrize("policy", ["max_norm", "autoclip"])
def test_accumulated_gradients_are_clipped_once(ranks, policy):
    agrees([each["accumulated"][policy] for each in ranks], alone(policy, 2))


def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all_and_by_the_schedule(ranks):
    agrees([each["bad"] for each in ranks], alone("autoclip", bad=BAD))
    assert alone("autoclip", bad=BAD)[1] == STEPS - 1


def test_with_deepspeed_its_own_take_over_does_the_same_and_a_policy_is_resumed(ranks):
    pytest.importorskip("deepspeed", reason="needs the extra: pip install 'distclip[deepspeed]'")
    results = [each["deepspeed"] for each in ranks]
    agrees([whole[0] for whole, _ in results], alone("autoclip", bad=BAD))
    for (run, report, state), (resumed, report_then, state_then) in results:
        assert resumed[0][-4:] == run[0][-4:]
        assert report_then == report, "the bound is that of a policy that knows all norms"
        assert same_bits([state_then, state])


def test_a_compiled_model_and_bf16(ranks):
    agrees([each["compiled"] for each in ranks], alone("max_norm"))
    for each in ranks:
        assert each["bf16"] == pytest.approx(alone("max_norm")[0], rel=5e-3)


def test_a_resumed_run_decides_as_the_one_that_went_on(ranks):
    assert same_bits([each["resumed"][1] for each in ranks])
    for each in ranks:
        went_on, resumed, files, anew, warned = each["resumed"]
        assert FILE in files
        assert same_bits([resumed, went_on])
        assert anew[1]["max_norm"] != went_on[1]["max_norm"], "the state before makes no difference here"
        assert len(warned) == 1
        assert "the clipping policy starts anew" in warned[0]


def test_a_resume_that_fails_names_the_file_and_is_forgotten(ranks):
    for each in ranks:
        found = each["damaged"]
        assert [found.pop(name) for name in list(found) if name.endswith(", then")] == [2] * 6
        assert len(found) == 6
        assert re.match(r".*checkpoint-1.distclip\.pt does not fit: policy state norms .*", found.pop("another window"))
        for error in found.values():
            assert re.match(r".*checkpoint-1.distclip\.pt is cut or garbled: .* or delete the file", error)


def test_a_second_training_starts_anew(ranks):
    assert all(each["errors"]["trained again"] for each in ranks)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("two owners", r"ValueError: TrainingArguments.max_grad_norm=1.0 .* pass max_grad_norm=0.0"),
        ("two owners later", r"ValueError: TrainingArguments.max_grad_norm=1.0 .* pass max_grad_norm=0.0"),
        ("two owners meanwhile", r"ValueError: TrainingArguments.max_grad_norm=1.0 .* pass max_grad_norm=0.0"),
        (
            "signals",
            "ValueError: OwnGate asks for the signals loss, tokens, .* where .*Trainer clips",
        ),
        ("twice", r"ValueError: .* call take_over\(\) once"),
        ("layerwise", "ValueError: optim=galore_adamw_layerwise steps inside the backward"),
        ("clip_", "RuntimeError: Trainer clips with this Clipper already"),
        ("removed", "RuntimeError: the callback of distclip was removed"),
        ("removed later", "RuntimeError: the callback of distclip was removed"),
        ("own loop", "RuntimeError: OwnLoop has a loop of its own, .* use distclip.attach in it"),
        (
            "deepspeed",
            r"ValueError: DeepSpeed .* deepspeed=distclip.integrations.deepspeed.take_over\)",
        ),
        ("no deepspeed", "ValueError: this Trainer has no DeepSpeed: leave deepspeed= out"),
    ],
)
def test_what_raises(ranks, case, message):
    for each in ranks:
        assert re.match(message, each["errors"][case])
