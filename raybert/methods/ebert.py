"""EBERT: dynamic structured pruning, the heads and neurons that each sample needs (Liu et al.,
Findings of ACL 2021).

    raybert compress method=ebert task=mrpc data=GLUE/MRPC teacher=runs/mrpc-finetuned

A small network in front of each attention and each feed-forward block looks at the sample's [CLS]
vector (in front of the first block: at the mean over its tokens) and decides which heads and
neurons are computed. Gates and model are trained together, with a loss that holds the share of
FLOPs saved at its target; a second phase can go on with frozen gates.

The finished model computes what is kept and nothing else (`raybert.skipping`). Beyond the paper:
heads and neurons that no calibration sample keeps can be removed for good.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)
from torch import Tensor, nn

from raybert.config import KEPT_SHARE
from raybert.errors import UserError
from raybert.gates import Gate, Shape, flops_loss
from raybert.kept import kept_units, layer_flops, spread_rows
from raybert.kept_operators import ACTIVATIONS
from raybert.method import MethodConfig
from raybert.phase import At, Distillation, Outputs, Phase
from raybert.skipping import GATED, Gated, GatedFeedForward
from raybert.surgery import (
    activation,
    compressed_by,
    encoder_layers,
    matrices,
    self_attention,
    set_blocks,
    sizes,
)

Counts = tuple[PositiveInt, ...]

LEAST_ROWS = 8
"""Rows of a forward pass, over all workers: of one alone a gate's normalisation leaves nothing, and
of few it is unlike that of all rows, which decides once the gates are frozen."""

REACHED = 0.05
"""How far the last step's share of the FLOPs may be above the target when that counts as
reached."""


class EBERT(MethodConfig):
    """Parameters of EBERT."""

    leaves_trace = True

    name: Literal["ebert"] = "ebert"
    target_flops_ratio: float = Field(
        default=0.5,
        gt=0,
        lt=1,
        description="Share of the encoder layers' FLOPs to be left, the gates' own included.",
    )
    masks: Literal["gumbel", "topk"] = Field(
        default="gumbel",
        description="How units are kept: gumbel, where a logit is not negative, drawn in training; "
        "topk, a fixed number in each block, those of the largest logits.",
    )
    flops_weight: NonNegativeFloat = Field(
        default=4.0, description="Weight of the FLOPs loss (lambda); topk has none."
    )
    layer_weight: NonNegativeFloat = Field(
        default=5.0, description="Weight, in that loss, of each layer's own distance to the target."
    )
    temperature: PositiveFloat = Field(default=1.0, description="Of the Gumbel-sigmoid.")
    gate_lr: PositiveFloat = Field(default=0.02, description="Peak learning rate of the gates.")
    gate_start: float = Field(
        default=3.0,
        description="Logits that gates start with, about; 0: half of all units, which damages the "
        "model before it has learned which.",
    )
    frozen_epochs: NonNegativeFloat = Field(
        default=0.0, description="Epochs of a second phase, in which gates are frozen."
    )
    frozen_lr: PositiveFloat | None = Field(
        default=None, description="Its peak learning rate; nothing: as `lr`."
    )
    remove: bool = Field(
        default=False,
        description="Before that phase, remove the units that no calibration row keeps for good.",
    )
    calibration_rows: PositiveInt = Field(
        default=1024, description="Training rows that `remove` looks at."
    )
    report_rows: NonNegativeInt = Field(
        default=512, description="Dev rows that the report's kept shares are taken over."
    )
    length: PositiveInt = Field(
        default=128,
        description="Tokens of the sample that a target in reach, or topk's number, is worked out "
        "for.",
    )
    shape: Shape | None = Field(
        default=None, description="Settled: layers, width, heads and inner width."
    )
    heads: Counts | None = Field(
        default=None, description="Settled by `remove`: the heads left in each layer."
    )
    neurons: Counts | None = Field(default=None, description="The same for neurons.")

    @model_validator(mode="after")
    def _consistent(self) -> EBERT:
        if self.frozen_lr is not None and not self.frozen_epochs:
            raise ValueError("ebert.frozen_lr is given and ebert.frozen_epochs is 0")
        if (self.heads is None) != (self.neurons is None):
            raise ValueError("ebert.heads and ebert.neurons are settled together; leave both out")
        return self

    def bind(self, recipe: Any) -> EBERT:
        """Refuse to learn what there is no place for.

        Raises:
            UserError: what is settled is given, attention is to be learned by fewer heads than the
                teacher has, or forward passes have too few rows for gates to learn from.
        """
        if self.heads is not None:
            raise UserError(
                "ebert.heads and ebert.neurons are settled by ebert.remove while a run trains, and "
                "cannot be asked for. Leave them out, and say method.ebert.remove=true."
            )
        train = recipe.train
        rows = train.batch_size // train.accumulation
        if rows < LEAST_ROWS:
            raise UserError(
                f"ebert's gates normalise over the rows of a forward pass, and {rows} are too few: "
                f"train.batch_size={train.batch_size} over train.accumulation="
                f"{train.accumulation}. Use train.accumulation="
                f"{max(1, train.batch_size // LEAST_ROWS)}"
                + (f" and train.batch_size={LEAST_ROWS}." if train.batch_size < LEAST_ROWS else ".")
            )
        if self.remove and self.frozen_epochs and recipe.kd.attention:
            raise UserError(
                "ebert.remove takes heads away for good before ebert.frozen_epochs, and "
                "kd.attention compares head by head. Use kd.attention=0, or leave one of the two."
            )
        return self

    def resolve(self, model_config: Any) -> EBERT:
        """Settle the model's shape.

        Raises:
            UserError: a target out of reach; a method before it that it cannot follow.
        """
        for entry in compressed_by(model_config):
            raise UserError(
                f"ebert cannot follow {entry['name']}: it gates heads and neurons of a model's own "
                "dense matrices, once. Put ebert after theseus, or start from the model that "
                f"{entry['name']} was given."
            )
        if model_config.chunk_size_feed_forward:
            raise UserError(
                "ebert's gates look at a sample's first token, which feed-forwards in chunks do "
                "not all see; load the model with chunk_size_feed_forward=0."
            )
        shape = Shape(**sizes(model_config))
        own = shape.cost(0, 0, self.length) / shape.dense_cost(self.length)
        if self.target_flops_ratio <= own:
            raise UserError(
                f"ebert.target_flops_ratio {self.target_flops_ratio:g} is out of reach: the gates "
                f"alone cost {own:.3g} of the layers' FLOPs at {self.length} tokens. Give more "
                "than that, or prune a larger model."
            )
        return self.model_copy(update={"shape": shape})

    @property
    def kept(self) -> float:
        """The share of units that the target leaves, at ``length`` tokens."""
        assert self.shape is not None
        own = self.shape.cost(0, 0, self.length) / self.shape.dense_cost(self.length)
        return self.target_flops_ratio - own

    def settle(self, model: Any, batches: list[dict[str, Any]]) -> EBERT:
        """Settle how many units are left, where the second phase begins."""
        found = dict(gated(model))
        if not self.remove or self.heads is not None or not found:
            return self
        used = used_units(model, batches)
        counts = {name: tuple(map(len, units)) for name, units in used.items()}
        return self.model_copy(update=counts)

    def remarks(self) -> list[str]:
        """How far the clock can be taken at its word."""
        return [
            "ebert: what is computed depends on the sample; latency and FLOPs in the tables are of "
            "random tokens, and the shares told of this run's phases are of its evaluation rows"
        ]

    def graph_remarks(self, model: Any) -> list[str]:
        """How far its clock can be taken at its word, and what the graph does not leave out."""
        found = [
            "ebert: what the graph computes depends on the samples; latency is of random tokens"
        ]
        blocks = [block for _, block in gated(model) if isinstance(block, GatedFeedForward)]
        if any(block.activation_name is None for block in blocks):
            found.append(
                "Simulated in part: the graph leaves out heads that a sample does not keep. Its "
                f"neurons, which have another activation than {', '.join(ACTIVATIONS)}, are all "
                "computed and multiplied by zero."
            )
        return found

    @property
    def rounding(self) -> float:
        """It can tip a gate's decision over."""
        return 0.02

    def phases(self) -> list[Phase]:
        """Training with gates, and training with frozen ones if that is asked for."""
        phases: list[Phase] = [TrainGates(self)]
        if self.remove or self.frozen_epochs:
            phases.append(FrozenGates(self))
        phases[-1].examined = self.report_rows
        return phases


def gated(model: nn.Module) -> list[tuple[str, Gated]]:
    """A model's gated blocks by name, layer by layer, attention before feed-forward."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, Gated)]


def used_units(model: nn.Module, batches: list[dict[str, Tensor]]) -> dict[str, list[Tensor]]:
    """For ``heads`` and ``neurons`` the numbers of those in each layer that some row keeps; of a
    layer where none is kept, the first stands for all."""
    seen = kept_units(model, [block.gate for _, block in gated(model)], batches)
    used = [torch.nonzero(keep.any(0)).flatten() for keep in seen]
    used = [units if len(units) else units.new_zeros(1) for units in used]
    return {"heads": used[::2], "neurons": used[1::2]}


class TrainGates(Phase):
    """Train gates and model together, towards the target."""

    name = "gates"

    def __init__(self, method: EBERT) -> None:
        self.method = method
        self.epochs, self.lr = method.epochs, method.lr
        self.rates = {"*.gate.*": method.gate_lr}
        self.share = torch.tensor(1.0)  # of the FLOPs, in the last step

    def prepare(self, model: nn.Module) -> None:
        """Put gates in front of every block, and lay its weights out unit by unit."""
        method, shape = self.method, self.method.shape
        assert shape is not None

        def gate(number: int, units: int) -> Gate:
            top = max(1, round(method.kept * units)) if method.masks == "topk" else None
            new = Gate(
                shape.hidden,
                units,
                number=number,
                top=top,
                start=method.gate_start if top is None else 0.0,
                temperature=method.temperature,
            )
            return new.to(next(model.parameters()).device)

        for index, layer in enumerate(encoder_layers(model)):
            found = list(matrices(layer).values())
            attention = self_attention(layer)
            heads = GATED[type(attention)].gated(
                attention, found[:4], gate(2 * index, shape.heads), mean=index == 0
            )
            neurons = GatedFeedForward(
                found[4], found[5], activation(layer), gate(2 * index + 1, shape.inner)
            )
            set_blocks(layer, heads, neurons)
            heads.train(layer.training)
            neurons.train(layer.training)

    def on_step(self, model: nn.Module, at: At) -> None:
        """Tell the gates for which rows they draw: a row draws the same on any worker."""
        assert at.rows is not None
        for _, block in gated(model):
            block.gate.draw = (at.seed, at.step, at.rows)

    def losses(
        self, model: nn.Module, out: Outputs, teacher: Outputs | None, batch: dict, kd: Distillation
    ) -> dict[str, Tensor]:
        """The usual ones, and that of the FLOPs."""
        terms = super().losses(model, out, teacher, batch, kd)
        kept = [block.gate.decided() for _, block in gated(model)]
        tokens = batch["attention_mask"].sum(1)  # [B]
        method, shape = self.method, self.method.shape
        assert shape is not None
        target, weight = method.target_flops_ratio, method.layer_weight
        loss, self.share = flops_loss(shape, kept, tokens, target=target, weight=weight)
        if method.masks == "gumbel":
            terms["flops"] = method.flops_weight * loss
        return terms

    def may_end(self, step: int) -> bool:
        """Once the target is about reached: what is hardly pruned yet scores best."""
        method = self.method
        reached = self.share.item() <= method.target_flops_ratio + REACHED
        return step > 0 and (reached or method.masks == "topk")

    def unreached(self) -> str:
        """That the target was not."""
        return (
            f"ebert: the last step's rows kept {self.share.item():.0%} of the layers' FLOPs, which "
            f"is more than the target of {self.method.target_flops_ratio:.0%}: train longer, or "
            "with a larger flops_weight or gate_lr"
        )

    def warnings(self, total: int) -> list[str]:
        """That untrained gates keep about everything."""
        if total or self.method.masks == "topk" or not self.method.gate_start:
            return []
        return ["ebert: gates that are not trained keep about everything, whatever the target is"]

    def metrics(self, model: nn.Module) -> dict[str, float]:
        """The share of the layers' FLOPs that the last step's rows kept."""
        return {"flops_share": self.share.item()}

    def finish(self, model: nn.Module) -> None:
        """Freeze the gates; from now on what they do not keep is not computed."""
        for _, block in gated(model):
            block.sort()
            block.gate.freeze()
            block.skips, block.expected = True, self.method.kept

    def facts(
        self, model: nn.Module, batches: list[dict[str, Tensor]]
    ) -> dict[str, dict[str, float]]:
        """What dev rows keep, and what that costs."""
        return what_is_kept(model, self.method, batches)


class FrozenGates(Phase):
    """Go on training the model behind its gates, without what no calibration row keeps."""

    name = "frozen_gates"

    def __init__(self, method: EBERT) -> None:
        self.method = method
        self.epochs, self.lr = method.frozen_epochs, method.frozen_lr or method.lr
        self.rates = {"*.gate.*": 0.0}
        self.calibration = method.calibration_rows if method.remove else 0
        self.used: list[Tensor] | None = None  # from `initialise` to `prepare`

    def initialise(
        self, model: nn.Module, batches: list[dict[str, Tensor]]
    ) -> dict[str, dict[str, float]]:
        """Find the units that are used; tells how many are left."""
        shape = self.method.shape
        assert shape is not None
        if not self.method.remove:
            return {}
        if not batches:
            raise UserError("ebert.remove found no calibration rows; give the task training rows.")
        used = used_units(model, batches)
        pairs = zip(used["heads"], used["neurons"], strict=True)
        self.used = [units for pair in pairs for units in pair]
        left = {
            f"layer {layer} {name}": float(len(units))
            for name, found in used.items()
            for layer, units in enumerate(found)
        }
        return {"left after removal": left}

    def prepare(self, model: nn.Module) -> None:
        """Remove what `initialise` did not find used; without it, only the sizes."""
        method = self.method
        if method.heads is None or method.neurons is None:
            return
        counts = [n for pair in zip(method.heads, method.neurons, strict=True) for n in pair]
        used = self.used or [None] * len(counts)
        for (_, block), found, count in zip(gated(model), used, counts, strict=True):
            # The first worker's units are everybody's, and its weights are sent to all: where sums
            # of floats differ, another may have found more or fewer.
            units = found if found is not None and len(found) == count else None
            block.units.narrow(units, count)
            block.gate.narrow(units, count)
        self.used = None

    def facts(
        self, model: nn.Module, batches: list[dict[str, Tensor]]
    ) -> dict[str, dict[str, float]]:
        """What dev rows keep, and what that costs."""
        return what_is_kept(model, self.method, batches)


KEPT = ("heads", "neurons")

COUNTED = 16
"""Dev rows, spread evenly over the lengths, whose FLOPs torch counts one by one."""


def what_is_kept(
    model: nn.Module, method: EBERT, batches: list[dict[str, Tensor]]
) -> dict[str, dict[str, float]]:
    """The kept share of each layer's heads and neurons, and the FLOPs of rows, by formula and as
    torch counts them; shares are of the model without gates."""
    shape = method.shape
    assert shape is not None
    seen = kept_units(model, [block.gate for _, block in gated(model)], batches)
    tokens = torch.cat([batch["attention_mask"].sum(1) for batch in batches]).double()
    counts = [keep.sum(1).double() for keep in seen]  # [rows] each
    cost = shape.cost(sum(counts[::2]), sum(counts[1::2]), tokens)
    dense = shape.dense_cost(tokens)
    shares = cost / dense
    rows = spread_rows(model, batches, COUNTED)
    places = [place for place, _ in rows]
    counted = sum(layer_flops(model, row) for _, row in rows) / 2
    names = [f"layer {layer} {part}" for layer in range(shape.layers) for part in KEPT]
    units = [shape.heads, shape.inner] * shape.layers
    sizes = zip(names, counts, units, strict=True)
    return {
        KEPT_SHARE: {name: count.mean().item() / n for name, count, n in sizes},
        "share of the layers' FLOPs": {
            "all rows, by formula": (cost.sum() / dense.sum()).item(),
            f"{len(rows)} rows, by formula": (cost[places].sum() / dense[places].sum()).item(),
            f"{len(rows)} rows, as torch counts": counted / dense[places].sum().item(),
            "least of a row": shares.min().item(),
            **{f"{q:.0%} of rows at most": shares.quantile(q).item() for q in (0.1, 0.5, 0.9)},
            "most of a row": shares.max().item(),
        },
    }
