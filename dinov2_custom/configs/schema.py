"""Declare the whole configuration: one dataclass a YAML section, the only source of defaults.

Not the loading or checking (load.py). Read `Config` first; the sections are in schema_model.py and schema_train.py, and
docs/configuration.md is generated from them.
"""

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

from dinov2_custom.configs import schema_model, schema_train
from dinov2_custom.configs.option import Option, list_options, section


@dataclass
class Config:
    """All keys of a run with their defaults."""

    MODEL: schema_model.Model = section(schema_model.Model, "Weights of a whole run to start from.")
    compute_precision: schema_model.ComputePrecision = section(
        schema_model.ComputePrecision, "Number formats and sharding, for each network."
    )
    dino: schema_model.Dino = section(schema_model.Dino, "Image-level loss and its head; KoLeo.")
    ibot: schema_model.Ibot = section(schema_model.Ibot, "Masked-patch loss and its head.")
    train: schema_train.Train = section(schema_train.Train, "The run: data, batch, output.")
    student: schema_model.Student = section(schema_model.Student, "The backbone.")
    teacher: schema_model.Teacher = section(schema_model.Teacher, "The exponential moving average of the student.")
    optim: schema_train.Optim = section(schema_train.Optim, "Length of the run, AdamW and its schedules.")
    crops: schema_train.Crops = section(schema_train.Crops, "Number, area and size of the crops.")
    evaluation: schema_train.Evaluation = section(schema_train.Evaluation, "Teacher checkpoints along the way.")
    checkpointing: schema_train.Checkpointing = section(schema_train.Checkpointing, "Checkpoints to resume from.")
    wandb: schema_train.Wandb = section(schema_train.Wandb, "Weights & Biases; see docs/monitoring.md.")
    data: schema_train.Data = section(schema_train.Data, "How pixels become numbers.")
    augmentation: schema_train.Augmentation = section(
        schema_train.Augmentation, "What a crop goes through; upstream has these as constants in its code."
    )


@functools.cache
def all_options() -> dict[str, Option]:
    """Return every key by dotted name, in the order of the schema. Not to be changed by the caller."""
    return list_options(Config())


def default_values() -> dict[str, Any]:
    """Return the defaults as nested plain dicts and lists."""
    return dataclasses.asdict(Config())
