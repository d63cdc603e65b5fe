"""Norms of every layer in TensorBoard, and which of them made the spikes: python examples/layer_norms.py"""

import time

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import distclip
from distclip.telemetry import Log
from distclip.telemetry.tensorboard import TensorBoard

torch.manual_seed(0)
model = torch.nn.ModuleDict({"words": torch.nn.EmbeddingBag(50, 16), "head": torch.nn.Linear(16, 1)})
model["numbers"] = torch.nn.Linear(4, 1)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
clipper = distclip.Clipper(model, 1.0, watch="parameters")  # or groups: watch={"words": "words.*", "others": ...}
folder = time.strftime("runs/layer-norms-%H%M%S")

with Log(clipper, TensorBoard(folder), every=1):
    for step in range(1, 61):
        words, numbers = torch.randint(50, (32, 5)), torch.randn(32, 4)
        label = (words[:, 0] < 25).float() + numbers.sum(1)
        if step in (25, 40):
            numbers *= 10  # somebody forgot to normalise
        guess = model["head"](model["words"](words).tanh()) + model["numbers"](numbers)
        (guess.squeeze(1) - label).square().mean().backward()
        clipper.step(optimizer)
        optimizer.zero_grad()

events = EventAccumulator(folder).Reload()  # what TensorBoard shows, read back
total = [event.value for event in events.Scalars("grad_norm/pre_clip")]
for step in (24, 25, 39, 40):
    print(f"step {step}: norm {total[step - 1]:6.2f}, of its square", end="")
    for name, _ in model.named_parameters():
        share = (events.Scalars(f"grad_norm/layer/{name}")[step - 1].value / total[step - 1]) ** 2
        print(f"  {name} {share:.0%}", end="")
    print()
print(f"tensorboard --logdir {folder}")
