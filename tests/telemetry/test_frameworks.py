"""The same numbers where a framework logs: Trainer's log, Accelerate's trackers, Fabric's loggers, on two ranks.

Lightning's loggers are in tests/integrations/test_lightning.py.
"""

import warnings
from contextlib import suppress
from math import isnan, nan
from typing import Any

import pytest
import torch
import torch.distributed as dist

from distclip.telemetry import Log
from integrations.launches import once
from support.ranks import run_ranks

BAD = 5  # the step, from 0, whose gradients are NaN
WHOLE = {"grad_norm/pre_clip", "grad_norm/post_clip", "clip/coef", "clip/max_norm", "clip/clipped", "clip/skipped"}
SINCE = {"clip/fraction", "grad_norm/max"}


def entries(log: list[dict[str, Any]]) -> list[tuple[int, dict[str, float]]]:
    return [(entry["step"], entry) for entry in log if "grad_norm/pre_clip" in entry]


def agrees(entries: list[tuple[int, dict[str, float]]]) -> None:
    """A record every 4 steps of 12, and one of the bad step between two of them."""
    assert [step for step, _ in entries] == [4, 6, 8, 12]
    for step, numbers in entries:
        assert set(numbers) >= (WHOLE if step == 6 else WHOLE | SINCE)
        assert numbers["clip/skipped"] == isnan(numbers["grad_norm/pre_clip"]) == (step == 6)
    assert "clip/fraction" not in entries[1][1]
    assert entries[2][1]["clip/fraction"] in (0.0, 0.25, 0.5, 0.75)  # of four steps, one of them skipped
    assert 0 < max(numbers["clip/fraction"] for step, numbers in entries if step != 6) <= 1


def in_a_trainer(folder: str) -> tuple[list[dict[str, Any]], list[tuple[int, float]], int]:
    from transformers import TrainerCallback

    from distclip.integrations.transformers import take_over
    from integrations.test_transformers import BOUND, trainer_in

    class Tracker(TrainerCallback):
        def __init__(self) -> None:
            self.seen: list[tuple[int, float]] = []

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            if "clip/coef" in logs:
                self.seen.append((state.global_step, logs["grad_norm/pre_clip"]))

    warnings.simplefilter("ignore")
    trainer, tracker = trainer_in(folder, bad=BAD, logging_steps=4), Tracker()
    take_over(trainer, BOUND, watch="parameters")
    trainer.add_callback(tracker)
    trainer.train()
    return trainer.state.log_history, tracker.seen, trainer.state.global_step


def in_trainers(folder: str) -> tuple[Any, Any]:
    return in_a_trainer(folder), at_the_end_of_a_trainer(folder)


@pytest.fixture(scope="module")
def trainers(tmp_path_factory) -> list[tuple[Any, Any]]:
    pytest.importorskip("transformers")
    folder = str(tmp_path_factory.mktemp("trainers"))
    return once(tmp_path_factory, "telemetry", lambda: run_ranks(in_trainers, 2, folder, fresh=True))


def test_trainer_logs_the_numbers_with_its_own_and_bad_steps_between(trainers):
    for (history, seen, steps), _ in trainers:
        found = entries(history)
        agrees(found)
        assert steps == 12
        assert [step for step, _ in seen] == [4, 6, 8, 12]
        for step, numbers in found:
            assert ("loss" in numbers) == (step != 6)
            if step != 6:
                assert numbers["grad_norm"] == numbers["grad_norm/pre_clip"]
        layers = {key for key, number in found[1][1].items() if key.startswith("grad_norm/layer/") and isnan(number)}
        assert len(layers) == 15  # all that are trained


def at_the_end_of_a_trainer(folder: str) -> list[list[tuple[int, bool]]]:
    """Steps and whether they were skipped, of a run whose bad step is after the last log, and of one that fails."""
    from distclip import NonFiniteError
    from distclip.integrations.transformers import take_over
    from integrations.test_transformers import BOUND, ROWS, trainer_in

    warnings.simplefilter("ignore")
    ends = trainer_in(folder, bad=10, logging_steps=8)
    take_over(ends, BOUND)
    ends.train()
    fails = trainer_in(folder, logging_steps=8)
    take_over(fails, BOUND, max_consecutive_skips=2)
    for row in fails.train_dataset[8 * ROWS :]:
        row["labels"] = row["labels"] * nan
    with suppress(NonFiniteError):
        fails.train()
    assert fails.state.global_step == 10
    logs = [entries(trainer.state.log_history) for trainer in (ends, fails)]
    return [[(step, bool(numbers["clip/skipped"])) for step, numbers in log] for log in logs]


def test_bad_steps_after_the_last_log_of_trainer_are_not_lost(trainers):
    for _, (ended, failed) in trainers:
        assert ended == [(8, False), (11, True)]
        assert failed == [(8, False), (9, True), (10, True)]


def at_the_end_of_lightning() -> list[list[tuple[int, bool]]]:
    from distclip import NonFiniteError
    from integrations.lightning_runs import Case, Kept, Lit, fit, quiet

    class Breaks(Lit):
        def training_step(self, rows: Any, batch_idx: int) -> torch.Tensor:
            loss: torch.Tensor = super().training_step(rows, batch_idx)
            return loss * nan if batch_idx >= 8 else loss

    quiet()
    ends, fails = Case("single", bad=10), Case("single", options={"max_consecutive_skips": 2})
    found = []
    for module in (Lit(ends), Breaks(fails)):
        logger = Kept()
        with suppress(NonFiniteError):
            fit(module.case, module, logger=logger, log_every_n_steps=8)
        found.append([(step, bool(numbers["clip/skipped"])) for step, numbers in logger.metrics])
    return found


def test_bad_steps_after_the_last_log_of_lightning_are_not_lost():
    pytest.importorskip("lightning")
    ((ended, failed),) = run_ranks(at_the_end_of_lightning, 1, fresh=True)
    assert ended == [(7, False), (10, True)]  # counted from 0, as Lightning does
    assert failed == [(7, False), (8, True), (9, True)]


def in_accelerate() -> list[tuple[int, dict[str, float]]]:
    from accelerate.tracking import GeneralTracker

    from integrations.test_accelerate import BOUND, ddp, loss_of

    class Tracker(GeneralTracker):
        name, requires_logging_directory = "kept", False

        def __init__(self) -> None:
            super().__init__()
            self.seen: list[tuple[int, dict[str, float]]] = []

        @property
        def tracker(self) -> None: ...

        def store_init_configuration(self, values: Any) -> None: ...

        def log(self, values: dict[str, float], step: int | None, **_: Any) -> None:
            self.seen.append((step, values))

    warnings.simplefilter("ignore")
    tracker = Tracker()
    accelerator, model, optimizer = ddp(log_with=[tracker])
    accelerator.init_trackers("distclip")
    clipper = accelerator.clipper(model, BOUND)
    with Log(clipper, accelerator.log, every=4):
        for step in range(12):
            accelerator.backward(loss_of(model, step, dist.get_rank(), 2, BAD))
            clipper.clip_()
            optimizer.step()
            optimizer.zero_grad()
    return tracker.seen


def test_accelerate_takes_its_log_for_a_sink():
    pytest.importorskip("accelerate")
    first, second = run_ranks(in_accelerate, 2, fresh=True)
    agrees(first)
    assert second == []


def in_fabric() -> list[tuple[int, dict[str, float]]]:
    from lightning.fabric import Fabric

    from distclip.integrations.lightning import FabricClipper
    from integrations.lightning_runs import Kept, quiet

    quiet()
    logger = Kept()
    fabric = Fabric(accelerator="cpu", devices=1, loggers=[logger])
    net = torch.nn.Linear(4, 1)
    model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.01))
    clipper = FabricClipper(fabric, model, 1.0)
    with Log(clipper, fabric.log_dict, every=4):
        for step in range(12):
            fabric.backward(model(torch.ones(2, 4) * (nan if step == BAD else 1.0)).square().mean())
            clipper.step(optimizer)
            optimizer.zero_grad()
    return logger.metrics


def test_fabric_takes_its_log_dict_for_a_sink():
    pytest.importorskip("lightning")
    (found,) = run_ranks(in_fabric, 1, fresh=True)
    agrees(found)
