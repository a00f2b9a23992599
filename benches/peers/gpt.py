"""The GPT-2 that both peers train: PyTorch's own modules, attention and AdamW."""

import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    def __init__(self, channels, heads, linear=nn.Linear):
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.qkv, self.projection = linear(channels, 3 * channels), linear(channels, channels)
        self.fc1, self.fc2 = linear(channels, 4 * channels), linear(4 * channels, channels)

    def forward(self, x):
        b, t, c = x.shape
        q, k, v = (
            part.view(b, t, self.heads, c // self.heads).transpose(1, 2)
            for part in self.qkv(self.ln_1(x)).split(c, dim=2)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.projection(y.transpose(1, 2).reshape(b, t, c))
        return x + self.fc2(F.gelu(self.fc1(self.ln_2(x)), approximate="tanh"))


class GPT(nn.Module):
    def __init__(self, layers, channels, heads, length, vocab, linear=nn.Linear):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab, channels), nn.Embedding(length, channels)
        self.blocks = nn.ModuleList(Block(channels, heads, linear) for _ in range(layers))
        self.ln_f = nn.LayerNorm(channels)
        self.register_buffer("positions", torch.arange(length))
        self.apply(lambda m: [nn.init.normal_(p, std=0.02) for p in m.parameters() if p.dim() > 1])

    def forward(self, tokens, targets):
        x = self.wte(tokens) + self.wpe(self.positions)
        for block in self.blocks:
            x = block(x)
        return self.loss(x, targets)

    def loss(self, x, targets):
        logits = self.ln_f(x) @ self.wte.weight.T
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def optimizer_of(model):
    """Fused AdamW with weight decay on matrices alone."""
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=3e-4, betas=(0.9, 0.95), fused=True)


def step_of(model, compiled, optimizer, shape):
    """A training step in bf16 on random tokens of a batch, length and vocabulary; gives the loss."""
    batch, length, vocab = shape
    device = next(model.parameters()).device

    def step():
        window = torch.randint(vocab, (batch, length + 1), device=device)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = compiled(window[:, :-1], window[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return step
