"""A training loop of one's own: deepspeed --num_gpus 2 examples/own_loop.py MODEL ROWS.jsonl DS_CONFIG.json STEPS"""

import sys

import deepspeed
import torch
from transformers import AutoModelForImageTextToText

from ds_lvxattn import attach

name, rows, ds_config, steps = sys.argv[-4:]  # the launcher puts --local_rank ahead
model = AutoModelForImageTextToText.from_pretrained(name)
parallel = attach(model, ds_config)
engine, *_ = deepspeed.initialize(**parallel.engine_arguments())
batches = parallel.micro_batches(parallel.rows(rows, max_frames=16), 0, int(steps))
for step, batch in enumerate(batches):
    loss = parallel.loss(engine(**batch.inputs).loss)
    engine.backward(loss)
    engine.step()
    if engine.global_rank == 0:
        print(f"step {step}: loss {loss.item():.6f}, {batch.text_tokens} tokens, {batch.frames} frames", flush=True)
engine.save_16bit_model("runs/own_loop")
torch.distributed.destroy_process_group()
