from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dinov2_custom.eval import linear
from dinov2_custom.eval.linear import (
    AllClassifiers,
    LinearClassifier,
    LinearPostprocessor,
    create_linear_input,
    rate_names,
    setup_linear_classifiers,
    sum_of_losses,
)

RATES = [1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1]


def tokens(batch=3, blocks=4, patches=6, dim=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(batch, patches, dim, generator=generator), torch.randn(batch, dim, generator=generator))
        for _ in range(blocks)
    ]


def test_input_is_class_tokens_and_mean_patch():
    given = tokens()
    got = create_linear_input(given, 2, True)
    assert torch.equal(got, torch.cat([given[2][1], given[3][1], given[3][0].mean(1)], dim=1))
    assert torch.equal(create_linear_input(given, 1, False), given[3][1])
    assert create_linear_input([(p.half(), c.half()) for p, c in given], 4, True).dtype == torch.float32


@pytest.mark.parametrize("batch_size", [8, 32, 64, 128, 1024])
def test_all_52_classifiers_have_names_of_their_own(batch_size):
    classifiers, groups = setup_linear_classifiers(tokens(), (1, 4), RATES, batch_size, num_classes=2)
    assert len(classifiers) == len(groups) == len(classifiers.state_dict()) // 2 == 52
    names = list(classifiers.classifiers_dict)
    scaled = [rate * batch_size / 256 for rate in RATES]
    assert [group["lr"] for group in groups] == scaled * 4
    for name, group in zip(names, groups, strict=True):
        text = name.rpartition("lr_")[2].replace("_", ".")
        assert float(text) == pytest.approx(group["lr"], rel=0.05, abs=5e-6 if len(text) == 7 else 0)
        owner = classifiers.classifiers_dict[name]
        assert {id(p) for p in group["params"]} == {id(p) for p in owner.parameters()}
    plain = [f"{rate:.5f}".replace(".", "_") for rate in scaled]  # upstream's
    kept = {text for text in plain if plain.count(text) == 1 and float(text.replace("_", "."))}
    assert kept < {name.rpartition("lr_")[2] for name in names} or batch_size == 1024


def test_names_are_upstreams_where_upstreams_are_distinct():
    assert list(rate_names([0.01, 0.5])) == ["0_01000", "0_50000"]
    assert list(rate_names([2e-6, 4e-6, 0.01, 0.01])) == ["0_000002", "0_000004", "0_01000"]
    assert list(rate_names([0.000011, 0.000012])) == ["0_000011", "0_000012"]
    assert list(rate_names([0.0])) == ["0_00000"]


def test_shared_inputs_are_made_once(monkeypatch):
    given, made = tokens(), []

    def counted(*args):
        made.append(args[1:])
        return create_linear_input(*args)

    classifiers, _ = setup_linear_classifiers(given, (1, 4), RATES[:3], 8, num_classes=2)
    monkeypatch.setattr(linear, "create_linear_input", counted)
    logits = classifiers(given)
    assert sorted(made) == [(1, False), (1, True), (4, False), (4, True)]
    for name, one in logits.items():
        assert torch.equal(one, classifiers.classifiers_dict[name](given))


def test_weights_do_not_depend_on_what_was_drawn_before():
    first, _ = setup_linear_classifiers(tokens(), (1,), [0.1], 8, num_classes=300)
    state = torch.get_rng_state()
    torch.rand(3)
    before = torch.get_rng_state()
    second, _ = setup_linear_classifiers(tokens(seed=1), (1,), [0.1], 8, num_classes=300)
    assert torch.equal(torch.get_rng_state(), before) and not torch.equal(before, state)
    for (name, one), other in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(one, other)
        assert float(one.std()) == pytest.approx(0.01, rel=0.1) if "weight" in name else not one.any()


def test_each_gradient_is_of_its_own_loss():
    given, labels = tokens(), torch.tensor([0, 1, 1])
    one, other = LinearClassifier(5, 1, False, 2), LinearClassifier(25, 4, True, 2)
    sum_of_losses(AllClassifiers({"a": one, "b": other})(given), labels).backward()
    together = one.linear.weight.grad.clone()
    one.zero_grad()
    F.cross_entropy(one(given), labels).backward()
    torch.testing.assert_close(one.linear.weight.grad, together)


def test_class_mapping_picks_columns():
    classifier, given = LinearClassifier(5, 1, False, 4), tokens()
    target = torch.tensor([0, 1, 0])
    got = LinearPostprocessor(classifier, [3, 1])(given, target)
    assert torch.equal(got["preds"], classifier(given)[:, [3, 1]]) and got["target"] is target
    assert torch.equal(LinearPostprocessor(classifier)(given, target)["preds"], classifier(given))
