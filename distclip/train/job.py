"""A whole run on one rank: load, build, start or resume, train, end."""

import json
import time
from contextlib import nullcontext
from signal import Signals
from typing import Any

import torch
import torch.distributed as dist

from distclip import find_source
from distclip.ranks.lost_ranks import Presence
from distclip.telemetry.json_lines import spelled
from distclip.train import checkpoint
from distclip.train.axes import Axes
from distclip.train.begun import say_begun
from distclip.train.clip import check_clip, scales
from distclip.train.config import Config
from distclip.train.dataset import Batches, Dataset
from distclip.train.folder import RunFolder, check_folder, open_folder
from distclip.train.metrics import MetricsFile, read_until
from distclip.train.page import page_of
from distclip.train.parallel import spread
from distclip.train.place import Place, check_device, join, limit_waits
from distclip.train.problem import require
from distclip.train.progress import Display, Screen, Tally
from distclip.train.resuming import command_to_resume
from distclip.train.stop import StopSignals, exit_code
from distclip.train.tasks.registry import TASKS
from distclip.train.trainer import Trainer
from distclip.train.ways.zero import check_installed


def check(config: Config, world: int) -> Dataset:
    """Check all that can be wrong before ranks meet; returns the data that it had to read.

    Raises:
        ConfigError: one line with the key to change.
    """
    axes = Axes.of(config.parallel, world)
    check_device(config.parallel, world)
    check_installed(config)
    check_folder(config)
    dataset = TASKS[config.task].load(config.data, config.seed)
    batches_of(config, dataset, axes)
    with torch.device("meta"):
        model = TASKS[config.task].build(config.model, dataset)
    check_clip(config, [name for name, _ in model.named_parameters()])
    return dataset


def run_rank(config: Config, world: int, stop: StopSignals) -> int:
    """Train as one of the `world` ranks of a launcher. Returns the exit code."""
    dataset = check(config, world)
    place = join(config.parallel.timeout, config.parallel.device)
    with Presence():
        code = train(config, dataset, place, stop)
        dist.barrier()
    dist.destroy_process_group()
    return code


def train(config: Config, dataset: Dataset, place: Place, stop: StopSignals) -> int:
    """Train in the existing process group. The folder is made last: an earlier failure leaves nothing behind."""
    trainer = build(config, dataset, place, stop)
    limit_waits(config.parallel.timeout)
    return Job(config, dataset, trainer, open_folder(config, place)).run()


def build(config: Config, dataset: Dataset, place: Place, stop: StopSignals) -> Trainer:
    """Build the whole model from the same seed on every rank, and keep this rank's part."""
    axes = Axes.of(config.parallel, place.world, place.rank)
    batches = batches_of(config, dataset, axes)
    torch.manual_seed(config.seed)
    model = TASKS[config.task].build(config.model, dataset)
    parameters = sum(p.numel() for p in model.parameters())
    passes, held = spread(model, config, axes, place)
    return Trainer(
        config=config,
        place=place,
        batches=batches,
        passes=passes,
        held=held,
        parameters=parameters,
        steps=config.train.steps or (config.train.epochs or 0) * batches.epoch_steps,
        stop=stop,
        source=find_source(held.model) if config.clip.options.find_source else None,
    )


def batches_of(config: Config, dataset: Dataset, axes: Axes) -> Batches:
    """The batches of this data-parallel rank; ConfigError if they cannot be divided."""
    size, microbatches = config.train.batch_size, config.parallel.microbatches or config.parallel.pipeline
    parts = axes.data_size * microbatches
    require(
        microbatches == 1 or size % parts == 0,
        "train.batch_size",
        f"{size} cannot be cut for {axes.data_size} data-parallel processes x {microbatches} microbatches: "
        f"use a multiple of {parts}",
    )
    return Batches(split=dataset.train, batch_size=size, seed=config.seed, rank=axes.data_rank, world=axes.data_size)


class Job:
    """The loop around `Trainer.step`: what is shown, written and saved, and when."""

    def __init__(self, config: Config, dataset: Dataset, trainer: Trainer, folder: RunFolder) -> None:
        self.config, self.dataset, self.trainer, self.folder = config, dataset, trainer, folder
        nothing = checkpoint.Found(step=0, damaged=[])
        self.found = checkpoint.newest_whole(folder.checkpoints, trainer.place) if config.resume else nothing
        self.start = self.found.step
        self.leads = trainer.place.rank == 0
        self.records = read_until(folder.metrics, self.start) if self.leads else []
        self.tally = Tally(self.records, scales=scales(config.clip))
        self.last: dict[str, Any] = self.records[-1] if self.records else {}
        self.display = Display(
            Screen(trainer.stop.hang_up, quiet=not self.leads),
            start=self.start,
            steps=trainer.steps,
            unit=TASKS[config.task].unit,
            log_every=config.train.log_every,
        )

    def run(self) -> int:
        began = time.perf_counter()
        if self.start:
            checkpoint.load(self.folder.checkpoints, self.start, self.trainer.held)
        self.announce()
        with MetricsFile(self.folder.metrics, self.records) if self.leads else nullcontext() as metrics, self.display:
            stopped = self.train(metrics)
        if self.leads:
            self.conclude(stopped, time.perf_counter() - began)
        return 0 if stopped is None else exit_code(stopped)

    def train(self, metrics: MetricsFile | None) -> Signals | None:
        """Step until the end, or until a signal, after which all ranks save at the same step."""
        say_begun()
        settings, steps = self.config.train, self.trainer.steps
        look_every = settings.eval_every or (settings.epochs and self.trainer.batches.epoch_steps)
        for step in range(self.start + 1, steps + 1):
            record, stopped = self.trainer.step(step - 1)
            if step == steps or (stopped is None and due(look_every, step)):
                record |= self.trainer.evaluate(self.dataset)
            self.tally.add(record)
            self.last = record
            if metrics is not None:
                metrics.write(record)
            self.display.step(record, self.tally)
            if step == steps or stopped is not None or due(settings.save_every, step):
                t, keep = self.trainer, self.config.run.keep
                checkpoint.save(self.folder.checkpoints, step, t.held, keep=keep, place=t.place)
            if stopped is not None and step < steps:
                return stopped
        return None

    def announce(self) -> None:
        place, parallel = self.trainer.place, self.config.parallel
        axes = Axes.of(parallel, place.world)
        how = parallel.strategy if axes.plain else f"{parallel.strategy}: {axes}"
        say = self.display.say
        say(f"ranks    {place.world} ({how}) on {place.device.type}, collectives by {place.backend}")
        say(f"data     {self.dataset.about}")
        size, steps = self.trainer.parameters, self.trainer.steps
        say(f"model    {size:,} parameters, {steps:,} steps of {self.config.train.batch_size}")
        say(f"entropy  {self.dataset.entropy():.4f} nats (unigram), the held-out loss of a model blind to its input")
        say(f"folder   {self.folder.path}")
        for damage in self.found.damaged:
            say(f"warning  {damage}; put aside")
        if self.start:
            say(f"resumed  after step {self.start} of {self.trainer.steps}")
        elif self.config.resume:
            say("resumed  nothing: the folder has no checkpoint, starting at step 1")

    def conclude(self, stopped: Signals | None, seconds: float) -> None:
        """The table at the end, the same in summary.json, and the report on the run."""
        summary = {
            "status": "finished" if stopped is None else f"stopped by {stopped.name}",
            "steps": self.last.get("step", self.start),
            "loss": self.last.get("loss"),
            "held_out_loss": self.last.get("held_out_loss"),
            "held_out_accuracy": self.last.get("held_out_accuracy"),
            "held_out_f1": self.last.get("held_out_f1"),
            "held_out_auc": self.last.get("held_out_auc"),
            "entropy": self.dataset.entropy(),
            "clipped": self.tally.share(self.tally.clipped) if self.tally.scales else None,
            "skipped": self.tally.share(self.tally.skipped),
            "seconds": seconds,
            "folder": str(self.folder.path),
        }
        self.folder.summary.write_text(json.dumps({k: spelled(v) for k, v in summary.items()}, indent=2) + "\n")
        self.display.table({name: shown(value) for name, value in summary.items() if value is not None})
        self.display.say(f"report   {page_of(self.folder)}")
        if stopped is not None:
            self.display.say(f"go on with: {command_to_resume(self.folder, self.trainer.place)}")


def due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0


def shown(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
