"""What GPU tests compare kernels with: weights of a scheme on the device, and results in float64."""

import torch

from undistilled import scheme as schemes
from undistilled.scheme import Stored

ROUNDING = 4e-3  # of results in bfloat16


def stored(name, *shape):
    scheme = schemes.get(name)
    return Stored(scheme, shape, scheme.compress(torch.randn(*shape, device="cuda") * shape[-1] ** -0.5))


def exact(weight):
    return weight.dense(torch.float32).double()


def error(ours, truth):
    assert ours.isfinite().all()
    return float((ours.double() - truth).norm() / truth.norm())


def activations(*shape):
    return torch.randn(*shape, device="cuda").bfloat16()


def reference(x, ids, shares, gate, up, down):
    out = torch.zeros(x.shape, dtype=torch.float64, device="cuda")
    for e in range(gate.shape[0]):
        g, u, d = (exact(w.expert(e)) for w in (gate, up, down))
        share = torch.where(ids == e, shares, 0).sum(-1).double()
        a = x.double() @ g.T
        out += share[:, None] * ((a * a.sigmoid() * (x.double() @ u.T)) @ d.T)
    return out
