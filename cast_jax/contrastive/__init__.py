"""The paper's heart: fused map, debias score, exact samplers, the contrastive loss and its diagnostics."""
