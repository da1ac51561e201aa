"""Hybrid fine-tuning of a base that FSDP2 shards over processes, in a custom training loop.

Each process holds a part of every weight, and each layer gathers its own weights while it runs. The
processes exchange a few scalars a step for the base. The script runs on the CPU in seconds:

    torchrun --nproc-per-node 2 examples/sharded_loop.py

With `--resume`, it continues from its checkpoint, on any number of processes. It also takes a model
from the hub (`--model`), as `minimal_loop.py` does.
"""

import argparse
from pathlib import Path

import peft
import torch
import torch.distributed as dist
from tiny import DEV, TRAIN, accuracy, collate, encode, load
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from zofo import (
    HybridOptimizer,
    ReshufflingSampler,
    Trajectory,
    load_checkpoint,
    param_groups,
    save_checkpoint,
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Hybrid fine-tuning of a sharded base.")
    parser.add_argument("--model", help="a causal language model; default: a tiny untrained Llama")
    parser.add_argument("--base-lr", type=float, default=2e-3)
    parser.add_argument("--lr", type=float, default=1e-2, help="of the adapter")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--out", default="sharded-checkpoint", help="folder of the checkpoint")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint")
    args = parser.parse_args()
    rank, size = dist.get_rank(), dist.get_world_size()

    torch.manual_seed(0)  # every process begins with the same adapter
    model, tokenizer = load(args.model)
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=4))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(device, (size,))
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)

    rows = encode(tokenizer, TRAIN)
    # Every process draws the same batch and takes its own rows.
    loader = DataLoader(
        rows, batch_size=8, sampler=ReshufflingSampler(len(rows), seed=0), collate_fn=collate
    )
    groups = param_groups(model, "hybrid", base_lr=args.base_lr, adapter_lr=args.lr)
    optimizer = HybridOptimizer(
        groups, model, optimizer="AdamW", max_grad_norm=1.0, process_group=dist.group.WORLD
    )
    if args.resume:  # each process replays the updates on its own rows
        load_checkpoint(model, args.out)
        optimizer.load_state_dict(torch.load(f"{args.out}/optimizer.pt", weights_only=True))
        optimizer.trajectory = Trajectory.load(Path(args.out, "base_trajectory.safetensors"))[0]
    for epoch in range(args.epochs):
        model.train()
        for batch in loader:
            own = {key: value[rank::size].to(device) for key, value in batch.items()}
            optimizer.step(lambda own=own: model(**own).loss)
        if epoch % 5 == 4:
            score = accuracy(model, tokenizer, DEV)  # all processes gather the layers
            if rank == 0:
                loss = optimizer.last_step.loss  # the mean over the processes
                print(f"epoch {epoch + 1}: loss {loss:.3f}, dev accuracy {score:.2f}")
    save_checkpoint(args.out, model, optimizer)  # all processes call it, the first one writes
    state = optimizer.state_dict()  # this too
    if rank == 0:
        torch.save(state, f"{args.out}/optimizer.pt")


if __name__ == "__main__":
    dist.init_process_group()
    main()
    dist.destroy_process_group()
