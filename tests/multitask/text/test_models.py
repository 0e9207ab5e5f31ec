"""The encoders: values by hand, and features that do not depend on the texts beside them."""

import pytest
import torch
from torch import nn

from counterpoise.classification import Design, HardSharing, Pretrained, TextCNN, build_classifier
from counterpoise.classification.models import build_encoder
from counterpoise.classification.vectors import token_ids

from .worlds import tasks, tiny_encoder


def table(rows: int = 12, dimension: int = 6) -> torch.Tensor:
    torch.manual_seed(0)
    made = torch.randn(rows, dimension)
    made[0] = 0.0
    return made


def pad(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    return token_ids(rows, 0).batch(torch.arange(len(rows)))


def encoder(kind: str, tmp_path) -> nn.Module:
    if kind == "bert":
        from transformers import AutoModel

        return Pretrained(AutoModel.from_pretrained(tiny_encoder(tmp_path)))
    return build_encoder(Design(kind, width=7), table())


def test_a_text_cnn_by_hand():
    model = TextCNN(torch.tensor([[0.0], [1.0], [2.0], [-3.0]]), width=1, kernels=[3])
    with torch.no_grad():
        model.convolutions[0].weight[:] = torch.tensor([[[1.0, 10.0, 100.0]]])
        model.convolutions[0].bias[:] = 0.5
    ids_BT, mask_BT = pad([[1, 2, 3], [3], [2, 1]])
    # by centre: 0+10+200, 1+20-300, 2-30+0; -30 -> 0 by relu; 0+20+100, 2+10+0
    assert model(ids_BT, mask_BT).tolist() == [[210.5], [0.0], [120.5]]


@pytest.mark.parametrize("kind", ["textcnn", "bert"])
def test_features_do_not_depend_on_the_texts_beside(kind, tmp_path):
    model = encoder(kind, tmp_path).eval()
    rows = [[5, 3, 4], [7], [2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 2, 3]]
    together = model(*pad(rows))
    assert together.shape == (3, model.features)
    for row, features_F in zip(rows, together, strict=True):
        torch.testing.assert_close(model(*pad([row]))[0], features_F, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["textcnn", "bert"])
def test_every_shared_parameter_and_only_its_own_head_gets_a_gradient(kind, tmp_path):
    model = HardSharing(encoder(kind, tmp_path), [2, 3], dropout=0.0)
    model.logits(model(*pad([[5, 3, 4], [7, 2, 9]])), 1).square().sum().backward()
    assert all(p.grad is not None for p in model.encoder.last_shared())
    assert model.heads[1].weight.grad is not None
    assert model.heads[0].weight.grad is None


def test_the_last_shared_layer_is_the_last(tmp_path):
    model = encoder("bert", tmp_path)
    names = {id(p): n for n, p in model.named_parameters()}
    assert {names[id(p)].split(".")[3] for p in model.last_shared()} == {"1"}


def test_padding_stays_zero_and_frozen_vectors_stay():
    model = build_encoder(Design("textcnn", width=3), table())
    model(*pad([[5, 3], [7]])).sum().backward()
    assert float(model.embedding.weight.grad[0].abs().max()) == 0.0
    frozen = build_encoder(Design("textcnn", width=3, freeze_vectors=True), table())
    assert not frozen.embedding.weight.requires_grad
    assert all(p is not frozen.embedding.weight for p in HardSharing(frozen, [2]).shared())


def test_an_encoder_decoder_gives_its_encoder():
    from transformers import AutoModel, T5Config

    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_heads": 2, "num_layers": 1, "vocab_size": 32}
    model = Pretrained(AutoModel.from_config(T5Config(**sizes)))
    assert model(*pad([[5, 3], [7]])).shape == (2, 16)
    assert not any("decoder" in n for n, _ in model.named_parameters())


def test_bad_designs(tmp_path):
    for wrong, message in (
        ({"kernels": (3, 4)}, "kernels: expected odd sizes"),
        ({"kernels": ()}, "kernels: expected odd sizes"),
        ({"dropout": 1.0}, "dropout: expected a share"),
        ({"width": 0}, "width and max_tokens of at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            Design(**wrong)
    found = tasks(tmp_path / "data")
    with pytest.raises(ValueError, match="no such folder, and not a hub id"):
        build_classifier(found, "textcn")
    bert = str(tiny_encoder(tmp_path / "bert"))
    with pytest.raises(ValueError, match="brings its own embedding"):
        build_classifier(found, Design(bert, max_tokens=32), vectors="v.txt")
    with pytest.raises(ValueError, match="reads at most 96 tokens, found 256"):
        build_classifier(found, bert)
    with pytest.raises(ValueError, match="found more than once"):
        build_classifier([found[0], found[0]])
