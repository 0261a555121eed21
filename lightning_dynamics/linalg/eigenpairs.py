"""Extremal eigenpairs: cold from a random vector, warm from old ones, complete with stated probability."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_dynamics.linalg.completeness import bound_complement
from lightning_dynamics.linalg.krylov import KrylovSpace, RitzPairs, random_vector
from lightning_dynamics.linalg.operator import SymmetricOperator
from lightning_dynamics.linalg.results import Eigenpairs, ExtremalEigenpairs

# The constants below were chosen by experiment on the workloads of tests/benchmarks; none of them enters a bound.
_TOP_GUARDS = 2  # old vectors beyond the wanted ones: without them r²/gap trusts a gap that is not there
_SMALL_MOVE = 0.1  # relative residual of the old leading vector below which old vectors are refined one by one
_FRESH = 0.3  # share of a random vector in a start vector made of old ones, so that nothing new is invisible
_STEPS_BEYOND = 3  # Ritz values beyond the wanted ones before a run may stop
_CLUSTER = 12  # widest group of old Ritz values that is bounded as one
_FLOOR = 0.1  # tolerances at the top are relative to max(|λ|, _FLOOR·‖A‖)
_NEARLY = 0.1  # relative residual below which a Ritz vector is worth deflating


@dataclass(frozen=True)
class _End:
    """One end of the spectrum as it is asked for: how many values, how exact."""

    count: int
    is_top: bool
    tolerance: float
    floor: float
    guards: int

    def order(self, pairs: RitzPairs) -> Tensor:
        """Indices of the Ritz pairs, outermost first."""
        size = len(pairs.values)
        return torch.arange(size) if self.is_top else torch.arange(size - 1, -1, -1)

    def wanted(self, pairs: RitzPairs) -> Tensor:
        return self.order(pairs)[: self.count]

    def allowed(self, values: Tensor, norm: float) -> Tensor:
        return self.tolerance * values.abs().clamp(min=self.floor * norm)


def eigenpairs(
    operator: SymmetricOperator,
    top: int = 1,
    bottom: int = 0,
    *,
    tolerance: float = 1e-3,
    bottom_tolerance: float = 1e-2,
    start: Tensor | None = None,
    confidence: float | None = 0.99,
    generator: torch.Generator | None = None,
    max_products: int = 300,
    max_rows: int | None = None,
) -> ExtremalEigenpairs:
    """The ``top`` largest and ``bottom`` smallest eigenpairs of a symmetric operator.

    Lanczos with full reorthogonalization and thick restart, stopped by the error of each eigen*value*
    (:attr:`Eigenpairs.bounds`). What a single start vector cannot see (further copies of a multiple eigenvalue, a
    neighbour not yet separated) is looked for by an independent random vector on the complement of what was found,
    which gives :attr:`Eigenpairs.limits`; if it meets something beyond the wanted values, the run takes it in and goes
    on.

    With ``start``, one product decides: if the leading old vector is still nearly an eigenvector, all old vectors are
    multiplied once (Rayleigh-Ritz) and the worst residual is followed until the bounds hold; else Lanczos starts from
    their sum and a random vector.

    Args:
        operator: A, of size n.
        top: Number of largest eigenvalues, ≥ 0.
        bottom: Number of smallest eigenvalues, ≥ 0.
        tolerance: Allowed error of a top value, relative to max(abs(λ), 0.1‖A‖).
        bottom_tolerance: Allowed error of a bottom value, relative to ‖A‖: the lower end of a loss Hessian is dense,
            and resolving it as finely as the top would cost several times as much.
        start: :attr:`ExtremalEigenpairs.subspace` of an earlier result for a nearby operator, shape ``(r, n)``.
        confidence: Probability with which :attr:`Eigenpairs.limits` hold; None leaves completeness unchecked.
        generator: CPU generator for the random vectors; a new one seeded with 0 by default.
        max_products: Give up after this many products (the result then says ``converged=False``).
        max_rows: Vectors held at once before a thick restart; :func:`most_rows` by default.

    Returns:
        Both ends. Memory: ``max_rows`` vectors at most; the completeness check holds about a third of that once more.

    Raises:
        ValueError: If nothing is asked for, or more than the operator has.
        FloatingPointError: If a product is not finite.
    """
    if top < 0 or bottom < 0 or not 0 < top + bottom <= operator.size:
        raise ValueError(
            "`top` and `bottom` must not be negative, and together between 1 and the operator's size "
            f"({operator.size}); got top={top}, bottom={bottom}."
        )
    for name, value in (("tolerance", tolerance), ("bottom_tolerance", bottom_tolerance)):
        if not 0 < value < 1:
            raise ValueError(f"`{name}` must lie between 0 and 1, got {value}.")
    if confidence is not None and not 0 < confidence < 1:
        raise ValueError(f"`confidence` must lie between 0 and 1, or be None; got {confidence}.")
    if start is not None and (start.dim() != 2 or start.shape[1] != operator.size):
        raise ValueError(f"`start` must have shape (r, {operator.size}), got {tuple(start.shape)}.")
    generator = generator if generator is not None else torch.Generator().manual_seed(0)
    ends = (
        _End(top, True, tolerance, _FLOOR, _TOP_GUARDS if top else 0),
        _End(bottom, False, bottom_tolerance, 1.0, 0),
    )
    rows = max(max_rows if max_rows is not None else most_rows(top, bottom), 2 * (top + bottom) + 8)
    run = _Run(operator, ends, generator, max_products, rows)
    run.begin(start)
    run.iterate()
    limits = run.complete(confidence) if confidence is not None else None
    return run.result(limits, confidence)


def most_rows(top: int, bottom: int) -> int:
    """Vectors that :func:`eigenpairs` holds at once by default."""
    return max(64, 4 * (top + bottom) + 16)


def value_bounds(pairs: RitzPairs, widest: int = 1) -> Tensor:
    """Estimated error of each Ritz value, shape ``(m,)``: the best quadratic bound over clusters that contain it.

    For neighbouring Ritz values C with residual block R, whose distance from the rest of the spectrum is gap, each is
    within ‖R‖²/gap of its eigenvalue (Mathias 1998; Kato-Temple where C is a single value). The rest of the spectrum is
    taken to be the other Ritz values, each anywhere within its own residual. Never worse than the residual itself.

    Args:
        pairs: The Ritz pairs.
        widest: Largest cluster considered. More than 1 trusts that the members of a cluster have all been met, which
            holds for vectors that were resolved before and have moved a little, not for a Krylov space that is still
            growing.
    """
    values, residuals = pairs.values, pairs.residuals
    size = len(values)
    best = residuals.clone()
    infinity = torch.full((1,), math.inf, dtype=torch.float64)
    # least that lies above position a, largest that lies at or below position b + 1
    ceiling = torch.cat([infinity, (values - residuals).cummin(0).values])[:size]
    floor = torch.cat([(values + residuals).flip(0).cummax(0).values.flip(0), -infinity])
    squares = torch.cat([torch.zeros(1, dtype=torch.float64), (residuals**2).cumsum(0)])
    for width in range(1, min(size - 1, widest) + 1):  # some other value must be left to measure the gap to
        first = torch.arange(size - width + 1)
        last = first + width - 1
        square = (squares[last + 1] - squares[first]).clamp(min=0.0)
        gap = torch.minimum(ceiling[first] - values[first], values[last] - floor[last + 1]) - square.sqrt()
        bound = torch.where(gap > 0, square / gap.clamp(min=1e-300), math.inf)
        for offset in range(width):
            best[offset : size - width + 1 + offset] = torch.minimum(best[offset : size - width + 1 + offset], bound)
    return best


class _Run:
    """State of one solve: the space, its Ritz pairs, and what has been spent."""

    def __init__(
        self,
        operator: SymmetricOperator,
        ends: tuple[_End, _End],
        generator: torch.Generator,
        max_products: int,
        max_rows: int,
    ) -> None:
        self.operator = operator
        self.ends = ends
        self.generator = generator
        self.max_products = max_products
        self.max_rows = max_rows
        self.space = KrylovSpace(operator, generator)
        self.pairs: RitzPairs
        self._spent = 0  # on spaces that were given up and on completeness checks
        self._refining = False
        self._num_wanted = sum(end.count for end in ends)

    @property
    def products(self) -> int:
        return self._spent + self.space.products

    @property
    def norm(self) -> float:
        return max(abs(float(self.pairs.values[0])), abs(float(self.pairs.values[-1])))

    def begin(self, start: Tensor | None) -> None:
        """Put the first directions into the space, cold or warm."""
        if start is None or not len(start) or not self.space.append(start[0]):
            self.space.append_random()
            return
        self.space.expand()
        leading = self.space.ritz()
        if float(leading.residuals[0]) <= _SMALL_MOVE * abs(float(leading.values[0])):
            self._refining = True
            behind = self.space.num_pending  # the residual of the first product waits
            num_old = sum(self.space.append(row) for row in start[1:])
            for _ in range(num_old):
                self.space.expand(behind)
            return
        self._spent += self.space.products
        self.space = KrylovSpace(self.operator, self.generator)
        fresh = random_vector(self.operator, self.generator)
        self.space.append(start.sum(0) / len(start) ** 0.5 + _FRESH * fresh / torch.linalg.vector_norm(fresh))

    def iterate(self) -> None:
        """Multiply until the bounds hold, the space is the whole space, or the products are spent."""
        enough = min(self._num_wanted + (0 if self._refining else _STEPS_BEYOND), self.operator.size)
        while True:
            if self.space.dimension:
                self.pairs = self.space.ritz()
            if self.space.dimension >= enough:
                slack = self._excess()
                if bool((slack <= 0).all()) or self.products >= self.max_products:
                    return
                if self._refining and not self.space.is_exhausted:
                    worst = self._wanted()[int(slack.argmax())]
                    self.space.steer(self.pairs.coupling[:, worst])
            if self.space.is_exhausted and not self.space.append_random():
                return  # the basis spans everything: the values are exact
            if self.space.num_rows >= self.max_rows:
                self._restart()
            self.space.expand()

    def complete(self, confidence: float) -> tuple[Tensor, Tensor] | None:
        """Look beyond what was found; take in what is met, and look again."""
        for attempt in range(1, 12):
            locked = self._nearly_converged()
            inner = [self._innermost(end) for end in self.ends]
            beyond = bound_complement(
                self.operator,
                self.space.vectors(self.pairs.coefficients[:, locked].mT),
                self.generator,
                # the failure probabilities of all attempts sum to 1 - confidence
                confidence=1 - (1 - confidence) / (attempt * (attempt + 1)),
                stop_above=inner[0],
                stop_below=inner[1],
                max_products=max(8, self.space.dimension // 3),
            )
            self._spent += beyond.products
            if not len(beyond.witnesses):
                return self._limits(locked, beyond.upper, beyond.lower)
            if self.products >= self.max_products:
                break
            # more copies may be missing than were met: every round adds twice as many fresh directions
            self._refining = False
            for witness in beyond.witnesses:
                self.space.append(witness)
            for _ in range(2 ** (attempt - 1) - 1):
                self.space.append_random()
            for _ in range(self.space.num_pending):
                self.space.expand()
            self.iterate()
        return None

    def result(self, limits: tuple[Tensor, Tensor] | None, confidence: float | None) -> ExtremalEigenpairs:
        errors = self._errors()
        collected = []
        for end, limit in zip(self.ends, limits or (None, None), strict=True):
            wanted = end.wanted(self.pairs)
            bounds = errors[wanted] + self.space.product_error
            values = self.pairs.values[wanted]
            following = end.order(self.pairs)[end.count : end.count + 1]
            gaps = (values[-1:] - self.pairs.values[following]).abs() - self.pairs.residuals[following]
            collected.append(
                Eigenpairs(
                    values=values,
                    vectors=self.space.vectors(self.pairs.coefficients[:, wanted].mT),
                    residuals=self.pairs.residuals[wanted],
                    bounds=bounds,
                    limits=limit,
                    confidence=confidence if limit is not None else None,
                    converged=bool((bounds <= end.allowed(values, self.norm)).all()),
                    gap=self._gap(end, gaps),
                    product_error=self.space.product_error,
                )
            )
        top, bottom = collected
        taken = set(self._wanted().tolist())
        guards = [i for end in self.ends for i in end.order(self.pairs)[: end.count + end.guards].tolist()]
        guards = list(dict.fromkeys(i for i in guards if i not in taken))
        beside = self.space.vectors(self.pairs.coefficients[:, torch.tensor(guards, dtype=torch.long)].mT)
        # where the space has not been yet: an eigenvalue that rises out of the bulk comes in through this one
        outside = self.space.pending()[:1]
        return ExtremalEigenpairs(
            top=top,
            bottom=bottom,
            subspace=torch.cat([top.vectors, bottom.vectors, beside, outside]),
            products=self.products,
            product_error=self.space.product_error,
            norm=self.norm,
        )

    def _gap(self, end: _End, gaps: Tensor) -> float | None:
        if len(gaps):
            return float(gaps[0]) - self.space.product_error
        return math.inf if end.count == self.operator.size else None

    def _wanted(self) -> Tensor:
        return torch.cat([end.wanted(self.pairs) for end in self.ends])

    def _errors(self) -> Tensor:
        return value_bounds(self.pairs, _CLUSTER if self._refining else 1)

    def _excess(self) -> Tensor:
        """By how much each bound exceeds what is allowed, in units of what is allowed."""
        bounds = self._errors()
        excess = []
        for end in self.ends:
            wanted = end.wanted(self.pairs)
            # a bound below the error of a product cannot be had by more products
            allowed = end.allowed(self.pairs.values[wanted], self.norm) - self.space.product_error
            allowed = allowed.clamp(min=max(self.space.product_error, 1e-300))
            excess.append(bounds[wanted] / allowed - 1)
        return torch.cat(excess)

    def _innermost(self, end: _End) -> float:
        """The innermost wanted value, moved inwards to outwards by the tolerance: what lies beyond it was missed."""
        outwards = 1.0 if end.is_top else -1.0
        if not end.count:
            return outwards * math.inf
        value = self.pairs.values[end.wanted(self.pairs)][-1:]
        return float(value + outwards * end.allowed(value, self.norm))

    def _nearly_converged(self) -> Tensor:
        """Ritz pairs worth deflating: the wanted ones, and on from each end while residuals are small."""
        small = self.pairs.residuals <= _NEARLY * self.pairs.values.abs().clamp(min=_FLOOR * self.norm)
        chosen: set[int] = set(self._wanted().tolist())
        for end in self.ends:
            if end.count:
                order = end.order(self.pairs)
                chosen.update(order[: int(small[order].to(torch.long).cumprod(0).sum())].tolist())
        return torch.tensor(sorted(chosen))

    def _limits(self, locked: Tensor, upper: float, lower: float) -> tuple[Tensor, Tensor]:
        """How far out the i-th eigenvalue can be, given bounds on the complement of the locked Ritz vectors.

        In the basis (locked, rest) A is at most [[Θ, Zᵀ], [Z, ν·I]] in the sense of quadratic forms, where ν bounds the
        rest from above; so its i-th eigenvalue bounds that of A (Courant-Fischer).
        """
        coupling = self.pairs.coupling[:, locked]
        num_locked, num_rows = len(locked), len(locked) + len(coupling)
        limits = []
        for end, edge in zip(self.ends, (upper, lower), strict=True):
            bordered = torch.zeros(num_rows, num_rows, dtype=torch.float64)
            bordered[:num_locked, :num_locked] = torch.diag(self.pairs.values[locked])
            bordered[num_locked:, :num_locked] = coupling
            bordered[:num_locked, num_locked:] = coupling.mT
            finite = edge if math.isfinite(edge) else 0.0
            bordered[num_locked:, num_locked:] = finite * torch.eye(len(coupling), dtype=torch.float64)
            ascending = torch.linalg.eigvalsh(bordered)
            if end.is_top:
                limits.append(ascending.flip(0)[: end.count].clamp(min=edge) + self.space.product_error)
            else:
                limits.append(ascending[: end.count].clamp(max=edge) - self.space.product_error)
        return limits[0], limits[1]

    def _restart(self) -> None:
        """Thick restart on the wanted Ritz vectors and about as many beyond them at each end."""
        keep: set[int] = set()
        for end in self.ends:
            if end.count:
                keep.update(end.order(self.pairs)[: 2 * end.count + 4].tolist())
        self.space.restart(self.pairs, torch.tensor(sorted(keep)))
