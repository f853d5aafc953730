"""A start for MA-BERT's new parts: softmax nets fitted to a model's attention, affine norms fitted
to its LayerNorms, both on calibration rows.

The paper starts from random networks, and from LayerNorms' weights under other statistics, and
leaves the rest to a large corpus. Here both begin where the model is already imitated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raybert.moments import INPUTS
from raybert.softmax_net import SoftmaxNet, matrix, real_keys
from raybert.surgery import backbone, encoder_layers, self_attention

Values = dict[str, Tensor]
"""Parameter or buffer name, below its module -> value."""

Batches = Sequence[Mapping[str, Any]]

ROWS = 12288
"""Queries of a layer that its net is fitted on."""

HELD_OUT = 6
"""One in so many of them is not fitted on: errors are measured there."""

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
    """Queries of several batches or layers."""
    return Queries(*map(torch.cat, zip(*parts, strict=True)))


# -- what the model does ---------------------------------------------------------------------------


@torch.no_grad()
def watched(model: nn.Module, batches: Batches, hooks: Mapping[nn.Module, Callable]) -> None:
    """Run batches through a model, with a forward hook on each of some modules.

    A hook is called with the batch's real tokens, bool [B, T], before the usual arguments.
    """
    now: dict[str, Tensor] = {}

    def wrap(hook: Callable) -> Callable:
        return lambda *args: hook(now["real"], *args)

    handles = [
        module.register_forward_hook(wrap(hook), with_kwargs=True)
        for module, hook in hooks.items()
    ]
    try:
        for batch in batches:
            now["real"] = batch["attention_mask"].bool()
            backbone(model)(**{key: batch[key] for key in INPUTS if key in batch})
    finally:
        for handle in handles:
            handle.remove()


def sample_queries(model: nn.Module, batches: Batches, length: int) -> list[Queries]:
    """For every layer some of its attention, the same queries in all layers.

    Args:
        model: with stock or projected attention, in evaluation mode.
        batches: none longer than ``length``.
        length: N.
    """
    layers = [self_attention(layer) for layer in encoder_layers(model)]
    found: dict[int, list[Queries]] = {index: [] for index in range(len(layers))}
    quota = -(-ROWS // len(batches))

    def hook_of(index: int, attention: Any) -> Callable:
        probe = matrix(attention, nn.Identity())

        def hook(real: Tensor, _module: nn.Module, args: tuple, kwargs: dict, _out: Any) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            heads = (*hidden.shape[:-1], -1, probe.attention_head_size)
            query, key, _ = (part.view(heads).transpose(1, 2) for part in probe.project(hidden))
            scores = probe.scores(query, key, real_keys(real[:, None, None], query))
            rows = real.unsqueeze(1).expand(scores.shape[:3]).nonzero()  # [n, 3]
            draw = torch.Generator().manual_seed(len(found[index]))
            chosen = torch.randperm(len(rows), generator=draw)[:quota].to(rows.device)
            batch, head, token = rows[chosen].T
            keys = real[batch]  # [n, T]
            picked = scores[batch, head, token]
            attention = picked.masked_fill(~keys, -torch.inf).softmax(-1)
            room = (0, length - keys.shape[-1])
            parts = (F.pad(part, room) for part in (picked, attention, keys))
            found[index].append(Queries(*parts))

        return hook

    watched(model, batches, {a: hook_of(i, a) for i, a in enumerate(layers)})
    layers_of = [joined(parts) for parts in found.values()]
    order = torch.randperm(len(layers_of[0].scores), generator=torch.Generator().manual_seed(0))
    return [queries.part(order.to(queries.scores.device)) for queries in layers_of]


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


class _Sums:
    """Sums over real tokens of what goes into and comes out of a norm, for each channel."""

    def __init__(self, width: int, device: torch.device) -> None:
        zeros = torch.zeros(5, width, dtype=torch.float64, device=device)
        self.sums = zeros  # x, y, xx, xy, yy
        self.count = 0

    def add(self, real: Tensor, _module: nn.Module, args: tuple, _kwargs: dict, out: Tensor):
        x, y = args[0][real].double(), out[real].double()  # [n, H]
        self.sums += torch.stack([part.sum(0) for part in (x, y, x * x, x * y, y * y)])
        self.count += len(x)


def fit_norms(model: nn.Module, batches: Batches) -> tuple[dict[str, Values], dict[str, Tensor]]:
    """For each LayerNorm the PowerNorm that comes closest to it, channel by channel.

    Returns:
        Values for a PowerNorm by its name, and the relative errors [2] of their outputs: with the
        LayerNorm's own weights, and with these.
    """
    norms = layer_norms(model)
    sums = {name: _Sums(len(n.weight), n.weight.device) for name, n in norms.items()}
    watched(model, batches, {norm: sums[name].add for name, norm in norms.items()})
    values, errors = {}, {}
    for name, norm in norms.items():
        x, y, xx, xy, yy = sums[name].sums / sums[name].count
        scale = (xy - x * y) / (xx - x * x).clamp(min=1e-12)
        shift = y - scale * x
        weight = scale * (xx + norm.eps).sqrt()
        own = norm.weight.detach() * (xx + norm.eps).rsqrt(), norm.bias.detach()
        errors[name] = torch.stack(
            [_affine_error(*pair, (x, y, xx, xy, yy)) for pair in (own, (scale, shift))]
        )
        found = {"weight": weight, "bias": shift, "running_phi": xx}
        values[name] = {key: value.float() for key, value in found.items()}
    return values, errors


def _affine_error(scale: Tensor, shift: Tensor, means: tuple[Tensor, ...]) -> Tensor:
    """Root of the mean of ``(scale x + shift - y)^2`` over that of ``y^2``."""
    x, y, xx, xy, yy = means
    squares = scale**2 * xx + shift**2 + yy + 2 * (scale * shift * x - scale * xy - shift * y)
    return (squares.clamp(min=0).sum() / yy.sum()).sqrt()
