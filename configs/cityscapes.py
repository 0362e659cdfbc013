"""Cityscapes, 10 % labelled: 298 labelled and 2,677 unlabelled images, 8 classes.

python -m cast_jax.main --config configs/cityscapes.py:cast --workdir runs/cityscapes --config.data.root=PATH

``root`` holds leftImg8bit/ and gtFine/ as released. The rows of the paper's Table 5 are other parts of the student:

    encoders: configs/cityscapes.py:cast,encoder=resnet50   (or sam2_s; dinov2_s is the paper's choice)
    decoders: configs/cityscapes.py:cast,decoder=fpn        (dpt is the paper's choice)

The paper's teacher without training, from converted weights of both networks:

    configs/cityscapes.py:zero_shot,teacher=grounded_sam2_l
    with --config.init.teacher.detector=PATH --config.init.teacher.segmenter=PATH
"""

from configs import common


def get_config(argument: str = "cast"):
    """``step[,seed=0][,smoke][,labelled=298][,encoder=dinov2_s][,decoder=dpt][,teacher=student_l][,system=cast]``."""
    arguments = common.parse_arguments(argument, labelled=298, encoder="dinov2_s", decoder="dpt", teacher="student_l")
    config = common.base(arguments, "configs/cityscapes.py")
    config.data.kind = "cityscapes"
    config.data.update({"root": "", "split": "", "labelled": arguments.labelled})
    common.student_parts(config, arguments)
    if arguments.smoke:
        common.smoke(config)
        config.data.labelled = 4
    common.teacher(config, arguments)
    common.system(config, arguments)
    return config
