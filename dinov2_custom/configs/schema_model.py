"""Declare the keys of the networks, the losses' heads and the numeric precision.

Not the training and data keys (schema_train.py). Read `Student` first. Names and defaults: upstream
`dinov2/configs/ssl_default_config.yaml`.
"""

from dataclasses import dataclass

from dinov2_custom.configs.archs import DEPTH_OF_ARCH
from dinov2_custom.configs.option import option, section

DTYPES = ("fp32", "fp16", "bf16")
FFN_LAYERS = ("mlp", "swiglu", "swiglufused", "identity")
SHARDING_STRATEGIES = ("auto", "NO_SHARD", "SHARD_GRAD_OP", "FULL_SHARD")


@dataclass
class Model:
    WEIGHTS: str = option(
        "",
        "file whose weights a fresh run starts from, of a training state student, teacher and centres; wins over "
        "student.pretrained_weights; empty: none",
        unit="path",
    )


@dataclass
class MixedPrecision:
    param_dtype: str = option(
        "auto",
        "number format of the forward and backward pass; auto: bf16 where the device has it natively, "
        "else fp16 on CUDA, else fp32; fp32 is without TF32, convolutions included",
        choices=("auto", *DTYPES),
    )
    reduce_dtype: str = option(
        "auto",
        "number format in which sharded gradients are summed; auto: fp32; fp16 only where param_dtype is fp16, too",
        choices=("auto", *DTYPES),
    )
    buffer_dtype: str = option("fp32", "number format of buffers of a sharded module", choices=DTYPES)


@dataclass
class ModulePrecision:
    sharding_strategy: str = option(
        "auto",
        "NO_SHARD: whole in every process (data parallel); SHARD_GRAD_OP: weights and optimizer state split over "
        "processes (FSDP2), weights gathered once a step; FULL_SHARD: again in the backward pass, least memory; auto: "
        "NO_SHARD on CPUs and while 20 bytes a parameter fit into a quarter of a GPU's memory, else SHARD_GRAD_OP",
        changes_results=False,
        choices=SHARDING_STRATEGIES,
    )
    mixed_precision: MixedPrecision = section(MixedPrecision)


@dataclass
class TeacherPrecision:
    backbone: ModulePrecision = section(ModulePrecision)
    dino_head: ModulePrecision = section(ModulePrecision)
    ibot_head: ModulePrecision = section(ModulePrecision)


@dataclass
class StudentPrecision:
    backbone: ModulePrecision = section(ModulePrecision)
    dino_head: ModulePrecision = section(ModulePrecision)
    ibot_head: ModulePrecision = section(ModulePrecision)


@dataclass
class ComputePrecision:
    grad_scaler: bool = option(True, "scale the loss against underflow; takes effect only where fp16 is in use")
    gather_dtype: str = option(
        "fp32",
        "number format in which processes send each other sharded weights; param_dtype: half the bytes in 16 bits, and "
        "biases, norms, LayerScale and embeddings are used rounded to it, too",
        choices=("fp32", "param_dtype"),
    )
    teacher: TeacherPrecision = section(TeacherPrecision)
    student: StudentPrecision = section(StudentPrecision)


@dataclass
class Dino:
    loss_weight: float = option(1.0, "weight of the image-level loss; 0: off", within="[0, inf)")
    head_n_prototypes: int = option(65536, "outputs of the head", within="[1, inf)")
    head_bottleneck_dim: int = option(256, "width before the prototypes", within="[1, inf)")
    head_nlayers: int = option(3, "linear layers before the prototypes", within="[1, inf)")
    head_hidden_dim: int = option(2048, "width of the hidden layers", within="[1, inf)")
    koleo_loss_weight: float = option(0.1, "weight of the KoLeo spreading loss; 0: off", within="[0, inf)")
    koleo_neighbours: str = option(
        "process",
        "where KoLeo looks for an image's nearest neighbour: among the batch of its process, as upstream, or of all, "
        "whose result does not depend on their number",
        choices=("process", "all"),
    )


@dataclass
class Ibot:
    loss_weight: float = option(1.0, "weight of the masked-patch loss; 0: off", within="[0, inf)")
    mask_sample_probability: float = option(
        0.5, "share of the global crops that get a mask; applies with loss_weight 0 too", within="[0, 1]"
    )
    mask_ratio_min_max: list[float] = option(
        [0.1, 0.5], "range of the masked share of a masked crop's patches", within="[0, 1]", length=2, increasing=True
    )
    separate_head: bool = option(
        False, "give patches a head of their own; false: they go through dino's head and ibot.head_* are ignored"
    )
    head_n_prototypes: int = option(65536, "outputs of the separate head", within="[1, inf)")
    head_bottleneck_dim: int = option(256, "width before its prototypes", within="[1, inf)")
    head_nlayers: int = option(3, "its linear layers before the prototypes", within="[1, inf)")
    head_hidden_dim: int = option(2048, "width of its hidden layers", within="[1, inf)")


@dataclass
class Student:
    arch: str = option(
        "vit_large",
        f"network: {', '.join(DEPTH_OF_ARCH)}; a suffix _memeff is ignored",
    )
    patch_size: int = option(16, "side of a patch; must divide both crop sizes", unit="px", within="[1, inf)")
    drop_path_rate: float = option(0.3, "share of samples that skip a residual branch", within="[0, 1)")
    layerscale: float | None = option(1e-5, "initial LayerScale factor; 0 or null: no LayerScale", within="[0, inf)")
    drop_path_uniform: bool = option(True, "same rate in all blocks; false: rises linearly from 0 with depth")
    pretrained_weights: str = option(
        "",
        "weights that student and teacher start from: Meta's files, Hugging Face's Dinov2 (file or folder), teacher "
        "checkpoints with their heads, a run directory (its newest teacher); a path, a URL, or what iopath serves; "
        "empty: random",
        unit="path",
    )
    freeze_backbone_epochs: int | float | str = option(
        0,
        "start of the run in which only the heads train, for random heads on a pretrained backbone",
        unit="epochs",
        within="[0, inf)",
        share=True,
    )
    ffn_layer: str = option("mlp", "feed-forward kind; identity: none", choices=FFN_LAYERS)
    block_chunks: int = option(
        0,
        "groups of blocks; only the names in the state dict depend on it, 0: blocks.{i}",
        changes_results=False,
        within="[0, inf)",
    )
    qkv_bias: bool = option(True, "biases in the query, key and value layer")
    proj_bias: bool = option(True, "biases in the attention's output layer")
    ffn_bias: bool = option(True, "biases in the feed-forward layers")
    num_register_tokens: int = option(0, "extra tokens besides CLS and patches; 4 is usual", within="[0, inf)")
    in_chans: int = option(
        3, "channels of an image; training reads RGB and takes 3 only, features of other weights any", within="[1, inf)"
    )
    channel_adaptive: bool = option(
        False,
        "bag of channels: get_intermediate_layers takes each channel as an image of its own; for weights of in_chans 1",
    )
    interpolate_antialias: bool = option(False, "antialias when position embeddings are resampled")
    interpolate_offset: float = option(
        0.1, "added to the grid size when position embeddings are resampled; 0: exact size", within="[0, inf)"
    )


@dataclass
class Teacher:
    momentum_teacher: float = option(0.992, "EMA momentum at the start", within="[0, 1]")
    final_momentum_teacher: float = option(1.0, "EMA momentum at the end (cosine between)", within="[0, 1]")
    warmup_teacher_temp: float = option(0.04, "teacher's softmax temperature at the start", within="(0, inf)")
    teacher_temp: float = option(0.07, "teacher's softmax temperature after its warm-up", within="(0, inf)")
    warmup_teacher_temp_epochs: int | float | str = option(
        30, "length of that linear warm-up; may exceed the run", unit="epochs", within="[0, inf)", share=True
    )
    in_chans: int = option(3, "as student.in_chans, which the teacher follows: that, or the default", within="[1, inf)")
    channel_adaptive: bool = option(False, "as student.channel_adaptive, likewise")
