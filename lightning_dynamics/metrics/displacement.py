"""How far, how fast and in what direction weights move: sums over every step, read off at some of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

_BLOCK = 1 << 17  # entries that a processor works on at once: what its cache holds
_BLOCK_ELSEWHERE = 1 << 24
_UNREAD = 256  # steps whose norms wait on the device
_ROUNDING = 1e-10  # relative square of a displacement that may be rounding

START, REFERENCE = "start", "reference"

Weights = Mapping[str, Tensor]
"""Parameters by name, each a vector: as they are, or projected (:class:`Projection`)."""


def layer_of(name: str) -> str:
    """The module that a parameter belongs to; the parameter itself where that is the network."""
    return name.rpartition(".")[0] or name


class Displacement:
    """Follows weights through training.

    The start, the weights of the last step and that step itself are kept, on the weights' device or on the host; an
    update reads the weights once, and writes the other two. Norms and products are taken in float32 (float64 for such
    weights) by blocks, and summed in float64.

    A parameter that appears later (of a layer that was frozen until now) has not moved before. If one disappears or
    changes its shape, all begins anew.

    Args:
        layer: Name of the layer that a parameter belongs to, a function of the parameter's name.
        on_host: Keep everything in the host's memory.

    Example:
        >>> moved = Displacement()
        >>> for x in (0.0, 3.0, 7.0):
        ...     _ = moved.update({"layer.weight": torch.tensor([x, 1.0])})
        >>> moved.read()["layer"]["path_length"]
        7.0
    """

    def __init__(self, layer: Callable[[str], str] = layer_of, on_host: bool = False) -> None:
        self._layer = layer
        self._on_host = on_host
        self._begin()

    def _begin(self) -> None:
        self.steps = 0
        self.count = 0
        self.layers: list[str] = []
        self._points: dict[str, dict[str, Tensor]] = {START: {}}
        self._previous: dict[str, Tensor] = {}
        self._back: dict[str, Tensor] = {}  # the last step, backwards
        self._waiting: list[list[Tensor]] = []
        self._groups: list[_Group] = []
        # one row for all weights, one for each layer
        self._sums = torch.zeros(1, len(_COLUMNS), dtype=torch.float64)
        self._told = self._sums.clone()  # as of the last reading

    @property
    def current(self) -> Weights:
        """The weights as of the last update; not to be written to."""
        return self._previous

    @property
    def has_reference(self) -> bool:
        return REFERENCE in self._points

    def update(self, weights: Weights, is_step: bool = True) -> str | None:
        """Take note of the weights.

        Args:
            weights: The weights after a step; nothing of them is kept but copies.
            is_step: Whether a step of training has changed them. Otherwise displacements are from where they are, but
                path and steps do not count the way there.

        Returns:
            Why all began anew, if it did.
        """
        lost = [n for n, kept in self._previous.items() if n not in weights or weights[n].shape != kept.shape]
        if lost:
            self._begin()
        known = {name for name in weights if name in self._previous}
        if known and is_step:
            self._waiting.append([group.advance(weights) for group in self._groups])
            self.steps += 1
            self.count += 1
            if len(self._waiting) >= _UNREAD:
                self._settle()
        else:
            for name in known:
                self._previous[name].copy_(weights[name])
        fresh = {name: tensor for name, tensor in weights.items() if name not in known}
        if fresh:
            self._admit(fresh)
        if not lost:
            return None
        others = "" if len(lost) == 1 else f" (and {len(lost) - 1} more)"
        return f"`{lost[0]}`{others} is gone or has another shape: displacements count from here anew"

    def anchor(self, weights: Weights | None = None) -> None:
        """Set the reference to the weights as they are, or to others.

        Args:
            weights: Others of the same names and shapes.
        """
        source = self._previous if weights is None else weights
        self._points[REFERENCE] = {name: self._own(source[name]) for name in self._previous}

    @property
    def energy(self) -> float:
        """Σ‖θ_s - θ_{s-1}‖² over all steps."""
        self._settle()
        return float(self._sums[0, _COLUMNS.index("squares")])

    def squared(self, point: str = REFERENCE) -> float:
        """‖θ - θ_ref‖², or that from the start."""
        away = self._from(point)
        return float(self._products(away, away).sum())

    def read(self) -> dict[str, dict[str, float]]:
        """The displacements of all weights, under ``""``, and of each layer; sums over steps begin anew.

        Returns:
            By layer and name, what is not defined left out:

            - ``norm``: ‖θ_t‖.
            - ``from_init``: ‖θ_t - θ_0‖; ``relative``: over ‖θ_0‖; ``angle``: between θ_t and θ_0, in radians.
            - ``from_reference``: ‖θ_t - θ_ref‖, where there is a reference.
            - ``step``: root mean square of ‖θ_s - θ_{s-1}‖ over the steps since the last reading; ``update_ratio``:
              over ‖θ_t‖.
            - ``path_length``: Σ‖θ_s - θ_{s-1}‖ over all steps; ``straightness``: ‖θ_t - θ_0‖ over it.
            - ``step_cosine``: mean cosine of consecutive steps since the last reading.
            - ``start_cosine``: cosine of the last step and θ_{t-1} - θ_0.
        """
        self._settle()
        start, away = self._points[START], self._from(START)
        columns = {
            "square": self._products(away, away),
            "along": self._products(away, start),
            "origin": self._products(start, start),
            "back": self._products(self._back, away),
        }
        if self.has_reference:
            other = self._from(REFERENCE)
            columns["away"] = self._products(other, other)
        rows = {name: torch.cat((column.sum(0, keepdim=True), column)).tolist() for name, column in columns.items()}
        since = self._sums - self._told
        since[:, _WHOLE] = self._sums[:, _WHOLE]
        rows.update({name: since[:, i].tolist() for i, name in enumerate(_COLUMNS)})
        found = {}
        for i, layer in enumerate(["", *self.layers]):
            found[layer] = _values({name: row[i] for name, row in rows.items()}, self.count, self.steps)
        self._told = self._sums.clone()
        self.count = 0
        return found

    def state_dict(self) -> dict[str, Any]:
        """All that is kept, in plain containers and tensors."""
        self._settle()
        return {
            "layers": list(self.layers),
            "points": {point: dict(tensors) for point, tensors in self._points.items()},
            "previous": {name: tensor.clone() for name, tensor in self._previous.items()},
            "back": {name: tensor.clone() for name, tensor in self._back.items()},
            "sums": self._sums.clone(),
            "told": self._told.clone(),
            "count": self.count,
            "steps": self.steps,
        }

    def load_state_dict(self, state: Mapping[str, Any], devices: Mapping[str, torch.device] | None = None) -> None:
        """Go on from what :meth:`state_dict` gave.

        Args:
            state: The state.
            devices: Where each parameter is now; the CPU by default.
        """
        self._begin()
        places = {} if devices is None or self._on_host else devices

        def placed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: tensor.to(places.get(name, "cpu"), copy=True) for name, tensor in tensors.items()}

        self.layers = list(state["layers"])
        self._points = {point: placed(tensors) for point, tensors in state["points"].items()}
        self._previous, self._back = placed(state["previous"]), placed(state["back"])
        self._sums, self._told = state["sums"].clone(), state["told"].clone()
        self.count, self.steps = state["count"], state["steps"]
        self._arrange()

    def _admit(self, weights: Weights) -> None:
        """Parameters that are seen for the first time: they have not moved so far."""
        self._settle()
        for name, tensor in weights.items():
            layer = self._layer(name)
            if layer not in self.layers:
                self.layers.append(layer)
            self._previous[name] = self._own(tensor)
            self._back[name] = torch.zeros_like(self._previous[name])
            for point in self._points.values():
                point[name] = self._previous[name].clone()
        more = 1 + len(self.layers) - len(self._sums)
        zeros = self._sums.new_zeros(more, len(_COLUMNS))
        self._sums, self._told = torch.cat((self._sums, zeros)), torch.cat((self._told, zeros))
        self._arrange()

    def _arrange(self) -> None:
        """Gather small parameters of one device and type, and cut large ones, into groups that fit a cache."""
        self._groups = []
        rows = {layer: 1 + i for i, layer in enumerate(self.layers)}
        together: dict[tuple[torch.device, torch.dtype], list[str]] = {}
        for name, tensor in self._previous.items():
            limit = _limit(tensor)
            row = rows[self._layer(name)]
            if tensor.numel() > limit:
                for a in range(0, tensor.numel(), limit):
                    place = slice(a, a + limit)
                    runs = [(row, 0, len(tensor[place]))]
                    self._groups.append(_Group([name], place, tensor[place], self._back[name][place], runs))
            else:
                together.setdefault((tensor.device, tensor.dtype), []).append(name)
        for names in together.values():
            members: list[str] = []
            for name in names:
                if sum(self._previous[n].numel() for n in (*members, name)) > _limit(self._previous[name]):
                    self._join(members, rows)
                    members = []
                members.append(name)
            self._join(members, rows)

    def _join(self, names: list[str], rows: Mapping[str, int]) -> None:
        """Keep parameters side by side, so that they are worked on as one."""
        previous = torch.cat([self._previous[name] for name in names])
        back = torch.cat([self._back[name] for name in names])
        runs: list[tuple[int, int, int]] = []
        place = 0
        for name in names:
            end = place + self._previous[name].numel()
            self._previous[name], self._back[name] = previous[place:end], back[place:end]
            row = rows[self._layer(name)]
            if runs and runs[-1][0] == row:
                runs[-1] = (row, runs[-1][1], end)
            else:
                runs.append((row, place, end))
            place = end
        self._groups.append(_Group(names, slice(None), previous, back, runs))

    def _settle(self) -> None:
        """Read the norms that wait on the device, and add them up."""
        if not self._waiting:
            return
        rows = torch.tensor([row for group in self._groups for row in group.rows])
        norms = [torch.cat([part.cpu() for part in parts], dim=1) for parts in self._waiting]
        self._waiting.clear()
        squares = torch.stack(norms).double().square()  # steps, (step, sum of two steps), blocks
        by_row = squares.new_zeros(len(squares), 2, len(self._sums)).index_add_(2, rows, squares)
        by_row[:, :, 0] = by_row[:, :, 1:].sum(2)
        now, both = by_row[:, 0], by_row[:, 1]
        before = torch.cat((self._sums[None, :, _LAST], now[:-1]))
        lengths = (now * before).sqrt()
        moved = lengths > 0
        cosines = torch.where(moved, (both - now - before) / (2 * lengths), 0.0).clamp(-1, 1)
        news = {"path": now.sqrt(), "squares": now, "cosines": cosines, "compared": moved.double()}
        for name, values in news.items():
            self._sums[:, _COLUMNS.index(name)] += values.sum(0)
        self._sums[:, _LAST] = now[-1]

    def _from(self, point: str) -> dict[str, Tensor]:
        origin = self._points[point]
        return {name: tensor - origin[name] for name, tensor in self._previous.items()}

    def _products(self, first: Weights, second: Weights) -> Tensor:
        """Inner products by layer, shape ``(layers,)``, float64."""
        products = torch.zeros(len(self.layers), dtype=torch.float64)
        place = {layer: i for i, layer in enumerate(self.layers)}
        for name, tensor in first.items():
            pairs = zip(torch.split(tensor, _BLOCK), torch.split(second[name], _BLOCK), strict=True)
            parts = [torch.dot(one, other) for one, other in pairs]
            products[place[self._layer(name)]] += torch.stack(parts).cpu().double().sum()
        return products

    def _own(self, tensor: Tensor) -> Tensor:
        return tensor.detach().to("cpu" if self._on_host else tensor.device, copy=True)


_COLUMNS = ("last", "path", "squares", "cosines", "compared")
_LAST = 0
_WHOLE = [0, 1]  # what is told of the whole way; the others since the last reading


class _Group:
    """Parameters, or a part of one, that are worked on as one vector.

    Args:
        names: Which.
        place: Which part of them.
        previous: Where they were, side by side.
        back: Their last step, backwards.
        runs: Rows of the layers that they belong to, each with the stretch that does.
    """

    def __init__(
        self, names: list[str], place: slice, previous: Tensor, back: Tensor, runs: list[tuple[int, int, int]]
    ) -> None:
        self.rows = [row for row, _, _ in runs]
        self._names = names
        self._place = place
        self._previous = previous
        self._back = back
        self._of_previous = [previous[a:b] for _, a, b in runs]
        self._of_back = [back[a:b] for _, a, b in runs]

    def advance(self, weights: Weights) -> Tensor:
        """Norms of the step to these weights, and of its sum with the step before, shape ``(2, runs)``."""
        parts = [weights[name][self._place] for name in self._names]
        current = (parts[0] if len(parts) == 1 else torch.cat(parts)).to(self._previous.device)
        # in place, since new memory would cost more than the arithmetic
        self._previous.sub_(current)
        single = _norms(self._of_previous)
        self._back.add_(self._previous)
        double = _norms(self._of_back)
        self._back.copy_(self._previous)
        self._previous.copy_(current)
        return torch.stack((single, double))


def _limit(tensor: Tensor) -> int:
    return _BLOCK if tensor.device.type == "cpu" else _BLOCK_ELSEWHERE


def _norms(tensors: list[Tensor]) -> Tensor:
    if tensors[0].device.type == "cpu":
        return torch.stack([torch.dot(tensor, tensor) for tensor in tensors]).sqrt()
    return torch.stack(torch._foreach_norm(tensors))


def _values(found: Mapping[str, float], count: int, steps: int) -> dict[str, float]:
    """What :meth:`Displacement.read` says of one layer, from its sums."""
    distance, origin = math.sqrt(found["square"]), math.sqrt(found["origin"])
    square = found["origin"] + 2 * found["along"] + found["square"]
    norm = math.sqrt(square) if not square <= 0 else 0.0  # NaN stays
    values = {"norm": norm, "from_init": distance, "path_length": found["path"]}
    if "away" in found:
        values["from_reference"] = math.sqrt(found["away"])
    if origin > 0:
        values["relative"] = distance / origin
        along = found["along"] / origin
        if norm > 0:
            across = math.sqrt(max(0.0, found["square"] - along * along))
            values["angle"] = math.atan2(across, origin + along)
    if found["path"] > 0:
        values["straightness"] = min(1.0, distance / found["path"])
    if count:
        values["step"] = math.sqrt(found["squares"] / count)
        if norm > 0:
            values["update_ratio"] = values["step"] / norm
    if found["compared"]:
        values["step_cosine"] = found["cosines"] / found["compared"]
    before = found["square"] + 2 * found["back"] + found["last"]
    if steps > 1 and before > _ROUNDING * found["square"] and found["last"] > 0:
        values["start_cosine"] = max(
            -1.0, min(1.0, (-found["back"] - found["last"]) / math.sqrt(before * found["last"]))
        )
    return values
