"""torchft on Gloo: two replica groups train, one is killed and comes back, and both clip alike throughout.

``run.sh torchft`` installs torchft and runs this. A replica group has one rank (DDP), two (FSDP2), or trains by DiLoCo.
The optimizer inside torchft's is attached to a policy with memory, and the clipper's state heals with the model. All of
the second group dies between forward and backward of a step; the first goes on alone, and holds until it is back. Fails
where weights, decisions or the policy's memory differ between ranks, where a scenario is not done in DEADLINE_S, or
where a clip before the commit is not refused.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torchft import DistributedDataParallel, Manager, Optimizer, ProcessGroupGloo
from torchft.coordination import LighthouseServer
from torchft.local_sgd import DiLoCo

import distclip

RANKS = {"ddp": 1, "fsdp2": 2, "diloco": 1}  # of a replica group
DIES_AT, HOLDS_AT, NAN_AT, STEPS = 8, 12, 18, 24  # torchft's steps; DiLoCo's are its outer ones
INNER_STEPS = 4  # between two of DiLoCo's outer ones
DEADLINE_S = 300


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))


def loss_of(model: nn.Module, replica: int, step: int) -> Tensor:
    """Of rows of this replica and step; not finite in one step of the second replica."""
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(1000 * replica + step))
    loss = (model(x) - x.exp().sum(1, keepdim=True)).square().mean()
    return loss * (float("nan") if replica == 1 and step == NAN_AT else 1.0)


def local(tensor: Any) -> Any:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def digest(found: Any) -> str:
    """The bits of tensors and numbers, however they are nested."""
    hashed = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, dict):
            for key in sorted(value):
                hashed.update(str(key).encode())
                add(value[key])
        elif isinstance(value, Tensor):
            hashed.update(local(value).detach().cpu().contiguous().numpy().tobytes())
        else:
            hashed.update(repr(value).encode())

    add(found)
    return hashed.hexdigest()[:16]


class Replica:
    """One rank of a replica group: makes what trains, and tells the parent each step in a line of JSON."""

    def __init__(self, kind: str, replica: int, life: int, rank: int, lighthouse: str, port: int, folder: Path) -> None:
        self.kind, self.replica, self.folder, self.dies = kind, replica, folder, replica == 1 and life == 0
        if RANKS[kind] > 1:
            store = dist.TCPStore("127.0.0.1", port, is_master=False)
            dist.init_process_group("gloo", store=dist.PrefixStore("group", store), rank=rank, world_size=RANKS[kind])
        self.manager = Manager(
            pg=ProcessGroupGloo(timeout=timedelta(seconds=20)),
            min_replica_size=1,
            load_state_dict=None,
            state_dict=None,
            use_async_quorum=kind != "diloco",
            replica_id=f"group_{replica}",
            rank=rank,
            world_size=RANKS[kind],
            store_addr="127.0.0.1",
            store_port=port,
            lighthouse_addr=lighthouse,
            hostname="localhost",
        )
        self.model: nn.Module = self.parallel(network())
        self.inner = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.clipper = distclip.attach(self.inner, self.model, distclip.AutoClip(percentile=50))
        self.healed: dict[str, Any] = {}
        self.heal(model=self.model, optimizer=self.inner, clipper=self.clipper)

    def parallel(self, model: nn.Module) -> nn.Module:
        if self.kind == "ddp":
            model = DistributedDataParallel(self.manager, model)
        if self.kind == "fsdp2":
            fully_shard(model)
            model.set_all_reduce_hook(lambda gradient: self.manager.allreduce(gradient).wait())  # over the replicas
        return model

    def heal(self, **held: Any) -> None:
        """Send their states to a replica group that joins, and load them where this one does."""
        self.healed |= held
        for name, one in held.items():
            self.manager.register_state_dict_fn(name, one.load_state_dict, one.state_dict)

    def tell(self, **said: Any) -> None:
        print(json.dumps(said), flush=True)

    def tell_step(self, clipper: distclip.Clipper, step: int) -> None:
        told = clipper.report.to_dict()
        self.tell(step=step, norm=told["norm"], coef=told["coef"], skip=told["skip"])

    def loss(self, step: int) -> Tensor:
        loss = loss_of(self.model, self.replica, step)
        if self.dies and self.manager.current_step() == DIES_AT:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss

    def wait_for(self, name: str) -> None:
        while not (self.folder / name).exists():
            time.sleep(0.02)

    def hold(self, step: int) -> None:
        """Before a step: until all have started, and until the second group is back, for which no quorum waits."""
        self.wait_for("back" if step >= HOLDS_AT else "all")
        if step >= HOLDS_AT and self.manager.num_participants() == 1:
            time.sleep(1)

    def refuse(self, optimizer: Optimizer) -> None:
        """What would clip before the manager has committed the step is an error."""
        rival = distclip.Clipper(self.model, 1.0)
        for clip in (self.clipper.clip_, partial(self.clipper.step, self.inner), partial(rival.step, optimizer)):
            try:
                clip()
            except (ValueError, RuntimeError) as error:
                self.tell(refused=str(error))
            else:
                raise SystemExit(f"{clip} was not refused")

    def train(self) -> None:
        optimizer = Optimizer(self.manager, self.inner)
        if self.kind == "ddp":
            self.refuse(optimizer)
        while (step := self.manager.current_step()) < STEPS:
            self.hold(step)
            optimizer.zero_grad()
            self.loss(step).backward()
            optimizer.step()
            if self.manager.current_step() > step:  # committed
                self.tell_step(self.clipper, self.manager.current_step())

    def train_diloco(self) -> None:
        outer = torch.optim.SGD(self.model.parameters(), lr=0.7, momentum=0.9, nesterov=True)
        outside = distclip.attach(outer, self.model, distclip.AutoClip(percentile=50))
        self.heal(outer=outer, outside=outside)
        with DiLoCo(self.manager, [self.model], self.inner, outer, sync_every=INNER_STEPS):
            inner_step = 0
            while (step := self.manager.current_step()) < STEPS:
                self.hold(step)
                self.inner.zero_grad()
                self.loss(inner_step).backward()
                self.inner.step()
                inner_step += 1
                if self.manager.current_step() > step:
                    self.tell_step(outside, self.manager.current_step())
        self.healed.pop("clipper")  # what the inner one remembers is of this replica's own gradients
        self.healed.pop("optimizer")

    def run(self) -> None:
        self.tell(ready=True)
        (self.train_diloco if self.kind == "diloco" else self.train)()
        self.tell(**{name: digest(held.state_dict()) for name, held in self.healed.items()})
        self.wait_for("over")  # the other may be asking for us
        self.manager.shutdown(wait=False)
        os._exit(0)


class Group:
    """The processes of a replica group, as a launcher starts them again after one has died."""

    def __init__(self, kind: str, replica: int, lighthouse: str, folder: Path) -> None:
        self.start: Callable[[int], None] = partial(self._start, kind, replica, lighthouse, folder)
        self.files = [folder / f"{replica}.{rank}.jsonl" for rank in range(RANKS[kind])]
        self.start(0)

    def _start(self, kind: str, replica: int, lighthouse: str, folder: Path, life: int) -> None:
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.said_before = [len(self.said(rank)) for rank in range(len(self.files))]
        self.processes = []
        for rank, file in enumerate(self.files):
            words = map(str, (kind, replica, life, rank, lighthouse, self.store.port, folder))
            with file.open("a") as out, file.with_suffix(".err").open("a") as err:
                command = [sys.executable, __file__, *words]
                self.processes.append(subprocess.Popen(command, stdout=out, stderr=err, start_new_session=True))

    def said(self, rank: int) -> list[dict[str, Any]]:
        file = self.files[rank]
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def all_said(self, key: str) -> bool:
        return all(any(key in line for line in self.said(r)[self.said_before[r] :]) for r in range(len(self.files)))

    def step(self) -> int:
        return max((line["step"] for line in self.said(0) if "step" in line), default=0)

    def is_dead(self) -> bool:
        return all(process.poll() is not None for process in self.processes)

    def kill(self) -> None:
        for process in self.processes:
            process.send_signal(signal.SIGKILL)
        for process in self.processes:
            process.wait()

    def wait_until(self, done: Callable[[], bool], deadline: float, what: str) -> None:
        while not done():
            if time.monotonic() > deadline or any(process.poll() is not None for process in self.processes):
                errors = [f"{file}\n{file.read_text()[-3000:]}" for file in sorted(self.files[0].parent.glob("*.err"))]
                raise SystemExit(f"with_torchft.py: {what} did not come\n" + "\n".join(errors))
            time.sleep(0.05)


def scenario(kind: str, folder: Path) -> list[str]:
    """Everything up to the end of training; what differs between the ranks, in words."""
    deadline = time.monotonic() + DEADLINE_S
    lighthouse = LighthouseServer(
        bind="127.0.0.1:0", min_replicas=1, join_timeout_ms=2000, heartbeat_timeout_ms=2000, quorum_tick_ms=50
    )
    address = f"http://localhost:{lighthouse.address().rsplit(':', 1)[1]}"
    groups = [Group(kind, replica, address, folder) for replica in (0, 1)]
    try:
        for group in groups:
            group.wait_until(lambda group=group: group.all_said("ready"), deadline, "a first start")
        (folder / "all").touch()
        stays, dies = groups
        stays.wait_until(dies.is_dead, deadline, "the death of the second group")
        stays.wait_until(lambda: stays.step() >= HOLDS_AT, deadline, f"step {HOLDS_AT}, alone")
        dies.start(1)
        dies.wait_until(lambda: dies.all_said("ready"), deadline, "the second start")
        (folder / "back").touch()
        for group in groups:
            group.wait_until(lambda group=group: group.all_said("model"), deadline, "the end of training")
        (folder / "over").touch()
        return differences(kind, groups)
    finally:
        for group in groups:
            group.kill()
        lighthouse.shutdown()


def differences(kind: str, groups: list[Group]) -> list[str]:
    ranks = [group.said(rank) for group in groups for rank in range(RANKS[kind])]
    steps = [{line["step"]: line for line in said if "step" in line} for said in ranks]
    shared = set.intersection(*map(set, steps))
    wrong = [
        f"step {step}: {[s[step] for s in steps]}" for step in sorted(shared) if len({str(s[step]) for s in steps}) > 1
    ]
    ends = [said[-1] for said in ranks]
    for name in ends[0]:
        copies = [ends[rank :: RANKS[kind]] if name != "clipper" else ends for rank in range(RANKS[kind])]
        wrong += [f"{name}: {[e[name] for e in same]}" for same in copies if len({e[name] for e in same}) > 1]
    alone = set(steps[0]) - shared
    coefs = [steps[0][step]["coef"] for step in shared]
    print(
        f"{kind}: {len(shared)} steps of both groups, {len(alone)} of one alone; clipped in "
        f"{sum(c < 1 for c in coefs)}, skipped {sorted(s for s in shared if steps[0][s]['skip'])}, "
        f"{'DIFFERENT' if wrong else 'the same bits everywhere'}",
        flush=True,
    )
    assert alone, "the first group was never alone"
    assert max(shared) == STEPS, "the second group never came back"
    assert min(coefs) < 1, "nothing was clipped"
    return wrong


def main() -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    wrong = []
    for kind in sys.argv[1:] or list(RANKS):
        with tempfile.TemporaryDirectory() as folder:
            wrong += scenario(kind, Path(folder))
    sys.stdout.writelines(f"{said}\n" for said in wrong)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    if len(sys.argv) > 3:
        kind, replica, life, rank, lighthouse, port, folder = sys.argv[1:]
        Replica(kind, int(replica), int(life), int(rank), lighthouse, int(port), Path(folder)).run()
    main()
