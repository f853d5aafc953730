"""The Hugging Face classes of models whose structure compression has changed.

A compressed class is its Hugging Face class whose ``__init__`` replays the surgery that
``config.compression`` lists, so that ``save_pretrained``, ``from_pretrained``, safetensors and
meta-device loading are transformers' own. A method that ends in a plain architecture leaves no
trace: what it makes is loaded by stock transformers without raybert.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForMaskedLM,
    DistilBertForQuestionAnswering,
    DistilBertForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForQuestionAnswering,
    RobertaForSequenceClassification,
)

from raybert.int8 import check_trainable
from raybert.method import MethodConfig
from raybert.methods import METHODS
from raybert.surgery import COMPRESSED_PREFIX, compressed_by, family


def finished(config: Any) -> list[MethodConfig]:
    """The methods that changed the structure of a config's model, in order."""
    return [METHODS[entry["name"]].model_validate(entry) for entry in compressed_by(config)]


def longest_input(config: Any) -> int:
    """Tokens that a row may have at most."""
    # RoBERTa counts positions from pad_token_id + 1.
    offset = config.pad_token_id + 1 if family(config) == "roberta" else 0
    most = [method.longest for method in finished(config)]
    return min([config.max_position_embeddings - offset, *(n for n in most if n is not None)])


def replay(model: nn.Module, chain: Iterable[MethodConfig]) -> None:
    """Redo the structural surgery of finished methods; the weights come from the checkpoint."""
    for method in chain:
        for phase in method.phases():
            phase.prepare(model)
            phase.finish(model)


class CompressedBertConfig(BertConfig):
    """A BERT config with the list of methods that changed the model's structure."""

    model_type = COMPRESSED_PREFIX + "bert"
    compression: list | None = None


class CompressedRobertaConfig(RobertaConfig):
    """A RoBERTa config with the list of methods that changed the model's structure."""

    model_type = COMPRESSED_PREFIX + "roberta"
    compression: list | None = None


class CompressedDistilBertConfig(DistilBertConfig):
    """A DistilBERT config with the list of methods that changed the model's structure."""

    model_type = COMPRESSED_PREFIX + "distilbert"
    compression: list | None = None


CONFIGS: dict[str, type[PreTrainedConfig]] = {
    "bert": CompressedBertConfig,
    "roberta": CompressedRobertaConfig,
    "distilbert": CompressedDistilBertConfig,
}

STOCK: dict[str, tuple[type[PreTrainedModel], ...]] = {
    "bert": (BertForSequenceClassification, BertForQuestionAnswering, BertForMaskedLM),
    "roberta": (RobertaForSequenceClassification, RobertaForQuestionAnswering, RobertaForMaskedLM),
    "distilbert": (
        DistilBertForSequenceClassification,
        DistilBertForQuestionAnswering,
        DistilBertForMaskedLM,
    ),
}
"""Family -> its stock classes with a head."""


def _compressed(stock: type[PreTrainedModel], config_class: type[PreTrainedConfig]) -> type:
    def __init__(self, config, *args: Any, **kwargs: Any) -> None:
        stock.__init__(self, config, *args, **kwargs)
        replay(self, finished(config))

    def train(self, mode: bool = True):
        if mode:
            check_trainable(self)  # before any part of it has changed
        return stock.train(self, mode)

    body: dict[str, Any] = {"__init__": __init__, "train": train, "config_class": config_class}
    body["__module__"] = __name__
    body["__doc__"] = f"{stock.__name__} whose structure `config.compression` describes."
    return type(f"Compressed{stock.__name__}", (stock,), body)


COMPRESSED: dict[str, type[PreTrainedModel]] = {
    stock.__name__: _compressed(stock, CONFIGS[name])
    for name, classes in STOCK.items()
    for stock in classes
}
"""Stock class name -> its compressed class."""

for _name, _config in CONFIGS.items():
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    for _auto, _stock in zip(
        (AutoModelForSequenceClassification, AutoModelForQuestionAnswering, AutoModelForMaskedLM),
        STOCK[_name],
        strict=True,
    ):
        _auto.register(_config, COMPRESSED[_stock.__name__], exist_ok=True)


def mark_compressed(model: PreTrainedModel, method: MethodConfig) -> None:
    """Note in the config that ``method`` changed the structure, and take on the compressed class.

    The model's modules are already as the finished method left them; only class and config change.
    """
    stock = type(model).__name__.removeprefix("Compressed")
    data = method.student_config(model.config).to_dict()
    data.pop("model_type")
    attention = model.config._attn_implementation
    config = CONFIGS[family(model.config)].from_dict(data)
    config._attn_implementation = attention
    module: Any
    for module in model.modules():
        if vars(module).get("config") is model.config and module is not model:
            module.config = config
    model.config = config
    model.__class__ = COMPRESSED[stock]
