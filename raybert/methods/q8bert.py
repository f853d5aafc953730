"""Q8BERT: 8-bit weights and activations by quantisation-aware training (Zafrir et al., NeurIPS EMC2
2019, arXiv 1910.06188; the straight-through estimator; integer arithmetic as in Jacob et al.,
CVPR 2018).

    raybert compress method=q8bert task=mrpc data=GLUE/MRPC teacher=runs/mrpc-finetuned

While training, every linear layer rounds its weights and inputs to the integers that will stand for
them, and embeddings their tables; gradients go through the rounding as if it were not there. The
range of each layer's inputs is a moving average of the largest magnitude in a step, over all
workers. At the end the integers themselves are what is left: int8 matrices, int32 biases, a scale
for each, and a matrix product of integers.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from pydantic import Field, NonNegativeInt, model_validator
from torch import Tensor, nn

from raybert.errors import UserError
from raybert.fake_quant import FakeQuantEmbedding, FakeQuantLinear, Range
from raybert.grid import largest, reach_of
from raybert.int8 import Inputs, Int8Embedding, Scheme, backend
from raybert.integer import (
    FakeQuantNorm,
    FakeQuantProduct,
    join,
    norms_of,
    regroup,
    roles,
    set_units,
)
from raybert.method import MethodConfig
from raybert.phase import At, Distillation, Outputs, Phase
from raybert.power_norm import PowerNorm
from raybert.softmax_net import Product
from raybert.surgery import attending, compressed_by, model_inputs, swap
from raybert.workers import workers

FAKE = (FakeQuantLinear, FakeQuantProduct, FakeQuantNorm)

SHARED_CORES = ("self_tucker_vertical", "self_tucker_4d", "ffn_tucker")
"""Modes of lobert that leave a core to several layers, which is no layer of its own."""

INPUTS: dict[str, Inputs] = {"ema": "static", "dynamic": "dynamic", "none": "float"}


class Q8BERT(MethodConfig):
    """Parameters of Q8BERT."""

    leaves_trace = True

    name: Literal["q8bert"] = "q8bert"
    mode: Literal["ema", "dynamic", "none"] = Field(
        default="ema",
        description="How activations are scaled: by a moving average of their range, by each "
        "batch's own, or not quantised at all.",
    )
    weight_bits: int = Field(default=8, ge=2, le=8, description="Bits of a weight.")
    activation_bits: int = Field(default=8, ge=2, le=8, description="Bits of an activation.")
    embeddings: bool = Field(default=True, description="Quantise embedding tables too.")
    embedding_bits: int | None = Field(
        default=None, ge=2, le=8, description="Bits of an embedding; nothing: weight_bits."
    )
    per_channel: bool = Field(
        default=False,
        description="A scale for each output of a layer and each row of a table, not one for all.",
    )
    asymmetric: bool = Field(
        default=False,
        description="Learn both ends of each range of inputs, and a zero point, in place of the "
        "largest magnitude: what GELU makes needs half the step.",
    )
    requantise: bool = Field(
        default=False, description="Quantise the outputs of linear layers too."
    )
    integer_only: bool = Field(
        default=False,
        description="After ma_bert: integers all the way from the embeddings to the head, also "
        "products of activations, ReLU, residuals and norms. Of weight_bits below 8 the right side "
        "of a product of activations has 7.",
    )
    start_step: NonNegativeInt = Field(
        default=0,
        description="Step of the phase from which training sees quantised values; ranges are "
        "observed from the first, and evaluation is always quantised.",
    )
    ema_decay: float = Field(
        default=0.9999, ge=0, lt=1, description="Weight of the past in the moving average."
    )
    calibration_rows: NonNegativeInt = Field(
        default=128, description="Training rows that the moving average starts from."
    )
    skip: tuple[str, ...] = Field(
        default=(), description="Name patterns of modules that stay as they are."
    )
    floats: tuple[str, ...] = Field(
        default=(), description="Settled: factorisations before it whose cores stay floats."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Q8BERT:
        if self.mode == "ema" and not self.calibration_rows:
            raise ValueError(
                "q8bert.calibration_rows is 0, which leaves the ranges of mode ema nothing to "
                "start from; give some, for example 128, or use mode=dynamic"
            )
        if self.mode == "none" and self.requantise:
            raise ValueError(
                "q8bert.requantise quantises activations, and mode=none leaves them as they are; "
                "use mode=ema or dynamic"
            )
        if self.asymmetric and self.mode != "ema":
            raise ValueError(
                f"q8bert.asymmetric learns both ends of a range, and mode={self.mode} learns none; "
                "use mode=ema, or leave asymmetric out"
            )
        plain = (self.mode, self.activation_bits, self.skip, self.requantise, self.asymmetric)
        if self.integer_only and plain != ("ema", 8, (), False, False):
            raise ValueError(
                "q8bert.integer_only settles where ranges of 8 bits are learned; use it with "
                "mode=ema, activation_bits=8, and without skip, requantise and asymmetric"
            )
        return self

    @property
    def simulated(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether no product of integers will run: mode none, or a processor without a fast one."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return self.mode == "none" or backend(device) == "float"

    def bind(self, recipe: Any) -> Q8BERT:
        """Refuse to learn what there is no place for.

        Raises:
            UserError: attention is to be learned while integers alone are trained.
        """
        if self.integer_only and recipe.kd.attention and self.epochs != 0:
            raise UserError(
                "q8bert.integer_only trains a model whose attention is of integers and is not "
                "recorded, so kd.attention cannot be learned. Use two runs: ma_bert with "
                "kd.attention, then q8bert with model= that run and kd.attention=0."
            )
        return self

    def check_model(self, make: Callable[[], Any]) -> None:
        """Refuse a pattern of ``skip`` that no layer has."""
        if not self.skip:
            return
        chosen = selected(make(), self.model_copy(update={"skip": ()}))
        for pattern in self.skip:
            if not any(fnmatch.fnmatchcase(name, pattern) for name in chosen):
                first, *_, last = chosen
                raise UserError(
                    f"q8bert.skip {pattern!r} matches no layer that would be quantised; those are "
                    f"{first} … {last}, and * stands for any part of a name."
                )

    def resolve(self, model_config: Any) -> Q8BERT:
        """Settle the bits of embeddings, and what stays as it is.

        Raises:
            UserError: the model is quantised already, or picks weights for each sample; or it has
                functions or factors that leave no way through for integers alone.
        """
        entries = compressed_by(model_config)
        before = [entry["name"] for entry in entries]
        if self.integer_only and set(before) != {"ma_bert"}:
            raise UserError(
                f"q8bert.integer_only needs a model of matrix products, ReLU and affine norms with "
                f"whole matrices, as ma_bert makes it; the methods before it are "
                f"{', '.join(before) or 'none that change the model'}. Use "
                f"method=[ma_bert,q8bert], or leave integer_only out."
            )
        if "ebert" in before:
            raise UserError(
                "q8bert cannot follow ebert: its products of integers are of whole matrices, and "
                "ebert's model picks rows of them for each sample. Use one of the two."
            )
        if self.name in before:
            raise UserError(
                "q8bert cannot follow q8bert: the model is quantised already. Quantise the model "
                "that it was made of, once, as the last method of a chain."
            )
        modes = {entry.get(part) for entry in entries for part in ("attention", "ffn")}
        settled = {
            "embedding_bits": self.embedding_bits or self.weight_bits,
            "floats": tuple(mode for mode in SHARED_CORES if mode in modes),
        }
        return self.model_copy(update=settled)

    @property
    def rounding(self) -> float:
        """It can tip an activation over to its next level; seen: 0.02 with 8 bits."""
        if self.mode == "none":
            return super().rounding
        return 0.05 * 2 ** ((8 - self.activation_bits) / 2)

    def phases(self) -> list[Phase]:
        """One: training with quantised values."""
        return [Quantise(self)]

    def scheme(self, *, tied: bool = False, **role: bool) -> Scheme:
        """How linear layers are quantised.

        Args:
            tied: whether the weights are the embeddings'.
            role: fields of `Scheme` that this layer's place settles.
        """
        embedding_bits = self.embedding_bits or self.weight_bits
        return Scheme(
            weight_bits=embedding_bits if tied else self.weight_bits,
            activation_bits=self.activation_bits,
            inputs=INPUTS[self.mode],
            # The stream's units make rows as unlike each other as its channels are. A tied layer
            # has the scales of the embeddings' table.
            per_row=self.per_channel or (self.integer_only and not tied),
            asymmetric=self.asymmetric,
            **{"requantise": self.requantise, **role},
        )

    def graph_remarks(self, model: Any) -> list[str]:
        """What an integer-only graph is made of, and what ONNX Runtime lacks for it."""
        if not self.integer_only:
            return []
        return [
            "q8bert.integer_only: between the embeddings and the head everything is computed on "
            "bytes. ONNX Runtime has no operator that multiplies two activations, or an activation "
            "and signed weights, and adds a bias before it rounds: so sums leave a product as "
            "float32, rescaled, and a second pass rounds them to bytes."
        ]

    def remarks(self) -> list[str]:
        """What bits below 8, and arithmetic that is not of integers, amount to."""
        found = []
        if self.floats:
            found.append(
                f"q8bert: the cores that layers share after {' and '.join(self.floats)} stay "
                "float32, on disk and in products; their outer factors are integers"
            )
        stored = {self.weight_bits, self.embedding_bits or self.weight_bits}
        if min(stored | {self.activation_bits}) < 8:
            packed, single = any(bits <= 4 for bits in stored), stored & {5, 6, 7}
            disk = " Up to 4 bits are packed on disk." if packed else ""
            disk += " Of 5 to 7 bits each number takes a byte there." if single else ""
            found.append(
                f"q8bert: bits below 8 save no time: the product is of 8-bit integers.{disk}"
            )
        if self.mode == "none":
            found.append(
                "q8bert: with mode=none only weights are integers; they are multiplied as floats, "
                "so this saves storage and no time"
            )
        elif self.simulated:
            found.append(
                "q8bert: this processor has no fast product of bytes for PyTorch, so there it "
                "computes the same numbers in float32; the saving is in storage, and in ONNX"
            )
        return found


# -- the phase -------------------------------------------------------------------------------------


def tied_decoder(model: Any) -> str | None:
    """Name of the layer whose weight is the word embeddings' table, if the model has one."""
    decoder = model.get_output_embeddings()
    names = (name for name, module in model.named_modules() if module is decoder)
    name = None if decoder is None else next(names)
    return name if f"{name}.weight" in model.all_tied_weights_keys else None


def selected(model: Any, method: Q8BERT) -> Mapping[str, nn.Module]:
    """The modules that are quantised, by name: every linear layer and every embedding, and in an
    integer-only model products of activations and norms.

    Word embeddings and the decoder that shares their table go together: both, or neither.

    Raises:
        UserError: ``skip`` leaves none.
    """
    kinds: tuple[type[nn.Module], ...] = (nn.Linear,)
    kinds += (nn.Embedding,) if method.embeddings else ()
    kinds += (Product, PowerNorm) if method.integer_only else ()
    modules = dict(model.named_modules())
    found = {
        name: module
        for name, module in modules.items()
        if isinstance(module, kinds) and not any(fnmatch.fnmatchcase(name, p) for p in method.skip)
    }
    decoder = tied_decoder(model)
    if decoder is not None:
        words = model.get_input_embeddings()
        pair = {decoder, *(name for name, module in modules.items() if module is words)}
        if not pair <= found.keys():
            found = {name: module for name, module in found.items() if name not in pair}
    if not found:
        raise UserError(f"q8bert.skip {list(method.skip)} leaves nothing to quantise.")
    return found


def calibrate(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: list[dict[str, Tensor]],
    size: Callable[[Tensor], Tensor] = largest,
) -> dict[str, dict[str, Tensor]]:
    """How far what goes into and comes out of layers goes, the mean over batches.

    Args:
        model: in evaluation mode.
        layers: those to watch, by name. One may be called several times in a pass.
        batches: of rows.
        size: the largest magnitude of a value, or its reach [2] below 0 and above.

    Returns:
        ``input`` and ``output`` of each layer, of a product ``left`` and ``right``; of one that
        never ran, nothing.
    """
    now: dict[str, list[Tensor]] = {}
    means: dict[str, Tensor] = {}  # [2, ...]

    def watch(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            both = (*args, output)[:2]
            now.setdefault(name, []).append(torch.stack([size(part) for part in both]))

        return hook

    handles = [layer.register_forward_hook(watch(name)) for name, layer in layers.items()]
    with torch.no_grad():
        for batch in batches:
            model(**model_inputs(model, batch))
            for name, seen in now.items():
                most = torch.stack(seen).amax(0).float() / len(batches)
                means[name] = means[name] + most if name in means else most
            now.clear()
    for handle in handles:
        handle.remove()
    sides = {
        name: ("left", "right") if isinstance(layer, Product) else ("input", "output")
        for name, layer in layers.items()
    }
    return {name: dict(zip(sides[name], mean.cpu(), strict=True)) for name, mean in means.items()}


class Quantise(Phase):
    """Train with quantised values; at the end the integers are left."""

    name = "quantise"
    every_token = True  # ranges are of all tokens

    def __init__(self, method: Q8BERT) -> None:
        self.method = method
        self.epochs, self.lr = method.epochs, method.lr
        self.calibration = method.calibration_rows if method.mode == "ema" else 0
        self.calibrated: dict[str, dict[str, Tensor]] = {}
        self.units: dict[str, Tensor] = {}
        self.step: int | None = None

    def may_end(self, step: int) -> bool:
        """From the start: with calibrated ranges 8 bits lose little, and training is not to lose
        more."""
        return True

    def initialise(
        self, model: Any, batches: list[dict[str, Tensor]]
    ) -> dict[str, dict[str, float]]:
        """Find where the moving averages start, and in an integer-only model the stream's units."""
        if self.method.mode != "ema":
            return {}
        if not batches:
            raise UserError("q8bert mode=ema needs calibration rows; there are none to train on.")
        with attending(model, "eager"):  # it goes by way of every layer that there is
            if self.method.integer_only:
                regroup(model)
                self.units = set_units(model, batches)
            chosen = selected(model, self.method)
            layers = {n: part for n, part in chosen.items() if not isinstance(part, nn.Embedding)}
            size = reach_of if self.method.asymmetric else largest
            self.calibrated = calibrate(model, layers, batches, size)
        inputs = {n: seen["input"] for n, seen in self.calibrated.items() if "input" in seen}
        most = {name: size.amax().item() for name, size in inputs.items()}
        return {"Largest input of each layer (calibration rows)": most}

    def prepare(self, model: nn.Module) -> None:
        """Put layers that compute with quantised values in the place of plain ones."""
        method = self.method
        if method.integer_only:
            regroup(model)
        chosen, decoder = selected(model, method), tied_decoder(model)
        role = roles(model) if method.integer_only else {}
        device = next(model.parameters()).device

        def make(name: str, module: nn.Module) -> nn.Module:
            if isinstance(module, nn.Embedding):
                bits = method.embedding_bits or method.weight_bits
                return FakeQuantEmbedding(module, bits, method.per_channel)
            new = self._trained(module, name == decoder, role.get(module, {}))
            for key, value in self.calibrated.get(name, {}).items():
                if f"{key}_range" in new._modules:
                    start: Any = new.get_submodule(f"{key}_range")
                    start.start(value)
            if name in self.units:
                new.get_buffer("unit").copy_(self.units[name])
            return new.to(device)

        swap(model, lambda name, _: name in chosen, make)
        if method.integer_only:
            join(model)

    def _trained(self, module: nn.Module, tied: bool, role: dict[str, bool]) -> nn.Module:
        """What takes a module's place while training."""
        if isinstance(module, nn.Linear):
            return FakeQuantLinear(module, self.method.scheme(tied=tied, **role), tied)
        if isinstance(module, PowerNorm):
            return FakeQuantNorm(module)
        # Of no fewer than 7 bits, which are for processors and not for storage.
        bits = min(8, max(7, self.method.weight_bits))
        return FakeQuantProduct(**{"unsigned": False, **role}, bits=bits)

    def on_step(self, model: nn.Module, at: At) -> None:
        """Where a new step begins, take what the last one saw into the moving averages."""
        if at.step != self.step:
            self.step = at.step
            self._fold(model)
        for module in model.modules():
            if isinstance(module, (*FAKE, FakeQuantEmbedding)):
                module.active = at.step >= self.method.start_step

    def _fold(self, model: nn.Module) -> None:
        ranges = learned_ranges(model)
        if not ranges:
            return
        decay = self.method.ema_decay
        seen = torch.cat([one.seen.flatten() for one in ranges])
        ema = torch.cat([one.ema.flatten() for one in ranges])
        moved = torch.where(ema > 0, decay * ema + (1 - decay) * seen, seen)
        for one, value in zip(
            ranges, _parts(torch.where(seen > 0, moved, ema), ranges), strict=True
        ):
            one.ema.copy_(value)
            one.seen.zero_()

    def losses(
        self, model: nn.Module, out: Outputs, teacher: Outputs | None, batch: dict, kd: Distillation
    ) -> dict[str, Tensor]:
        """The usual ones. Also lets every worker know what the others saw in this pass.

        Here and not in the next `on_step`: a checkpoint between the two holds one worker's buffers.
        """
        ranges = learned_ranges(model)
        if ranges and workers() > 1:
            seen = torch.cat([one.seen.flatten() for one in ranges])
            dist.all_reduce(seen, op=dist.ReduceOp.MAX)
            for one, value in zip(ranges, _parts(seen, ranges), strict=True):
                one.seen.copy_(value)
        if self.method.integer_only and out.hidden:  # a teacher's stream has no units
            norms: Any = norms_of(model)[::2]
            hidden = [part * norm.unit for part, norm in zip(out.hidden, norms, strict=True)]
            out = replace(out, hidden=hidden)
        return super().losses(model, out, teacher, batch, kd)

    def warnings(self, total: int) -> list[str]:
        """What the bits, and the step from which training is quantised, amount to."""
        method, found = self.method, []
        if total and method.start_step >= total:
            found.append(
                f"q8bert.start_step {method.start_step} is not reached in {total} steps, so no "
                "step trains with quantised values"
            )
        return found

    def metrics(self, model: nn.Module) -> dict[str, float]:
        """The mean over layers of the ranges of their inputs and outputs."""
        ranges = learned_ranges(model)
        if not ranges:
            return {}
        return {"activation_range": torch.stack([one.ema.amax() for one in ranges]).mean().item()}

    def finish(self, model: Any) -> None:
        """Leave integers and their scales, for inference only."""
        model.eval()
        decoder = tied_decoder(model)
        if any(isinstance(module, FakeQuantEmbedding) for module in model.modules()):
            swap(model, _is(FakeQuantEmbedding), _finished())
        words = model.get_input_embeddings()
        swap(model, _is(FakeQuantLinear), _finished(words))
        if self.method.integer_only:
            swap(model, _is(FakeQuantProduct, FakeQuantNorm), _finished())
        if decoder is not None and isinstance(words, Int8Embedding):
            _untie(model, decoder)


def learned_ranges(model: nn.Module) -> list[Range]:
    """The ranges with a moving average, in the model's order."""
    return [m for m in model.modules() if isinstance(m, Range) and m.learned]


def _parts(values: Tensor, ranges: list[Range]) -> list[Tensor]:
    """What belongs to each range of all their values in a row, in its shape."""
    parts = values.split([one.ema.numel() for one in ranges])
    return [part.view_as(one.ema) for part, one in zip(parts, ranges, strict=True)]


def _is(*kinds: type[nn.Module]) -> Any:
    return lambda _, module: isinstance(module, kinds)


def _finished(*table: Any) -> Any:
    return lambda _, module: module.finished(*table)


def _untie(model: Any, decoder: str) -> None:
    """Let transformers know that the decoder has no parameters of its own to be tied any more."""
    tied = model.all_tied_weights_keys
    owner = tied.get(f"{decoder}.bias")
    if owner is not None:  # the bias, now int32, is the decoder's alone
        head = model.get_submodule(owner.rpartition(".")[0])
        head.bias = None
        head._is_hf_initialized = True  # else transformers would set that bias to zeros
    left = {target: source for target, source in tied.items() if not target.startswith(decoder)}
    model.all_tied_weights_keys = model._tied_weights_keys = left
