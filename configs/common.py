"""What every configuration shares: parsing ``file.py:step,key=value`` and the paper's hyper-parameters.

Values marked (chosen) are ours where the paper is silent; the others are its table.
"""

from ml_collections import ConfigDict, FrozenConfigDict
from ml_collections.config_dict import placeholder

STEPS = (
    "cast",
    *("pretrain", "finetune", "pseudo_label", "adapt", "burn_in", "distill", "refine", "student_supervised"),
    *("evaluate", "zero_shot", "audit", "check_data"),  # what looks at models, at a run, and at its images
)
PIPELINE = (
    "finetune",
    "pseudo_label/finetuned",
    "adapt",
    "pseudo_label/adapted",
    "distill",
    "refine",
    "student_supervised",
)

# CAST, and what the paper compares it with; see ``system``.
SYSTEMS = (
    "cast",
    *("supervised", "self_training", "ema_teacher"),
    *("pais", "guided_distillation", "kd_unlabelled", "kd"),
)


# Own data: ``split`` divides ``labelled``; without ``unlabelled`` the rest of it is the pool.
COCO = {"labelled": "", "unlabelled": "", "val": "", "labelled_images": "", "val_images": "", "split": ""}


def parse_arguments(
    text: str, steps: tuple[str, ...] = STEPS, **defaults: bool | int | float | str
) -> FrozenConfigDict:
    """Parses ``"distill,seed=1,smoke"``: the step, then arguments typed by their defaults (a bare name sets a bool).

    Raises:
      ValueError: an unknown step, argument or system, listing the known ones, or a value of the wrong type.
    """
    defaults = {"seed": 0, "smoke": False, "system": "cast", **defaults}
    values, given = dict(defaults), set[str]()
    step, *arguments = text.split(",")
    if step not in steps:
        raise ValueError(f"unknown step {step!r}; known steps: {', '.join(steps)}")
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name in given:
            raise ValueError(f"config argument {name} is given twice")
        given.add(name)
        if name not in defaults:
            raise ValueError(f"unknown config argument {name!r}; known: {', '.join(defaults)}")
        kind = type(defaults[name])
        if kind is bool:
            known = {"": True, "true": True, "1": True, "false": False, "0": False}
            if value.lower() not in known:
                raise ValueError(f"config argument {name}={value!r} must be true or false")
            values[name] = known[value.lower()]
        else:
            try:
                values[name] = kind(value)
            except ValueError as error:
                raise ValueError(f"config argument {name}={value!r} must be of type {kind.__name__}") from error
    if values["system"] not in SYSTEMS:
        raise ValueError(f"unknown system {values['system']!r}; known systems: {', '.join(SYSTEMS)}")
    return FrozenConfigDict({"step": step, **values})


def base(arguments: FrozenConfigDict, file: str) -> ConfigDict:
    """The paper's protocol, with the data and the models still to be named."""
    config = ConfigDict()
    config.file = file
    config.step = arguments.step
    config.seed = arguments.seed
    config.pipeline = PIPELINE
    config.embedding_dim = 128  # of the projection head (chosen)
    config.runtime = {
        "compilation_cache": placeholder(str),
        "debug_nans": False,
        "fused_attention": True,
        "xla_flags": "",
    }
    config.mesh = {"data": -1, "fsdp": 1}
    config.profile = {"start": 10, "steps": 0}  # trace so many updates of each trained step, after the first ten
    # Several processes: "auto" (SLURM, Open MPI, Kubernetes, TPU pods), or HOST:PORT of process 0 with the two numbers.
    config.distributed = {"coordinator": "", "num_processes": 0, "process_id": -1, "timeout": 300}  # seconds
    config.init = {"teacher": "", "student": ""}  # folders of converted weights; empty: fresh
    config.model = {"teacher": {"name": "student_l"}, "student": {"name": "student_s"}}
    config.data = {
        "kind": "",
        "image_size": (518, 1036),
        "max_instances": 100,
        "on_unreadable": "error",  # or "skip": leave unreadable images and faulty annotations out, counted
        "cache": "",  # a folder for decoded images: worth it where reading them is what the device waits for
        "split_seed": 0,
        "loader": {"num_threads": 4, "num_workers": 0, "prefetch": 4},
        "view": {
            "scale": (0.5, 2.0),  # weak: multi-scale resize, relative to the whole image on the canvas
            "flip_horizontal": 0.5,
            "flip_vertical": 0.0,
            "rotate90": False,
            "crop_area": (0.25, 1.0),  # strong: random resized crop, as a share of the canvas
            "min_area": 16,  # pixels; smaller remains of an instance are dropped
        },
        "generated": {"train": 0, "val": 0, "source": 0, "image_size": (128, 256), "seed": 0},
    }
    config.pseudo_labels = {"threshold": 0.3, "max_iou": 0.5, "shard_size": 256}  # max_iou (chosen)
    config.audit = {"share": 0.25, "seed": 0, "pictures": 8}
    config.evaluate = {
        "step": "",  # which trained step `:evaluate` looks at; empty: refine, else distill, ... (preflight.EVALUATED)
        "batch_size": 8,
        "max_detections": 100,
        "min_score": 0.01,
        "overlays": 8,
    }
    config.steps = {
        "finetune": teacher_step(steps=1_000),
        "adapt": teacher_step(steps=5_000, pseudo_labels="finetuned"),
        "distill": student_step(steps=90_000, pseudo_labels="adapted"),
        "refine": student_step(steps=2_000, start="distill", start_parts=()),
        # The baseline: the same student, updates and images a batch, labels only.
        "student_supervised": student_step(steps=1),
    }
    students = [config.steps[name].train.get_ref("steps") for name in ("distill", "refine")]
    config.steps.student_supervised.train.steps = students[0] + students[1]  # also where those change
    return config


def teacher_step(steps: int, **changes) -> dict:
    """A step of the teacher: batch 4, multi-step schedule, weight decay 0.01."""
    optimizer = {
        "learning_rate": 1e-4,  # (chosen: the paper's values were lost)
        "learning_rate_scaling": "none",  # for other batches than reference_batch: "sqrt" or "linear"
        "reference_batch": 4,
        "schedule": "multi_step",
        "weight_decay": 0.01,
        "clip_norm": placeholder(float),
        "learning_rate_rules": (("segmenter/encoder/.*", 0.1), (".*", 1.0)),
        "frozen": (),  # patterns of parameters that are not trained: ("segmenter/detector/bert/.*",)
    }
    return _step("teacher", 4, steps, optimizer, **changes)


def student_step(steps: int, **changes) -> dict:
    """A step of the student: batch 8, polynomial schedule, weight decay 0.05, clipping at 0.1."""
    optimizer = {
        "learning_rate": 1e-4,
        "learning_rate_scaling": "none",
        "reference_batch": 8,
        "schedule": "polynomial",
        "weight_decay": 0.05,
        "clip_norm": 0.1,
        "learning_rate_rules": (("segmenter/encoder/.*", 0.1), (".*", 1.0)),  # (chosen)
        "frozen": (),
    }
    return _step("student", 8, steps, optimizer, **{"start_parts": ("encoder",), **changes})


def _step(
    model: str,
    batch: int,
    steps: int,
    optimizer: dict,
    *,
    start: str = "",
    start_parts: tuple[str, ...] = (),
    pseudo_labels: str = "",
    source: str = "labelled",
) -> dict:
    """With pseudo-labels half of the batch is unlabelled (chosen) and all three terms are on."""
    semi = bool(pseudo_labels)
    return {
        "model": model,
        "source": source,  # "labelled", or "pretrain" for the demo's other look
        "start": start,  # a step whose weights to start from; empty: config.init
        "start_parts": start_parts,  # which parts of them; empty: all
        "pseudo_labels": pseudo_labels,  # "finetuned", "adapted" or "online"
        "data": {
            "batch_labelled": batch // 2 if semi else batch,
            "batch_unlabelled": batch // 2 if semi else 0,
            "views": ("weak", "strong"),
        },
        "objective": {
            "supervised_weight": 1.0,
            "pseudo_label_weight": 1.0 if semi else 0.0,  # (chosen)
            "contrastive_weight": 0.2 if semi else 0.0,
            "supervised_views": ("weak", "strong"),  # (chosen)
            "pseudo_label_views": ("weak", "strong"),  # (chosen)
            "contrastive_stride": 1,
            "criterion": {"num_points": 12_544},
            "contrastive": {
                "num_negatives": 256,
                "temperature": 0.2,
                "map": "fusion",
                "score": "d",
                "scope": "batch",
                "loss": "infonce",
                "sampler": "mixture_proposals",
            },
        },
        "optimizer": optimizer,
        "train": {"steps": steps, "accumulate": 1, "log_every": 50, "save_every": 1000, "eval_every": 0, "keep": 2},
    }


def teacher(config: ConfigDict, arguments: FrozenConfigDict, default: str = "student_l") -> None:
    """Another teacher: the argument of this name, after everything else. The paper's is ``grounded_sam2_l``.

    Its two networks start from weights, and their encoders learn at a tenth of the rate. ``grounded_sam2_tiny`` starts
    from nothing.

    Raises:
      ValueError: a large one with ``smoke``.
    """
    name = arguments.teacher
    if name == default:
        return
    tiny = name.endswith("_tiny")
    if arguments.smoke and not tiny:
        raise ValueError(f"smoke has small models of its own: leave teacher={name} out, or use grounded_sam2_tiny")
    config.model.teacher = {"name": name}
    if not name.startswith("grounded_sam2"):
        return
    rules = (("segmenter/detector/(backbone|bert)/.*", 0.1), ("segmenter/segmenter/encoder/.*", 0.1), (".*", 1.0))
    for step in config.steps.values():
        if step.model == "teacher":
            step.optimizer.learning_rate_rules = rules[-1:] if tiny else rules  # (chosen)
    if not tiny:
        config.init = {"teacher": {"detector": "", "segmenter": ""}, "student": ""}
        config.model.teacher.tokenizer = "bert-base-uncased"  # a folder with its vocab.txt, or its name on the hub


def student_parts(config: ConfigDict, arguments: FrozenConfigDict) -> None:
    """Another encoder or decoder in the paper's student: the arguments of these names.

    Encoders of stride 32 see a canvas whose sides are multiples of 32 and of the teacher's 14.

    Raises:
      ValueError: they are given with ``smoke``, which has small models of its own.
    """
    encoder, decoder = arguments.encoder, arguments.decoder
    if arguments.smoke and (encoder, decoder) != ("dinov2_s", "dpt"):
        raise ValueError("smoke has small models of its own: leave encoder= and decoder= out")
    if encoder != "dinov2_s":
        config.model.student.encoder = {"name": encoder}
    if decoder != "dpt":
        config.model.student.decoder = {"name": decoder}
    config.model.student.encoder = {**config.model.student.get("encoder", {}), "remat": "blocks"}
    if not encoder.startswith("dinov2"):
        config.data.image_size = (448, 896)


def system(config: ConfigDict, arguments: FrozenConfigDict, ema_decay: float | None = None) -> None:
    """One of the systems that the paper compares CAST with: the argument of this name, after everything else.

    What they publish is theirs (in comments: whose reference implementation); models, data, schedules and the other
    terms of the loss stay CAST's (chosen).

    - ``supervised``: teacher and student on the labels alone.
    - ``self_training``: the teacher on its own pseudo-labels, once, in the way of Noisy Student (Xie et al., 2020).
    - ``ema_teacher``: the teacher after its finetuning on what its moving average finds, Unbiased Teacher (Liu et al.,
      2021); the average is the result.
    - ``pais``: the student on what its moving average finds, each label weighed by its quality (Hu et al., 2023).
    - ``guided_distillation`` (Berrada et al., 2024): a teacher of the student's own kind learns the labels, the student
      first what that one finds ("burn-in", with stored labels as CAST's), then what its own moving average finds.
    - ``kd_unlabelled``, ``kd``: the student on the adapted teacher's pseudo-labels alone (Vemulapalli et al., 2024), or
      with the labels; as ``cast`` without the student's contrast.

    Args:
      ema_decay: instead of the published ones, for short schedules.

    Raises:
      ValueError: a step that the system does not have.
    """
    name, steps = arguments.system, config.steps
    if name == "cast":
        _require_step(config, name)
        return
    steps.distill.objective.contrastive_weight = 0.0
    if not name.startswith("kd"):
        steps.adapt.objective.contrastive_weight = 0.0

    def learn_online(step: str, decay: float, start: str = "", **options) -> None:
        steps[step].update({"pseudo_labels": "online", "online_labels": options})
        steps[step].objective.pseudo_label_views = ("strong",)
        steps[step].train.ema_decay = decay if ema_decay is None else ema_decay
        if start:
            steps[step].update({"start": start, "start_parts": ()})
            steps[step].train.ema_warmup = False  # what it starts from is the labeller

    pipeline: tuple[str, ...]
    adapted = ("finetune", "pseudo_label/finetuned", "adapt", "pseudo_label/adapted", "distill")
    if name == "supervised":
        pipeline = ("finetune", "student_supervised")
    elif name == "self_training":
        pipeline = adapted[:3]
    elif name == "ema_teacher":
        pipeline = ("finetune", "adapt")
        learn_online("adapt", 0.9996, "finetune", class_threshold=0.7)  # Unbiased Teacher
        steps.adapt.objective.pseudo_label_weight = 4.0  # Unbiased Teacher
        steps.adapt.train.evaluate_ema = True
    elif name == "pais":
        pipeline = ("distill",)
        learn_online("distill", 0.999, class_threshold=0.35, mask_threshold=0.3, weighting="quality")  # PAIS
    elif name == "guided_distillation":
        pipeline = ("finetune", "pseudo_label/finetuned", "burn_in", "distill")
        steps.finetune = steps.student_supervised.copy_and_resolve_references()
        steps.burn_in = steps.distill.copy_and_resolve_references()
        steps.burn_in.pseudo_labels = "finetuned"
        steps.burn_in.objective.pseudo_label_views = ("strong",)
        steps.distill.train.steps //= 2  # (chosen)
        half, refined = (steps[step].train.get_ref("steps") for step in ("distill", "refine"))
        steps.burn_in.train.steps = half
        for step in ("finetune", "student_supervised"):
            steps[step].train.steps = half + half + refined
        learn_online("distill", 0.9996, "burn_in", class_threshold=0.7)  # Guided Distillation
        for step in ("burn_in", "distill"):
            steps[step].objective.pseudo_label_weight = 2.0  # Guided Distillation
    else:
        pipeline = adapted
        if name == "kd_unlabelled":
            steps.distill.objective.supervised_weight = 0.0
            data = steps.distill.data
            data.batch_unlabelled, data.batch_labelled = data.batch_unlabelled + data.batch_labelled, 0
    pretrained = any(steps[step].start == "pretrain" for step in pipeline if step in steps)
    config.pipeline = (*(("pretrain",) if pretrained else ()), *pipeline)
    _require_step(config, name)


def _require_step(config: ConfigDict, name: str) -> None:
    """The steps that mean something else in another system must be the system's; ``refine`` follows any ``distill``."""
    missing = {"adapt", "burn_in", "distill"} - set(config.pipeline)
    if config.step in missing or (config.step == "refine" and "distill" in missing):
        raise ValueError(f"system={name} has no step {config.step!r}; it is {', '.join(config.pipeline)}")


def tiny_models(config: ConfigDict, image_size: tuple[int, int]) -> None:
    """Models and losses for two CPU cores: learned from scratch on small images."""
    config.model = {"teacher": {"name": "teacher_tiny"}, "student": {"name": "student_tiny"}}
    config.data.image_size = image_size
    config.data.loader = {"num_threads": 2, "num_workers": 0, "prefetch": 2}
    config.embedding_dim = 32
    for step in config.steps.values():
        step.optimizer.update({"learning_rate": 2e-3, "schedule": "polynomial", "weight_decay": 0.02, "clip_norm": 1.0})
        step.optimizer.update({"warmup_steps": 20, "learning_rate_rules": ((".*", 1.0),)})
        step.objective.contrastive_stride = 2
        step.objective.criterion = {"num_points": placeholder(int)}
        step.objective.contrastive.update({"num_negatives": 64, "num_anchors": 128})


def small_steps(config: ConfigDict, steps: dict[str, int], *, log_every: int, save_every: int) -> None:
    """Schedules of so many updates of four images; the baseline's follows."""
    for name, step in config.steps.items():
        semi = bool(step.pseudo_labels)
        step.data.update({"batch_labelled": 2 if semi else 4, "batch_unlabelled": 2 if semi else 0})
        step.optimizer.reference_batch = 4
        step.train.update({"log_every": log_every, "save_every": save_every})
        if name in steps:
            step.train.steps = steps[name]


def smoke(config: ConfigDict) -> None:
    """The same code path with tiny models and a few steps, on generated data where no root is given."""
    tiny_models(config, (64, 128))
    config.runtime.xla_flags = "--xla_backend_optimization_level=0"  # a few steps: most of the time is compilation
    config.data.max_instances = 16
    config.data.generated = {"train": 12, "val": 4, "source": 8, "image_size": (64, 128), "seed": 0}
    config.pseudo_labels.threshold = 0.0  # a model of a few steps is sure of nothing
    config.evaluate.overlays = 2
    small = {
        "encoder": {"embed_dim": 32, "depth": 4, "num_heads": 2},
        "decoder": {"features": 16, "out_channels": (16, 16, 16, 16)},
    }
    decoder = {"hidden_dim": 32, "mask_dim": 16, "ffn_dim": 32, "num_layers": 1}
    for role in config.model:
        config.model[role] = {"name": "student_tiny", **small, "mask_decoder": decoder}
    for name, step in config.steps.items():
        step.data.batch_labelled = 2
        step.data.batch_unlabelled = 2 if step.pseudo_labels else 0
        step.optimizer.warmup_steps = 1
        step.objective.contrastive.update({"num_negatives": 16, "num_anchors": 32})
        step.train.update({"log_every": 1, "save_every": 2})
        if name != "student_supervised":  # which follows
            step.train.steps = 4
