"""Pipeline parallelism: consecutive blocks on consecutive ranks, through which microbatches flow."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.pipelining.schedules import PipelineScheduleSingle

from distclip.train.passes import Answer, mean_loss

SCHEDULES: dict[str, type[PipelineScheduleSingle]] = {"1f1b": Schedule1F1B, "gpipe": ScheduleGPipe}


@dataclass(kw_only=True, slots=True, frozen=True)
class Piped:
    """One pipeline stage: the first gets the inputs, the last computes the loss."""

    schedule: PipelineScheduleSingle
    first: bool
    last: bool

    @classmethod
    def of(
        cls, stage: nn.Module, group: dist.ProcessGroup, device: torch.device, schedule: str, microbatches: int
    ) -> "Piped":
        index, count = group.rank(), group.size()
        piped = PipelineStage(stage, index, count, device, group=group)
        runner = SCHEDULES[schedule](piped, microbatches, loss_fn=mean_loss)
        return cls(schedule=runner, first=index == 0, last=index == count - 1)

    def forward_backward(self, inputs: Tensor, targets: Tensor) -> Answer | None:
        losses: list[Tensor] = []
        logits = self.schedule.step(*self.fed(inputs), target=self.compared(targets), losses=losses)
        return Answer(torch.stack(losses).mean().detach(), logits.detach()) if self.last else None

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor | None:
        return self.schedule.eval(*self.fed(inputs), target=self.compared(targets))  # type: ignore[no-any-return]

    def fed(self, inputs: Tensor) -> tuple[Tensor, ...]:
        return (inputs,) if self.first else ()

    def compared(self, targets: Tensor) -> Tensor | None:
        return targets if self.last else None
