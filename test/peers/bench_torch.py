"""Times one training step (forward, backward, AdamW) of the networks that `lathe bench train` runs, in PyTorch.

Prints one JSON line per network: CPU and wall milliseconds per step (median), first step, peak resident memory in MB.

    python3 bench_torch.py [--threads N] [--steps N] [--compile] [NETWORK ...]

Where PyTorch offers a choice, the default is what was faster for it here (FASTER); --attention, --layout, --optimizer and
--norm set it by hand.
"""

import argparse
import json
import math
import resource
import statistics
import time

import torch
import torch.nn as nn
import torch.nn.functional as F


# How the current network is to be computed; main sets it before the network is made.
ATTENTION, NORM = "sdpa", "torch"


def attend(q, k, v, causal=False):
    """Scaled dot-product attention over [batch, heads, tokens, width]."""
    if ATTENTION == "sdpa":
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    s = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if causal:
        t = q.shape[-2]
        s = s.masked_fill(torch.ones(t, t, dtype=torch.bool).triu(1), float("-inf"))
    return torch.softmax(s, -1) @ v


class Attention(nn.Module):
    def __init__(self, d, heads):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(d, d) for _ in range(4))

    def forward(self, x):
        b, t, d = x.shape
        split = lambda z: z.view(b, t, self.heads, d // self.heads).transpose(1, 2)
        return self.o(attend(split(self.q(x)), split(self.k(x)), split(self.v(x))).transpose(1, 2).reshape(b, t, d))


class Block(nn.Module):
    def __init__(self, d, heads, hidden):
        super().__init__()
        self.n1, self.n2, self.a = nn.LayerNorm(d), nn.LayerNorm(d), Attention(d, heads)
        self.f1, self.f2 = nn.Linear(d, hidden), nn.Linear(hidden, d)

    def forward(self, x):
        x = x + self.a(self.n1(x))
        return x + self.f2(F.gelu(self.f1(self.n2(x))))


class ViT(nn.Module):
    def __init__(self, d=64, heads=4):
        super().__init__()
        self.patch = nn.Conv2d(1, d, 7, 7)
        self.cls, self.pos = nn.Parameter(torch.zeros(1, 1, d)), nn.Parameter(torch.zeros(1, 17, d))
        self.blocks = nn.Sequential(*[Block(d, heads, 2 * d) for _ in range(4)])
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, 10)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.pos
        return self.head(self.norm(self.blocks(x))[:, 0])


class Residual(nn.Module):
    def __init__(self, i, o, s):
        super().__init__()
        self.c1, self.b1 = nn.Conv2d(i, o, 3, s, 1, bias=False), nn.BatchNorm2d(o)
        self.c2, self.b2 = nn.Conv2d(o, o, 3, 1, 1, bias=False), nn.BatchNorm2d(o)
        self.short = nn.Identity() if i == o and s == 1 else nn.Sequential(nn.Conv2d(i, o, 1, s, bias=False), nn.BatchNorm2d(o))

    def forward(self, x):
        return F.relu(self.b2(self.c2(F.relu(self.b1(self.c1(x))))) + self.short(x))


class ResNet8(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16)
        self.stages = nn.Sequential(Residual(16, 16, 1), Residual(16, 32, 2), Residual(32, 64, 2))
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        return self.head(self.stages(F.relu(self.norm(self.stem(x)))).mean((2, 3)))


def mlp():
    sizes = [784, 1024, 1024, 1024, 1024]
    layers = [m for i, o in zip(sizes, sizes[1:]) for m in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(1024, 10))


class Same(nn.Conv2d):
    """A convolution without bias whose padding is TensorFlow's "same", for inputs of one size."""

    def __init__(self, i, o, k, s, size, groups=1):
        total = max((math.ceil(size / s) - 1) * s + k - size, 0)
        even = total % 2 == 0
        super().__init__(i, o, k, s, total // 2 if even else 0, groups=groups, bias=False)
        self.far = None if even else (total // 2, total - total // 2) * 2

    def forward(self, x):
        return super().forward(F.pad(x, self.far) if self.far else x)


class Bottleneck(nn.Module):
    def __init__(self, i, o, k, s, expand, size):
        super().__init__()
        mid, parts = i * expand, []
        norm = lambda n: nn.BatchNorm2d(n, 1e-3, 0.01)
        if expand > 1:
            parts += [nn.Conv2d(i, mid, 1, bias=False), norm(mid), nn.ReLU6(inplace=True)]
        parts += [Same(mid, mid, k, s, size, mid), norm(mid), nn.ReLU6(inplace=True), nn.Conv2d(mid, o, 1, bias=False), norm(o)]
        self.branch, self.sum = nn.Sequential(*parts), s == 1 and i == o

    def forward(self, x):
        return x + self.branch(x) if self.sum else self.branch(x)


def efficientnet_lite0(size=224, classes=1000):
    stem = [Same(3, 32, 3, 2, size), nn.BatchNorm2d(32, 1e-3, 0.01), nn.ReLU6(inplace=True)]
    blocks, c, size = [], 32, math.ceil(size / 2)
    for n, k, s, o in [(1, 3, 1, 16), (2, 3, 2, 24), (2, 5, 2, 40), (3, 3, 2, 80), (3, 5, 1, 112), (4, 5, 2, 192), (1, 3, 1, 320)]:
        for i in range(n):
            blocks.append(Bottleneck(c, o, k, s if i == 0 else 1, 6 if blocks else 1, size))
            size, c = math.ceil(size / s) if i == 0 else size, o
    head = [nn.Conv2d(c, 1280, 1, bias=False), nn.BatchNorm2d(1280, 1e-3, 0.01), nn.ReLU6(inplace=True)]
    return nn.Sequential(*stem, *blocks, *head, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, classes))


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        conv = lambda i, o, s=1: nn.Sequential(nn.Conv2d(i, o, 3, s, 1), nn.ReLU())
        self.e1, self.e2, self.e3, self.mid = conv(3, 16), conv(16, 32, 2), conv(32, 64, 2), conv(64, 64)
        self.u2, self.u1 = nn.ConvTranspose2d(64, 32, 2, 2), nn.ConvTranspose2d(32, 16, 2, 2)
        self.d2, self.d1, self.head = conv(64, 32), conv(32, 16), nn.Conv2d(16, 3, 1)

    def forward(self, x):
        a = self.e1(x)
        d = self.e2(a)
        e = self.mid(self.e3(d))
        f = self.d2(torch.cat([self.u2(e), d], 1))
        return self.head(self.d1(torch.cat([self.u1(f), a], 1)))


class CharLSTM(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.rnn, self.head = nn.Embedding(128, 32), nn.LSTM(32, 256, batch_first=True), nn.Linear(256, 128)

    def forward(self, x):
        return self.head(self.rnn(self.emb(x))[0]).transpose(1, 2)


class RMSNorm(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.g = nn.Parameter(torch.ones(d))

    def forward(self, x):
        if NORM == "torch":
            return F.rms_norm(x, self.g.shape, self.g, 1e-6)
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.g


class LlamaBlock(nn.Module):
    def __init__(self, d, heads, hidden):
        super().__init__()
        self.heads = heads
        self.n1, self.n2 = RMSNorm(d), RMSNorm(d)
        self.q, self.k, self.v, self.o = (nn.Linear(d, d, bias=False) for _ in range(4))
        self.gate, self.up, self.down = nn.Linear(d, hidden, bias=False), nn.Linear(d, hidden, bias=False), nn.Linear(hidden, d, bias=False)

    def forward(self, x, cos, sin):
        b, t, d = x.shape
        h = self.n1(x)
        split = lambda z: z.view(b, t, self.heads, d // self.heads).transpose(1, 2)

        def rope(z):  # rotate-half, as in LLaMA
            a, c = z.chunk(2, -1)
            return z * cos + torch.cat([-c, a], -1) * sin

        a = attend(rope(split(self.q(h))), rope(split(self.k(h))), split(self.v(h)), causal=True)
        x = x + self.o(a.transpose(1, 2).reshape(b, t, d))
        h = self.n2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class CharLlama(nn.Module):
    """CharLLaMA-4: 4 layers of width 128, 4 heads, SwiGLU of 384, rotary positions of base 10000, untied head."""

    def __init__(self, symbols=96, d=128, heads=4, hidden=384, depth=4, context=128):
        super().__init__()
        self.emb, self.norm, self.head = nn.Embedding(symbols, d), RMSNorm(d), nn.Linear(d, symbols, bias=False)
        self.blocks = nn.ModuleList([LlamaBlock(d, heads, hidden) for _ in range(depth)])
        w = d // heads
        angle = torch.outer(torch.arange(context).float(), 10000.0 ** (-torch.arange(0, w, 2).float() / w)).repeat(1, 2)
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())

    def forward(self, x):
        x = self.emb(x)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return self.head(self.norm(x)).transpose(1, 2)


labels = lambda n, *d: torch.randint(0, n, d)
NETWORKS = {
    "vit": (ViT, lambda: (torch.randn(128, 1, 28, 28), labels(10, 128)), F.cross_entropy),
    "vit384": (lambda: ViT(384, 6), lambda: (torch.randn(32, 1, 28, 28), labels(10, 32)), F.cross_entropy),
    "resnet": (ResNet8, lambda: (torch.randn(128, 3, 32, 32), labels(10, 128)), F.cross_entropy),
    "mlp": (mlp, lambda: (torch.randn(128, 784), labels(10, 128)), F.cross_entropy),
    "dw": (efficientnet_lite0, lambda: (torch.randn(8, 3, 224, 224), labels(1000, 8)), F.cross_entropy),
    "unet": (UNet, lambda: (torch.randn(16, 3, 32, 32), torch.randn(16, 3, 32, 32)), F.mse_loss),
    "lstm": (CharLSTM, lambda: (labels(128, 16, 64), labels(128, 16, 64)), F.cross_entropy),
    "gpt": (CharLlama, lambda: (labels(96, 16, 128), labels(96, 16, 128)), F.cross_entropy),
}


# Eager, one thread, against the other choices: attention 4 to 15 % faster, convolutional networks 17 to 25 %, fused AdamW
# 3 to 47 %; the RMS norms are alike.
FASTER = {"attention": "sdpa", "norm": "torch", "layout": "channels_last", "optimizer": "fused"}


def cpu():
    u = resource.getrusage(resource.RUSAGE_SELF)
    return (u.ru_utime + u.ru_stime) * 1e3


def peak_mb():
    """Peak resident memory: of this program alone, where the system says so (ru_maxrss counts that of the starter too)."""
    try:
        with open("/proc/self/status") as f:
            return next(int(line.split()[1]) for line in f if line.startswith("VmHWM")) // 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def main():
    global ATTENTION, NORM
    p = argparse.ArgumentParser()
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--steps", type=int, default=10)
    p.add_argument("--compile", action="store_true", help="torch.compile of network and loss")
    p.add_argument("--attention", choices=["sdpa", "explicit"])
    p.add_argument("--norm", choices=["torch", "explicit"], help="RMS norm")
    p.add_argument("--layout", choices=["plain", "channels_last"], help="of convolutional networks")
    p.add_argument("--optimizer", choices=["foreach", "fused", "loop"])
    p.add_argument("network", nargs="*", default=list(NETWORKS))
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    for name in a.network:
        how = FASTER | {k: v for k in FASTER if (v := getattr(a, k))}
        ATTENTION, NORM = how["attention"], how["norm"]
        make, data, loss = NETWORKS[name]
        torch.manual_seed(0)
        model, (x, y) = make(), data()
        if how["layout"] == "channels_last" and x.dim() == 4:
            model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
        objective = lambda x, y: loss(model(x), y)
        if a.compile:
            objective = torch.compile(objective)
        opt = torch.optim.AdamW(model.parameters(), 1e-3, foreach=how["optimizer"] == "foreach", fused=how["optimizer"] == "fused")
        cpus, walls = [], []
        for i in range(a.steps + 2):
            if i == 2:
                begin = time.perf_counter()
            elif i >= 4 and time.perf_counter() - begin > 4:
                break  # as `lathe bench train` does with steps that take long
            c, w = cpu(), time.perf_counter()
            opt.zero_grad()
            value = objective(x, y)
            value.backward()
            opt.step()
            cpus.append(cpu() - c)
            walls.append((time.perf_counter() - w) * 1e3)
        print(json.dumps({
            "network": name, "threads": a.threads, "compiled": a.compile, "how": how, "cpu_ms": round(statistics.median(cpus[2:]), 2),
            "wall_ms": round(statistics.median(walls[2:]), 2), "first_ms": round(walls[0], 1), "rss_mb": peak_mb(), "loss": value.item(),
            "parameters": sum(q.numel() for q in model.parameters()), "version": "PyTorch " + torch.__version__,
        }), flush=True)


if __name__ == "__main__":
    main()
