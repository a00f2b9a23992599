"""Linear layers in FP8 with current scaling, by hand on PyTorch's own product (torch._scaled_mm):
x and W in E4M3, dy in E5M2, one scale a tensor, as torchao's float8 has by default."""

import torch
from torch import nn

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def to_fp8(tensor, kind):
    """The tensor in `kind`, and what gives its values back."""
    amax = tensor.abs().amax().float().clamp(min=1e-12)
    largest = torch.finfo(kind).max
    scaled = (tensor.float() * (largest / amax)).clamp(-largest, largest)
    return scaled.to(kind), amax / largest


def columns(tensor):
    """The same numbers, stored along columns: FP8 products read both operands along the reduction."""
    return tensor.t().contiguous().t()


def product(a, b, fast):
    """a b, both with their scales. Sums of a forward pass may be the tensor cores' short ones."""
    (a, of_a), (b, of_b) = a, b
    return torch._scaled_mm(
        a, b, scale_a=of_a, scale_b=of_b, out_dtype=torch.bfloat16, use_fast_accum=fast
    )


class Product(torch.autograd.Function):
    """y = x W^T."""

    @staticmethod
    def forward(ctx, x, w):
        (x8, of_x), (w8, of_w) = to_fp8(x, E4M3), to_fp8(w, E4M3)
        ctx.save_for_backward(x8, of_x, w8, of_w)
        return product((x8, of_x), (w8.t(), of_w), fast=True)

    @staticmethod
    def backward(ctx, dy):
        x8, of_x, w8, of_w = ctx.saved_tensors
        dy8, of_dy = to_fp8(dy, E5M2)
        dx = product((dy8, of_dy), (columns(w8), of_w), fast=False)
        dw = product((dy8.t().contiguous(), of_dy), (columns(x8), of_x), fast=False)
        return dx, dw.float()


class Linear(nn.Linear):
    def forward(self, x):
        y = Product.apply(x.to(torch.bfloat16).flatten(0, -2), self.weight)
        return y.unflatten(0, x.shape[:-1]) + self.bias.to(torch.bfloat16)


def check():
    """A layer's result and gradients are near those in f32, as far as FP8 can be."""
    torch.manual_seed(0)
    ours, exact = Linear(256, 512).cuda(), nn.Linear(256, 512).cuda()
    exact.load_state_dict(ours.state_dict())
    x = torch.randn(128, 256, device="cuda")
    dy = torch.randn(128, 512, device="cuda")
    found = []
    for layer in (ours, exact):
        x.grad, x.requires_grad = None, True
        layer(x).float().backward(dy)
        found.append((x.grad, layer.weight.grad, layer.bias.grad))
    for ours, exact in zip(*found):
        error = ((ours - exact).norm() / exact.norm()).item()
        assert error < 0.1, error
