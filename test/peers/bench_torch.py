"""Times one training step (forward, backward, AdamW) of the networks that `lathe bench train` runs, in PyTorch.

Prints one JSON line per network: CPU and wall milliseconds per step (median), first step, peak resident memory in MB.

    python3 bench_torch.py [--threads N] [--steps N] [--compile] [NETWORK ...]
"""

import argparse
import json
import resource
import time

import torch
import torch.nn as nn
import torch.nn.functional as F


class Attention(nn.Module):
    def __init__(self, d, heads):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(d, d) for _ in range(4))

    def forward(self, x):
        b, t, d = x.shape
        split = lambda z: z.view(b, t, self.heads, d // self.heads).transpose(1, 2)
        q, k, v = split(self.q(x)), split(self.k(x)), split(self.v(x))
        p = torch.softmax(q @ k.transpose(-1, -2) / (d // self.heads) ** 0.5, -1)
        return self.o((p @ v).transpose(1, 2).reshape(b, t, d))


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


def depthwise():
    layers, c = [nn.Conv2d(3, 32, 3, 2, 1)], 32
    for o, s, k in [(16, 1, 3), (24, 2, 3), (40, 2, 5), (80, 2, 3), (112, 1, 5)]:
        e = 6 * c
        layers += [nn.Conv2d(c, e, 1), nn.BatchNorm2d(e), nn.ReLU(), nn.Conv2d(e, e, k, s, k // 2, groups=e), nn.BatchNorm2d(e), nn.ReLU(), nn.Conv2d(e, o, 1), nn.BatchNorm2d(o)]
        c = o
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 10))


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
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.g


class LlamaBlock(nn.Module):
    def __init__(self, d, heads):
        super().__init__()
        self.n1, self.n2, self.a = RMSNorm(d), RMSNorm(d), Attention(d, heads)
        self.gate, self.up, self.down = nn.Linear(d, 4 * d, bias=False), nn.Linear(d, 4 * d, bias=False), nn.Linear(4 * d, d, bias=False)

    def forward(self, x):
        x = x + self.a(self.n1(x))
        h = self.n2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class CharLlama(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.blocks, self.head = nn.Embedding(96, 128), nn.Sequential(*[LlamaBlock(128, 4) for _ in range(4)]), nn.Linear(128, 96)

    def forward(self, x):
        return self.head(self.blocks(self.emb(x))).transpose(1, 2)


labels = lambda n, *d: torch.randint(0, n, d)
NETWORKS = {
    "vit": (ViT, lambda: (torch.randn(128, 1, 28, 28), labels(10, 128)), F.cross_entropy),
    "vit384": (lambda: ViT(384, 6), lambda: (torch.randn(32, 1, 28, 28), labels(10, 32)), F.cross_entropy),
    "resnet": (ResNet8, lambda: (torch.randn(128, 3, 32, 32), labels(10, 128)), F.cross_entropy),
    "mlp": (mlp, lambda: (torch.randn(128, 784), labels(10, 128)), F.cross_entropy),
    "dw": (depthwise, lambda: (torch.randn(8, 3, 64, 64), labels(10, 8)), F.cross_entropy),
    "unet": (UNet, lambda: (torch.randn(16, 3, 32, 32), torch.randn(16, 3, 32, 32)), F.mse_loss),
    "lstm": (CharLSTM, lambda: (labels(128, 16, 64), labels(128, 16, 64)), F.cross_entropy),
    "gpt": (CharLlama, lambda: (labels(96, 16, 128), labels(96, 16, 128)), F.cross_entropy),
}


def cpu():
    u = resource.getrusage(resource.RUSAGE_SELF)
    return (u.ru_utime + u.ru_stime) * 1e3


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--steps", type=int, default=10)
    p.add_argument("--compile", action="store_true")
    p.add_argument("network", nargs="*", default=list(NETWORKS))
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    for name in a.network:
        make, data, loss = NETWORKS[name]
        torch.manual_seed(0)
        model, (x, y) = make(), data()
        step_model = torch.compile(model) if a.compile else model
        opt = torch.optim.AdamW(model.parameters(), 1e-3)
        cpus, walls = [], []
        for _ in range(a.steps + 2):
            c, w = cpu(), time.perf_counter()
            opt.zero_grad()
            loss(step_model(x), y).backward()
            opt.step()
            cpus.append(cpu() - c)
            walls.append((time.perf_counter() - w) * 1e3)
        median = lambda v: sorted(v)[len(v) // 2]
        print(json.dumps({
            "network": name, "threads": a.threads, "compiled": a.compile, "cpu_ms": round(median(cpus[2:]), 2),
            "wall_ms": round(median(walls[2:]), 2), "first_ms": round(walls[0], 1),
            "rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        }), flush=True)


if __name__ == "__main__":
    main()
