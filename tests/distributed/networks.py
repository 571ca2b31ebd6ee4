"""A small network with something of everything, and batches for each process."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class Network(nn.Module):
    """Matrices, an embedding, a convolution, a norm, a layer that some batches do not reach, a head."""

    def __init__(self, norm="layer", bias=True, checkpointing=None):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(40, 16)
        self.conv = nn.Conv1d(16, 24, 3, padding=1, bias=bias)
        self.norm = nn.BatchNorm1d(24) if norm == "batch" else nn.GroupNorm(4, 24, affine=bias)
        self.inner = nn.Linear(24, 32, bias=bias)
        self.seldom = nn.Linear(32, 32, bias=bias)
        self.head = nn.Linear(32, 4, bias=bias)
        self.checkpointing = checkpointing

    def block(self, hidden):
        return torch.tanh(self.inner(hidden))

    def forward(self, ids, seldom=False):
        hidden = self.norm(self.conv(self.embedding(ids).transpose(1, 2))).mean(-1)
        if self.checkpointing is None:
            hidden = self.block(hidden)
        else:
            hidden = checkpoint(self.block, hidden, use_reentrant=self.checkpointing == "reentrant")
        if seldom:
            hidden = hidden + torch.tanh(self.seldom(hidden))
        return self.head(hidden)


def batch(rank, number):
    """On the default device, so that tests/gpu can do the same."""
    ids = torch.randint(0, 40, (6, 5), generator=torch.Generator().manual_seed(100 * number + rank), device="cpu")
    return ids.to(torch.get_default_device())


def reaches(rank, number):
    """Whether a batch reaches the layer that is seldom reached."""
    return number % 3 == 2 or (number % 3 == 1 and rank == 0)


def loss_of(model, rank, number):
    return model(batch(rank, number), seldom=reaches(rank, number)).float().square().mean()


def bits(model):
    return torch.cat([t.detach().reshape(-1).double() for t in [*model.parameters(), *model.buffers()]])
