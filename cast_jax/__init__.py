"""CAST: semi-supervised instance segmentation in JAX, by contrastive adaptation and distillation (README.md)."""
