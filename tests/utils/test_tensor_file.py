import torch

from dinov2_custom.train.memory import LiveBytes
from dinov2_custom.utils.tensor_file import Piece, TensorFile, write_pieces


def test_of_tensors_on_a_device_one_at_a_time_is_in_host_memory(tmp_path, monkeypatch):
    tensors = {str(i): torch.full((1000, 25), float(i)) for i in range(8)}
    monkeypatch.setattr(torch.Tensor, "cpu", torch.Tensor.clone)  # as from a device, it takes memory
    with LiveBytes() as live:
        write_pieces(tmp_path / "file", {name: Piece.whole(tensor) for name, tensor in tensors.items()})
    assert sum(live.at_peak.values()) == tensors["0"].nbytes
    written = TensorFile(tmp_path / "file")
    for name, tensor in tensors.items():
        out = torch.empty_like(tensor)
        written.read_into(out, name, 0)
        assert torch.equal(out, tensor)
