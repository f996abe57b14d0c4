"""The bytes that a registration counts are those that torch's flight recorder has seen."""

import os

import pytest
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
    registration = commhub.register(model, hook, timeout=30)
    recorder = Recorder()
    for _ in range(3):
        model(torch.ones(2, 16)).sum().backward()
    sent = recorder.sent_bytes(dist.get_world_size())
    dist.barrier()
    dist.destroy_process_group()
    return sent, registration.stats.sent_bytes


@pytest.mark.parametrize(("nproc", "hook"), [(2, "fp16"), (3, "quantize_per_tensor")])
def test_the_flight_recorder_has_seen_what_a_registration_counts(ranks, nproc, hook):
    for seen, counts in ranks(counted, nproc, hook, init=False, fresh=True):
        assert seen == pytest.approx(counts, rel=1e-9)
        assert seen > 0
