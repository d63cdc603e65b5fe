"""Lightning on two ranks, with a bad row on one of them: torchrun --nproc-per-node 2 examples/lightning_ddp.py"""

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader, TensorDataset

import distclip
from distclip.integrations.lightning import ClipGradients


class Sums(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        return (self.net(batch[0]) - batch[1]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, fused=True)


torch.manual_seed(0)
x = torch.randn(960, 8)
y = x.sum(1, keepdim=True)
x[100, 0] = torch.nan  # one rank gets it: all ranks skip that step
clip = ClipGradients(distclip.AutoClip(percentile=10, max_norm=1.0), max_consecutive_skips=5)
trainer = Trainer(
    accelerator="cpu",
    devices=2,
    strategy=DDPStrategy(process_group_backend="gloo"),
    max_epochs=1,
    logger=CSVLogger("."),  # grad_norm/pre_clip, clip/coef, clip/fraction and others
    log_every_n_steps=10,
    callbacks=[clip],
)
trainer.fit(Sums(), DataLoader(TensorDataset(x, y), batch_size=16))
print(trainer.global_step, clip.clipper.report.to_dict(), clip.clipper.culprit)
