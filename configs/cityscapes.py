"""Cityscapes, 10 % labelled: 298 labelled and 2,677 unlabelled images, 8 classes.

python -m cast_jax.main --config configs/cityscapes.py:cast --workdir runs/cityscapes --config.data.root=PATH

``root`` holds leftImg8bit/ and gtFine/ as released.
"""

from configs import common


def get_config(argument: str = "cast"):
    """``step[,seed=0][,smoke][,labelled=298]``."""
    arguments = common.parse_arguments(argument, labelled=298)
    config = common.base(arguments, "configs/cityscapes.py")
    config.data.kind = "cityscapes"
    config.data.update({"root": "", "split": "", "labelled": arguments.labelled})
    if arguments.smoke:
        common.smoke(config)
        config.data.labelled = 4
    return config
