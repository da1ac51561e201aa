"""Compare two ways to replay a trajectory: all updates of a weight in one pass, and one by one.

Run `python benchmarks/replay.py` to replay 1,000 steps of SmolLM2-135M. With `--distribution
rank-one --directions 32`, each step has that many directions; `--fused-only` leaves out the slow
side.
"""

from __future__ import annotations

import argparse
import copy
import time

import torch

from zofo import Trajectory, split_parameters
from zofo.models.loading import load_model
from zofo.optim.trajectory import GroupSpec, Update


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--distribution", default="rademacher")
    parser.add_argument("--directions", type=int, default=1)
    parser.add_argument("--fused-only", action="store_true")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    model, _ = load_model(args.model, dtype=args.dtype)
    other = copy.deepcopy(model)
    blocks = split_parameters(model)
    spec = GroupSpec(tuple(blocks.base), tuple(blocks.base_index[name] for name in blocks.base))
    generator = torch.Generator().manual_seed(0)
    scalars = torch.randn(args.steps, args.directions, generator=generator).tolist()
    updates = [(Update(step, tuple(s), 1e-6, 0.0),) for step, s in enumerate(scalars)]
    index = blocks.base_index
    matrices = frozenset(index[name] for name, p in blocks.base.items() if p.ndim == 2)
    rank_one = matrices if args.distribution == "rank-one" else frozenset()
    setting = (0, args.distribution, 1e-3, "forward", (spec,))
    trajectory = Trajectory(*setting, updates, rank_one)
    warm_up = Trajectory(*setting, updates[:1], rank_one)
    for parameters in (blocks.base, split_parameters(other).base):
        warm_up.replay(parameters)

    began = time.perf_counter()
    trajectory.replay(blocks.base)
    fused = time.perf_counter() - began
    print(
        f"{args.model}, {args.dtype}, {args.steps} steps of {args.directions} directions, "
        f"{args.distribution}, {args.threads} thread(s)"
    )
    print(f"  one pass       {fused:8.2f} s", flush=True)
    if args.fused_only:
        return
    began = time.perf_counter()
    apart = split_parameters(other).base
    for (update,) in updates:
        update.apply(
            apart.values(),
            spec.tensors,
            seed=0,
            distribution=args.distribution,
            rank_one=rank_one,
        )
    separate = time.perf_counter() - began
    same = all(torch.equal(blocks.base[name], apart[name]) for name in apart)
    print(f"  one by one     {separate:8.2f} s")
    print(f"  ratio          {separate / fused:8.2f}, bits {'the same' if same else 'DIFFER'}")


if __name__ == "__main__":
    main()
