"""LoBERT: low-rank factors in place of weight matrices, then training with knowledge distillation.

    raybert compress method=lobert task=mrpc data=GLUE/MRPC teacher=runs/mrpc-finetuned \\
        kd.alpha=0.5 kd.cls=100

Queries, keys and values are factorised in one of seven ways, the feed-forward matrices in one of
two, any one with any one: by truncated SVD, by Tucker or by FALCON (one shared matrix, scaled row
by row), within a layer or over all layers. The student is then trained by distillation, as in
patient knowledge distillation (``kd.alpha``, ``kd.cls``).

Ranks are numbers, a share of the encoder's parameters, or a share of the squared singular values.
Beyond the released method: factors that fit what the weights do to calibration rows (DRONE, Chen et
al., NeurIPS 2021), ranks spent where they gain most, more FALCON bases than one, and the
attention's output projection.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator
from torch import Tensor, nn

from raybert.errors import UserError
from raybert.factorise import spectrum
from raybert.factors import Key, Layout, Values, build, dense_matrices, factorise
from raybert.lowrank import PARTS
from raybert.method import MethodConfig
from raybert.moments import second_moments
from raybert.phase import Phase
from raybert.ranks import (
    ATTENTION,
    FFN,
    WITH_OUTPUT,
    Falcon,
    Mode,
    Ranked,
    Shape,
    Svd,
    Tucker,
    even_ranks,
    ladders,
    ranks_by_energy,
    saving_rank,
    spend,
)
from raybert.surgery import compressed_by, encoder_layers


class LoBERT(MethodConfig):
    """Parameters of LoBERT."""

    leaves_trace = True

    name: Literal["lobert"] = "lobert"
    attention: (
        Literal[
            "self_svd",
            "self_tucker_layer",
            "self_falcon_layer",
            "self_tucker_vertical",
            "self_falcon_vertical",
            "self_tucker_4d",
            "self_falcon_4d",
        ]
        | None
    ) = Field(default="self_svd", description="How Q, K and V are factorised; null: not at all.")
    ffn: Literal["ffn_svd", "ffn_tucker"] | None = Field(
        default="ffn_svd", description="How the feed-forward is factorised; null: not at all."
    )
    attention_output: bool = Field(
        default=False, description="With self_svd: the attention's output projection as well."
    )
    attention_rank: PositiveInt | tuple[PositiveInt, ...] | None = Field(
        default=None,
        description="SVD: one rank, or one for each layer. Tucker: one for each dimension of the "
        "stack. Nothing, and no share or energy: the released ones, scaled to the model.",
    )
    ffn_rank: PositiveInt | tuple[PositiveInt, ...] | None = Field(
        default=None, description="The same for the feed-forward."
    )
    falcon_rank: PositiveInt = Field(default=1, description="Bases of a FALCON mode.")
    share: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Ranks from the share of the encoder layers' parameters to be kept at most; "
        "on matrices wide enough multiples of 16, which are computed faster.",
    )
    energy: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="SVD ranks from the share of the squared singular values to be kept at least, "
        "chosen as by share; a matrix whose rank would save nothing stays dense.",
    )
    allocate: Literal["even", "energy"] = Field(
        default="even",
        description="With share: the same for all layers, or where a parameter keeps most of the "
        "squared singular values.",
    )
    ranks: tuple[tuple[NonNegativeInt, ...], ...] | None = Field(
        default=None,
        description="SVD ranks for each layer and matrix, in the order query, key, value, "
        "attention_output, intermediate, output as far as they are factorised; 0 stays dense. "
        "Settled from energy.",
    )
    data_aware: bool = Field(
        default=False,
        description="Factors that keep what the weights do to calibration rows, not the weights; "
        "all but ffn_tucker's of the output matrices.",
    )
    calibration_rows: NonNegativeInt = Field(
        default=256, description="Training rows that data_aware looks at."
    )
    shape: Shape | None = Field(
        default=None, description="Settled: layers, width and inner width of the encoder."
    )
    bound_to_depth: bool = Field(
        default=False,
        description="Settled: layers share parameters or differ in rank, so none can be left out.",
    )

    # -- what may stand together ---------------------------------------------------------------

    @model_validator(mode="after")
    def _consistent(self) -> LoBERT:
        svd = [mode for mode in self.modes.values() if isinstance(mode, Svd)]
        ways = [name for name in ("share", "energy", "ranks") if vars(self)[name] is not None]
        problems = {
            "attention and ffn are both null, which leaves nothing to factorise; give one": (
                not self.modes
            ),
            f"{' and '.join(ways)} are ways of giving ranks; keep one": len(ways) > 1,
            f"{''.join(ways[:1])} gives ranks of SVD modes; with attention={self.attention} and "
            f"ffn={self.ffn} there is none": ways[:1] in (["energy"], ["ranks"]) and not svd,
            "allocate=energy spends what share keeps; give lobert.share": (
                self.allocate == "energy" and ways[:1] not in (["share"], ["ranks"])
            ),
            f"allocate=energy chooses SVD ranks; with attention={self.attention} and "
            f"ffn={self.ffn} there is none": self.allocate == "energy" and not svd,
            "attention_output is factorised with attention=self_svd only": (
                self.attention_output and self.attention != "self_svd"
            ),
            "calibration_rows 0 leaves data_aware nothing to look at; give some, for example 256": (
                self.data_aware and not self.calibration_rows
            ),
            "falcon_rank is the rank of FALCON modes; attention is "
            f"{self.attention}": self.falcon_rank > 1 and not self._is("attention", Falcon),
            "share has no rank to find: FALCON's is lobert.falcon_rank": (
                self.share is not None and not self.ranked
            ),
        }
        problems.update(self._doubled(ways))
        for text, wrong in problems.items():
            if wrong:
                raise ValueError(f"lobert.{text}")
        return self

    def _doubled(self, ways: list[str]) -> dict[str, bool]:
        found = {}
        for part, mode in self.modes.items():
            given = vars(self)[f"{part}_rank"] is not None
            settles = bool(ways) and (ways[0] == "share" or isinstance(mode, Svd))
            text = f"{part}_rank and lobert.{''.join(ways)} both give ranks; leave one out"
            found[text] = given and settles
            text = f"{''.join(ways)} gives ranks of SVD modes alone; give lobert.{part}_rank too"
            found[text] = bool(ways) and not settles and isinstance(mode, Tucker) and not given
            text = f"{part}_rank is not FALCON's; give lobert.falcon_rank"
            found[text] = given and isinstance(mode, Falcon)
        for part in {"attention", "ffn"} - set(self.modes):
            text = f"{part}_rank is given and lobert.{part} is null"
            found[text] = vars(self)[f"{part}_rank"] is not None
        return found

    def advice(self, recipe: Any, model_config: Any) -> list[str]:
        if recipe.kd.active:
            return []
        return [
            "lobert was published with distillation, and here its student learns from labels "
            "alone: kd.alpha=0.5 kd.cls=100 is a start"
        ]

    # -- modes and their ranks -----------------------------------------------------------------

    @property
    def modes(self) -> dict[str, Mode]:
        """What is factorised: ``attention``, ``ffn`` or both -> how."""
        found: dict[str, Mode] = {}
        if self.attention:
            found["attention"] = WITH_OUTPUT if self.attention_output else ATTENTION[self.attention]
        if self.ffn:
            found["ffn"] = FFN[self.ffn]
        return found

    @property
    def ranked(self) -> dict[str, Ranked]:
        """The modes whose ranks can be chosen finely."""
        return {p: mode for p, mode in self.modes.items() if not isinstance(mode, Falcon)}

    def _is(self, part: str, kind: type) -> bool:
        return isinstance(self.modes.get(part), kind)

    @property
    def svd(self) -> tuple[str, ...]:
        """The matrices of a layer that have an SVD rank each."""
        modes = [mode for mode in self.modes.values() if isinstance(mode, Svd)]
        return tuple(name for mode in modes for name in mode.matrices)

    @property
    def unsettled(self) -> bool:
        """Whether ranks wait for the weights."""
        return self.ranks is None and (self.share is not None or self.energy is not None)

    def rank(self, part: str) -> Any:
        """The rank of a part that is not SVD."""
        return self.falcon_rank if self._is(part, Falcon) else vars(self)[f"{part}_rank"]

    def svd_ranks(self, depth: int) -> list[dict[str, int]]:
        """For each of ``depth`` layers the rank of each SVD matrix; 0 stays dense."""
        if self.ranks is not None:
            return [dict(zip(self.svd, row, strict=True)) for row in self.ranks]
        found: list[dict[str, int]] = [{} for _ in range(depth)]
        for part, mode in self.modes.items():
            if isinstance(mode, Svd):
                rank = self.rank(part)
                rows = [rank] * depth if isinstance(rank, int) else rank
                for layer, one in zip(found, rows, strict=True):
                    layer |= dict.fromkeys(mode.matrices, one)
        return found

    def layout(self, depth: int) -> Layout:
        """Where which factors go, in a model of ``depth`` layers."""
        stacked = self.attention if self.attention != "self_svd" else None
        return Layout(
            svd=self.svd_ranks(depth),
            attention=stacked,
            attention_rank=self.rank("attention") if stacked else None,
            ffn_rank=vars(self)["ffn_rank"] if self.ffn == "ffn_tucker" else None,
        )

    # -- the four steps of a method ------------------------------------------------------------

    def resolve(self, model_config: Any) -> LoBERT:
        """Settle ranks against the model's sizes, as far as no weight is needed.

        Raises:
            UserError: a rank does not fit, or saves nothing; a share out of reach; a method before
                it that it cannot follow.
        """
        for entry in compressed_by(model_config):
            raise UserError(
                f"lobert cannot follow {entry['name']}: it factorises a model's own dense "
                "matrices. Put lobert after theseus and before q8bert, once."
            )
        shape = Shape.of(model_config)
        found: dict[str, Any] = {"shape": shape}
        for part, mode in self.modes.items():
            if isinstance(mode, Falcon):
                mode.check(shape, self.falcon_rank, "falcon_rank")
            elif self.share is None and not (isinstance(mode, Svd) and self._by_matrix):
                found[f"{part}_rank"] = rank = self.rank(part) or mode.default(shape)
                mode.check(shape, rank, f"{part}_rank")
        if self.ranks is not None:
            self._check_ranks(shape, self.ranks)
        if self.share is not None:
            even = self._even(shape)
            if self.allocate == "even":
                found |= {**even, "share": None}
        across = any(mode.shared for mode in self.modes.values())
        lists = any(
            isinstance(mode, Svd) and isinstance(found.get(f"{part}_rank"), tuple)
            for part, mode in self.modes.items()
        )
        by_matrix = self._by_matrix or self.allocate == "energy"
        found["bound_to_depth"] = across or lists or by_matrix
        return self.model_copy(update=found)

    @property
    def _by_matrix(self) -> bool:
        return self.energy is not None or self.ranks is not None

    def _check_ranks(self, shape: Shape, ranks: tuple[tuple[int, ...], ...]) -> None:
        widths = {len(row) for row in ranks}
        if len(ranks) != shape.layers or widths != {len(self.svd)}:
            raise UserError(
                f"lobert.ranks has {len(ranks)} rows of {sorted(widths)}; give one for each of the "
                f"{shape.layers} layers, with {len(self.svd)} ranks: {', '.join(self.svd)}."
            )
        for layer, row in enumerate(ranks):
            for name, rank in zip(self.svd, row, strict=True):
                outer, inner = shape.matrix(name)
                if rank > saving_rank(outer, inner):
                    raise UserError(
                        f"lobert.ranks: {rank} for layer {layer}'s {name} saves nothing on a "
                        f"{outer}x{inner} matrix (break-even {saving_rank(outer, inner) + 1}); use "
                        f"rank <= {saving_rank(outer, inner)}, or 0 to leave it dense."
                    )
        if not any(map(any, ranks)):
            raise UserError("lobert.ranks leaves every matrix dense; give some a rank.")

    def _budget(self, shape: Shape) -> int:
        """Weights that the factors of all ranked modes may have together."""
        assert self.share is not None
        rest = shape.parameters - sum(mode.dense(shape) for mode in self.modes.values())
        pinned = [mode for mode in self.modes.values() if isinstance(mode, Falcon)]
        rest += sum(mode.parameters(shape, self.falcon_rank) for mode in pinned)
        return int(self.share * shape.parameters + 1e-6) - rest

    def _even(self, shape: Shape) -> dict[str, Any]:
        """Ranks by part for the share, the same in all layers."""
        budget, modes = self._budget(shape), list(self.ranked.values())
        steps = ladders(shape, modes)
        if not all(steps):
            raise UserError("lobert.share: a mode has no ranks that save on so small a model.")
        assert self.share is not None
        spare = int(self.share * shape.parameters + 1e-6) - budget
        least, most = (
            (spare + sum(ladder[end][0] for ladder in steps)) / shape.parameters for end in (0, -1)
        )
        # Rounded inwards, so that what the message names can be had.
        least, most = -(-least * 1000 // 1) / 1000, most * 1000 // 1 / 1000
        if not least <= self.share <= most + 1e-3:
            raise UserError(
                f"lobert.share {self.share:g} cannot be reached with attention={self.attention} "
                f"and ffn={self.ffn}: they keep between {least:g} and {most:g} of the encoder's "
                "parameters. Give a share in between, or factorise more or less."
            )
        found = even_ranks(shape, modes, budget)
        return {f"{part}_rank": rank for part, rank in zip(self.ranked, found, strict=True)}

    def settle(self, model: Any, batches: list[dict[str, Any]]) -> LoBERT:
        """Settle ranks by energy from the weights, or from what they do to calibration rows.

        Raises:
            UserError: nothing would be saved, or there are no calibration rows.
        """
        if not self.unsettled:
            return self
        assert self.shape is not None
        shape, dense = self.shape, dense_matrices(model)
        moments = self.moments(model, batches)
        keys = [(layer, name) for layer in range(shape.layers) for name in self.svd]
        spectra = {
            key: spectrum(dense[key].weight.detach(), moments.get(key)).cpu() for key in keys
        }
        sizes = {key: shape.matrix(key[1]) for key in keys}
        found: dict[str, Any] = {"share": None, "energy": None}
        if self.energy is not None:
            ranks = ranks_by_energy(spectra, sizes, self.energy)
        else:
            even, budget = self._even(shape), self._budget(shape)
            for part, mode in self.ranked.items():
                if isinstance(mode, Tucker):
                    found[f"{part}_rank"] = even[f"{part}_rank"]
                    budget -= mode.parameters(shape, even[f"{part}_rank"])
            ranks = spend(spectra, sizes, budget)
        if not any(ranks.values()):
            raise UserError(
                f"lobert.energy {self.energy} asks for ranks that save nothing in any matrix; use "
                "less, or give lobert.share."
            )
        rows = tuple(
            tuple(ranks[layer, name] for name in self.svd) for layer in range(shape.layers)
        )
        return self.model_copy(update={**found, "ranks": rows})

    def moments(self, model: Any, batches: list[dict[str, Any]]) -> dict[Key, Tensor]:
        """The second moment for each matrix, as `low_rank` takes it; none unless data_aware.

        Raises:
            UserError: data_aware, and no calibration rows.
        """
        if not self.data_aware:
            return {}
        if not batches:
            raise UserError(
                "lobert.data_aware found no calibration rows; give the task training rows."
            )
        # Not ffn_tucker's outputs: the moment [I, I] of their inputs would cost more than all else.
        names = {*self.svd, *(PARTS if self.attention else ())}
        if self.ffn and self.shape is not None and self.shape.inner >= self.shape.hidden:
            names.add("intermediate")  # where it is narrower, the moment is of its outputs
        seen = {key: dense for key, dense in dense_matrices(model).items() if key[1] in names}
        # Queries, keys and values have one input, whose moment is taken once.
        twins = {key for key in seen if key[1] in PARTS[1:]}
        found = second_moments(model, {k: v for k, v in seen.items() if k not in twins}, batches)
        return found | {(layer, name): found[layer, "query"] for layer, name in twins}

    def phases(self) -> list[Phase]:
        """One: factorise, then train."""
        if not self.unsettled:
            return [LowRank(self)]
        # To be counted before there are weights: a budget spread evenly, or the most that saves.
        assert self.shape is not None
        shape = self.shape
        if self.share is not None:
            ranks = self._even(shape)
        else:
            modes = self.ranked.items()
            ranks = {f"{p}_rank": m.rungs(shape)[-1] for p, m in modes if isinstance(m, Svd)}
        return [LowRank(self.model_copy(update={**ranks, "share": None, "energy": None}))]


class LowRank(Phase):
    """Put factors in the place of matrices, and train them with everything else."""

    name = "low_rank"

    def __init__(self, method: LoBERT) -> None:
        self.method = method
        self.epochs, self.lr = method.epochs, method.lr
        self.calibration = method.calibration_rows if method.data_aware else 0
        self.values: dict[Any, Values] = {}  # from `initialise` to `prepare`

    def warnings(self, total: int) -> list[str]:
        """Says so where a mode saves parameters and no arithmetic."""
        method, shape = self.method, self.method.shape
        assert shape is not None
        found = []
        for part, mode in method.modes.items():
            if isinstance(mode, Svd):
                continue
            now, dense = mode.multiply_adds(shape, method.rank(part)), mode.dense(shape)
            if now >= dense:
                found.append(
                    f"lobert.{part} {vars(method)[part]} saves bytes and not time: "
                    f"{now / 1e6:.3g} million multiply-adds a token in place of {dense / 1e6:.3g}"
                )
        return found

    def initialise(
        self, model: nn.Module, batches: list[dict[str, Tensor]]
    ) -> dict[str, dict[str, float]]:
        """Factorise the weights; tells the relative error of every matrix."""
        moments = self.method.moments(model, batches)
        factors = factorise(model, self.method.layout(len(encoder_layers(model))), moments)
        self.values = factors.values
        tables = {
            "reconstruction error": factors.errors,
            "reconstruction error on activations": factors.on_data,
        }
        keys = dense_matrices(model)  # in a layer's own order
        return {
            title: {f"layer {key[0]} {key[1]}": rows[key] for key in keys if key in rows}
            for title, rows in tables.items()
            if rows
        }

    def prepare(self, model: nn.Module) -> None:
        """Put the factors in place, with what `initialise` computed, or zeros."""
        build(model, self.method.layout(len(encoder_layers(model))), self.values)
        self.values = {}
