"""One rank's way through all checks of a command, and what rank 0 shows of it."""

import signal
from collections.abc import Iterator
from functools import partial

import torch
import torch.distributed as dist

from distclip.doctor import collectives, gpu, layouts, machine, model, speed
from distclip.doctor.examination import hold
from distclip.doctor.finding import Check, Finding
from distclip.doctor.meeting import STARTING, Meeting, Record
from distclip.doctor.options import Options
from distclip.doctor.page import Page
from distclip.doctor.place import Site, join
from distclip.train.stop import exit_code

STOPPED = exit_code(signal.SIGTERM)


class Visit:
    """``site`` is there once the ranks have joined."""

    def __init__(self, meeting: Meeting, options: Options, device: torch.device) -> None:
        self.meeting, self.options, self.device = meeting, options, device
        self.site: Site | None = None

    def joined(self) -> Record:
        """Join the process group, and try its collectives."""
        self.site = join(self.meeting, self.device)
        return collectives.run(self.site)

    def checks(self) -> Iterator[Check]:
        """Each once the one before is done."""
        options, facts = self.options, partial(machine.facts, self.device)
        if options.model is not None:
            yield model.importable(options.model)
        yield Check(name="versions", run=facts, judge=machine.judge_versions, patience=STARTING)
        yield Check(name="collectives", run=self.joined, judge=collectives.judge)
        assert self.site is not None  # a failure ends the visit
        if options.command == "doctor":
            latency = partial(collectives.latency, self.site)
            yield Check(name="latency", run=latency, judge=collectives.judge_latency)
            yield Check(name="kernels", run=facts, judge=machine.judge_kernels)
            if self.device.type == "cuda":
                yield Check(name="GPU", run=partial(gpu.run, self.site, gpu.Gpu()), judge=gpu.judge)
            yield from layouts.checks(self.site)
            yield Check(name="speed", run=partial(speed.run, options.parameters, self.site), judge=speed.judge)
        if options.model is not None:
            yield model.check(options.model, options.timeout, verifies=options.command == "doctor", every=options.every)

    def findings(self, page: Page | None) -> Iterator[Finding]:
        """What comes of each check; none after one that ends them."""
        for check in self.checks():
            if page is not None:
                page.begin(check.name)
            finding = hold(self.meeting, check)
            yield finding
            if finding.ends or self.meeting.stopped():
                return


def visit(meeting: Meeting, options: Options, device: torch.device) -> tuple[int, bool]:
    """The exit code, and whether the process group can be left as it should be."""
    shown = None if options.command == "doctor" else {model.PLAN}
    page = Page(options.json, shown) if meeting.rank == 0 else None
    found: list[Finding] = []
    for finding in Visit(meeting, options, device).findings(page):
        found.append(finding)
        if page is not None and not finding.says_nothing:
            page.add(finding)
    code = max(finding.code or int(finding.wrong) for finding in found)
    if meeting.stopped() and code == 0:
        return STOPPED, False
    if page is not None:
        page.end(options.command == "doctor")
        code = max(code, page.code)
    works = not found[-1].ends
    if works:
        dist.destroy_process_group()
    return code, works
