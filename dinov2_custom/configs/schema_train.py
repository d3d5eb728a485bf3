"""Declare the keys of the run, the data, the augmentation and the optimizer.

Not the networks and losses (schema_model.py). Read `Train` first. Names and defaults of upstream's keys: upstream
`dinov2/configs/ssl_default_config.yaml`; `augmentation` holds what upstream's code has as constants.
"""

from dataclasses import dataclass

from dinov2_custom.configs.option import option, section


@dataclass
class Train:
    batch_size_per_gpu: int = option(64, "images per step on one GPU (or process)", unit="images", within="[1, inf)")
    dataset_path: str | dict | list[str | dict] = option(
        "",
        "folder of images, list file, tar shards, Parquet, dataset string such as ImageNet:split=TRAIN:root=..., list "
        "of these, or a mixture [{path: /a, weight: 0.7}, {path: /b, weight: 0.3}]; see docs/datasets.md",
    )
    output_dir: str = option(
        "",
        "where everything of the run goes; --output-dir wins; empty: outputs/<date>_<time>",
        unit="path",
        changes_results=False,
    )
    saveckp_freq: int = option(20, "unused, as upstream; see checkpointing.period", changes_results=False, unused=True)
    seed: int = option(0, "seed of weights, order, crops and masks", within="[0, inf)")
    num_workers: int | str = option(
        10,
        "data-loading processes per GPU; 0: in the main process; auto: as many as keep up, measured",
        changes_results=False,
        choices=("auto",),
        within="[0, inf)",
    )
    OFFICIAL_EPOCH_LENGTH: int | str = option(
        1250,
        "length of an epoch; auto: one pass over the data, images / global batch rounded up",
        unit="iterations",
        choices=("auto",),
        within="[1, inf)",
    )
    max_steps: int = option(
        0,
        "length of the run instead of optim.epochs; lengths in epochs keep their share of optim.epochs; 0: not set",
        unit="iterations",
        within="[0, inf)",
    )
    max_hours: int | float = option(
        0,
        "length of the run in hours of training, without the time between a stop and the resume; the schedules follow "
        "the clock, so results depend on the speed; lengths in epochs keep their share of optim.epochs; 0: not set",
        unit="hours",
        within="[0, inf)",
    )
    cache_dataset: bool = option(True, "unused, as upstream", changes_results=False, unused=True)
    cell_augmentation: bool = option(False, "upstream's augmentation of cell images, which is not here: false only")
    channel_adaptive: bool = option(
        False, "unused, as upstream; see student.channel_adaptive", changes_results=False, unused=True
    )
    centering: str = option(
        "centering", "how teacher outputs are kept from collapsing", choices=("centering", "sinkhorn_knopp")
    )
    view_groups: int | str = option(
        "auto",
        "parts in which the student's crops are computed, one after the other, which divides the memory; 1: all "
        "together; 2: global, local; more: each global crop alone, local ones in parts; auto: as many as pay",
        changes_results=False,
        choices=("auto",),
        within="[1, inf)",
    )
    activation_checkpointing: str = option(
        "auto",
        "what the backward pass computes again: none; selective: each block's FFN; full: each block; auto: as little "
        "as fits what is free on the GPU that has the least, by the count of run/train/memory.py",
        changes_results=False,
        choices=("none", "selective", "full", "auto"),
    )
    compile: str = option(
        "auto",
        "torch.compile what lies between the matrix products of the blocks, and the heads' loss; keeps the memory of "
        "train.lean; needs a C++ compiler on a CPU, Triton on a GPU, else a warning; auto: off, as no device was found "
        "yet on which it pays",
        changes_results=False,
        choices=("auto", "on", "off"),
    )
    lean: bool = option(
        True,
        "keep half of what autograd would for the backward pass, and no logits: norms, activations and targets are "
        "computed twice instead; false: autograd's own way, for comparison",
        changes_results=False,
    )
    path_preserved: str | list[str] = option(
        "",
        "folder or folders of whose images train.frac is held out, listed in the run's preserved_images.txt; or a text "
        "file for the list, then of all images; empty: none",
    )
    frac: float = option(
        0.0,
        "share of the images that train.path_preserved names held out; without it 0, or 1 as a fork has it: none",
        within="[0, 1]",
    )
    max_bad_fraction: float = option(
        0.01, "stop when more than this share of the images read so far is unreadable", within="[0, 1]"
    )
    max_nonfinite_steps: int = option(
        3,
        "steps in a row with a non-finite loss or gradient, each left out, that end the run",
        unit="steps",
        changes_results=False,
        within="[1, inf)",
    )
    hang_timeout: int | float = option(
        480,
        "without a step for so long, three times that for the first step and for saves, each process writes its stacks "
        "into its log and ends; a collective gives up after four times that, at least 30 minutes; 0: neither ever",
        unit="s",
        changes_results=False,
        within="[0, inf)",
    )
    log_every: int = option(10, "log interval", unit="iterations", changes_results=False, within="[1, inf)")
    tensorboard: bool = option(
        False, "write the metrics to <output_dir>/logs/tensorboard too; needs that package", changes_results=False
    )


@dataclass
class Checkpointing:
    period: int = option(
        0, "save interval; 0: three epochs, as upstream", unit="iterations", changes_results=False, within="[0, inf)"
    )
    keep_last: int = option(
        3, "newest periodic checkpoints kept", unit="checkpoints", changes_results=False, within="[1, inf)"
    )
    keep_every: int = option(
        0,
        "checkpoints of every so many iterations are never removed; 0: none such",
        unit="iterations",
        changes_results=False,
        within="[0, inf)",
    )
    on_error: str = option(
        "warn",
        "when a checkpoint cannot be written (disk full): warn and train on with the one before, or stop",
        choices=("warn", "stop"),
        changes_results=False,
    )
    async_save: bool = option(
        False,
        "copy the state to host memory (16 bytes a parameter, of sharded parts a process's share) and write it while "
        "training goes on, instead of one tensor after the other while training waits; an error shows at the next save",
        changes_results=False,
    )


@dataclass
class Optim:
    epochs: int | float = option(100, "length of the run; fractions are fine", unit="epochs", within="(0, inf)")
    accumulation_steps: int = option(
        1,
        "batches whose gradients make one step; learning rate and epochs follow the effective batch",
        unit="batches",
        within="[1, inf)",
    )
    global_batch: int = option(
        0,
        "images of a step, all processes together, whose number has to divide it; train.batch_size_per_gpu and "
        "optim.accumulation_steps follow: on GPUs, what does not fit at once by the count of run/train/memory.py is "
        "accumulated; as overrides these two are the most images at once and the fewest batches, in a config file they "
        "do not count then; 0: not set",
        unit="images",
        within="[0, inf)",
    )
    weight_decay: float = option(0.04, "weight decay at the start", within="[0, inf)")
    weight_decay_end: float = option(0.4, "weight decay at the end (cosine between)", within="[0, inf)")
    base_lr: float = option(0.004, "peak learning rate at a global batch of 1024 images", within="[0, inf)")
    lr: float = option(
        0.0, "computed: base_lr * sqrt(global batch / 1024); a value given here is ignored", within="[0, inf)"
    )
    warmup_epochs: int | float | str = option(
        10,
        "linear warm-up of the learning rate from 0; at most the whole run",
        unit="epochs",
        within="[0, inf)",
        share=True,
    )
    min_lr: float = option(1e-6, "learning rate at the end (cosine)", within="[0, inf)")
    clip_grad: float | None = option(
        3.0, "largest gradient norm, of backbone and heads separately; 0 or null: no clipping", within="[0, inf)"
    )
    freeze_last_layer_epochs: int | float | str = option(
        1,
        "start of the run in which the prototypes stay as they are",
        unit="epochs",
        within="[0, inf)",
        share=True,
    )
    scaling_rule: str = option("sqrt_wrt_1024", "how optim.lr follows from base_lr", choices=("sqrt_wrt_1024",))
    patch_embed_lr_mult: float = option(0.2, "learning-rate factor of the patch embedding", within="[0, inf)")
    layerwise_decay: float = option(
        0.9, "learning-rate factor from each block to the one below it; 1: none", within="(0, inf)"
    )
    adamw_beta1: float = option(0.9, "AdamW's decay of the mean gradient", within="[0, 1)")
    adamw_beta2: float = option(0.999, "AdamW's decay of the mean square", within="[0, 1)")


@dataclass
class Crops:
    global_crops_scale: list[float] = option(
        [0.32, 1.0], "range of a global crop's share of the image area", within="(0, 1]", length=2, increasing=True
    )
    local_crops_number: int = option(8, "local crops per image; 0: none", within="[0, inf)")
    local_crops_scale: list[float] = option(
        [0.05, 0.32], "range of a local crop's share of the image area", within="(0, 1]", length=2, increasing=True
    )
    global_crops_size: int = option(
        224, "side of a global crop, a multiple of student.patch_size", unit="px", within="[1, inf)"
    )
    local_crops_size: int = option(
        96, "side of a local crop, a multiple of student.patch_size", unit="px", within="[1, inf)"
    )


@dataclass
class Normalize:
    mean: list[float] = option([0.485, 0.456, 0.406], "subtracted from R, G, B in 0..1 (ImageNet's)", length=3)
    std: list[float] = option([0.229, 0.224, 0.225], "then divided by (ImageNet's)", within="(0, inf)", length=3)


@dataclass
class Data:
    normalize: Normalize = section(Normalize)
    intensity: str | list[float] = option(
        "auto",
        "values that become 0 and 255 in images of more than 8 bits (16-bit, float), one range for all, such as "
        "[100, 4095]; auto: measured on a sample at the first start, without nodata and outliers, and kept in the "
        "run's config.yaml for resumes, features and evaluations",
        choices=("auto",),
        length=2,
        increasing=True,
    )
    page: int = option(0, "page or frame that is read of files with several, from 0", within="[0, inf)")
    dct_scaling: bool = option(
        False,
        "decode a JPEG at 1/2, 1/4 or 1/8 of its size where every crop still has 1.5 times the pixels it needs; twice "
        "as fast for 12 megapixels",
    )


@dataclass
class Augmentation:
    brightness: float = option(0.4, "brightness factor drawn from 1 +- this", within="[0, inf)")
    contrast: float = option(0.4, "contrast factor drawn from 1 +- this", within="[0, inf)")
    saturation: float = option(0.2, "saturation factor drawn from 1 +- this", within="[0, inf)")
    hue: float = option(0.1, "hue shift drawn from +- this", unit="turns", within="[0, 0.5]")
    jitter_p: float = option(0.8, "probability of the four above", within="[0, 1]")
    gray_p: float = option(0.2, "probability of dropping colour", within="[0, 1]")
    solarize_p: float = option(0.2, "probability of solarizing the second global crop", within="[0, 1]")
    blur_p: list[float] = option(
        [0.0, 0.9, 0.5],
        "probabilities of blurring global crop 1, global crop 2, local crops; the defaults are what upstream really "
        "applies, DINO's paper has [1.0, 0.1, 0.5]",
        within="[0, 1]",
        length=3,
    )
    blur_sigma: list[float] = option(
        [0.1, 2.0], "range of the Gaussian's sigma", unit="px", within="(0, inf)", length=2, increasing=True
    )
    hflip_p: float = option(0.5, "probability of a horizontal flip", within="[0, 1]")
    device: str = option(
        "auto",
        "where colours are changed, with the same pixels: cpu: by the data-loading processes; device: where the model "
        "is; auto: device on a GPU",
        changes_results=False,
        choices=("auto", "cpu", "device"),
    )


@dataclass
class Evaluation:
    eval_period_iterations: int = option(
        12500,
        "interval of writing teacher_checkpoint.pth; 0 or less: only at the end",
        unit="iterations",
        changes_results=False,
    )


@dataclass
class Wandb:
    mode: str = option(
        "disabled",
        "offline: into <output_dir>/logs/wandb, for wandb sync; online falls back to it; WANDB_MODE can lower it",
        choices=("disabled", "online", "offline"),
        changes_results=False,
    )
    project: str = option("", "empty: WANDB_PROJECT, else dinov2_custom", changes_results=False)
    entity: str = option("", "user or team; empty: the key's own", changes_results=False)
    name: str = option("", "of the run; empty: WANDB_NAME, else the output directory's", changes_results=False)
    group: str = option("", "runs to be shown together", changes_results=False)
    tags: str | int | float | list[str | int | float] = option(
        "", "label, or list of labels, of the run", changes_results=False
    )
    id: str = option(
        "", "of the run; empty: WANDB_RUN_ID, else the one this run directory had, else new", changes_results=False
    )
