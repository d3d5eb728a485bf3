"""ExtendedVisionDataset subclassed as by users, and the decoder classes."""

import pytest

from dinov2_custom.data import DatasetWithEnumeratedTargets
from dinov2_custom.data.datasets.decoders import Decoder, DecoderType, ImageDataDecoder, TargetDecoder, TupleDecoder
from dinov2_custom.data.datasets.extended import ExtendedVisionDataset
from dinov2_custom.errors import DataError
from tests.data.pictures import encode, picture


class Own(ExtendedVisionDataset):
    """A user-defined dataset with upstream's signature."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.files = [encode(picture(8, 6, i)) for i in range(3)] + [b"broken"]

    def get_image_data(self, index: int) -> bytes:
        return self.files[index]

    def get_target(self, index: int):
        return None if index == 2 else 10 * index

    def __len__(self) -> int:
        return len(self.files)


def test_users_subclass_gives_samples():
    dataset = Own("somewhere", transform=lambda image: image.size, target_transform=lambda target: target + 1)
    assert dataset.root == "somewhere" and dataset[1] == ((8, 6), 11)
    assert Own(root="x", transforms=lambda image, target: (target, image.mode))[1] == (10, "RGB")


def test_broken_image_is_named_by_class_and_index():
    with pytest.raises(DataError, match=r"Own\[3\]"):
        Own()[3]


def test_base_class_is_abstract():
    base = ExtendedVisionDataset()
    for call in (lambda: base.get_image_data(0), lambda: base.get_target(0), lambda: len(base), Decoder().decode):
        with pytest.raises(NotImplementedError):
            call()


def test_decoders():
    data = encode(picture(8, 6))
    image, target = TupleDecoder(ImageDataDecoder(data), TargetDecoder(5)).decode()
    assert image.tobytes() == picture(8, 6).tobytes() and target == 5


class Halved(Decoder):
    """A user-defined decoder with a parameter."""

    def __init__(self, image_data: bytes, by: int = 2):
        self.image_data, self.by = image_data, by

    def decode(self):
        return ImageDataDecoder(self.image_data).decode().reduce(self.by)


def test_a_decoder_of_choice():
    by_name = Own(image_decoder_type=DecoderType.ImageDataDecoder)
    assert DecoderType("ImageDataDecoder").get_class() is ImageDataDecoder
    assert by_name[1][0].tobytes() == Own()[1][0].tobytes()
    assert Own(image_decoder_type=Halved)[0][0].size == (4, 3)
    assert Own(image_decoder_type=Halved, image_decoder_params={"by": 3})[0][0].size == (3, 2)
    with pytest.raises(DataError, match="mine"):
        Own(image_decoder_params={"source": "mine"})[3]


def test_enumerated_targets_contain_the_index():
    dataset = DatasetWithEnumeratedTargets(Own())
    assert len(dataset) == 4
    assert dataset[1][1] == (1, 10) == dataset.get_target(1)
    assert dataset[2][1] == 2 == dataset.get_target(2), "no target: the index alone"
    assert dataset[0][0].size == (8, 6)
    assert dataset.get_image_data(3) == b"broken" and dataset.get_sample_decoder(0).decode().size == (8, 6)
