"""The stream driver: its logic on the host with streams that do nothing, and on a GPU where there is one."""

import contextlib
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import commhub
from commhub.drivers import _driver
from commhub.drivers._stream import CudaStreams, StreamDriver
from commhub.drivers._timeline import Recorder
from commhub.testing import assert_equal_across_ranks, bitwise_equal

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and this machine has none")


class HostStreams:
    """Streams of a device on which everything happens at once: the host."""

    def enter(self, tensor):
        return contextlib.nullcontext()

    def leave(self):
        pass

    def future(self):
        return torch.futures.Future()


class Everything:
    """Uses each collective, a tuple and a subgroup, and averages twice on the way."""

    def prepare(self, setup):
        p = setup.world_size
        self.pair = setup.partition([[r, r + 1] for r in range(0, p - 1, 2)] + ([[p - 1]] if p % 2 else []))

    def reduce(self, bucket):
        p, n = bucket.world_size, bucket.flat.numel()
        mean = (yield commhub.AllReduce(bucket.flat.clone())).clone()
        shares = torch.zeros(-(-n // p) * p)
        shares[:n] = bucket.flat
        share = yield commhub.ReduceScatter(shares)
        gathered = yield commhub.AllGather(share)
        codes, first = yield (
            commhub.AllToAll(torch.arange(2 * p, dtype=torch.uint8)),
            commhub.Broadcast(torch.full((3,), float(bucket.rank)), src=p - 1),
        )
        pair = yield commhub.AllReduce(torch.ones(2), group=self.pair, op="sum")
        assert codes.tolist() == [2 * bucket.rank, 2 * bucket.rank + 1] * p
        assert first.tolist() == [p - 1.0] * 3
        assert pair.tolist() == [float(len(self.pair))] * 2
        bucket.flat.copy_((mean + gathered[:n]) / 2)


def on_host_streams(*, group, label, **_):
    return StreamDriver(group, HostStreams(), Recorder(enqueues=True), label=label)


def host_streams(wanted=True):
    """Registrations made meanwhile get the stream driver, if it is wanted."""
    return patch.dict(_driver.BY_DEVICE, {"cpu": on_host_streams} if wanted else {})


def train(hook, stream, steps=4):
    torch.manual_seed(0)
    model = DistributedDataParallel(
        torch.nn.Sequential(*[torch.nn.Linear(16, 16) for _ in range(6)]), bucket_cap_mb=0.002
    )
    with host_streams(stream):
        registration = commhub.register(model, hook)
    for step in range(steps):
        x = torch.randn(4, 16, generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))
        model(x).pow(2).mean().backward()
    grads = [p.grad for p in model.parameters()]
    assert_equal_across_ranks(grads)
    return grads, registration.stats.sent_bytes


def compare(hooks):
    for hook in hooks:
        made = Everything() if hook == "everything" else hook
        thread, bytes_thread = train(made, stream=False)
        stream, bytes_stream = train(Everything() if hook == "everything" else hook, stream=True)
        if hook == "everything":
            for a, b in zip(thread, stream, strict=True):
                torch.testing.assert_close(a, b)
        else:
            assert all(bitwise_equal(a, b) for a, b in zip(thread, stream, strict=True)), hook
        assert bytes_thread == bytes_stream


@pytest.mark.parametrize("nproc", [1, 2, 3, 4])
def test_the_stream_driver_gives_what_the_thread_driver_gives(ranks, nproc):
    ranks(compare, nproc, ["allreduce", "fp16", "bf16", "everything"])


class Raises:
    def reduce(self, bucket):
        yield commhub.AllReduce(bucket.flat)
        if bucket.step == 1:
            raise ZeroDivisionError("planned")


def fail_and_go_on():
    model = DistributedDataParallel(
        torch.nn.Sequential(*[torch.nn.Linear(8, 8) for _ in range(4)]), bucket_cap_mb=0.0005
    )
    with host_streams():
        registration = commhub.register(model, Raises())
        model(torch.ones(2, 8)).sum().backward()
        with pytest.raises(commhub.HookError, match="planned"):
            model(torch.ones(2, 8)).sum().backward()
        registration.swap("allreduce")
        model(torch.ones(2, 8)).sum().backward()


def test_a_hook_that_raises_on_the_stream_driver_is_one_error_and_a_swap_mends_it(ranks):
    ranks(fail_and_go_on, 2)


@needs_cuda
def test_a_hook_on_a_cuda_device_gives_the_mean_without_a_host_synchronisation(tmp_path):
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("nccl", store=store, rank=0, world_size=1)
    try:
        device = torch.device("cuda", 0)
        torch.cuda.set_device(device)
        for hook in ("allreduce", "fp16", "bf16"):
            torch.manual_seed(0)
            net = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(8)]).to(device)
            x = torch.randn(32, 64, device=device)
            bare = DistributedDataParallel(net, device_ids=[0], bucket_cap_mb=0.05)
            bare(x).pow(2).mean().backward()
            expected = [p.grad.clone() for p in net.parameters()]
            net.zero_grad()
            model = DistributedDataParallel(net, device_ids=[0], bucket_cap_mb=0.05)
            commhub.register(model, hook)
            model(x).pow(2).mean().backward()
            net.zero_grad()
            torch.cuda.set_sync_debug_mode("error")
            model(x).pow(2).mean().backward()
            torch.cuda.set_sync_debug_mode("default")
            for got, wanted in zip(net.parameters(), expected, strict=True):
                tolerance = 0 if hook == "allreduce" else 1e-2
                torch.testing.assert_close(got.grad, wanted, rtol=tolerance, atol=tolerance)
    finally:
        dist.destroy_process_group()


@needs_cuda
def test_a_capture_of_a_cuda_graph_is_refused_with_the_reason():
    device = torch.device("cuda", 0)
    streams = CudaStreams(device)
    with torch.cuda.graph(torch.cuda.CUDAGraph()), pytest.raises(commhub.HookError, match="CUDA graph"):
        streams.enter(torch.empty(1, device=device))


def test_cuda_gradients_on_gloo_are_refused_with_the_reason():
    from commhub.training.attachments._ddp import check_devices

    class Somewhere:
        device = torch.device("cuda", 0)
        requires_grad = True

    with pytest.raises(commhub.RegistrationError, match="Use NCCL"):
        check_devices([Somewhere()], "gloo")
