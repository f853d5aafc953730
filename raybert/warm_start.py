"""A start for MA-BERT's new parts: fitted, on calibration rows, to what they take the place of.

The paper starts from random networks, and from LayerNorms' weights under other statistics, and
leaves the rest to a large corpus. Here one pass through the new structure fits each softmax net to
the model's own attention and each norm to the model's own LayerNorm, and then each layer, whole, to
what the model's own layer gives: what the new parts cannot do, the other weights make up for. A
part is fitted on what the parts below it make of the rows: attention is of third degree in its
inputs, so that errors which nothing normalises away would grow from layer to layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raybert.power_norm import PowerNorm
from raybert.softmax_net import MatrixAttention, SoftmaxNet, matrix
from raybert.surgery import INPUTS, backbone, encoder_layers, model_inputs, self_attention

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

ROWS = 32
"""Rows of a step in a layer's fit."""

LAYER_RATE = 3e-4


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
        draw = torch.Generator().manual_seed(0)
        # They come sorted by length, and the first are held out of a layer's fit.
        order = torch.randperm(sum(len(b["input_ids"]) for b in batches), generator=draw)
        self.batch = {}
        for key in (name for name in INPUTS if name in batches[0]):
            padded = [F.pad(b[key], (0, longest - b[key].shape[1])) for b in batches]
            self.batch[key] = torch.cat(padded)[order.to(padded[0].device)]
        self.length = length
        self.real = self.batch["attention_mask"].bool()  # [B, T]
        tokens = self.real.nonzero()  # [n, 2]
        self.tokens = _drawn(tokens, TOKENS, draw)
        every = [F.pad(tokens, (0, 1), value=head) for head in range(heads)]
        self.queries = _drawn(torch.cat(every), QUERIES, draw)  # [n, 3]: row, token, head

    def through(self, model: nn.Module) -> None:
        """Run the rows through a model's encoder."""
        backbone(model)(**model_inputs(model, self.batch))

    def scores(self, attention: MatrixAttention, hidden: Tensor) -> Queries:
        """A layer's sampled queries, given what enters its attention [B, T, H]."""
        query, key, _ = attention.heads(hidden, self.real[:, None, None])
        row, token, head = self.queries.T
        # Not of all queries, of which the sample is a small part.
        asked = query[row, head, token]  # [n, D]
        parts = [
            torch.einsum("nd,ntd->nt", asked[part], key[row[part], head[part]])
            for part in torch.arange(len(row), device=row.device).split(BATCH)
        ]
        picked, keys = torch.cat(parts), self.real[row]  # [n, T]
        softmax = picked.masked_fill(~keys, -torch.inf).softmax(-1)
        room = (0, self.length - keys.shape[-1])
        return Queries(*(F.pad(part, room) for part in (picked, softmax, keys)))

    def picked(self, hidden: Tensor) -> Tensor:
        """Sampled tokens [n, H] of [B, T, H]."""
        return hidden[tuple(self.tokens.T)]


def _drawn(rows: Tensor, most: int, draw: torch.Generator) -> Tensor:
    return rows[torch.randperm(len(rows), generator=draw)[:most].to(rows.device)]


class Recorded(NamedTuple):
    """What a model does on a sample: queries by layer, norms' outputs [n, H] and the largest of all
    real tokens' [H] by name, and layers' outputs [B, T, H]."""

    queries: list[Queries]
    norms: dict[str, Tensor]
    bounds: dict[str, Tensor]
    layers: list[Tensor]


@torch.no_grad()
def record(model: nn.Module, sample: Sample) -> Recorded:
    """Run a model with softmax and LayerNorm, in evaluation mode, and note what both give."""
    found = Recorded([], {}, {}, [])

    def attention(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        found.queries.append(sample.scores(matrix(module, nn.Identity()), hidden))

    def norm_of(name: str) -> Callable:
        def hook(_module: nn.Module, _args: tuple, out: Tensor) -> None:
            found.norms[name] = sample.picked(out)
            found.bounds[name] = out[sample.real].abs().amax(0)

        return hook

    def layer_output(_module: nn.Module, _args: tuple, out: Any) -> None:
        found.layers.append(_hidden(out))

    layers: list[Any] = list(encoder_layers(model))
    handles = [
        self_attention(layer).register_forward_pre_hook(attention, with_kwargs=True)
        for layer in layers
    ]
    handles += [layer.register_forward_hook(layer_output) for layer in layers]
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
        layer_steps: of Adam, for each layer.
    """

    def __init__(self, sample: Sample, recorded: Recorded, steps: int, layer_steps: int) -> None:
        self.sample, self.recorded = sample, recorded
        self.steps, self.layer_steps = steps, layer_steps
        self.nets: list[tuple[float, float]] = []
        """For each layer the relative errors, with a random net and with its own."""
        self.norms: dict[str, tuple[float, float]] = {}
        """For each norm the relative errors, with the LayerNorm's weights and with its own."""
        self.layers: list[tuple[float, float]] = []
        """For each layer the relative errors of its outputs, of fitted parts and fitted whole."""

    def run(self, model: nn.Module) -> None:
        """Fill the parts of a model that `raybert.methods.ma_bert.exchange` has gone through."""
        layers: list[Any] = list(encoder_layers(model))
        first: Any = self_attention(layers[0])
        shared = bool(first.shared)
        if shared:
            fitted = joined(layer.fitted() for layer in self.recorded.queries)
            put(first.net, fit_net(fitted, self.steps, 0))
        handles = self._norms(model, layers)
        for index, layer in enumerate(layers):
            parts = self._norms(model, [layer], inside=True)
            hook = self._attention(index, shared)
            parts.append(self_attention(layer).register_forward_pre_hook(hook, with_kwargs=True))
            whole = self._layer(index, parts)
            handles += [*parts, layer.register_forward_hook(whole, with_kwargs=True)]
        try:
            with torch.no_grad(), in_slices([self_attention(layer) for layer in layers]):
                self.sample.through(model)
        finally:
            for handle in handles:
                handle.remove()

    def _norms(self, model: nn.Module, layers: list[Any], inside: bool = False) -> list[Any]:
        """Hooks that fit the norms inside, or outside, of layers."""
        names = {module: name for name, module in model.named_modules()}
        within = {module for layer in layers for module in layer.modules()}
        return [
            module.register_forward_pre_hook(self._norm(name))
            for module, name in names.items()
            if isinstance(module, PowerNorm) and (module in within) == inside
        ]

    def _layer(self, index: int, parts: list[Any]) -> Callable:
        def hook(layer: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> Any:
            for part in parts:  # they are fitted
                part.remove()
            if not self.layer_steps:
                return out
            fit = LayerFit(self.sample, layer, args, kwargs, self.recorded.layers[index])
            new, errors = fit.run(self.layer_steps, index)
            self.layers.append(errors)
            return (new, *out[1:]) if isinstance(out, tuple) else new

        return hook

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
            if module.bound is not None:
                module.bound.copy_(self.recorded.bounds[name])
            put(module, {key: values[key] for key in ("weight", "bias")})
            self.norms[name] = errors

        return hook


@contextmanager
def in_slices(attentions: Sequence[nn.Module]) -> Iterator[None]:
    """Attention takes a few rows at a time: of all calibration rows at once its scores alone
    [B, A, T, T] would fill the memory. Hooks see all rows all the same."""

    def sliced(forward: Callable) -> Callable:
        def run(hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
            count, parts = len(hidden_states), []
            for start in range(0, count, ROWS):
                rows = slice(start, start + ROWS)
                own = [_rows_of(value, rows, count) for value in (hidden_states, *args)]
                named = {key: _rows_of(value, rows, count) for key, value in kwargs.items()}
                parts.append(_hidden(forward(*own, **named)))
            return torch.cat(parts), None

        return run

    for attention in attentions:
        attention.forward = sliced(attention.forward)
    try:
        yield
    finally:
        for attention in attentions:
            del attention.forward


def _rows_of(value: Any, rows: Any, count: int) -> Any:
    """Some rows of what has ``count``; anything else as it is."""
    own = torch.is_tensor(value) and value.dim() > 1 and len(value) == count
    return value[rows] if own else value


def _hidden(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


class LayerFit:
    """Fits a layer of the new structure to outputs of the model's own, by Adam on their distance.

    Args:
        sample: the rows.
        layer: with its parts fitted, in evaluation mode.
        args, kwargs: what it was called with on all rows.
        wanted: what it is to give [B, T, H].
    """

    def __init__(
        self, sample: Sample, layer: nn.Module, args: tuple, kwargs: dict[str, Any], wanted: Tensor
    ) -> None:
        self.real, self.layer, self.wanted = sample.real.unsqueeze(-1), layer, wanted
        self.args, self.kwargs = args, kwargs

    def run(self, steps: int, seed: int) -> tuple[Tensor, tuple[float, float]]:
        """The fitted layer's outputs [B, T, H], and the relative errors before and after."""
        parameters = list(self.layer.parameters())
        optimizer = torch.optim.AdamW(parameters, lr=LAYER_RATE, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, steps)
        draw = torch.Generator().manual_seed(seed)
        held_out = max(1, len(self.real) // HELD_OUT)
        before = self._error(slice(0, held_out))
        with torch.enable_grad():
            for _ in range(steps):
                rows = torch.randint(
                    held_out, max(len(self.real), held_out + 1), (ROWS,), generator=draw
                )
                rows = rows.clamp(max=len(self.real) - 1).to(self.real.device)
                loss = self._distance(rows).square().sum() / self.real[rows].sum()
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                schedule.step()
        optimizer.zero_grad()
        out = self._moments_anew()
        return out, (before, self._error(slice(0, held_out)))

    def _through(self, rows: Any) -> Tensor:
        count = len(self.real)
        args = [_rows_of(value, rows, count) for value in self.args]
        kwargs = {name: _rows_of(value, rows, count) for name, value in self.kwargs.items()}
        return _hidden(self.layer.forward(*args, **kwargs))

    def _distance(self, rows: Any) -> Tensor:
        """[b, T, H], 0 for padding."""
        return (self._through(rows) - self.wanted[rows]) * self.real[rows]

    def _error(self, rows: slice) -> float:
        with torch.no_grad():
            size = (self.wanted[rows] * self.real[rows]).norm()
            return (self._distance(rows).norm() / size).item()

    def _moments_anew(self) -> Tensor:
        """Let norms' moments be those of what they see now, and their maps the same as before."""
        norms = [module for module in self.layer.modules() if isinstance(module, PowerNorm)]
        real = self.real.squeeze(-1)

        def take(norm: PowerNorm, args: tuple) -> None:
            phi = args[0][real].square().mean(0)
            norm.weight.mul_(torch.sqrt((phi + norm.eps) / (norm.running_phi + norm.eps)))
            norm.running_phi.copy_(phi)

        handles: list[Any] = [norm.register_forward_pre_hook(take) for norm in norms]
        try:
            with torch.no_grad():
                return self._through(slice(None))
        finally:
            for handle in handles:
                handle.remove()


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
