"""Cross-attention over keys that are divided over the ranks: each rank passes its own shards and gets its own rows.

torchrun --nproc_per_node 2 examples/sp_attention.py
"""

import torch
import torch.distributed as dist

from ds_lvxattn import KVInterval, sp_attention

gpus = torch.cuda.is_available()
dist.init_process_group("nccl" if gpus else "gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()
device = torch.device("cuda", rank % torch.cuda.device_count()) if gpus else torch.device("cpu")
torch.manual_seed(0)
q, k, v = (torch.randn(1, heads, tokens, 64, device=device) for heads, tokens in ((8, 32), (2, 4096), (2, 4096)))
stop = torch.linspace(1, 4096, 32, device=device).int()[None]  # a row sees the keys up to its own

mine, frames = torch.arange(32).chunk(ranks)[rank], torch.arange(4096).chunk(ranks)[rank]
interval = KVInterval(torch.zeros_like(stop)[:, mine], stop[:, mine])
out, lse = sp_attention(q[:, :, mine], k[:, :, frames], v[:, :, frames], group=dist.group.WORLD, interval=interval)

mask = torch.arange(4096, device=device) < stop[0, :, None]
whole = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
print(f"rank {rank} of {ranks}: rows {list(out.shape)}, off by {(out - whole[:, :, mine]).abs().max():.1e}")
dist.destroy_process_group()
