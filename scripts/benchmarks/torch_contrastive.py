"""The contrastive loss in PyTorch, to compare with: as one would write it from the paper, and as fast as we could.

Both draw K negatives in proportion to d(p, r) = 1 - <ĝ_p, ĝ_r> among all pixels but the anchor, take the mean NT-Xent
loss and leave its gradient in ``z_weak.grad`` and ``z_strong.grad``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch

BLOCK = 128  # anchors at a time in the fast version; as many as share a pool of proposals in ours


@dataclasses.dataclass(frozen=True)
class Contrast:
    """The contrastive term of an update: how it is computed, anchors an image, negatives, temperature, weight."""

    version: Callable[..., float]
    anchors: int
    negatives: int = 256
    temperature: float = 0.2
    weight: float = 0.2

    def __call__(
        self, projection: torch.nn.Module, features: Sequence[torch.Tensor], fused_map: torch.Tensor
    ) -> torch.Tensor:
        """A scalar with the weighted loss's gradient.

        Features of the weak and the strong view and the fused map of the weak one are ``[images, channels, h, w]``.
        """
        flat = [view.permute(0, 2, 3, 1).flatten(0, 2) for view in (*features, fused_map)]
        embeddings, g = [torch.nn.functional.normalize(projection(view), dim=-1) for view in flat[:2]], flat[2]
        anchors = torch.randperm(len(g), device=g.device)[: self.anchors * len(fused_map)]
        leaves = [z.detach().requires_grad_() for z in embeddings]
        self.version(*leaves, g, anchors, self.negatives, self.temperature)
        gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
        products = [(z * to_z).sum() for z, to_z in zip(embeddings, gradients, strict=True)]
        return self.weight * torch.stack(products).sum()


def projection_head(features: int) -> torch.nn.Module:
    """From pixel features to embeddings."""
    return torch.nn.Sequential(torch.nn.Linear(features, 128), torch.nn.ReLU(), torch.nn.Linear(128, 128))


@torch.no_grad()
def pseudo_probability(mask_logits: torch.Tensor, class_logits: torch.Tensor) -> torch.Tensor:
    """The fused map (the paper's section 3.2): instance probabilities beside class probabilities of each pixel."""
    masks = mask_logits.softmax(1)
    classes = torch.einsum("bqhw,bqc->bchw", masks, class_logits.softmax(-1))
    return torch.cat([masks, classes], 1)


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
