"""The parts of each family's layers, and exchanging them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import VOCAB, toy_encoder
from torch import nn
from transformers import AutoModelForSequenceClassification

from raybert.compressed import CONFIGS
from raybert.surgery import (
    attention_block,
    backbone,
    embeddings,
    encoder_layers,
    family,
    ffn_block,
    self_attention,
    set_depth,
    set_encoder_layers,
)

FAMILIES = ("bert", "roberta", "distilbert")
IDS = torch.randint(5, len(VOCAB), (2, 9), generator=torch.Generator().manual_seed(0))


def toy_classifier(name: str, layers: int = 4) -> Any:
    torch.manual_seed(1)
    config = toy_encoder(name, layers).config
    return AutoModelForSequenceClassification.from_config(config).eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_parts_are_found_and_are_the_models_own(name):
    model = toy_classifier(name)
    assert family(model.config) == name
    assert backbone(model) is model.base_model
    assert embeddings(model) is model.base_model.embeddings
    layers = encoder_layers(model)
    assert len(layers) == 4
    inside = {id(module) for module in model.modules()}
    assert all(id(self_attention(layer)) in inside for layer in layers)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_family_of_a_compressed_config_is_the_same(name):
    assert family(CONFIGS[name]()) == name


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_two_blocks_make_the_layer(name, attention):
    model = toy_classifier(name)
    model.set_attn_implementation(attention)
    hidden = torch.randn(2, 9, 32)
    mask = torch.zeros(2, 1, 9, 9)
    mask[1, :, :, 6:] = torch.finfo(torch.float32).min
    with torch.inference_mode():
        for layer in encoder_layers(model):
            whole = layer(hidden, attention_mask=mask)
            half = attention_block(layer, hidden, attention_mask=mask)
            assert torch.equal(ffn_block(layer, half), whole)
            assert torch.equal(
                ffn_block(layer, attention_block(layer, hidden, mask)), layer(hidden, mask)
            )
            assert not torch.allclose(half, whole)
            assert not torch.allclose(layer(hidden), whole), "the mask counts"


@pytest.mark.parametrize("name", FAMILIES)
def test_self_attention_gives_context_and_weights(name):
    model = toy_classifier(name)
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        context, weights = self_attention(encoder_layers(model)[0])(torch.randn(2, 9, 32))
    assert context.shape == (2, 9, 32)
    assert torch.allclose(weights.sum(-1), torch.ones(2, 2, 9), atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_other_layers_are_adopted_and_the_config_agrees(name):
    model = toy_classifier(name)
    layers = list(encoder_layers(model))
    seen = []
    layers[3].register_forward_hook(lambda *_: seen.append(3))
    before = [copy.deepcopy(layers[i].state_dict()) for i in (1, 3)]
    set_encoder_layers(model, [layers[1], layers[3]])
    set_depth(model)
    assert list(encoder_layers(model)) == [layers[1], layers[3]]
    assert model.config.num_hidden_layers == 2
    places = [
        [vars(m)["layer_idx"] for m in layer.modules() if "layer_idx" in vars(m)]
        for layer in encoder_layers(model)
    ]
    assert places == [[0] * len(places[0]), [1] * len(places[1])]
    with torch.inference_mode():
        logits = model(IDS).logits
    assert seen == [3], "hooks went along"
    fresh = AutoModelForSequenceClassification.from_config(model.config).eval()
    fresh.load_state_dict(model.state_dict())
    with torch.inference_mode():
        assert torch.equal(fresh(IDS).logits, logits)
    for layer, weights in zip(encoder_layers(fresh), before, strict=True):
        for key, tensor in layer.state_dict().items():
            assert torch.equal(tensor, weights[key]), key


def test_a_module_without_layers_is_an_error():
    model = toy_classifier("bert")
    model.bert.encoder = nn.Identity()
    with pytest.raises(AttributeError, match="layer"):
        encoder_layers(model)
