"""MA-BERT: matrix arithmetic only, without softmax, GELU or normalisation (Ming et al., ICLR 2023).

    raybert compress method=ma_bert task=mrpc data=GLUE/MRPC teacher=runs/mrpc-finetuned

Softmax becomes a network of two linear layers over the keys, GELU becomes ReLU, and LayerNorm
becomes PowerNorm, which at the end is a multiply-add with constants. What is left to compute are
matrix products, additions and ReLU.

The paper transfers knowledge in two stages, each of which is a run of its own here: (a) from a BERT
with its masked-language-modelling head on plain text (``task=mlm``), (b) from a fine-tuned teacher
on its task, starting from what (a) left (``model=RUN``). Without (a), (b) starts from the teacher.
Distillation is the recipe's ``kd``.
"""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor, nn

from raybert.config import Share
from raybert.errors import UserError
from raybert.method import MethodConfig
from raybert.phase import At, Phase
from raybert.power_norm import PowerNorm, RealTokens
from raybert.softmax_net import MatrixAttention, SoftmaxNet, matrix
from raybert.surgery import (
    backbone,
    compressed_by,
    encoder_layers,
    layer_holder,
    self_attention,
    set_activation,
    sizes,
    swap,
)
from raybert.warm_start import (
    QUERIES,
    ROWS,
    Fit,
    Sample,
    Values,
    layer_norms,
    put,
    random_net,
    record,
)

LENGTH = 128
"""N where neither the method nor the recipe's data says otherwise; the paper's."""

SHARED = "softmax_net"
"""What the network of all layers is called, beside the layers."""

AFTER = ("theseus", "lobert", "ma_bert")
"""The methods whose models this one can start from."""


class MABERT(MethodConfig):
    """Parameters of MA-BERT; section numbers are the paper's."""

    name: Literal["ma_bert"] = "ma_bert"
    length: PositiveInt | None = Field(
        default=None,
        description="N, the tokens that softmax nets are made for and a row has at most; nothing: "
        "`data.max_length`. Of a model that is an MA-BERT already it is the model's, if that is "
        "more.",
    )
    shared: bool = Field(
        default=False, description="One softmax net for all layers, not one for each (3.1)."
    )
    warm_start: bool = Field(
        default=True,
        description="Fit softmax nets to the model's own attention, and norms to its LayerNorms, "
        "before training; otherwise nets are random and norms take the LayerNorms' weights.",
    )
    calibration_rows: PositiveInt = Field(
        default=256, description="Training rows that they are fitted on."
    )
    fit_steps: NonNegativeInt = Field(
        default=400, description="Steps of Adam in the fit of each softmax net."
    )
    layer_steps: NonNegativeInt = Field(
        default=100,
        description="Steps of Adam, of 32 of these rows, in the fit of each whole layer to the "
        "model's own, which makes up for what the new parts cannot do.",
    )
    bounded: bool | None = Field(
        default=None,
        description="Cut each channel of a norm off at the largest value that its LayerNorm gives "
        "there on the calibration rows, beyond the paper: otherwise tokens far from the rest, "
        "which only LayerNorm holds back, grow from layer to layer; nothing: if `warm_start`.",
    )
    alpha: Share = Field(
        default=0.9, description="Weight of the past in PowerNorm's running statistics."
    )
    warmup: NonNegativeInt | None = Field(
        default=None,
        description="Updates for which a PowerNorm uses each batch's own moments, and a plain "
        "average of them so far; nothing: by `warmup_share`.",
    )
    warmup_share: Share | None = Field(
        default=None,
        description="The same as a share of the phase's steps, where it is not given; nothing: all "
        "of them, as in the authors' settings, or none where the moments are known already, from "
        "the warm start or from training before.",
    )
    continues: bool = Field(
        default=False,
        description="Settled by the model: it is an MA-BERT already, and is trained on.",
    )

    @property
    def leaves_trace(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the structure changes: that of an MA-BERT that is trained on does not."""
        return not self.continues

    @property
    def fits(self) -> bool:
        """Whether new parts are fitted to the model's own."""
        return self.warm_start and not self.continues

    def calibration_bytes(self, model_config: Any, length: int) -> int:
        """All rows at once: what each layer gives of them, the feed-forward under way, a step of
        the layers' fit and the queries of the nets'."""
        if not self.fits:
            return 0
        size = sizes(model_config)
        a_token = (size["layers"] + 6) * size["hidden"] + 2 * size["inner"]
        fitted = 22 * size["hidden"] + 3 * size["heads"] * length
        queries = 3 * size["layers"] * QUERIES
        return 4 * length * (self.calibration_rows * a_token + ROWS * fitted + queries)

    def bind(self, recipe: Any) -> MABERT:
        """Take N from the recipe's data.

        Raises:
            UserError: rows may be longer than N, or the precision scales losses.
        """
        longest = recipe.data.max_length
        if self.length is not None and self.length < longest:
            raise UserError(
                f"data.max_length {longest} is more than ma_bert.length {self.length}, the most "
                f"that the softmax nets read; use data.max_length={self.length}, or "
                f"method.ma_bert.length={longest}."
            )
        if recipe.train.precision == "fp16":
            raise UserError(
                "ma_bert cannot train in fp16: its norms keep running statistics of gradients, "
                "which loss scaling changes from step to step. Use train.precision=bf16 or fp32."
            )
        return self.model_copy(update={"length": self.length or longest})

    def advice(self, recipe: Any, model_config: Any) -> list[str]:
        rate = recipe.train.dropout
        if rate is None:
            own = ("hidden_dropout_prob", "dropout")  # BERT's and RoBERTa's name, DistilBERT's
            rate = next((getattr(model_config, n) for n in own if hasattr(model_config, n)), 0.0)
        if not rate:
            return []
        return [
            f"dropout of {rate:g} makes outliers, which MA-BERT's norms do not hold back as "
            "LayerNorm does: train.dropout=0 trains better"
        ]

    def resolve(self, model_config: Any) -> MABERT:
        """Settle N; take over the structure of a model that is an MA-BERT already.

        Raises:
            UserError: a method before it that it cannot follow, or a larger N.
        """
        before = compressed_by(model_config)
        for entry in before:
            if entry["name"] not in AFTER:
                raise UserError(
                    f"ma_bert cannot follow {entry['name']}: it changes attention itself and needs "
                    f"it whole, with weights that can be trained. Put ma_bert before "
                    f"{entry['name']} if that can follow it, or leave one of them out."
                )
        own = next((entry for entry in before if entry["name"] == self.name), None)
        if own is None:
            bounded = self.warm_start if self.bounded is None else self.bounded
            if bounded and not self.warm_start:
                raise UserError(
                    "ma_bert.bounded needs ma_bert.warm_start: the bounds are what the LayerNorms "
                    "give on its calibration rows. Leave one of the two settings out."
                )
            settled = {"length": self.length or LENGTH, "bounded": bounded, "continues": False}
            return self.model_copy(update=settled)
        # Shorter rows are padded inside the attention, so less than the model's N asks for nothing.
        longer = self.length is not None and self.length > own["length"]
        if longer or self.shared not in (False, own["shared"]):
            raise UserError(
                f"ma_bert cannot follow ma_bert with a larger length or other sharing: the model's "
                f"softmax nets are of length {own['length']}"
                f"{', one for all layers' if own['shared'] else ''}. Say data.max_length="
                f"{own['length']} or less, and leave method.ma_bert.length and shared out."
            )
        if self.bounded not in (None, bool(own.get("bounded"))):
            raise UserError(
                f"ma_bert.bounded={str(self.bounded).lower()} is not what this model was made "
                "with: bounds are found where norms take the LayerNorms' place. Leave "
                "method.ma_bert.bounded out."
            )
        same = {key: own.get(key) for key in ("length", "shared", "bounded")}
        return self.model_copy(update={**same, "continues": True})

    @property
    def longest(self) -> int | None:
        """N."""
        return self.length

    def phases(self) -> list[Phase]:
        """One: transfer of knowledge into the new structure."""
        return [Transfer(self)]

    def remarks(self) -> list[str]:
        """What the structure is worth by itself."""
        cut = ", and cuts its norms off at their bounds" if self.bounded else ""
        return [
            "ma_bert: up to its head, which keeps its own functions (a classifier tanh, a language "
            "model GELU and LayerNorm), the model computes matrix products, additions and ReLU "
            f"alone{cut}; on processors with fused float kernels that is about as fast as its "
            "teacher, and its use is hardware without other functions, and integer arithmetic "
            "(q8bert after it)"
        ]


# -- the phase -------------------------------------------------------------------------------------


class Transfer(Phase):
    """Train with running statistics; at the end norms are constants."""

    name = "transfer"

    def __init__(self, method: MABERT) -> None:
        self.method = method
        self.epochs, self.lr = method.epochs, method.lr
        self.calibration = method.calibration_rows if method.fits else 0
        self.values: Values = {}  # from `initialise` to `prepare`
        self.step: int | None = None
        self.real = RealTokens()
        self.handle: Any = None

    @property
    def length(self) -> int:
        """N."""
        return self.method.length or LENGTH

    def initialise(
        self, model: nn.Module, batches: list[dict[str, Tensor]]
    ) -> dict[str, dict[str, float]]:
        """Fit the new parts to the model's own, or draw them; tells how well they fit."""
        method = self.method
        if method.continues:
            for norm in power_norms(model):
                norm.updates.zero_()  # a warm-up is of this phase's
            return {}
        new = copy.deepcopy(model)
        self._exchange(new)
        facts = {}
        if method.warm_start:
            facts = self._fit(model, new, batches)
        else:
            for seed, net in enumerate(softmax_nets(new)):
                put(net, random_net(self.length, seed))
        self.values = new_parts(new, whole=method.warm_start and method.layer_steps > 0)
        return facts

    def _fit(self, model: Any, new: nn.Module, batches: list[dict[str, Tensor]]) -> Any:
        if not batches:
            raise UserError(
                "ma_bert.warm_start found no calibration rows; give the task training rows, or "
                "say method.ma_bert.warm_start=false."
            )
        sample = Sample(batches, self.length, model.config.num_attention_heads)
        steps = self.method.fit_steps, self.method.layer_steps
        fit = Fit(sample, record(model, sample), *steps)
        fit.run(new)
        nets, layers = (
            {f"layer {index}": pair for index, pair in enumerate(pairs)}
            for pairs in (fit.nets, fit.layers)
        )
        return {
            f"relative error of {what} {when} the fit": {
                name: pair[column] for name, pair in rows.items()
            }
            for what, rows in (("softmax nets", nets), ("norms", fit.norms), ("layers", layers))
            if rows
            for column, when in enumerate(("before", "after"))
        }

    def prepare(self, model: nn.Module) -> None:
        """Put nets, ReLU and PowerNorms in place, and let the norms take statistics."""
        if not self.method.continues:
            self._exchange(model)
            if self.values:
                unknown = model.load_state_dict(self.values, strict=False).unexpected_keys
                assert not unknown
                self.values = {}
        for norm in power_norms(model):
            norm.observe(self.real)
        self.handle = backbone(model).register_forward_pre_hook(self._note_mask, with_kwargs=True)

    def _exchange(self, model: nn.Module) -> None:
        method = self.method
        exchange(model, self.length, shared=method.shared, bounded=bool(method.bounded))

    def _note_mask(self, _module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        # Each family's head passes the mask by name.
        self.real.mask = kwargs.get("attention_mask")

    def on_step(self, model: nn.Module, at: At) -> None:
        """Where a new step begins, take what the last one saw into the running statistics."""
        if at.step == self.step:
            return
        self.step = at.step
        method = self.method
        share = method.warmup_share
        if share is None:
            share = float(not (method.warm_start or method.continues))
        for norm in power_norms(model):
            norm.warmup = round(share * at.total) if method.warmup is None else method.warmup
            norm.update(method.alpha)

    def metrics(self, model: nn.Module) -> dict[str, float]:
        """The mean over norms and channels of what activations are divided by."""
        psi = torch.cat([norm.running_phi for norm in power_norms(model)]).sqrt()
        return {"running_psi": psi.mean().item()}

    def finish(self, model: nn.Module) -> None:
        """Statistics stand still from here on."""
        for norm in power_norms(model):
            norm.settle()
        self.handle.remove()


def exchange(model: nn.Module, length: int, *, shared: bool, bounded: bool = False) -> None:
    """The structure: softmax nets of zeros, ReLU, and PowerNorms with the LayerNorms' weights."""
    layers: Any = encoder_layers(model)
    like = next(model.parameters())
    owner = SoftmaxNet(length, like) if shared else None
    if owner is not None:
        layer_holder(model).add_module(SHARED, owner)
    for layer in layers:
        old = self_attention(layer)

        def make(_name: str, attention: nn.Module) -> MatrixAttention:
            new = matrix(attention, owner or SoftmaxNet(length, like))
            return new.share() if shared else new

        swap(layer, lambda _, module, old=old: module is old, make)
        set_activation(layer, nn.ReLU())
    chosen = set(layer_norms(model))

    def normed(_name: str, norm: Any) -> PowerNorm:
        return PowerNorm(norm, bounded=bounded)

    swap(model, lambda name, _: name in chosen, normed)


def power_norms(model: nn.Module) -> list[PowerNorm]:
    """The model's PowerNorms in its own order."""
    return [module for module in model.modules() if isinstance(module, PowerNorm)]


def softmax_nets(model: nn.Module) -> list[SoftmaxNet]:
    """The model's softmax nets in its own order; a shared one is one."""
    return [module for module in model.modules() if isinstance(module, SoftmaxNet)]


def new_parts(model: nn.Module, *, whole: bool) -> Values:
    """Parameters and buffers of nets and norms, or of whole layers too, by their names in the
    model."""
    kinds = (SoftmaxNet, PowerNorm)
    layers = set(encoder_layers(model)) if whole else set()
    return {
        f"{name}.{key}": value.detach()
        for name, module in model.named_modules()
        if isinstance(module, kinds) or module in layers
        for key, value in module.state_dict().items()
    }
