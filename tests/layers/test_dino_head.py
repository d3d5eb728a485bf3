import torch
import torch.nn.functional as F

from dinov2_custom.layers import DINOHead


def test_logits_are_cosines_times_weight_g():
    torch.manual_seed(0)
    head = DINOHead(16, 40, hidden_dim=32, bottleneck_dim=8)
    with torch.no_grad():
        head.last_layer.weight_g.uniform_(0.5, 2)
    x = torch.randn(5, 16)
    features = F.normalize(head.mlp(x), dim=-1)
    rows = F.normalize(head.last_layer.weight_v, dim=-1) * head.last_layer.weight_g
    torch.testing.assert_close(head(x), features @ rows.T)


def test_names_are_those_of_released_heads():
    names = set(DINOHead(16, 40, hidden_dim=32, bottleneck_dim=8).state_dict())
    assert names == {
        *(f"mlp.{i}.{part}" for i in (0, 2, 4) for part in ("weight", "bias")),
        "last_layer.weight_g",
        "last_layer.weight_v",
    }
    assert set(DINOHead(16, 40, nlayers=1).state_dict()) >= {"mlp.weight", "mlp.bias"}


def test_prototype_spread_and_gain_at_start():
    torch.manual_seed(0)
    head = DINOHead(16, 4096, hidden_dim=32, bottleneck_dim=256)
    assert abs(head.last_layer.weight_v.std().item() - 0.0361) < 2e-4  # 1 / sqrt(3 * 256)
    assert torch.equal(head.last_layer.weight_g, torch.ones(4096, 1))


def test_half_precision_features_stay_normalised():
    head = DINOHead(16, 40, hidden_dim=32, bottleneck_dim=8).bfloat16()
    norms = head.embed(torch.randn(5, 16).bfloat16()).float().norm(dim=-1)
    torch.testing.assert_close(norms, torch.ones(5), rtol=0, atol=1e-2)
