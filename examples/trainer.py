"""Hugging Face's Trainer: deepspeed --num_gpus 2 examples/trainer.py MODEL ROWS.jsonl DS_CONFIG.json STEPS"""

import sys

import torch
from transformers import AutoModelForImageTextToText, TrainingArguments

from ds_lvxattn.hf import Rows, SequenceParallelTrainer

name, rows, ds_config, steps = sys.argv[-4:]  # the launcher puts --local_rank ahead
args = TrainingArguments(
    "runs/trainer",
    deepspeed=ds_config,  # says how samples are divided
    per_device_train_batch_size=2,  # rows for the ranks of a group together
    learning_rate=3e-3,
    lr_scheduler_type="constant",
    max_steps=int(steps),
    logging_steps=1,
    report_to="none",
    use_cpu=not torch.cuda.is_available(),
)
model = AutoModelForImageTextToText.from_pretrained(name)
trainer = SequenceParallelTrainer(
    model=model,
    args=args,
    train_dataset=Rows(rows, max_frames=16),
    eval_dataset=Rows(rows, max_frames=16, limit=4),
)
trainer.train()
print(trainer.evaluate())
trainer.save_model()
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
