"""TRL's SFTTrainer, full and with a PEFT LoRA, clipped by `distclip.integrations.transformers.take_over`.

``run.sh trl-peft`` installs both and runs this: one process, then two ranks of DDP. Fails where

* the logged ``grad_norm`` is off by more than 1e-6 from the float64 norm of the gradients that are trained;
* weights differ from those of TRL's own clipping at the same bound, or between one process and two ranks;
* a run that is resumed from a checkpoint ends with other weights, or another memory of the policy.
"""

import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

import distclip
from distclip.integrations.transformers import Clipping, take_over

STEPS, ROWS = 8, 8  # rows a step, of all ranks
BOUNDS = {"full": 0.8, "LoRA": 0.13}  # between the norms of the runs
WORDS = [f"w{number}" for number in range(30)]
LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def tokenizer() -> PreTrainedTokenizerFast:
    known = Tokenizer(
        models.WordLevel({word: number for number, word in enumerate(["[PAD]", "[EOS]", *WORDS])}, "[EOS]")
    )
    known.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=known, pad_token="[PAD]", eos_token="[EOS]")


def rows() -> Dataset:
    """Rows of one length, so that means over ranks and over tokens are the same."""
    generator = torch.Generator().manual_seed(0)
    picked = torch.randint(len(WORDS), (STEPS * ROWS, 12), generator=generator).tolist()
    return Dataset.from_list([{"text": " ".join(WORDS[number] for number in row)} for row in picked])


def trainer_of(folder: Path, lora: bool, **options: Any) -> SFTTrainer:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    arguments = SFTConfig(
        str(folder),
        use_cpu=True,
        bf16=False,
        ddp_backend="gloo" if "WORLD_SIZE" in os.environ else None,
        per_device_train_batch_size=ROWS // 2 // int(os.environ.get("WORLD_SIZE", "1")),
        gradient_accumulation_steps=2,
        optim="sgd",
        learning_rate=1.0,
        max_steps=STEPS,
        max_length=32,
        gradient_checkpointing=False,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        **options,
    )
    trainer = SFTTrainer(
        LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS) + 2, **shape)),
        arguments,
        train_dataset=rows(),
        processing_class=tokenizer(),
        peft_config=LORA if lora else None,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


class Beside(TrainerCallback):
    """The float64 norm of all gradients, at each step, before they are scaled."""

    def __init__(self, trainer: SFTTrainer, clipping: Clipping) -> None:
        self.trainer, self.clipping = trainer, clipping
        self.norms: list[float] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        assert self.clipping.clipper is not None
        self.clipping.clipper.register_report_hook(lambda report, step: self.norms.append(self.norm()))

    def norm(self) -> float:
        held = [p.grad for p in self.trainer.model.parameters() if p.grad is not None]
        return math.sqrt(sum(gradient.double().square().sum().item() for gradient in held))


def weights(trainer: SFTTrainer) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def farthest(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference; NaN and NaN are equal, as in a window that is not full."""
    assert one.keys() == other.keys()
    pairs = [(one[name], other[name]) for name in one]
    return max(torch.where((a == b) | (a.isnan() & b.isnan()), 0, (a - b).abs()).max().item() for a, b in pairs)


def ours(folder: Path, lora: bool, policy: distclip.Policy | float, resume: str | None = None) -> dict[str, Any]:
    trainer = trainer_of(folder, lora, max_grad_norm=0.0, save_steps=STEPS // 2)
    before = weights(trainer)
    clipping = take_over(trainer, policy)
    beside = Beside(trainer, clipping)
    trainer.add_callback(beside)
    trainer.train(resume_from_checkpoint=resume)
    logged = [line["grad_norm"] for line in trainer.state.log_history if "grad_norm" in line]
    after = weights(trainer)
    moved = [name for name in after if not torch.equal(before[name], after[name])]
    assert clipping.clipper is not None
    return {
        "weights": after,
        "norms": logged[-len(beside.norms) :],
        "true": beside.norms,
        "moved": moved,
        "state": clipping.clipper.state_dict(),
        "clipped": clipping.clipper.history.clipped,
    }


def theirs(folder: Path, lora: bool) -> dict[str, Tensor]:
    trainer = trainer_of(folder, lora, max_grad_norm=BOUNDS["LoRA" if lora else "full"], save_strategy="no")
    trainer.train()
    return weights(trainer)


def checked(kind: str, folder: Path) -> dict[str, float]:
    """By how much each promise is missed, on the ranks there are; one process leaves its weights in ``folder``."""
    lora, world, here = kind == "LoRA", int(os.environ.get("WORLD_SIZE", "1")), folder / kind
    own = ours(here / f"{world}", lora, BOUNDS[kind])
    assert len(own["true"]) == STEPS
    assert 0 < own["clipped"] < STEPS, own["norms"]
    assert own["moved"]
    assert all("lora" in name for name in own["moved"]) is lora
    alone = here / "alone.pt"
    if world == 1:
        torch.save(own["weights"], alone)
    beside = theirs(here / "theirs", lora) if world == 1 else torch.load(alone)
    policy, whole, again = distclip.AutoClip(percentile=50), here / f"whole {world}", here / f"again {world}"
    through = ours(whole, lora, policy)
    resumed = ours(again, lora, policy, resume=str(whole / f"checkpoint-{STEPS // 2}"))
    return {
        "norm": max(abs(norm / true - 1) for norm, true in zip(own["norms"], own["true"], strict=True)),
        "weights": farthest(own["weights"], beside),
        "weights, resumed": farthest(through["weights"], resumed["weights"]),
        "memory, resumed": farthest(through["state"]["policy"], resumed["state"]["policy"]),
    }


def main() -> None:
    if len(sys.argv) > 1:
        off = {kind: checked(kind, Path(sys.argv[1])) for kind in BOUNDS}
        if os.environ.get("RANK", "0") == "0":
            for kind, found in off.items():
                numbers = ", ".join(f"{name} off by {value:.1e}" for name, value in found.items())
                print(f"{os.environ.get('WORLD_SIZE', '1')} rank(s), {kind}: {numbers}", flush=True)
        sys.exit(not all(value <= 1e-6 for found in off.values() for value in found.values()))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    with tempfile.TemporaryDirectory() as folder:
        for launch in ([sys.executable], torchrun):
            subprocess.run([*launch, __file__, folder], check=True)


if __name__ == "__main__":
    main()
