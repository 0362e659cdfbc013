"""The contrastive loss with its gradient against PyTorch."""

from __future__ import annotations

import functools
import itertools
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

    PyTorch's versions run where their time stays below a minute or so.
    """
    literal_limit, blocked_limit = 2**28, 2**29  # anchors x pixels: 1 GiB of scores; about half a minute
    cases = list(itertools.product((1, 8), (4_096, 16_384, 32_768), (109, 201), (1_024, None)))
    rows = []
    for images, pixels, dim, anchors in [*cases, (1, 32_768, 109, 4_096)]:
        case = _ContrastiveCase(images, pixels, dim, anchors)
        size = images**2 * (anchors or pixels) * pixels
        variants: dict[str, Callable[[], Any]] = {"jax": case.ours()}
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
    return rows


def samplers(repeats: int) -> list[dict[str, Any]]:
    """The samplers with 1,024 anchors of one image; the reference, once, in the smallest case only."""
    rows: list[dict[str, Any]] = []
    for pixels in (4_096, 16_384, 32_768):
        case = _ContrastiveCase(1, pixels, 109, 1_024)
        times = medians({name: case.ours(sampler=name) for name in ("mixture_proposals", "inverse_cdf")}, repeats)
        if not rows:
            times |= medians({"categorical": case.ours(sampler="categorical")}, 1)
        rows.append({"pixels": pixels} | {f"{name} ms": round(1e3 * seconds, 1) for name, seconds in times.items()})
        print(rows[-1], flush=True)
    return [rows[0] | dict.fromkeys(rows[0], "") | row for row in rows]


def gradient_noise(repeats: int) -> list[dict[str, Any]]:
    """Standard deviation of the gradient over draws, over that of independent draws, and the time, by pools.

    All pixels of one image are anchors; ``repeats`` of the time only.
    """
    rows = []
    for pixels, pools in ((4_096, (1, 8, 16, 32)), (16_384, (32, 64, 128))):
        independent = _gradient_noise(pixels, ContrastiveConfig(sampler="inverse_cdf"))
        times = medians(
            {str(count): _ContrastiveCase(1, pixels, 109, None).ours(max_pools=count) for count in pools}, repeats
        )
        for count in pools:
            noise = _gradient_noise(pixels, ContrastiveConfig(max_pools=count)) / independent
            row = {"pixels": pixels, "groups": pixels // 128, "pools": count, "noise": round(noise, 2)}
            rows.append(row | {"ms": round(1e3 * times[str(count)], 1)})
            print(rows[-1], flush=True)
    return rows


def _gradient_noise(pixels: int, config: ContrastiveConfig, keys: int = 12) -> float:
    """Standard deviation of the loss's gradient over draws, for 16 instances, each in a row, half learned."""
    rng, embedding = np.random.default_rng(0), 128
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

    def ours(self, **options: Any) -> Callable[[], None]:
        config = ContrastiveConfig(num_negatives=self.negatives, num_anchors=self.anchors, **options)
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
