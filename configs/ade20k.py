"""ADE20K's 100 instance classes, 10 labelled images of each: 1,000 labelled and 2,537 unlabelled images.

python scripts/make_splits.py ade20k PATH --output splits
python -m cast_jax.main --config configs/ade20k.py:cast --workdir runs/ade20k --config.data.root=PATH \
    --config.data.split=splits/ade20k_10_per_class_seed0.json

``root`` is ADEChallengeData2016 with annotations_instance/ in it, or ADE20K_2021_17_01. ``encoder`` and ``decoder`` are
those of configs/cityscapes.py.
"""

from configs import common


def get_config(argument: str = "cast"):
    """``step[,seed=0][,smoke][,encoder=dinov2_s][,decoder=dpt][,teacher=student_l][,system=cast]``."""
    arguments = common.parse_arguments(argument, encoder="dinov2_s", decoder="dpt", teacher="student_l")
    config = common.base(arguments, "configs/ade20k.py")
    config.data.kind = "ade20k"
    config.data.update({"root": "", "split": "", "labelled": 0, "category_ids": "instance100"})
    common.student_parts(config, arguments)
    side = 518 if arguments.encoder.startswith("dinov2") else 448
    config.data.image_size = (side, side)  # (chosen)
    config.steps.distill.train.steps = 80_000
    if arguments.smoke:
        common.smoke(config)
        config.data.labelled = 4
    common.teacher(config, arguments)
    common.system(config, arguments)
    return config
