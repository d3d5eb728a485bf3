"""Declare every key of a configuration once: type, limits, default and meaning. The only source of defaults.

There is one pydantic model per YAML section, and docs/configuration.md is generated from them. Names and defaults of
upstream's keys are from upstream's `dinov2/configs/ssl_default_config.yaml`; `augmentation` holds constants of
upstream's code.
"""

import functools
from operator import attrgetter
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
)
from pydantic.fields import FieldInfo

# repeated here to avoid importing torch; a test compares them with dinov2_custom.models.vision_transformer
DEPTH_OF_ARCH = {
    "vit_nano": 4,
    "vit_micro": 6,
    "vit_tiny": 12,
    "vit_small": 12,
    "vit_base": 12,
    "vit_large": 24,
    "vit_giant2": 40,
}


def _ascending(values: list[float]) -> list[float]:
    if values != sorted(values):
        raise ValueError("not in ascending order")
    return values


T = TypeVar("T")
Text = Annotated[str, BeforeValidator(lambda value: "" if value is None else value)]
Fraction = Annotated[float, Field(ge=0, le=1)]
AreaShare = Annotated[float, Field(gt=0, le=1)]
Percent = Annotated[str, Field(pattern=r"^(\d{1,2}(\.\d*)?|100(\.0*)?)%$", examples=["10%"])]
Length = NonNegativeInt | NonNegativeFloat | Percent  # in epochs, or a percentage of the run
NonEmpty = Annotated[list[T], Field(min_length=1)]
Triple = Annotated[list[T], Field(min_length=3, max_length=3)]
Range = Annotated[
    list[T], Field(min_length=2, max_length=2, json_schema_extra={"ascending": True}), AfterValidator(_ascending)
]
Mapping = Annotated[dict[str, Any], Field(min_length=1)]
Dtype = Literal["fp32", "fp16", "bf16"]
Switch = Annotated[  # YAML parses a bare on or off as true or false
    Literal["auto", "on", "off"],
    BeforeValidator(lambda value: ("off", "on")[value] if isinstance(value, bool) else value),
]


class Section(BaseModel):
    """Keys of one YAML section. Only whole numbers are converted: 4.0 is accepted as int, 1 as float."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="forbid")

    @field_validator("*", mode="before")
    @classmethod
    def _whole(cls, value: Any) -> Any:
        return int(value) if isinstance(value, float) and value.is_integer() else value


def key(
    default: Any, description: str, *, unit: str = "", changes_results: bool = True, unused: bool = False, **limits: Any
) -> Any:
    """Create the field of a key.

    Args:
        unit: unit of the value; empty for a plain number or a name.
        changes_results: whether the value affects the trained weights.
        unused: whether this is a key of upstream that is accepted but has no effect, and is documented as such.
        limits: constraints of pydantic, such as ``lt=1``.
    """
    about = {"unit": unit, "changes_results": changes_results, "unused": unused}
    return Field(default, description=description, json_schema_extra=about, **limits)


class Model(Section):
    """Weights of a whole run to start from."""

    WEIGHTS: Text = key(
        "",
        "file with the initial weights of a new run; from a training state, student, teacher and centres are each "
        "loaded; takes precedence over student.pretrained_weights; empty: none",
        unit="path",
    )


class MixedPrecision(Section):
    param_dtype: Literal["auto", Dtype] = key(
        "auto",
        "number format of the forward and backward pass; auto: bf16 if the device supports it natively, "
        "else fp16 on CUDA, else fp32; fp32 never uses TF32",
    )
    reduce_dtype: Literal["auto", Dtype] = key(
        "auto",
        "number format in which sharded gradients are summed; auto: fp32; fp16 is possible only if param_dtype is fp16 "
        "too",
    )
    buffer_dtype: Dtype = key("fp32", "number format of buffers of a sharded module")


class ModulePrecision(Section):
    sharding_strategy: Literal["auto", "NO_SHARD", "SHARD_GRAD_OP", "FULL_SHARD"] = key(
        "auto",
        "NO_SHARD: whole in every process (data parallel); SHARD_GRAD_OP: weights and optimizer state are sharded over "
        "the processes (FSDP2), and weights are gathered once per step; FULL_SHARD: they are gathered again in the "
        "backward pass, which needs the least memory; auto: NO_SHARD on CPUs and while 20 bytes per parameter fit into "
        "a quarter of a GPU's memory, else SHARD_GRAD_OP",
        changes_results=False,
    )
    mixed_precision: MixedPrecision = MixedPrecision()


class NetworkPrecision(Section):
    backbone: ModulePrecision = ModulePrecision()
    dino_head: ModulePrecision = ModulePrecision()
    ibot_head: ModulePrecision = ModulePrecision()


class ComputePrecision(Section):
    """Number formats and sharding, for each network."""

    grad_scaler: bool = key(True, "scale the loss to prevent underflow; has an effect only with fp16")
    gather_dtype: Literal["fp32", "param_dtype"] = key(
        "fp32",
        "number format in which sharded weights are gathered; param_dtype: half the traffic in 16 bits, and biases, "
        "norms, LayerScale and embeddings are also rounded to it",
    )
    teacher: NetworkPrecision = NetworkPrecision()
    student: NetworkPrecision = NetworkPrecision()


class Dino(Section):
    """Image-level loss and its head; KoLeo."""

    loss_weight: NonNegativeFloat = key(1.0, "weight of the image-level loss; 0: off")
    head_n_prototypes: PositiveInt = key(65536, "number of prototypes, the outputs of the head")
    head_bottleneck_dim: PositiveInt = key(256, "width of the bottleneck, the layer before the prototypes")
    head_nlayers: PositiveInt = key(3, "number of linear layers before the prototypes")
    head_hidden_dim: PositiveInt = key(2048, "width of the hidden layers")
    koleo_loss_weight: NonNegativeFloat = key(0.1, "weight of the KoLeo loss, which spreads features apart; 0: off")
    koleo_neighbours: Literal["process", "all"] = key(
        "process",
        "images among which KoLeo searches the nearest neighbour: process: those of the same process, as upstream; "
        "all: those of all processes; the result then does not depend on their number",
    )


class Ibot(Section):
    """Masked-patch loss and its head."""

    loss_weight: NonNegativeFloat = key(1.0, "weight of the masked-patch loss; 0: off")
    mask_sample_probability: Fraction = key(0.5, "share of the global crops that are masked, also if loss_weight is 0")
    mask_ratio_min_max: Range[Fraction] = key(
        [0.1, 0.5], "range of the share of patches that are masked in a masked crop"
    )
    separate_head: bool = key(
        False, "use a separate head for patches; false: they use the DINO head, and ibot.head_* are ignored"
    )
    head_n_prototypes: PositiveInt = key(65536, "number of prototypes of the separate head")
    head_bottleneck_dim: PositiveInt = key(256, "width of its bottleneck")
    head_nlayers: PositiveInt = key(3, "number of its linear layers before the prototypes")
    head_hidden_dim: PositiveInt = key(2048, "width of its hidden layers")


class Train(Section):
    """The run: data, batch, output."""

    batch_size_per_gpu: PositiveInt = key(64, "images per step on one GPU (or process)", unit="images")
    dataset_path: Text | Mapping | NonEmpty[str | Mapping] = key(
        "",
        "folder of images, list file, tar shards, Parquet, dataset string such as ImageNet:split=TRAIN:root=..., list "
        "of these, or a mixture [{path: /a, weight: 0.7}, {path: /b, weight: 0.3}]; see docs/datasets.md",
    )
    output_dir: Text = key(
        "",
        "directory for all files of the run; --output-dir takes precedence; empty: outputs/<date>_<time>",
        unit="path",
        changes_results=False,
    )
    saveckp_freq: int = key(20, "unused, as upstream; see checkpointing.period", changes_results=False, unused=True)
    seed: NonNegativeInt = key(0, "seed of weights, order of images, crops, masks and drop path")
    num_workers: NonNegativeInt | Literal["auto"] = key(
        10,
        "data-loading processes per GPU; 0: load in the main process; auto: measure how many are needed",
        changes_results=False,
    )
    OFFICIAL_EPOCH_LENGTH: PositiveInt | Literal["auto"] = key(
        1250, "length of an epoch; auto: one pass over the data, images / global batch rounded up", unit="iterations"
    )
    max_steps: NonNegativeInt = key(
        0,
        "length of the run instead of optim.epochs; lengths in epochs scale with it; 0: not set",
        unit="iterations",
    )
    max_hours: NonNegativeInt | NonNegativeFloat = key(
        0,
        "length of the run in hours of training, excluding interruptions; the schedules follow the clock, so results "
        "depend on the speed of the machine; lengths in epochs scale with it; 0: not set",
        unit="hours",
    )
    cache_dataset: bool = key(True, "unused, as upstream", changes_results=False, unused=True)
    cell_augmentation: bool = key(
        False, "upstream's augmentation of cell images, which is not supported: must be false"
    )
    channel_adaptive: bool = key(
        False, "unused, as upstream; see student.channel_adaptive", changes_results=False, unused=True
    )
    centering: Literal["centering", "sinkhorn_knopp"] = key(
        "centering", "how a collapse of the teacher's outputs is prevented"
    )
    view_groups: PositiveInt | Literal["auto"] = key(
        "auto",
        "number of groups in which the student's crops are computed one after the other; more groups need less memory; "
        "1: all at once; 2: global, local; more: each global crop separately, local crops in parts; auto: chosen by "
        "device and memory of the activations",
        changes_results=False,
    )
    activation_checkpointing: Literal["none", "selective", "full", "auto"] = key(
        "auto",
        "activations recomputed in the backward pass: none; selective: each block's FFN; full: each block; auto: as "
        "few as fit into the GPU with the least free memory, by the estimate of run/train/plan.py",
        changes_results=False,
    )
    compile: Switch = key(
        "auto",
        "apply torch.compile to the operations between the matrix products of the blocks and to the heads' loss, with "
        "the memory use of train.lean; needs a C++ compiler on a CPU or Triton on a GPU, otherwise warns; auto: off, "
        "because no benefit has been measured on any device yet",
        changes_results=False,
    )
    lean: bool = key(
        True,
        "store half of autograd's activations for the backward pass and no logits: norms, activations and targets are "
        "computed twice instead; false: plain autograd, for comparison",
        changes_results=False,
    )
    path_preserved: Text | NonEmpty[str] = key(
        "",
        "images from which train.frac holds some out: a folder or a list of folders (the held-out images are listed in "
        "the run's preserved_images.txt), or a text file (images of the whole dataset, listed in that file); empty: "
        "none",
    )
    frac: Fraction = key(
        0.0,
        "share of the images of train.path_preserved that is held out; without that key, no image is held out, and "
        "this must be 0 or the forks' default of 1",
    )
    max_bad_fraction: Fraction = key(
        0.01, "end the run if more than this share of the images read so far is unreadable"
    )
    max_nonfinite_steps: PositiveInt = key(
        3,
        "number of consecutive steps with a non-finite loss or gradient, each skipped, after which the run ends",
        unit="steps",
        changes_results=False,
    )
    on_collapse: Literal["warn", "stop"] = key(
        "warn",
        "what to do when the run has collapsed or explodes; warn: log it; stop: save a checkpoint and end with exit "
        "code 3, after which no launcher restarts the run",
        changes_results=False,
    )
    hang_timeout: NonNegativeInt | NonNegativeFloat = key(
        480,
        "time without a step (three times that for the first step and for saves) after which each process writes its "
        "stacks to its log and ends; collectives time out after four times that, at least 30 minutes; 0: never",
        unit="s",
        changes_results=False,
    )
    log_every: PositiveInt = key(10, "log interval", unit="iterations", changes_results=False)
    tensorboard: bool = key(
        False,
        "also write the metrics to <output_dir>/logs/tensorboard; needs the package tensorboard",
        changes_results=False,
    )


class Student(Section):
    """The backbone."""

    arch: Text = key("vit_large", f"network: {', '.join(DEPTH_OF_ARCH)}; a suffix _memeff is ignored")
    patch_size: PositiveInt = key(16, "side of a patch; must divide both crop sizes", unit="px")
    drop_path_rate: NonNegativeFloat = key(0.3, "share of samples that skip a residual branch", lt=1)
    layerscale: NonNegativeFloat | None = key(1e-5, "initial LayerScale factor; 0 or null: no LayerScale")
    drop_path_uniform: bool = key(True, "same rate in all blocks; false: rises linearly from 0 with depth")
    pretrained_weights: Text = key(
        "",
        "initial weights of student and teacher: Meta's files, Hugging Face's Dinov2 (file or folder), teacher "
        "checkpoints with their heads, or a run directory (its newest teacher); a path, a URL, or an iopath URI; "
        "empty: random",
        unit="path",
    )
    freeze_backbone_epochs: Length = key(
        0,
        "length of the beginning of the run in which only the heads train, for new heads on a pretrained backbone",
        unit="epochs",
    )
    ffn_layer: Literal["mlp", "swiglu", "swiglufused", "identity"] = key(
        "mlp", "kind of feed-forward network; identity: none"
    )
    block_chunks: NonNegativeInt = key(
        0,
        "number of groups of blocks; only the names in the state dict depend on it; 0: blocks.{i}",
        changes_results=False,
    )
    qkv_bias: bool = key(True, "biases in the query, key and value layer")
    proj_bias: bool = key(True, "biases in the attention's output layer")
    ffn_bias: bool = key(True, "biases in the feed-forward layers")
    num_register_tokens: NonNegativeInt = key(0, "extra tokens besides CLS and patches; 4 is usual")
    in_chans: PositiveInt = key(
        3, "channels of an image; training reads RGB and requires 3; models that only compute features can have others"
    )
    channel_adaptive: bool = key(
        False,
        "bag of channels: get_intermediate_layers treats each channel as a separate image; for weights of in_chans 1",
    )
    interpolate_antialias: bool = key(False, "resample position embeddings with antialiasing")
    interpolate_offset: NonNegativeFloat = key(
        0.1, "added to the grid size when position embeddings are resampled; 0: exact size"
    )


class Teacher(Section):
    """The exponential moving average of the student."""

    momentum_teacher: Fraction = key(0.992, "EMA momentum at the start")
    final_momentum_teacher: Fraction = key(1.0, "EMA momentum at the end (cosine between)")
    warmup_teacher_temp: PositiveFloat = key(0.04, "teacher's softmax temperature at the start")
    teacher_temp: PositiveFloat = key(0.07, "teacher's softmax temperature after its warm-up")
    warmup_teacher_temp_epochs: Length = key(30, "length of that linear warm-up; may exceed the run", unit="epochs")
    in_chans: PositiveInt = key(3, "must equal student.in_chans or the default; the student's value is used")
    channel_adaptive: bool = key(
        False, "must equal student.channel_adaptive or the default; the student's value is used"
    )


class Optim(Section):
    """Length of the run, AdamW and its schedules."""

    epochs: PositiveInt | PositiveFloat = key(100, "length of the run; may be a fraction", unit="epochs")
    accumulation_steps: PositiveInt = key(
        1,
        "number of batches whose gradients are summed for one step; learning rate and epochs depend on the total batch",
        unit="batches",
    )
    global_batch: NonNegativeInt = key(
        0,
        "images per step over all processes, a multiple of their number; train.batch_size_per_gpu and "
        "optim.accumulation_steps are derived from it: on GPUs, batches that do not fit by the estimate of "
        "run/train/plan.py are accumulated; these two, as overrides, set the maximum number of images and the minimum "
        "number of batches, and are ignored in a config file; 0: not set",
        unit="images",
    )
    weight_decay: NonNegativeFloat = key(0.04, "weight decay at the start")
    weight_decay_end: NonNegativeFloat = key(0.4, "weight decay at the end (cosine between)")
    base_lr: NonNegativeFloat = key(0.004, "peak learning rate at a global batch of 1024 images")
    lr: NonNegativeFloat = key(0.0, "computed: base_lr * sqrt(global batch / 1024); a value given here is ignored")
    warmup_epochs: Length = key(10, "linear warm-up of the learning rate from 0; at most the whole run", unit="epochs")
    min_lr: NonNegativeFloat = key(1e-6, "learning rate at the end (cosine)")
    clip_grad: NonNegativeFloat | None = key(
        3.0, "maximum gradient norm, for backbone and heads separately; 0 or null: no clipping"
    )
    freeze_last_layer_epochs: Length = key(
        1, "length of the beginning of the run in which the prototypes are frozen", unit="epochs"
    )
    scaling_rule: Literal["sqrt_wrt_1024"] = key("sqrt_wrt_1024", "how optim.lr is computed from base_lr")
    patch_embed_lr_mult: NonNegativeFloat = key(0.2, "learning-rate factor of the patch embedding")
    layerwise_decay: PositiveFloat = key(0.9, "learning-rate factor from each block to the one below it; 1: none")
    adamw_beta1: NonNegativeFloat = key(0.9, "AdamW's decay of the mean gradient", lt=1)
    adamw_beta2: NonNegativeFloat = key(0.999, "AdamW's decay of the mean square", lt=1)


class Crops(Section):
    """Number, area and size of the crops."""

    global_crops_scale: Range[AreaShare] = key([0.32, 1.0], "range of a global crop's share of the image area")
    local_crops_number: NonNegativeInt = key(8, "local crops per image; 0: none")
    local_crops_scale: Range[AreaShare] = key([0.05, 0.32], "range of a local crop's share of the image area")
    global_crops_size: PositiveInt = key(224, "side of a global crop, a multiple of student.patch_size", unit="px")
    local_crops_size: PositiveInt = key(96, "side of a local crop, a multiple of student.patch_size", unit="px")


class Online(Section):
    """Evaluation of the teacher during the run; see docs/monitoring.md."""

    every: NonNegativeInt = key(
        0,
        "interval of evaluations; there is another one at the end; 0: none",
        unit="iterations",
        changes_results=False,
    )
    images: PositiveInt = key(
        256,
        "number of images: held-out ones (train.frac), otherwise a fixed sample of the training images; kept in host "
        "memory as crops, about 0.5 MB per image, shared by the processes",
        unit="images",
        changes_results=False,
    )
    knn_train: Text = key(
        "",
        "dataset string of labelled images, the neighbours of kNN; needs evaluation.online.knn_val; empty: no kNN",
        changes_results=False,
    )
    knn_val: Text = key("", "dataset string of labelled images to classify", changes_results=False)
    compare_to_start: bool = key(
        True, "also evaluate the initial weights, and raw pixels by kNN, for comparison", changes_results=False
    )
    best: Literal["auto", "knn", "rankme", "loss", "none"] = key(
        "auto",
        "metric that selects the best teacher, which is kept in eval/best/teacher_checkpoint.pth; auto: knn if there "
        "are datasets for it, else rankme; loss: eval_loss, lower is better; none: not kept",
        changes_results=False,
    )


class Evaluation(Section):
    """Evaluation of the teacher during the run (docs/monitoring.md), and files of its weights."""

    online: Online = Online()

    eval_period_iterations: int = key(
        12500,
        "interval of writing teacher_checkpoint.pth; 0 or less: only at the end",
        unit="iterations",
        changes_results=False,
    )


class Checkpointing(Section):
    """Checkpoints to resume from."""

    period: NonNegativeInt = key(
        0, "save interval; 0: three epochs, as upstream", unit="iterations", changes_results=False
    )
    keep_last: PositiveInt = key(
        3, "number of latest periodic checkpoints to keep", unit="checkpoints", changes_results=False
    )
    keep_every: NonNegativeInt = key(
        0,
        "interval of checkpoints that are never removed; 0: none",
        unit="iterations",
        changes_results=False,
    )
    on_error: Literal["warn", "stop"] = key(
        "warn",
        "if a checkpoint cannot be written (disk full): warn and continue with the previous one, or stop",
        changes_results=False,
    )
    async_save: bool = key(
        False,
        "write a checkpoint while training continues, from a copy of the state in host memory (16 bytes per "
        "parameter; of sharded parameters, the process's share); an error is reported at the next save; false: "
        "training waits for each save",
        changes_results=False,
    )


class Wandb(Section):
    """Weights & Biases; see docs/trackers.md."""

    mode: Literal["disabled", "online", "offline"] = key(
        "disabled",
        "offline: write to <output_dir>/logs/wandb for wandb sync; online falls back to it; WANDB_MODE can restrict it",
        changes_results=False,
    )
    project: Text = key("", "name of the project; empty: WANDB_PROJECT, else dinov2_custom", changes_results=False)
    entity: Text = key("", "user or team; empty: the owner of the API key", changes_results=False)
    name: Text = key(
        "", "name of the run; empty: WANDB_NAME, else the name of the output directory", changes_results=False
    )
    group: Text = key("", "name of a group of runs that W&B shows together", changes_results=False)
    tags: Text | int | float | NonEmpty[str | int | float] = key(
        "", "label, or list of labels, of the run", changes_results=False
    )
    id: Text = key(
        "", "id of the run; empty: WANDB_RUN_ID, else the id of this run directory, else new", changes_results=False
    )


class Mlflow(Section):
    """MLflow; see docs/trackers.md."""

    enabled: bool = key(False, "log metrics to MLflow", changes_results=False)
    tracking_uri: Text = key(
        "",
        "server or store; empty: MLFLOW_TRACKING_URI, else files in <output_dir>/logs/mlruns",
        changes_results=False,
    )
    experiment: Text = key(
        "", "name of the experiment; empty: MLFLOW_EXPERIMENT_NAME, else dinov2_custom", changes_results=False
    )
    name: Text = key("", "name of the run; empty: the name of the output directory", changes_results=False)
    id: Text = key(
        "",
        "id of an existing run; empty: MLFLOW_RUN_ID, else the id of this run directory, else new",
        changes_results=False,
    )


class Normalize(Section):
    mean: Triple[float] = key([0.485, 0.456, 0.406], "subtracted from R, G, B in 0..1 (ImageNet's)")
    std: Triple[PositiveFloat] = key([0.229, 0.224, 0.225], "then divided by (ImageNet's)")


class Data(Section):
    """How pixels become numbers."""

    normalize: Normalize = Normalize()
    intensity: Literal["auto"] | Range[float] = key(
        "auto",
        "values that become 0 and 255 in images of more than 8 bits (16-bit, float), one range for all, such as "
        "[100, 4095]; auto: measured on a sample at the first start, without nodata and outliers, and kept in the "
        "run's config.yaml for resumes, features and evaluations",
    )
    page: NonNegativeInt = key(0, "page or frame to read from files with several, counted from 0")
    dct_scaling: bool = key(
        False,
        "decode a JPEG at 1/2, 1/4 or 1/8 of its size if each side of every crop then still has 1.5 times the pixels "
        "that it needs; faster for photographs of several megapixels",
    )


class Augmentation(Section):
    """Augmentation of the crops; constants in upstream's code."""

    brightness: NonNegativeFloat = key(0.4, "brightness factor drawn from 1 +- this")
    contrast: NonNegativeFloat = key(0.4, "contrast factor drawn from 1 +- this")
    saturation: NonNegativeFloat = key(0.2, "saturation factor drawn from 1 +- this")
    hue: NonNegativeFloat = key(0.1, "hue shift drawn from +- this", unit="turns", le=0.5)
    jitter_p: Fraction = key(0.8, "probability that the four changes above are applied to a crop")
    gray_p: Fraction = key(0.2, "probability that a crop becomes grey")
    solarize_p: Fraction = key(0.2, "probability of solarizing the second global crop")
    blur_p: Triple[Fraction] = key(
        [0.0, 0.9, 0.5],
        "probabilities of blurring global crop 1, global crop 2, local crops; the defaults are what upstream's code "
        "applies; DINO's paper has [1.0, 0.1, 0.5]",
    )
    blur_sigma: Range[PositiveFloat] = key([0.1, 2.0], "range of the Gaussian's sigma", unit="px")
    hflip_p: Fraction = key(0.5, "probability of a horizontal flip")
    device: Literal["auto", "cpu", "device"] = key(
        "auto",
        "where colours are changed; the pixels are the same; cpu: in the data-loading processes; device: on the "
        "device of the model; auto: device on a GPU, else cpu",
        changes_results=False,
    )


class Config(Section):
    """All keys of a run with their defaults."""

    MODEL: Model = Model()
    compute_precision: ComputePrecision = ComputePrecision()
    dino: Dino = Dino()
    ibot: Ibot = Ibot()
    train: Train = Train()
    student: Student = Student()
    teacher: Teacher = Teacher()
    optim: Optim = Optim()
    crops: Crops = Crops()
    evaluation: Evaluation = Evaluation()
    checkpointing: Checkpointing = Checkpointing()
    wandb: Wandb = Wandb()
    mlflow: Mlflow = Mlflow()
    data: Data = Data()
    augmentation: Augmentation = Augmentation()


def default_values() -> dict[str, Any]:
    """Return the defaults as nested plain dicts and lists."""
    return Config().model_dump()


@functools.cache
def all_keys(root: type[Section] = Config) -> dict[str, FieldInfo]:
    """Return every key by dotted name, in the order of the schema. The caller must not modify the result.

    Args:
        root: the schema, here and below: that of a run, or of another command with settings.
    """
    return keys_below(root)


def keys_below(section: type[Section], prefix: str = "") -> dict[str, FieldInfo]:
    """Return the keys of ``section`` and of those in it, by dotted name after ``prefix``."""
    found: dict[str, FieldInfo] = {}
    for name, field in section.model_fields.items():
        default = field.get_default(call_default_factory=True)
        if isinstance(default, Section):
            found |= keys_below(type(default), f"{prefix}{name}.")
        else:
            found[prefix + name] = field
    return found


@functools.cache
def section_keys(root: type[Section] = Config) -> dict[str, list[str]]:
    """Return the names directly inside each section, by dotted section name."""
    inside: dict[str, dict[str, None]] = {}
    for name in all_keys(root):
        parts = name.split(".")
        for count in range(1, len(parts)):
            inside.setdefault(".".join(parts[:count]), {})[parts[count]] = None
    return {name: list(keys) for name, keys in inside.items()}


@functools.cache
def _json_schemas(section: str, root: type[Section]) -> dict[str, Any]:
    return (type(attrgetter(section)(root())) if section else root).model_json_schema()["properties"]


def alternatives(name: str, root: type[Section] = Config) -> list[dict[str, Any]]:
    """Return the alternative JSON schemas of a key's value, without integer if all numbers are legal."""
    section, _, leaf = name.rpartition(".")
    schema = _json_schemas(section, root)[leaf]
    found = schema.get("anyOf", [schema])
    numbers = any(one["type"] == "number" for one in found)
    return [one for one in found if not (numbers and one["type"] == "integer")]


def kinds(name: str, root: type[Section] = Config) -> set[str]:
    """Return the JSON types of a key's legal values, with "string" only if any text is legal."""
    return {one["type"] for one in alternatives(name, root) if not one.keys() & {"const", "enum", "pattern"}}


def choices(name: str, root: type[Section] = Config) -> list[str]:
    """Return the names among a key's legal values."""
    return [choice for one in alternatives(name, root) for choice in _named(one)]


def _named(schema: dict[str, Any]) -> list[str]:
    return schema.get("enum") or ([schema["const"]] if "const" in schema else [])


def expected(name: str, root: type[Section] = Config) -> str:
    """Describe the legal values of a key in a few words."""
    return " or ".join(_describe(schema) for schema in alternatives(name, root))


def _describe(schema: dict[str, Any]) -> str:
    if names := _named(schema):
        return " | ".join(names)
    if schema["type"] == "string":
        return f"a share of the run such as {schema['examples'][0]}" if "examples" in schema else "text"
    if schema["type"] == "array":
        return _describe_list(schema)
    words = {"null": "null", "boolean": "true or false", "object": "a mapping", "integer": "a whole number"}
    return words.get(schema["type"], "a number") + _describe_interval(schema)


def _describe_list(schema: dict[str, Any]) -> str:
    items = schema["items"].get("anyOf", [schema["items"]])
    plural = {"string": "texts", "object": "mappings"}
    nouns = dict.fromkeys(plural.get(item["type"], "numbers") + _describe_interval(item) for item in items)
    count = f"{schema['minItems']} " if "maxItems" in schema else ""
    return f"a list of {count}{' and '.join(nouns)}{', smaller first' if schema.get('ascending') else ''}"


def _describe_interval(schema: dict[str, Any]) -> str:
    low, above = schema.get("minimum"), schema.get("exclusiveMinimum")
    high, below = schema.get("maximum"), schema.get("exclusiveMaximum")
    if above is not None and schema["type"] == "integer":
        low, above = above + 1, None
    if high is not None or below is not None:
        left = f"({above:g}" if low is None else f"[{low:g}"
        return f" in {left}, " + (f"{below:g})" if high is None else f"{high:g}]")
    return f" above {above:g}" if above is not None else "" if low is None else f" of at least {low:g}"
