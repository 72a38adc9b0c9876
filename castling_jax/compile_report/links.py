"""How long the links of a pod need for what its chips send each other.

A chip takes in what a collective brings it over the links along the axes of the torus that the collective's group
spans: two of each axis that is a ring on which the group's chips are as far apart from each other all the way round,
one of any other, where the chip at the end has no more. All links of a group work at once, as the compiler's own rings
do; a link that several groups of the collective send over is shared by them. So, of arrays that are `whole` bytes
together on the n chips of a group,

  all-gather, reduce-scatter  whole * (n - 1) / n over those links (Chan et al., Collective communication, 2007)
  all-reduce                  twice that
  all-to-all                  the same share, times the mean number of links on the way
  collective-permute          what is sent, times the links on the longest way, over one link

These are times of the links alone: latencies, of about a microsecond a link, and what other collectives send at the
same time are not counted.
"""

import math
import re
from collections.abc import Sequence

import numpy as np

from castling_jax.compile_report.chips import Chip
from castling_jax.compile_report.dump import Collective

Coordinates = Sequence[int]
IOTA = r"\[([\d,]+)\](?:<=\[([\d,]+)\])?(?:T\(([\d,]+)\))?"


def read_groups(text: str, count: int) -> list[list[int]] | None:
    """The groups of a collective: positions of devices in the program's mesh. None where they are not known.

    Args:
      text: the HLO instruction.
      count: of all devices.
    """
    pairs = re.search(r"source_target_pairs=\{(\{[\d,{}]*\})\}", text)
    listed = pairs or re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", text)
    if listed:
        return [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed[1])]
    if "replica_groups={}" in text:
        return [list(range(count))]
    if iota := re.search(rf"replica_groups={IOTA}", text):
        groups, dims, order = (_numbers(part) for part in iota.groups())
        return _iota(dims or groups, order).reshape(groups).tolist()
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}", text):
        return _mesh_groups(*mesh.groups())
    return None


def _mesh_groups(mesh: str, ids: str | None, over: str) -> list[list[int]] | None:
    axes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh)}
    chosen = re.findall(r"'(\w+)'", over)
    if over.replace(" ", "") != ",".join(f"'{name}'" for name in chosen):  # a part of an axis
        return None
    devices = np.arange(math.prod(axes.values()))
    if ids is not None:
        iota = re.fullmatch(IOTA, ids)
        if iota is None:
            return None
        devices = _iota(_numbers(iota[2] or iota[1]), _numbers(iota[3])).reshape(-1)
    names = list(axes)
    last = [names.index(name) for name in chosen]
    first = [place for place in range(len(names)) if place not in last]
    size = math.prod(axes[name] for name in chosen)
    return devices.reshape(tuple(axes.values())).transpose(first + last).reshape(-1, size).tolist()


def _numbers(text: str | None) -> list[int]:
    return [int(n) for n in (text or "").split(",") if n]


def _iota(dims: list[int], order: list[int]) -> np.ndarray:
    numbers = np.arange(math.prod(dims)).reshape(dims)
    return numbers.transpose(order) if order else numbers


def link_ms(sent: Collective, devices: Sequence[Coordinates], chip: Chip) -> float | None:
    """Milliseconds that the links need for a collective; the module's docstring says how. None: its group is unknown.

    Args:
      sent: the collective.
      devices: where in the torus each device of the program's mesh is.
      chip: what the pod is made of.
    """
    groups = read_groups(sent.text, len(devices))
    if groups is None:
        return None
    where = np.asarray(devices)
    sides = where.max(axis=0) + 1
    rings = (sides % chip.ring == 0) & (sides > 2)  # between two chips there is one link, not a ring
    if chip.axes == 3:
        rings &= rings.all()
    link = chip.link_gigabytes_per_second * 1e6  # bytes a millisecond
    if sent.kind == "collective-permute":
        hops = max(int(_hops(where[a], where[b], sides, rings).sum()) for a, b in groups)
        return sent.bytes * hops / link
    members = [where[group] for group in groups]
    ways = np.array([_ways(group, sides, rings) for group in members])  # [groups, axes]
    shares = np.array([_share(members, axis, ways[:, axis], sides) for axis in range(len(sides))])
    return max(
        _group_ms(sent, group, float((of_group / shares).sum()) * link, sides, rings)
        for group, of_group in zip(members, ways, strict=True)
    )


def _hops(start: np.ndarray, end: np.ndarray, sides: np.ndarray, rings: np.ndarray) -> np.ndarray:
    """Links on the shortest way, along each axis."""
    straight = np.abs(start - end)
    return np.where(rings, np.minimum(straight, sides - straight), straight)


def _ways(group: np.ndarray, sides: np.ndarray, rings: np.ndarray) -> list[int]:
    """Along each axis, over how many links a chip of a group takes in: 0 where the group does not span it."""
    found = []
    for axis, side, ring in zip(group.T, sides, rings, strict=True):
        places = np.unique(axis)
        closed = ring and len(set(np.diff(places, append=places[0] + side))) == 1
        found.append(0 if len(places) == 1 else 2 if closed else 1)
    return found


def _share(groups: list[np.ndarray], axis: int, ways: np.ndarray, sides: np.ndarray) -> int:
    """How many groups at most send over one link along an axis; 1 where none does."""
    crossing: dict[tuple[int, ...], np.ndarray] = {}  # of each line along the axis, the groups that cross its links
    for group, way in zip(groups, ways, strict=True):
        if not way:
            continue
        others = np.delete(group, axis, axis=1)
        for line in {tuple(place) for place in others.tolist()}:
            places = group[(others == line).all(axis=1), axis]
            links = crossing.setdefault(line, np.zeros(sides[axis], int))
            links[slice(None) if way == 2 else slice(places.min(), places.max())] += 1
    return max((int(links.max()) for links in crossing.values()), default=1)


def _group_ms(sent: Collective, group: np.ndarray, rate: float, sides: np.ndarray, rings: np.ndarray) -> float:
    """Milliseconds of one group, a chip of which takes in `rate` bytes a millisecond."""
    count = len(group)
    if count == 1:
        return 0.0
    whole = sent.bytes * (count if sent.kind == "reduce-scatter" else 1)
    milliseconds = whole * (count - 1) / count / rate
    if sent.kind == "all-reduce":
        return 2 * milliseconds
    if sent.kind == "all-to-all":
        hops = _hops(group[:, None], group, sides, rings).sum(axis=-1)
        return milliseconds * float(hops.sum()) / (count * (count - 1))
    return milliseconds
