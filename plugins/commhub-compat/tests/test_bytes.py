"""What hooks given to DDP's own register_comm_hook send is what a registration counts and the flight recorder saw."""

import os

import commhub_compat
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import commhub
from commhub.testing import current, mlp
from commhub.testing._recorded import Recorder


def counted(hook):
    os.environ["TORCH_FR_BUFFER_SIZE"] = "2000"
    me = current()
    dist.init_process_group("gloo", store=me.store, rank=me.rank, world_size=me.world_size)
    model = DistributedDataParallel(mlp([16] * 5), bucket_cap_mb=0.001)
    model.register_comm_hook(None, getattr(commhub_compat, hook))
    recorder = Recorder()
    for _ in range(3):
        model(torch.ones(2, 16)).sum().backward()
    sent = recorder.sent_bytes(dist.get_world_size())
    dist.barrier()
    dist.destroy_process_group()
    return sent, commhub.registration(model).stats.sent_bytes


def test_the_flight_recorder_has_seen_the_bytes_that_are_counted(ranks):
    numel = sum(p.numel() for p in mlp([16] * 5).parameters())
    for seen, counts in ranks(counted, 2, "fp16_compress_hook", init=False, fresh=True):
        assert seen == counts == 3 * numel * 2
