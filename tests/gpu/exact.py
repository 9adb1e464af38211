"""What GPU tests compare kernels with: weights of a scheme on the device, and results in float64."""

from contextlib import contextmanager

import torch

from undistilled import scheme as schemes
from undistilled.ops.experts import experts
from undistilled.scheme import Stored

ROUNDING = 4e-3  # of results in bfloat16
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # the latter in Triton's interpreter


def stored(name, *shape):
    scheme = schemes.get(name)
    return Stored(scheme, shape, scheme.compress(torch.randn(*shape, device=DEVICE) * shape[-1] ** -0.5))


def exact(weight):
    return weight.dense(torch.float32).double()


def error(ours, truth):
    assert ours.isfinite().all()
    return float((ours.double() - truth).norm() / truth.norm())


def activations(*shape):
    return torch.randn(*shape, device=DEVICE).bfloat16()


def reference(x, ids, shares, gate, up, down):
    out = torch.zeros(x.shape, dtype=torch.float64, device=DEVICE)
    for e in range(gate.shape[0]):
        g, u, d = (exact(w.expert(e)) for w in (gate, up, down))
        share = torch.where(ids == e, shares, 0).sum(-1).double()
        a = x.double() @ g.T
        out += share[:, None] * ((a * a.sigmoid() * (x.double() @ u.T)) @ d.T)
    return out


@contextmanager
def nothing_waits():
    """Raises where the host waits for the GPU."""
    if DEVICE == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if DEVICE == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def check_experts(tokens, *weights):
    """The Triton kernels of the op `experts` on weights of 9 experts, with ids of other banks among them."""
    x = activations(tokens, weights[0].shape[-1])
    ids = torch.stack([torch.randperm(13, device=DEVICE)[:4] for _ in range(tokens)]) - 2
    ids[ids == 5] = 20
    shares = torch.rand(tokens, 4, device=DEVICE)
    kernel = experts.resolve(weights[0], x.dtype)
    assert kernel.name == "triton"
    kernel.run(x, ids, shares, *weights)
    with nothing_waits():
        ours = kernel.run(x, ids, shares, *weights)
    truth = reference(x, ids, shares, *weights)
    assert error(ours, truth) < 2 * ROUNDING
    assert torch.equal(ours, kernel.run(x, ids, shares, *weights))
    if tokens == 64:
        alone = torch.cat([kernel.run(x[t : t + 1], ids[t : t + 1], shares[t : t + 1], *weights) for t in range(5)])
        assert torch.equal(alone, ours[:5])
