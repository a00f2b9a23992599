"""The Llama that both peers train: PyTorch's own modules, attention and AdamW; one product for q, k and
v, and one for gate and up."""

import torch
import torch.nn.functional as F
from torch import nn


def rotations(length, size, theta=1e4):
    """(T, D / 2) each: cosines and sines of angles."""
    frequencies = theta ** (-torch.arange(0, size, 2).float() / size)
    angles = torch.arange(length).float()[:, None] * frequencies
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class Block(nn.Module):
    def __init__(self, channels, heads, kv_heads, width, linear):
        super().__init__()
        self.heads, self.kv_heads, size = heads, kv_heads, channels // heads
        self.norm_1, self.norm_2 = nn.RMSNorm(channels, eps=1e-5), nn.RMSNorm(channels, eps=1e-5)
        self.qkv = linear(channels, (heads + 2 * kv_heads) * size, bias=False)
        self.projection = linear(channels, channels, bias=False)
        self.gate_up = linear(channels, 2 * width, bias=False)
        self.down = linear(width, channels, bias=False)

    def forward(self, x, cos, sin):
        b, t, c = x.shape
        size = c // self.heads
        widths = [self.heads * size, self.kv_heads * size, self.kv_heads * size]
        q, k, v = (
            part.view(b, t, -1, size).transpose(1, 2)
            for part in self.qkv(self.norm_1(x)).split(widths, dim=2)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.projection(y.transpose(1, 2).reshape(b, t, c))
        gate, up = self.gate_up(self.norm_2(x)).chunk(2, dim=2)
        return x + self.down(F.silu(gate) * up)


class Llama(nn.Module):
    def __init__(self, layers, channels, heads, kv_heads, width, length, vocab, linear=nn.Linear):
        super().__init__()
        self.embedding = nn.Embedding(vocab, channels)
        blocks = (Block(channels, heads, kv_heads, width, linear) for _ in range(layers))
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.RMSNorm(channels, eps=1e-5)
        self.head = nn.Linear(channels, vocab, bias=False)
        cos, sin = rotations(length, channels // heads)
        self.register_buffer("cos", cos)
        self.register_buffer("sin", sin)
        self.apply(lambda m: [nn.init.normal_(p, std=0.02) for p in m.parameters() if p.dim() > 1])

    def forward(self, tokens, targets):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return self.loss(x, targets)

    def loss(self, x, targets):
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1).float(), targets.flatten())
