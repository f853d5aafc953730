"""A start for MA-BERT's new parts: fitted, on calibration rows, to what they take the place of.

The paper starts from random networks, and from LayerNorms' weights under other statistics, and
leaves the rest to a large corpus. Here one pass through the new structure fits each softmax net to
the model's own attention and each norm to the model's own LayerNorm. A part is fitted on what the
parts below it make of the rows: attention is of third degree in its inputs, so that errors which
nothing normalises away would grow from layer to layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raybert.power_norm import PowerNorm
from raybert.softmax_net import MatrixAttention, SoftmaxNet, matrix
from raybert.surgery import backbone, encoder_layers, model_inputs, self_attention

Values = dict[str, Tensor]
"""Parameter or buffer name, below its module -> value."""

QUERIES = 12288
"""Queries of a layer that its net is fitted on."""

TOKENS = 4096
"""Tokens that a norm is fitted on."""

HELD_OUT = 6
"""One in so many queries is not fitted on: errors are measured there."""

BATCH = 1024
RATE = 1e-3


class Queries(NamedTuple):
    """Scores of queries over N keys, the attention they stand for, and which keys are real."""

    scores: Tensor  # [n, N], 0 where there is padding
    attention: Tensor  # [n, N]
    real: Tensor  # [n, N], bool

    def part(self, rows: Any) -> Queries:
        """Some of them."""
        return Queries(*(part[rows] for part in self))

    def held_out(self) -> Queries:
        """Those that errors are measured on."""
        return self.part(slice(0, max(1, len(self.scores) // HELD_OUT)))

    def fitted(self) -> Queries:
        """Those that nets are fitted on."""
        return self.part(slice(max(1, len(self.scores) // HELD_OUT), None))


def joined(parts: Iterable[Queries]) -> Queries:
    """Queries of several layers."""
    return Queries(*map(torch.cat, zip(*parts, strict=True)))


# -- one batch through the model -------------------------------------------------------------------


class Sample:
    """Calibration rows as one batch, and the queries and tokens of it that parts are fitted on.

    Args:
        batches: of rows, none longer than ``length``.
        length: N.
        heads: of a layer.
    """

    def __init__(self, batches: Sequence[Mapping[str, Any]], length: int, heads: int) -> None:
        longest = max(batch["input_ids"].shape[1] for batch in batches)
        keys = list(model_inputs(batches[0]))
        self.batch = {
            key: torch.cat([F.pad(b[key], (0, longest - b[key].shape[1])) for b in batches])
            for key in keys
        }
        self.length = length
        self.real = self.batch["attention_mask"].bool()  # [B, T]
        draw = torch.Generator().manual_seed(0)
        tokens = self.real.nonzero()  # [n, 2]
        self.tokens = _drawn(tokens, TOKENS, draw)
        # The same for every head, and several heads of one token.
        queries = _drawn(tokens, QUERIES, draw)
        own = torch.randint(heads, (len(queries),), generator=draw).to(tokens.device)
        every = [
            torch.cat([queries, queries.new_full((len(queries), 1), h)], 1) for h in range(heads)
        ]
        much = len(queries) * heads > QUERIES
        chosen = torch.cat([queries, own.unsqueeze(1)], 1) if much else torch.cat(every)
        self.queries = _drawn(chosen, QUERIES, draw)  # [n, 3]: row, token, head

    def through(self, model: nn.Module) -> None:
        """Run the rows through a model's encoder."""
        backbone(model)(**self.batch)

    def scores(self, attention: MatrixAttention, hidden: Tensor) -> Queries:
        """A layer's sampled queries, given what enters its attention [B, T, H]."""
        query, key, _ = attention.heads(hidden, self.real[:, None, None])
        whole = query @ key.transpose(2, 3)
        row, token, head = self.queries.T
        picked, keys = whole[row, head, token], self.real[row]  # [n, T]
        softmax = picked.masked_fill(~keys, -torch.inf).softmax(-1)
        room = (0, self.length - keys.shape[-1])
        return Queries(*(F.pad(part, room) for part in (picked, softmax, keys)))

    def picked(self, hidden: Tensor) -> Tensor:
        """Sampled tokens [n, H] of [B, T, H]."""
        return hidden[tuple(self.tokens.T)]


def _drawn(rows: Tensor, most: int, draw: torch.Generator) -> Tensor:
    return rows[torch.randperm(len(rows), generator=draw)[:most].to(rows.device)]


class Recorded(NamedTuple):
    """What a model does on a sample: queries by layer, and norms' outputs [n, H] by name."""

    queries: list[Queries]
    norms: dict[str, Tensor]


@torch.no_grad()
def record(model: nn.Module, sample: Sample) -> Recorded:
    """Run a model with softmax and LayerNorm, in evaluation mode, and note what both give."""
    found = Recorded([], {})

    def attention(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        found.queries.append(sample.scores(matrix(module, nn.Identity()), hidden))

    def norm_of(name: str) -> Callable:
        def hook(_module: nn.Module, _args: tuple, out: Tensor) -> None:
            found.norms[name] = sample.picked(out)

        return hook

    layers = [self_attention(layer) for layer in encoder_layers(model)]
    handles = [m.register_forward_pre_hook(attention, with_kwargs=True) for m in layers]
    norms = layer_norms(model).items()
    handles += [norm.register_forward_hook(norm_of(name)) for name, norm in norms]
    try:
        sample.through(model)
    finally:
        for handle in handles:
            handle.remove()
    return found


class Fit:
    """Fits a new structure's parts to a recorded model, in one pass from bottom to top.

    Args:
        sample: the rows.
        recorded: of the model that the structure was made of.
        steps: of Adam, for each net.
    """

    def __init__(self, sample: Sample, recorded: Recorded, steps: int) -> None:
        self.sample, self.recorded, self.steps = sample, recorded, steps
        self.nets: list[tuple[float, float]] = []
        """For each layer the relative errors, with a random net and with its own."""
        self.norms: dict[str, tuple[float, float]] = {}
        """For each norm the relative errors, with the LayerNorm's weights and with its own."""

    def run(self, model: nn.Module) -> None:
        """Fill the parts of a model that `raybert.methods.ma_bert.exchange` has gone through."""
        layers: list[Any] = [self_attention(layer) for layer in encoder_layers(model)]
        shared = bool(layers[0].shared)
        if shared:
            fitted = joined(layer.fitted() for layer in self.recorded.queries)
            put(layers[0].net, fit_net(fitted, self.steps, 0))
        handles = [
            module.register_forward_pre_hook(self._attention(index, shared), with_kwargs=True)
            for index, module in enumerate(layers)
        ]
        for name, module in model.named_modules():
            if isinstance(module, PowerNorm):
                handles.append(module.register_forward_pre_hook(self._norm(name)))
        try:
            with torch.no_grad():
                self.sample.through(model)
        finally:
            for handle in handles:
                handle.remove()

    def _attention(self, index: int, shared: bool) -> Callable:
        def hook(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            own = self.sample.scores(module, hidden)
            queries = own._replace(attention=self.recorded.queries[index].attention)
            if not shared:
                put(module.net, fit_net(queries.fitted(), self.steps, index))
            random = random_net(self.sample.length, 0 if shared else index)
            found = {name: value.detach() for name, value in module.net.named_parameters()}
            held_out = queries.held_out()
            self.nets.append((net_error(held_out, random), net_error(held_out, found)))

        return hook

    def _norm(self, name: str) -> Callable:
        def hook(module: PowerNorm, args: tuple) -> None:
            wanted = self.recorded.norms[name]
            values, errors = fit_norm(self.sample.picked(args[0]), wanted, module)
            module.running_phi.copy_(values["running_phi"])
            put(module, {key: values[key] for key in ("weight", "bias")})
            self.norms[name] = errors

        return hook


def put(module: nn.Module, values: Values) -> None:
    with torch.no_grad():
        for name, value in values.items():
            module.get_parameter(name).copy_(value)


# -- softmax nets ----------------------------------------------------------------------------------


def random_net(length: int, seed: int) -> Values:
    """A net as PyTorch would begin it, the same for the same seed."""
    draw = torch.Generator().manual_seed(seed)
    bound = length**-0.5
    shapes = {"weight": (length, length), "bias": (length,)}
    return {
        f"{layer}.{name}": (torch.rand(shape, generator=draw) * 2 - 1) * bound
        for layer in ("hidden", "out")
        for name, shape in shapes.items()
    }


def fit_net(queries: Queries, steps: int, seed: int) -> Values:
    """Least squares for a net over real keys, by Adam from a start that is one already in part.

    The start: hidden unit i is key i's score with a bias, out is the least-squares solution.
    """
    length = queries.scores.shape[-1]
    net = SoftmaxNet(length, queries.scores)
    values = _structured(queries, seed)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.copy_(values[name])
    optimizer = torch.optim.Adam(net.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, max(1, steps))
    draw = torch.Generator().manual_seed(seed)
    with torch.enable_grad():
        for _ in range(steps):
            rows = torch.randint(len(queries.scores), (BATCH,), generator=draw)
            part = queries.part(rows.to(queries.scores.device))
            loss = ((net(part.scores) - part.attention) * part.real).square().sum(-1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return {name: parameter.detach() for name, parameter in net.named_parameters()}


def _structured(queries: Queries, seed: int) -> Values:
    length = queries.scores.shape[-1]
    scores = queries.scores
    eye = torch.eye(length, device=scores.device)
    noise = random_net(length, seed)["hidden.weight"].to(scores)
    hidden = {"hidden.weight": eye + 0.1 * noise, "hidden.bias": scores.new_zeros(length)}
    inner = F.relu(F.linear(scores, hidden["hidden.weight"], hidden["hidden.bias"]))
    inner = F.pad(inner, (0, 1), value=1.0).double()
    gram = inner.T @ inner
    gram += 1e-3 * gram.diagonal().mean() * torch.eye(length + 1, device=scores.device)
    solved = torch.linalg.solve(gram, inner.T @ queries.attention.double()).float()  # [N + 1, N]
    return {**hidden, "out.weight": solved[:-1].T.contiguous(), "out.bias": solved[-1]}


@torch.no_grad()
def net_error(queries: Queries, values: Values) -> float:
    """Root of the squared error over real keys, relative to the attention's own size."""
    own = {name: value.to(queries.scores) for name, value in values.items()}
    inner = F.relu(F.linear(queries.scores, own["hidden.weight"], own["hidden.bias"]))
    out = F.linear(inner, own["out.weight"], own["out.bias"]) * queries.real
    difference = (out - queries.attention).norm()
    return (difference / queries.attention.norm()).item()


# -- norms -----------------------------------------------------------------------------------------


def layer_norms(model: nn.Module) -> dict[str, nn.LayerNorm]:
    """The norms of embeddings and layers, by name; a head's own are not among them."""
    inner = backbone(model)
    name = next(name for name, module in model.named_modules() if module is inner)
    return {
        f"{name}.{key}": module
        for key, module in inner.named_modules()
        if isinstance(module, nn.LayerNorm)
    }


def fit_norm(x: Tensor, y: Tensor, norm: PowerNorm) -> tuple[Values, tuple[float, float]]:
    """The PowerNorm that makes y [n, H] of x [n, H], channel by channel, by least squares.

    Returns:
        Its values, and the relative errors with the norm's own weights and with these.
    """
    x, y = x.double(), y.double()
    phi = x.square().mean(0)
    size = (phi + norm.eps).sqrt()
    centred = x - x.mean(0)
    scale = (centred * y).mean(0) / centred.square().mean(0).clamp(min=1e-12)
    shift = y.mean(0) - scale * x.mean(0)
    pairs = (norm.weight.detach() / size, norm.bias.detach()), (scale, shift)
    before, after = ((((x * a + b) - y).norm() / y.norm()).item() for a, b in pairs)
    values = {"weight": scale * size, "bias": shift, "running_phi": phi}
    return {name: value.float() for name, value in values.items()}, (before, after)
