"""Conserved quantities: symmetries of the loss, found in gradients, and the charges that gradient flow conserves."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import astuple, dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

_NORMALIZATION = 3e-3  # the ε of a normalization layer breaks its symmetry by up to about this
_CONTRADICTION = 10.0  # residuals of so many tolerances refute; those between decide nothing
_PLAIN = 0.1  # residual of two units that refutes without a look at the others
_PARTS = 4  # matrices that one packed weight holds, at most
_SLICE = 1 << 17  # coordinates that are worked on at a time


@dataclass(frozen=True)
class Units:
    """The units of a layer as one of its weights sees them: one vector of coordinates for each.

    Attributes:
        weight: Name of the weight.
        bias: Name of the bias whose entries belong to the vectors, None if none do.
        axis: Dimension of the weight that runs over units. In linear layers and convolutions: 0 where the layer
            produces them, 1 where it reads them.
        count: Units u. Each takes several successive indices where a convolution's output was flattened.
        part: Which of the equal parts of the dimension it is, in weights that hold several matrices.
        parts: Their number.
    """

    weight: str
    bias: str | None
    axis: int
    count: int
    part: int = 0
    parts: int = 1

    @property
    def parameters(self) -> tuple[str, ...]:
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    def rows(self, tensors: Mapping[str, Tensor], count: int | None = None) -> Tensor:
        """The vectors as rows, shape ``(u, m)``, or the first ``count`` of them; of weights or gradients by name."""
        rows = self._rows(_real(tensors[self.weight]).movedim(self.axis, 0), count)
        if self.bias is None:
            return rows
        return torch.cat([rows, self._rows(_real(tensors[self.bias]), count).to(rows)], dim=1)

    def fold(self, values: Tensor) -> Tensor:
        """Sums over the indices of each unit, shape ``(u,)``, of numbers along the dimension."""
        return self._rows(values).sum(1)

    def _rows(self, tensor: Tensor, count: int | None = None) -> Tensor:
        count = count or self.count
        each = len(tensor) // (self.parts * self.count)
        return tensor[self.part * self.count * each :][: count * each].reshape(count, -1)


@dataclass(frozen=True)
class Symmetry:
    """A change of weights that no mini-batch's loss notices, and what follows from it.

    With the vectors wᵢ (and vᵢ) of unit i as rows of W (and V), and their gradients g, G (and h, H):

    =================  ===========================  =====================  ==========================
    kind               the loss is the same after   for every gradient     gradient flow conserves
    =================  ===========================  =====================  ==========================
    scale              w → a·w                      Σ ⟨wᵢ, gᵢ⟩ = 0         Σ ‖wᵢ‖²
    shift              wᵢ → wᵢ + a                  Σ gᵢ = 0               Σ wᵢ
    rescale            wᵢ → aᵢwᵢ, vᵢ → vᵢ/aᵢ        ⟨wᵢ, gᵢ⟩ = ⟨vᵢ, hᵢ⟩    ‖wᵢ‖² - ‖vᵢ‖²
    rescale, linear    W → AW, V → A⁻ᵀV             GWᵀ = VHᵀ              WWᵀ - VVᵀ
    =================  ===========================  =====================  ==========================

    with a > 0, any invertible A, and sums and A within groups of units. Scale: weights before a normalization layer.
    Shift: outputs of a softmax, or what only layer norms read. Rescale: layers with a positively homogeneous function
    between them (ReLU, pooling, none), w the incoming weights of a unit with its bias, v the outgoing ones. Linear:
    nothing between them but perhaps a mixture of positions (values and outputs of an attention head), or a scalar
    product (its queries and keys).

    Source: Kunin et al., arXiv 2012.04728; for layers, Du, Hu and Lee, arXiv 1806.00900; the general form derived.

    Attributes:
        kind: Which.
        sides: One :class:`Units`, or two for ``rescale``: w and v.
        groups: Number of groups, of equally many successive units: u where each unit is normalized (batch norm) or
            rescaled (ReLU) by itself, 1 for a whole tensor (layer norm, shift) or linear chain, else normalization
            groups or attention heads.
        residual: Largest that was seen while this was confirmed, see :class:`SymmetryFinder`.
    """

    kind: Literal["scale", "shift", "rescale"]
    sides: tuple[Units, ...]
    groups: int
    residual: float = field(default=math.nan, compare=False)

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters that it changes."""
        return tuple(dict.fromkeys(name for side in self.sides for name in side.parameters))

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the modules that own them."""
        return tuple(dict.fromkeys(side.weight.rpartition(".")[0] for side in self.sides))

    @property
    def is_linear(self) -> bool:
        """Whether units mix."""
        return self.kind == "rescale" and self.groups < self.sides[0].count


class SymmetryFinder:
    """Finds symmetries in the gradients of training, whatever the architecture.

    Every identity of :class:`Symmetry` that the shapes permit is tested on every gradient. Its residual is what is
    left, Σ|Σ terms| over units, beside what random signs of the terms would leave, Σ(Σ terms²)^½, or for ``rescale``
    Σ|a - b| beside Σ|a| + Σ|b|, so that sides which vanish are not equal. It is about 1 where there is no symmetry,
    and what rounding leaves where there is one: 5e-8 to 5e-6 in float32. The ε of a normalization layer leaves more,
    1e-5 to 3e-3. An identity is found once enough gradients have confirmed it since one refuted it. Chance confirms a
    single number with a probability of about the tolerance; an identity that holds at the initialization only is
    refuted when weights move.

    Gradients are those of the loss, before weight decay and clipping by value, of any mini-batches; a common factor
    does not matter. Gradients that hardly differ, of one batch at neighbouring steps, say, are counted as several and
    are one. Low precision hides symmetries: under bfloat16 autocast residuals are 1e-3 to 5e-3, and
    ``tolerance=1e-2`` is needed, which also admits what is nearly a symmetry. Only pairs of sides are compared, so a
    norm that separate query, key and value weights read is not found.

    Args:
        tolerance: Largest residual that confirms; for ``scale`` at least 3e-3. Ten times as much refutes.
        confirmations: How many gradients must confirm.
    """

    def __init__(self, *, tolerance: float = 1e-5, confirmations: int = 3) -> None:
        if not 0 < tolerance < 1 / _CONTRADICTION:
            raise ValueError(f"`tolerance` must lie between 0 and {1 / _CONTRADICTION}, got {tolerance!r}.")
        if confirmations < 1:
            raise ValueError(f"`confirmations` must be at least 1, got {confirmations!r}.")
        self.tolerance = tolerance
        self.confirmations = confirmations
        self._evidence: dict[Symmetry, tuple[int, float]] = {}

    def update(self, weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor | None]) -> None:
        """Test every identity on one gradient, in slices of the tensors, without copies of them all.

        Args:
            weights: The parameters by name.
            gradients: The gradients at them by name. One that is missing, zero or not finite decides nothing.

        Raises:
            ValueError: If a gradient has another shape than its weight.
        """
        usable = ((name, _usable(name, weight, gradients.get(name))) for name, weight in weights.items())
        pairs = {name: pair for name, pair in usable if pair is not None}
        seen: list[_Measured] = []
        for name in pairs:
            for symmetry, residual in _measure(name, pairs, seen, self.tolerance):
                self._judge(symmetry, residual)
        for symmetry, residual in self._rescalings(pairs, seen):
            self._judge(symmetry, residual)

    def found(self) -> tuple[Symmetry, ...]:
        """What is confirmed: of each symmetry the form that conserves most, rescalings without those others imply."""
        versions: dict[Any, list[Symmetry]] = {}
        for symmetry, (count, worst) in self._evidence.items():
            if count >= self.confirmations:
                sides = frozenset(replace(side, bias=None) for side in symmetry.sides)
                key = (symmetry.kind, symmetry.sides[0].weight if symmetry.kind == "scale" else sides)
                versions.setdefault(key, []).append(replace(symmetry, residual=worst))
        joined: dict[Units, Units] = {}
        found = []
        for symmetry in map(_best, versions.values()):
            if symmetry.kind == "rescale":
                first, second = (_root(joined, side) for side in symmetry.sides)
                if first == second:
                    continue
                joined[first] = second
            found.append(symmetry)
        return tuple(found)

    def state_dict(self) -> dict[str, Any]:
        """The evidence, in lists, strings and numbers."""
        return {
            "evidence": [
                [s.kind, [list(astuple(side)) for side in s.sides], s.groups, count, worst]
                for s, (count, worst) in self._evidence.items()
            ]
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._evidence = {
            Symmetry(kind, tuple(Units(*side) for side in sides), groups): (count, worst)
            for kind, sides, groups, count, worst in state["evidence"]
        }

    def _judge(self, symmetry: Symmetry, residual: float) -> None:
        limit = max(self.tolerance, _NORMALIZATION) if symmetry.kind == "scale" else self.tolerance
        count, worst = self._evidence.get(symmetry, (0, 0.0))
        if residual <= limit:
            self._evidence[symmetry] = (count + 1, max(worst, residual))
        elif residual > _CONTRADICTION * limit:
            self._evidence.pop(symmetry, None)

    def _rescalings(
        self, pairs: Mapping[str, tuple[Tensor, Tensor]], seen: list[_Measured]
    ) -> Iterator[tuple[Symmetry, float]]:
        """Pairs of sides whose products per unit coincide, or did before; near ones first."""
        every = {m.units: m for m in [*seen, *_regrouped(seen)] if m.units.count > 1}
        order = {units: i for i, units in enumerate(every)}
        near = {_oriented(a, b, order) for a, b in _near(every.values(), self.tolerance)}
        known = {s.sides for s in self._evidence if s.kind == "rescale" and all(side in every for side in s.sides)}
        for sides in sorted(near | known, key=lambda s: (abs(order[s[1]] - order[s[0]]), order[s[0]])):
            a, b = (every[side] for side in sides)
            residual = _inequality(a.products, b.products)
            yield Symmetry("rescale", sides, a.units.count), residual
            mixing = _divisors(a.units.count)[:-1]
            residuals = _mixing(sides, pairs, mixing) if residual <= self.tolerance else [residual] * len(mixing)
            for groups, residual in zip(mixing, residuals, strict=True):
                yield Symmetry("rescale", sides, groups), residual


def conserved(symmetry: Symmetry, weights: Mapping[str, Tensor]) -> Tensor:
    """The charge that gradient flow conserves, float64 on the CPU.

    A step θ → (1 - ηλ)θ - ηg of gradient descent with coupled weight decay λ turns it into (1 - ηλ)² times itself plus
    η² times the same function of g, exactly; a shift into (1 - ηλ) times itself. Derived from the identities.

    Args:
        symmetry: Of which.
        weights: The parameters by name.

    Returns:
        Shape ``(groups,)`` for ``scale`` and ``rescale``, ``(groups, u/groups, u/groups)`` if that is linear, ``(m,)``
        for ``shift``.
    """
    charge, *other = _charges(symmetry, weights)
    return charge - other[0] if other else charge


def charge_scale(symmetry: Symmetry, weights: Mapping[str, Tensor]) -> float:
    """How large a charge could be: the norms of its parts, without the cancellation between them."""
    if symmetry.kind == "shift":
        return float(_double(symmetry.sides[0].rows(weights)).abs().sum(0).norm())
    return math.fsum(float(part.norm()) for part in _charges(symmetry, weights))


def breaking(charge: Tensor, start: Tensor, scale: float) -> float:
    """‖Q - Q₀‖ / scale, the relative change of a charge; NaN if the scale is 0.

    Args:
        charge: Q.
        start: Q₀, same shape.
        scale: :func:`charge_scale` at the start.
    """
    return _ratio(float((charge - start).norm()), scale)


def imbalance(symmetry: Symmetry, weights: Mapping[str, Tensor]) -> float:
    """‖W_{l+1}‖² - ‖W_l‖² - ‖b_l‖² of the two layers of a ``rescale`` symmetry.

    Raises:
        ValueError: If it is of another kind.
    """
    if symmetry.kind != "rescale":
        raise ValueError(f"Only a symmetry of kind 'rescale' balances layers, this one is of kind {symmetry.kind!r}.")
    first, second = (float(_double(side.rows(weights)).square().sum()) for side in symmetry.sides)
    return second - first


def radial_share(weight: Tensor, gradient: Tensor) -> float:
    """⟨w, g⟩ / (‖w‖‖g‖), 0 where the scale of w does not matter; NaN if one of them is 0."""
    w, g = (_double(_real(each)).flatten() for each in (weight, gradient))
    return _ratio(float(w @ g), float(w.norm() * g.norm()))


def effective_learning_rate(rate: float, charge: Tensor, *, adaptive: bool = False) -> Tensor:
    """The learning rate of the direction of scale-invariant weights.

    Source: van Laarhoven, arXiv 1706.05350.

    Args:
        rate: η.
        charge: ‖w‖² of each group, :func:`conserved` of a ``scale`` symmetry.
        adaptive: Whether steps do not grow with the gradient, as those of Adam.

    Returns:
        η/‖w‖², or η/‖w‖ if adaptive, same shape.
    """
    return rate / (charge.sqrt() if adaptive else charge)


@dataclass(frozen=True)
class _Measured:
    """⟨wᵢ, gᵢ⟩ of each unit, shape ``(u,)``."""

    units: Units
    products: Tensor
    is_whole: bool = True


def _measure(
    name: str, pairs: Mapping[str, tuple[Tensor, Tensor]], seen: list[_Measured], tolerance: float
) -> Iterator[tuple[Symmetry, float]]:
    """Shift and scale identities of a tensor; what rescaling needs is appended to ``seen``."""
    for axis, (left, by_chance, products, squares) in enumerate(_sums(*pairs[name])):
        count = len(products)
        yield Symmetry("shift", (Units(name, None, axis, count),), 1), _ratio(left, by_chance)
        if "bias" in name.rpartition(".")[2]:  # adds only; two that are added to the same may stay equal for ever
            continue
        variants: dict[str | None, tuple[Tensor, Tensor]] = {None: (products, squares)}
        bias, share = _bias_of(name), 0.0
        if bias in pairs and pairs[bias][0].shape == (count,) and (axis == 0 or count != len(pairs[name][0])):
            *_, more, more_squares = _sums(*pairs[bias])[0]
            variants[bias] = (products + more, squares + more_squares)
            share = _ratio(float(more.abs().sum()), float(squares.sqrt().sum()))
            if share == 0:  # a bias that is still zero cannot tell whether it takes part
                del variants[None]
        for partner, (products, squares) in variants.items():
            units = Units(name, partner, axis, count)
            seen.append(_Measured(units, products))
            for groups in _divisors(count)[axis:]:  # the whole is the same along both
                left = float(products.reshape(groups, -1).sum(1).abs().sum())
                by_chance = float(squares.reshape(groups, -1).sum(1).sqrt().sum())
                residual = _ratio(left, by_chance)
                is_unclear = partner is None and tolerance < share < _CONTRADICTION * residual
                if not is_unclear or residual > _CONTRADICTION * _NORMALIZATION:  # the ε hides whether the bias matters
                    yield Symmetry("scale", (units,), groups), residual


def _sums(weight: Tensor, gradient: Tensor) -> list[tuple[float, float, Tensor, Tensor]]:
    """For each of the first two dimensions: Σ|Σ g| and Σ(Σ g²)^½, inner sums along it; Σ w·g and Σ (w·g)² across it."""
    shape = (len(weight), -1, 1) if weight.dim() < 2 else (*weight.shape[:2], -1)
    w, g = _real(weight).reshape(shape), _real(gradient).reshape(shape)
    step = max(1, _SLICE // w[0].numel())
    down = torch.zeros(2, *w.shape[1:], dtype=torch.float64, device=_double(w[:0]).device)
    columns, along = torch.zeros_like(down[:, :, 0]), torch.zeros_like(down[:, 0, 0])
    rows = []
    for a, b in zip(torch.split(w, step), torch.split(g, step), strict=True):
        b = _double(b)
        product, power = _double(a) * b, b.square()
        square = product.square()
        rows.append(torch.stack([product.sum((1, 2)), square.sum((1, 2))]))
        columns += torch.stack([product.sum((0, 2)), square.sum((0, 2))])
        down += torch.stack([b.sum(0), power.sum(0)])
        along += torch.stack([b.sum(1).abs().sum(), power.sum(1).sqrt().sum()])
    found = [(float(down[0].abs().sum()), float(down[1].sqrt().sum()), *torch.cat(rows, dim=1).cpu())]
    if weight.dim() > 1:
        found.append((float(along[0]), float(along[1]), *columns.cpu()))
    return found


def _regrouped(seen: list[_Measured]) -> Iterator[_Measured]:
    """Units that take several indices, or part of a dimension, where other weights have as many."""
    counts = sorted({m.units.count for m in seen})
    for m in seen:
        size = m.units.count
        splits = [(count, 1) for count in counts if count < size and size % count == 0]
        splits += [(size // n, n) for n in range(2, _PARTS + 1) if size % n == 0 and size // n in counts]
        for count, parts in splits:
            for part in range(parts):
                units = replace(m.units, count=count, part=part, parts=parts)
                yield _Measured(units, units.fold(m.products), is_whole=False)


def _near(every: Iterable[_Measured], tolerance: float) -> Iterator[tuple[Units, Units]]:
    """Pairs of vectors a, b with ‖a - b‖₁ ≤ tolerance · (‖a‖₁ + ‖b‖₁).

    Sums with fixed random signs differ by no more than that: sorted by them, such vectors are close neighbours.
    """
    by_count: dict[int, list[_Measured]] = {}
    for m in every:
        by_count.setdefault(m.units.count, []).append(m)
    for count, group in by_count.items():
        signs = torch.randint(2, (count,), generator=torch.Generator().manual_seed(0)).double() * 2 - 1
        vectors = torch.stack([m.products for m in group])
        sizes, places = vectors.abs().sum(1).tolist(), (vectors @ signs).tolist()
        order = sorted((i for i in range(len(group)) if 0 < sizes[i] < math.inf), key=places.__getitem__)
        for position, i in enumerate(order):
            for j in order[position + 1 :]:
                if places[j] - places[i] > 3 * tolerance * sizes[i]:
                    break
                if _are_apart(group[i], group[j]) and _inequality(vectors[i], vectors[j]) <= tolerance:
                    yield group[i].units, group[j].units


def _are_apart(a: _Measured, b: _Measured) -> bool:
    """Whether they are of different coordinates, and do not just follow from whole dimensions that coincide."""
    if a.units.weight == b.units.weight:
        return a.units.axis == b.units.axis and a.units.parts == b.units.parts and a.units.part != b.units.part
    return a.is_whole or b.is_whole


def _oriented(a: Units, b: Units, order: Mapping[Units, int]) -> tuple[Units, Units]:
    """First the side that produces the units: the one with a bias, else dimension 0, else the earlier one."""
    first, second = sorted((a, b), key=lambda side: (side.bias is None, side.axis, order[side]))
    return first, second


def _mixing(sides: tuple[Units, ...], pairs: Mapping[str, tuple[Tensor, Tensor]], groupings: list[int]) -> list[float]:
    """Residuals of GWᵀ = VHᵀ within groups of units.

    Entries beside the diagonal suffice: commutators of the changes of weights that they stand for give all others.
    """
    weights, gradients = ({name: pairs[name][i] for side in sides for name in side.parameters} for i in (0, 1))
    count = sides[0].count

    def beside(end: int) -> tuple[Tensor, Tensor]:
        (w, g), (v, h) = ((side.rows(weights, end), side.rows(gradients, end)) for side in sides)
        return _beside(g, w), _beside(v, h)

    if (plain := _inequality(*beside(2))) > _PLAIN:  # the first two units share a group, whatever the groups
        return [plain] * len(groupings)
    left, right = beside(count)
    together = [torch.arange(1, count) % (count // groups) != 0 for groups in groupings]
    return [_inequality(left[:, inside], right[:, inside]) for inside in together]


def _beside(first: Tensor, second: Tensor) -> Tensor:
    """Entries (i, i + 1) and (i + 1, i) of the product of first and secondᵀ, shape ``(2, u - 1)``."""
    found = []
    step = max(1, _SLICE // first.shape[1])
    for start in range(0, len(first) - 1, step):
        a, b = (_double(each[start : start + step + 1]) for each in (first, second))
        found.append(torch.stack([(a[:-1] * b[1:]).sum(1), (a[1:] * b[:-1]).sum(1)]))
    return torch.cat(found, dim=1).cpu()


def _inequality(a: Tensor, b: Tensor) -> float:
    return _ratio(float((a - b).abs().sum()), float(a.abs().sum() + b.abs().sum()))


def _charges(symmetry: Symmetry, weights: Mapping[str, Tensor]) -> list[Tensor]:
    matrices = [_double(side.rows(weights)) for side in symmetry.sides]
    if symmetry.kind == "shift":
        return [matrices[0].sum(0).cpu()]
    if symmetry.is_linear:
        blocks = (m.reshape(symmetry.groups, -1, m.shape[1]) for m in matrices)
        return [(block @ block.mT).cpu() for block in blocks]
    return [m.square().reshape(symmetry.groups, -1).sum(1).cpu() for m in matrices]


def _best(versions: list[Symmetry]) -> Symmetry:
    """That which conserves most. A bias that makes no difference is part of a rescaling, and not of a scale."""
    is_rescale = versions[0].kind == "rescale"
    groups = (min if is_rescale else max)(s.groups for s in versions)
    same = [s for s in versions if s.groups == groups]
    return (max if is_rescale else min)(same, key=lambda s: len(s.parameters))


def _root(joined: Mapping[Units, Units], side: Units) -> Units:
    while side in joined:
        side = joined[side]
    return side


def _bias_of(name: str) -> str:
    """The name that the bias of a weight has; empty if this is no weight."""
    owner, dot, last = name.rpartition(".")
    return owner + dot + last.replace("weight", "bias") if "weight" in last else ""


def _usable(name: str, weight: Tensor, gradient: Tensor | None) -> tuple[Tensor, Tensor] | None:
    if gradient is None or weight.dim() == 0 or weight.numel() == 0:
        return None
    if gradient.shape != weight.shape:
        raise ValueError(
            f"{name} has the shape {tuple(weight.shape)}, and its gradient the shape {tuple(gradient.shape)}."
        )
    dense = gradient.detach() if gradient.layout is torch.strided else gradient.detach().to_dense()
    return weight.detach(), dense.to(weight.device)


def _divisors(number: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else math.nan


def _real(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _double(tensor: Tensor) -> Tensor:
    """In double precision, on the CPU where the device has none."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()
