"""What tests/distributed claims, on GPUs over NCCL (or, without GPUs, over gloo): one line for each claim.

torchrun --nproc-per-node 2 tests/gpu/distributed_once.py
"""

import datetime
import os
import sys
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

for folder in ("tests", "tests/distributed"):
    sys.path.insert(0, str(Path(__file__).parents[2] / folder))

import test_accelerate  # noqa: E402
import test_checkpoints  # noqa: E402
import test_ddp  # noqa: E402
import test_replicate  # noqa: E402
import test_shards  # noqa: E402


def close(found, expected, *, apart=0, tolerance=1e-3):
    """At most `apart` numbers differ by more than `tolerance`."""
    difference = (found.to(expected.device) - expected).abs()
    count = int((difference > tolerance).sum())
    assert count <= apart, f"{count} of {found.numel()} weights differ by up to {float(difference.max()):.2g}"
    return f"largest difference {float(difference.max()):.1e}, {int((difference > 0).sum())} weights differ"


def alike(ends):
    for end in ends[1:]:
        assert torch.equal(ends[0], end), f"replicas differ by {float((ends[0] - end).abs().max()):.2g}"


def shards_equal(name):
    def check(rank, size):
        ends = everybody(test_shards.equal(rank, size, name))
        alike(ends)
        return close(ends[0], test_shards.on_one(size, name), apart=200 if name == "by gradient" else 0)

    return check


def replicas_equal(name):
    def check(rank, size):
        ends = everybody(test_replicate.equal(rank, size, name)[0])
        alike(ends)
        return close(ends[0], test_replicate.on_one(size, name), tolerance=2e-2 if name == "half entries" else 1e-3)

    return check


def replicas_long(granularity, how):
    def check(rank, size):
        alike(everybody(test_replicate.long(rank, size, granularity, steps=200, how=how)))
        return "bit for bit the same for 200 steps"

    return check


def drift(*kinds):
    def check(rank, size):
        for how in kinds:
            said = test_replicate.drift(rank, size, how)
            assert said and "Drifted" in said, (how, said)
        return said

    return check


def untouched(rank, size):
    nobody, still, one, kind, end = test_replicate.untouched(rank, size)
    assert nobody and still and kind
    alike(everybody(end))
    alike(everybody(one[0].cpu()))
    return "the same everywhere"


def gradients(rank, size):
    found = test_shards.gradients(rank, size)
    assert found["kind"] == ("DTensor", "SelectedGradient")
    assert found["twice"] and found["kept"] and found["zeroed"]
    for expected, norm in found["norms"]:
        assert abs(norm - expected) < 1e-4 * expected, (norm, expected)
    return f"norms {found['norms']}"


def against_adamw(rank, size):
    return close(*test_shards.against_adamw(rank, size), tolerance=1e-5)


def synchronised(rank, size):
    return close(*test_shards.synchronised(rank, size))


def uneven(rank, size):
    before, after, _ = test_shards.uneven(rank, size)
    alike(everybody(after))
    assert after.isfinite().all() and not torch.equal(before, after)
    return "the same everywhere"


def mixed(rank, size):
    still, end, scale = test_shards.mixed(rank, size)
    assert still == [False, True, False], still
    assert scale == 4.0, scale
    alike(everybody(end))
    return "an overflow of one process is skipped by all"


def tensor_parallel(rank, size):
    (alone, cut), _ = test_shards.tensor_parallel(rank, size)
    return close(cut, alone)


def streams(rank, size):
    """FSDP2 reduces on streams of its own: many steps, refreshes and schedules, end where one process ends."""
    from nanoadam import linear, param_groups
    from nanoadam.optimizer import NanoAdam

    def train(model, ranks, weight):
        opt = NanoAdam(
            param_groups(model),
            local=True,
            lr=3e-3,
            mask_interval=3,
            density=linear(0.4, 0.1, total_steps=30, interval=7),
        )
        for step in range(40):
            for each in ranks:
                (weight * test_shards.loss_of(model, each, step)).backward()
            opt.step()
            opt.zero_grad()
        return test_shards.weights(model)

    sharded = train(test_shards.shard(test_shards.Wide(rows=64)), [rank], 1.0)
    alike(everybody(sharded))
    return close(sharded, train(test_shards.Wide(rows=64), range(size), 1 / size), tolerance=1e-2, apart=2000)


def ddp_prepared(bias):
    def check(rank, size):
        ends, (_, left, sent) = test_ddp.prepared(rank, size, bias)
        for number, accumulate in enumerate((1, 2)):
            alike(everybody(ends[number]))
            close(ends[number], test_ddp.on_one(size, bias, accumulate))
        return f"DDP has kept {left}, {sent} bytes went beside it"

    return check


def ddp_warned(rank, size):
    after, view, named, _ = test_ddp.warned(rank, size)
    assert len(after) == len(view) == 1, (after, view)
    assert len(named) == 2, named
    return "said once"


def checkpoints(rank, size):
    found = test_checkpoints.save_and_go_on(rank, size)
    for kind, (straight, resumed, (both, same, before), _, _) in found.items():
        assert torch.equal(straight, resumed), f"{kind}: {float((straight - resumed).abs().max()):.2g}"
        assert both == same == before > 0, (kind, both, same, before)
    return f"{', '.join(found)}: bit for bit"


def exports(rank, size):
    found = [test_checkpoints.exported(rank, size, kind) for kind in ("uneven", "columns")]
    for both, same, before in (each for some in found for each in some):
        assert both == same and both > 0.98 * before, found
    return f"{found}"


def accelerate_ddp(rank, size):
    end, beside = test_accelerate.train(rank)
    alike(everybody(end))
    return close(end, test_accelerate.on_one(size)) + f", {beside.replica.sent_bytes} bytes"


def accelerate_fsdp2(rank, size):
    from accelerate import FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["Sequential"]
    )
    end, _ = test_accelerate.train(rank, plugin)
    alike(everybody(end))
    return close(end, test_accelerate.on_one(size))


CHECKS = {
    **{f"replicate, {name}": replicas_equal(name) for name in test_replicate.EQUAL},
    **{
        f"{how}, 200 steps, {granularity}s": replicas_long(granularity, how) for granularity, how in test_replicate.LONG
    },
    "replicate, untouched parameters": untouched,
    "replicate, drift": drift("weights", "steps"),
    **{f"FSDP2, {name}": shards_equal(name) for name in test_shards.EQUAL},
    "FSDP2, gradients": gradients,
    "FSDP2, AdamW at density 1": against_adamw,
    "FSDP2, no gradient sync": synchronised,
    "FSDP2, uneven shards": uneven,
    "FSDP2, mixed precision, overflow": mixed,
    "FSDP2, streams": streams,
    "tensor parallel": tensor_parallel,
    "DCP, the same processes": checkpoints,
    "DCP, exports": exports,
    **{f"DDP, prepared, bias={bias}": ddp_prepared(bias) for bias in (True, False)},
    "DDP, warnings": ddp_warned,
    "accelerate, DDP": accelerate_ddp,
    "accelerate, FSDP2": accelerate_fsdp2,
    "replicate, drift of options": drift("options"),
}
LAST = "replicate, drift of options"
"""One process begins exchanges that the other does not: a GPU is of no use to them afterwards."""


def everybody(value):
    """What each process has."""
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, value.cpu() if isinstance(value, torch.Tensor) else value)
    return [each.to(value.device) if isinstance(each, torch.Tensor) else each for each in found]


def main():
    wanted = sys.argv[1:]
    rank = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
        torch.set_default_device(f"cuda:{rank}")
        backend = "cpu:gloo,cuda:nccl"
    else:
        backend = "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=90))
    size, lines = dist.get_world_size(), []
    for name, check in CHECKS.items():
        if wanted and not any(word in name for word in wanted):
            continue
        begun = time.perf_counter()
        try:
            said, good = check(rank, size), True
        except Exception as error:
            said, good = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300], False
            traceback.print_exc()
        verdicts = [good] if name == LAST else everybody(good)
        lines.append(f"{'ok  ' if all(verdicts) else 'FAIL'} {name:36s} {time.perf_counter() - begun:6.1f} s  {said}")
        if rank == 0 or not good:
            print(lines[-1], flush=True)
    if rank == 0:
        print("\n".join(["", f"{size} processes, {backend}, torch {torch.__version__}", *lines]), flush=True)
    sys.stdout.flush()
    os._exit(any(line.startswith("FAIL") for line in lines))  # what was left by LAST would be waited for


if __name__ == "__main__":
    main()
