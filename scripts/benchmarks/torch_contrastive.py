"""The contrastive loss in PyTorch, to compare with: as one would write it from the paper, and as fast as we could.

Both draw K negatives in proportion to d(p, r) = 1 - <ĝ_p, ĝ_r> among all pixels but the anchor, take the mean NT-Xent
loss and leave its gradient in ``z_weak.grad`` and ``z_strong.grad``.
"""

from __future__ import annotations

import torch

BLOCK = 128  # anchors at a time in the fast version; as many as share a pool of proposals in ours


def literal(
    z_weak: torch.Tensor, z_strong: torch.Tensor, g: torch.Tensor, anchors: torch.Tensor, k: int, temperature: float
) -> float:
    """The whole score matrix, ``torch.multinomial`` on its rows, K gathered embeddings an anchor.

    Embeddings are [pixels, E], ``g`` [pixels, D], ``anchors`` positions among the pixels.
    """
    negatives = torch.multinomial(_scores(g, anchors), k, replacement=True)
    z_anchors = z_weak[anchors]
    positive = (z_anchors * z_strong[anchors]).sum(-1) / temperature
    negative = torch.einsum("ae,ake->ak", z_anchors, z_strong[negatives]) / temperature
    loss = _nt_xent(positive, negative).mean()
    loss.backward()
    return float(loss.detach())


def blocked(
    z_weak: torch.Tensor, z_strong: torch.Tensor, g: torch.Tensor, anchors: torch.Tensor, k: int, temperature: float
) -> float:
    """Block by block: cumulative sums are inverted by binary search, similarities picked from a dense product."""
    total = 0.0
    for block in anchors.split(BLOCK):
        cumulative = _scores(g, block).cumsum(-1)
        uniform = torch.rand(len(block), k) * cumulative[:, -1:]
        negatives = torch.searchsorted(cumulative, uniform, right=True).clamp_(max=len(g) - 1)
        z_anchors = z_weak[block]
        positive = (z_anchors * z_strong[block]).sum(-1) / temperature
        negative = (z_anchors @ z_strong.T).gather(1, negatives) / temperature
        loss = _nt_xent(positive, negative).sum() / len(anchors)
        loss.backward()
        total += float(loss.detach())
    return total


def _scores(g: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        unit = g / g.norm(dim=-1, keepdim=True)
        scores = (1.0 - unit[anchors] @ unit.T).clamp_(min=1e-12)  # of equal pixels any is as good as another
        scores[torch.arange(len(anchors)), anchors] = 0.0
        return scores


def _nt_xent(positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
    return torch.logsumexp(torch.cat([positive[:, None], negative], dim=1), dim=1) - positive
