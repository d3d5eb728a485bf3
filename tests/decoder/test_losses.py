import pytest
import torch

from dinov2_custom.decoder.bridge import build
from dinov2_custom.decoder.images import Images, collate
from dinov2_custom.decoder.losses import count, cross_entropy, set_loss
from dinov2_custom.decoder.train import parameter_groups
from tests.decoder.scenes import make_split
from tests.export.backbones import make_teacher

CLASSES = ("square", "disc")


def make(task, settings):
    settings = settings.model_copy(update={"dropout": 0.0})  # whose numbers depend on the batch
    return build(make_teacher("patch 14", img_size=32, patch_size=8), task, CLASSES, settings)


def batch_of(decoder, folder, numbers=(0, 1, 3)):
    """Of three images, of which one has no object."""
    data = Images(make_split(folder, 4), decoder.facts)
    return collate([data[number] for number in numbers])


def loss_of(decoder, batch, training=True):
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)  # of the points at which masks are compared
        return decoder.model.train(training)(**batch).loss


@pytest.mark.parametrize("task", ["detection", "instance"])
def test_the_sum_is_transformers_mean_times_the_number_of_objects(task, tiny, tmp_path):
    settings = tiny("loss.classes=2", "loss.box=3", "loss.giou=0.5", "loss.mask=4", "loss.dice=6", "decoder_layers=2")
    decoder = make(task, settings)
    batch = batch_of(decoder, tmp_path / "a")
    theirs = loss_of(decoder, batch)
    set_loss(decoder.model, 0.0)
    torch.testing.assert_close(loss_of(decoder, batch), theirs * count(batch["labels"]))


@pytest.mark.parametrize("task", ["detection", "instance"])
def test_in_evaluation_all_queries_compete_and_images_add_up(task, tiny, tmp_path):
    """With transformers' loss, 8 queries in 13 groups are none in a group."""
    decoder = make(task, tiny("groups=13", "loss.mask=0", "loss.dice=0"))  # the points of masks are random
    set_loss(decoder.model, 0.0)
    whole = batch_of(decoder, tmp_path / "a")
    parts = [batch_of(decoder, tmp_path / f"b{number}", (number,)) for number in (0, 1, 3)]
    summed = sum(loss_of(decoder, part, training=False) for part in parts)
    torch.testing.assert_close(loss_of(decoder, whole, training=False), summed)


@pytest.mark.parametrize("task", ["detection", "instance"])
@pytest.mark.parametrize("numbers", [(1,), (0, 1)], ids=["no object", "objects"])
def test_every_parameter_has_a_gradient_as_processes_that_average_them_need(task, numbers, tiny, tmp_path):
    settings = tiny()
    decoder = make(task, settings)
    parameter_groups(decoder.model, settings)  # sets what is trained
    set_loss(decoder.model, 0.0)
    decoder.model.train()(**batch_of(decoder, tmp_path / "a", numbers)).loss.backward()
    trained = {name: value for name, value in decoder.model.named_parameters() if value.requires_grad}
    assert [name for name, value in trained.items() if value.grad is None] == []


@pytest.mark.parametrize(
    "task, term",
    [*(("detection", name) for name in ("classes", "box", "giou")), ("instance", "mask"), ("instance", "dice")],
)
def test_every_weight_of_a_term_acts(task, term, tiny, tmp_path):
    names = ("classes", "box", "giou", "mask", "dice")
    losses = []
    for weight in (1, 3):
        decoder = make(task, tiny(*(f"loss.{name}={weight if name == term else 0}" for name in names)))
        # the costs of matching objects to queries have the weights of the masks
        decoder.model.config.mask_point_sample_ratio = 1
        set_loss(decoder.model, 0.0)
        losses.append(loss_of(decoder, batch_of(decoder, tmp_path / f"{weight}")))
    assert losses[0] > 0
    if task == "detection":
        torch.testing.assert_close(losses[1], 3 * losses[0])
    else:
        assert losses[1] > 2 * losses[0]


@pytest.mark.parametrize("task", ["detection", "instance"])
def test_label_smoothing_draws_the_classes_of_matched_queries_towards_a_half(task, tiny, tmp_path):
    decoder = make(task, tiny("loss.box=0", "loss.giou=0", "loss.mask=0", "loss.dice=0"))
    batch = batch_of(decoder, tmp_path / "a")
    losses = []
    for smoothing in (0.0, 0.1, 1.0):
        set_loss(decoder.model, smoothing)
        losses.append(loss_of(decoder, batch))
    plain, smoothed, even = losses
    torch.testing.assert_close(smoothed, 0.9 * plain + 0.1 * even)
    with torch.no_grad():
        for name, value in decoder.model.named_parameters():
            if "class_embed" in name:
                value.zero_()  # every probability is a half
    levels = decoder.model.config.decoder_layers + 1
    wanted = count(batch["labels"]) * levels * len(CLASSES) * torch.tensor(2.0).log()
    torch.testing.assert_close(loss_of(decoder, batch), wanted)


def test_semantic_losses_count_labelled_pixels():
    logits, labels = torch.randn(2, 3, 4, 4), torch.full((2, 4, 4), 255)
    assert cross_entropy(logits, labels, 0.0) == count(labels) == 0
    labels[0, 0, :2] = 1
    wanted = torch.nn.functional.cross_entropy(logits[0, :, 0, :2].T, labels[0, 0, :2], reduction="sum")
    torch.testing.assert_close(cross_entropy(logits, labels, 0.0), wanted)
    assert count(labels) == 2
