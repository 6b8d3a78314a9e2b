"""The stand-ins for CUDA: in a process of its own, since they change torch."""

from __future__ import annotations

from tests.support.interpreter import run

DEVICES = ("'cuda'", "'cuda:0'", "torch.device('cuda', 0)", "0", "torch.cuda.current_device()")


def test_every_way_to_name_the_device_means_the_cpu() -> None:
    made = "\n".join(
        f"made += [torch.zeros(2, device={device}), torch.tensor([1], device={device}), torch.ones_like(x, device={device}),"
        f" torch.randint(0, 9, (2,), device={device}), x.new_full((2,), 1.0, device={device}), x.to({device}),"
        f" x.to(device={device}), x.to({device}, non_blocking=True), torch.nn.Linear(2, 2, device={device}).weight,"
        f" torch.nn.Linear(2, 2).to({device}).weight]"
        for device in DEVICES
    )
    run(
        f"""
import torch
from paci_megatron.platform import cpu
assert cpu.activate() or torch.cuda.is_available()
x, made = torch.ones(2), []
{made}
made += [x.cuda(), torch.nn.Linear(2, 2).cuda().weight, x.to(torch.ones(1, dtype=torch.float64))]
if cpu.is_active():
    assert all(tensor.device.type == "cpu" for tensor in made)
    assert x.cuda() is x and x.type() == "torch.cuda.FloatTensor" and x.type(torch.int32).dtype is torch.int32
    assert x.to(torch.float16).dtype is torch.float16 and made[-1].dtype is torch.float64
"""
    )


def test_nothing_is_left_behind() -> None:
    run(
        """
import torch
from paci_megatron.platform import cpu
before = [(owner, name, getattr(owner, name)) for owner, name, _ in cpu._replacements()]
assert len({(id(owner), name) for owner, name, _ in before}) == len(before)
if cpu.activate():
    assert all(getattr(owner, name) is not value for owner, name, value in before)
    cpu.deactivate()
assert all(getattr(owner, name) is value for owner, name, value in before)
"""
    )
