"""Trainer with an adaptive bound: torchrun --nproc-per-node 2 examples/transformers_trainer.py"""

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import distclip
from distclip.integrations.transformers import take_over

torch.manual_seed(0)
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
starts = torch.randint(64, (320, 1))
rows = (starts + torch.arange(16)) % 64  # counting, from anywhere
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder,
        use_cpu=True,
        ddp_backend="gloo",
        max_grad_norm=0.0,  # ours, not Trainer's
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        num_train_epochs=1,
        logging_steps=5,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    data = [{"input_ids": row, "labels": row} for row in rows]
    trainer = Trainer(LlamaForCausalLM(config), arguments, train_dataset=data)
    clipping = take_over(trainer, distclip.AutoClip(percentile=10, max_norm=0.5))
    trainer.train()

assert clipping.clipper.report.coef < 1
assert trainer.state.log_history[0]["grad_norm"] > 0.5  # before clipping
