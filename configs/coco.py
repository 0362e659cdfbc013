"""Your own data: a COCO JSON with a few labelled images, a folder of unlabelled ones, a COCO JSON for validation.

python -m cast_jax.main --config configs/coco.py:cast --workdir runs/mine \
    --config.data.labelled=labelled.json --config.data.unlabelled=unlabelled/ --config.data.val=val.json

The images of a JSON lie in the folder beside it with its name (``labelled/``), or in ``data.labelled_images``.
"""

from configs import common


def get_config(argument: str = "cast"):
    """``step[,seed=0][,smoke][,size=518][,encoder=dinov2_s][,decoder=dpt][,teacher=student_l][,system=cast]``.

    ``size`` is the side of the square that images are fitted into: a multiple of 14, and with an encoder of stride 32
    beside the teacher's 14, of 224 (448 if it is left out).
    """
    arguments = common.parse_arguments(argument, size=0, encoder="dinov2_s", decoder="dpt", teacher="student_l")
    if arguments.smoke and arguments.size:
        raise ValueError("smoke has small images of its own: leave size= out")
    config = common.base(arguments, "configs/coco.py")
    config.data.kind = "coco"
    common.student_parts(config, arguments)
    side = arguments.size or (518 if arguments.encoder.startswith("dinov2") else 448)
    config.data.image_size = (side, side)
    config.data.update(common.COCO)
    if arguments.smoke:
        common.smoke(config)
    common.teacher(config, arguments)
    common.system(config, arguments)
    return config
