"""The last layer for one token alone gives the logits and gradients of the whole layer."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import pytest
import torch
from conftest import VOCAB, toy_encoder
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from raybert.first_token import first_token_only
from raybert.methods import METHODS
from raybert.phase import Taps
from raybert.surgery import encoder_layers

FAMILIES = ("bert", "roberta", "distilbert")


def classifier(family: str, attention: str) -> Any:
    torch.manual_seed(0)
    config = toy_encoder(family, layers=3).config
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation=attention)
    return model.eval()


def batch() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(5, len(VOCAB), (4, 7), generator=draw)
    mask = torch.ones_like(ids)
    mask[1:, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 1, 1, 0])}


def run(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Any]]:
    model.zero_grad()
    out = model(**inputs)
    out.loss.backward()
    return out.logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padded", [True, False])
def test_logits_and_gradients_are_those_of_all_tokens(family, attention, padded):
    model, inputs = classifier(family, attention), batch()
    if not padded:
        del inputs["attention_mask"]
    wanted, gradients = run(model, inputs)
    with first_token_only(model):
        found, narrow = run(model, inputs)
    torch.testing.assert_close(found, wanted)
    for name, gradient in gradients.items():
        # Biases of keys have none: a softmax does not see them.
        assert (gradient is None) == (narrow[name] is None)
        if gradient is not None:
            torch.testing.assert_close(narrow[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_other_tokens_of_the_last_layer_are_not_computed(family):
    model, inputs = classifier(family, "sdpa"), batch()
    taps = Taps(model, hidden=True, attention=False)
    with torch.no_grad():
        for narrow in (True, False):  # and all of it is back afterwards
            with first_token_only(model) if narrow else contextlib.nullcontext():
                hidden = taps.collect(model(**inputs)).hidden
            assert [h.shape[1] for h in hidden] == [7, 7, 7, 1 if narrow else 7]


def test_attention_that_a_method_owns_is_left_alone():
    model, inputs = classifier("bert", "sdpa"), batch()
    method = METHODS["ma_bert"].model_validate({"length": 8, "warm_start": False})
    for phase in method.resolve(model.config).phases():
        phase.initialise(model, [])
        phase.prepare(model)
        phase.finish(model)
    taps = Taps(model, hidden=True, attention=False)
    with first_token_only(model), torch.no_grad():
        assert taps.collect(model(**inputs)).hidden[-1].shape[1] == 7


@pytest.mark.parametrize("modules", ["layer", "sublayer"])
def test_layers_that_are_replaced_too(modules):
    model, inputs = classifier("bert", "sdpa"), batch()
    method = METHODS["theseus"].model_validate({"groups": [1, 2], "modules": modules})
    (phase,) = method.resolve(model.config).phases()
    phase.prepare(model)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    containers: Any = encoder_layers(model)
    for replaced in itertools.product((True, False), repeat=2):
        for container in containers:
            container.replaced = replaced
        wanted, gradients = run(model, inputs)
        with first_token_only(model):
            found, narrow = run(model, inputs)
        torch.testing.assert_close(found, wanted)
        for name, gradient in gradients.items():
            if gradient is not None:
                torch.testing.assert_close(narrow[name], gradient, rtol=1e-4, atol=1e-6)


def test_inputs_that_all_tokens_scale_together_are_left_alone():
    model, inputs = classifier("bert", "sdpa").eval(), batch()
    method = METHODS["q8bert"].model_validate({"mode": "dynamic", "epochs": 0})
    for phase in method.resolve(model.config).phases():
        phase.initialise(model, [inputs])
        phase.prepare(model)
        phase.finish(model)
    with torch.no_grad():
        wanted = model(**inputs).logits
        with first_token_only(model):
            assert torch.equal(model(**inputs).logits, wanted)


def test_low_rank_projections_too():
    model, inputs = classifier("bert", "sdpa"), batch()
    method = METHODS["lobert"].model_validate({"share": 0.8}).resolve(model.config)
    for phase in method.phases():
        phase.initialise(model, [])
        phase.prepare(model)
    wanted, _ = run(model, inputs)
    with first_token_only(model):
        found, _ = run(model, inputs)
    torch.testing.assert_close(found, wanted)
