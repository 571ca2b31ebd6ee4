"""NanoAdam as the paper states it, and nothing more: full-size float64 moments and a boolean mask, no speed.

Written from the restated Algorithm 1 and the meanings of DESIGN, sharing no code with the library.
"""

import itertools
import math

import numpy as np


def chunk_bounds(shape, max_chunk=4096):
    """(start, stop) of every chunk in the flattened tensor."""
    rows, cols = shape[0], math.prod(shape[1:])
    if cols <= max_chunk:
        block = 1
        while block * 2 * cols <= max_chunk:
            block *= 2
        edges = [min(rows, r) * cols for r in range(0, rows + block, block)]
        return [(a, b) for a, b in itertools.pairwise(edges) if b > a]
    pieces = math.ceil(cols / max_chunk)
    piece = min(max_chunk, math.ceil(math.ceil(cols / pieces) / 64) * 64)
    return [(r * cols + a, r * cols + min(a + piece, cols)) for r in range(rows) for a in range(0, cols, piece)]


def smallest_mask(weight, density, *, criterion="smallest", keep_zeros=False):
    """Boolean mask of the weights that Algorithm 1 selects; `weight` is a float64 numpy array."""
    flat = weight.reshape(-1)
    mask = np.zeros(flat.size, dtype=bool)
    sign = {"smallest": 1, "largest": -1}[criterion]
    for start, stop in chunk_bounds(weight.shape):
        keep = min(stop - start, max(1, round(density * (stop - start))))

        def rank(i):
            isnan = math.isnan(flat[i])
            return sign * isnan, 0.0 if isnan else sign * abs(flat[i]), i  # NaN counts as largest

        order = [i for i in sorted(range(start, stop), key=rank) if not (keep_zeros and flat[i] == 0)]
        mask[order[:keep]] = True
    return mask.reshape(weight.shape)


class Oracle:
    """One tensor. `density` is a function of the step; the caller says which weights the library has now."""

    def __init__(self, weight, *, lr, betas, eps, weight_decay, density, mask_interval, moments="carry", **rule):
        self.w = weight.astype(np.float64)
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.density, self.mask_interval, self.moments, self.rule = density, mask_interval, moments, rule
        self.m, self.v = np.zeros_like(self.w), np.zeros_like(self.w)
        self.age = np.zeros(self.w.shape, dtype=int)
        self.mask, self.k, self.t = None, None, 0

    def refresh(self, weights_now):
        k = self.density(self.t)
        if self.mask is None or k != self.k or self.t % self.mask_interval == 0:
            new = smallest_mask(weights_now.astype(np.float64), k, **self.rule)
            gone = ~new if self.moments == "carry" else np.ones_like(new)
            for moment in (self.m, self.v, self.age):
                moment[gone] = 0
            self.mask, self.k = new, k

    def step(self, gradient):
        b1, b2 = self.betas
        i = self.mask
        g = gradient.astype(np.float64)[i]
        self.m[i] = b1 * self.m[i] + (1 - b1) * g
        self.v[i] = b2 * self.v[i] + (1 - b2) * g * g
        self.age[i] += 1
        m_hat = self.m[i] / (1 - b1 ** self.age[i])
        v_hat = self.v[i] / (1 - b2 ** self.age[i])
        self.w[i] -= self.lr * self.weight_decay * self.w[i]
        self.w[i] -= self.lr * m_hat / (np.sqrt(v_hat) + self.eps)
        self.t += 1
