"""The contrastive loss with its gradient against PyTorch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from benchmarks import torch_contrastive
from benchmarks.timing import medians, peak_mib, run

from cast_jax.contrastive.config import ContrastiveConfig
from cast_jax.contrastive.loss import contrastive_loss


def contrastive(repeats: int) -> list[dict[str, Any]]:
    """Loss and gradient at K = 256, embedding 128, all pixels or 1,024 of an image as anchors, against PyTorch.

    PyTorch's versions run where their time stays below a minute or so; the reference sampler in the smallest case only.
    """
    literal_limit, blocked_limit = 2**28, 2**29  # anchors x pixels: 1 GiB of scores; about half a minute
    rows = []
    for images, pixels, dim, anchors in (
        (1, 4_096, 109, 1_024),
        (1, 16_384, 109, 1_024),
        (1, 32_768, 109, 1_024),
        (1, 32_768, 201, 1_024),
        (8, 16_384, 109, 1_024),
        (1, 4_096, 109, None),
        (1, 16_384, 109, None),
        (1, 16_384, 201, None),
        (1, 32_768, 109, None),
        (1, 32_768, 109, 4_096),
    ):
        case = _ContrastiveCase(images, pixels, dim, anchors)
        size = images**2 * (anchors or pixels) * pixels
        variants: dict[str, Callable[[], Any]] = {"jax": case.ours("mixture_proposals")}
        if size <= literal_limit:
            variants["literal"] = case.torch(torch_contrastive.literal)
        if size <= blocked_limit:
            variants["blocked"] = case.torch(torch_contrastive.blocked)
        memory = {name: peak_mib(call) for name, call in variants.items()}
        times = medians(variants, repeats if size < 2**27 else 3)
        row: dict[str, Any] = {"images": images, "pixels": pixels, "map": dim, "anchors": anchors or "all"}
        row |= {"jax ms": round(1e3 * times["jax"], 1), "jax MiB": memory["jax"]}
        for name in ("literal", "blocked"):
            known = name in times
            row[f"torch {name} ms"] = round(1e3 * times[name], 1) if known else ""
            row[f"{name} MiB"] = memory[name] if known else ""
            row[f"{name} / jax"] = round(times[name] / times["jax"], 1) if known else ""
        rows.append(row)
        print(row, flush=True)
    small = _ContrastiveCase(1, 4_096, 109, 1_024)
    for sampler in ("mixture_proposals", "inverse_cdf", "categorical"):
        milliseconds = 1e3 * medians({sampler: small.ours(sampler)}, 1)[sampler]
        print(f"{sampler}: {milliseconds:.0f} ms for 1 image of 4,096 pixels with 1,024 anchors", flush=True)
    independent = _gradient_noise(ContrastiveConfig(sampler="inverse_cdf"))
    for pools in (1, 8, 16, 32):
        ratio = _gradient_noise(ContrastiveConfig(max_pools=pools)) / independent
        print(
            f"{pools} pools for 32 groups of 128 anchors: {ratio:.2f} x the independent draws' gradient noise",
            flush=True,
        )
    return rows


def _gradient_noise(config: ContrastiveConfig, keys: int = 12) -> float:
    """Standard deviation of the loss's gradient over draws, for 16 instances of 256 pixels in a row, half learned."""
    rng, pixels, embedding = np.random.default_rng(0), 4_096, 128
    instance = np.repeat(np.arange(16), pixels // 16)
    logits = 4 * rng.normal(size=(pixels, 109)) + 8 * np.eye(109)[instance]
    g = np.exp(logits - logits.max(-1, keepdims=True)).astype(np.float32)[None]
    centres = rng.normal(size=(16, embedding))[instance]
    views = [(centres + rng.normal(size=centres.shape)).astype(np.float32)[None] for _ in range(2)]
    valid = jnp.ones((1, pixels), bool)

    @jax.jit
    def gradient(key, z_weak, z_strong, g):
        def mean(z_weak, z_strong):
            total, count, _ = contrastive_loss(key, config, z_weak=z_weak, z_strong=z_strong, g=g, valid=valid)
            return total / count

        return jnp.stack(jax.grad(mean, argnums=(0, 1))(z_weak, z_strong)).ravel()

    found = np.stack([gradient(key, *views, g) for key in jax.random.split(jax.random.key(0), keys)])
    return float(np.sqrt(np.sum(np.var(found, axis=0, ddof=1))))


class _ContrastiveCase:
    """Random embeddings and a map of softmaxes, for us and for PyTorch."""

    negatives, embedding = 256, 128

    def __init__(self, images: int, pixels: int, dim: int, anchors: int | None):
        rng = np.random.default_rng(0)
        logits = 4 * rng.normal(size=(images, pixels, dim)).astype(np.float32)
        self.g = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        self.z_weak, self.z_strong = (_unit(rng.normal(size=(images, pixels, self.embedding))) for _ in range(2))
        self.anchors = anchors

    def ours(self, sampler: str) -> Callable[[], None]:
        config = ContrastiveConfig(num_negatives=self.negatives, num_anchors=self.anchors, sampler=sampler)
        valid = jnp.ones(self.g.shape[:2], bool)

        def loss(z_weak, z_strong, g):
            total, count, _ = contrastive_loss(
                jax.random.key(1), config, z_weak=z_weak, z_strong=z_strong, g=g, valid=valid
            )
            return total / count

        operands = tuple(jnp.asarray(array) for array in (self.z_weak, self.z_strong, self.g))
        step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*operands).compile()
        return functools.partial(run, step, *operands)

    def torch(self, version: Callable[..., float]) -> Callable[[], None]:
        import torch

        z_weak, z_strong, g = (torch.from_numpy(array).flatten(0, 1) for array in (self.z_weak, self.z_strong, self.g))
        images, pixels = self.g.shape[:2]

        def step() -> None:
            leaves = [z.clone().requires_grad_() for z in (z_weak, z_strong)]
            anchors = torch.arange(images * pixels)
            if self.anchors:
                chosen = torch.rand(images, pixels).topk(self.anchors).indices
                anchors = (chosen + pixels * torch.arange(images)[:, None]).flatten()
            version(*leaves, g, anchors, self.negatives, 0.2)

        return step


def _unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)
