"""Published PyTorch weights become ours: strict rules from source keys to parameters, proven by ``--verify``."""
