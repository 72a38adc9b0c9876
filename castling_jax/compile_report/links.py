"""The time that a pod's links need for collectives.

A collective's group spans some axes of the torus, and a chip receives over the links along these axes. An axis gives it
two links where the axis is a ring and the group's chips have equal distances all the way round; any other axis gives it
one, because the chip at the end has no more. All links of a group work at the same time, as in the compiler's rings,
and groups of the same collective share the links that they have in common. For arrays of `whole` bytes, summed over the
n chips of a group, each chip receives

  all-gather, reduce-scatter  whole * (n - 1) / n over those links (Chan et al., Collective communication, 2007)
  all-reduce                  twice that
  all-to-all                  the same share, times the mean number of links on the way
  collective-permute          the bytes that it is sent, times the links on the longest way, over one link

These are times of the links alone, without latencies (about a microsecond a link) and without other collectives at the
same time.
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
    """The groups of a collective, as positions of devices in the program's mesh; None where the text is not understood.

    Args:
      text: the HLO instruction.
      count: the number of all devices.
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
    spanned = re.findall(r"'(\w+)'", over)
    if over.replace(" ", "") != ",".join(f"'{name}'" for name in spanned):  # a part of an axis
        return None
    devices = np.arange(math.prod(axes.values()))
    if ids is not None:
        iota = re.fullmatch(IOTA, ids)
        if iota is None:
            return None
        devices = _iota(_numbers(iota[2] or iota[1]), _numbers(iota[3])).reshape(-1)
    names = list(axes)
    last = [names.index(name) for name in spanned]
    first = [place for place in range(len(names)) if place not in last]
    size = math.prod(axes[name] for name in spanned)
    return devices.reshape(tuple(axes.values())).transpose(first + last).reshape(-1, size).tolist()


def _numbers(text: str | None) -> list[int]:
    return [int(n) for n in (text or "").split(",") if n]


def _iota(dims: list[int], order: list[int]) -> np.ndarray:
    numbers = np.arange(math.prod(dims)).reshape(dims)
    return numbers.transpose(order) if order else numbers


def link_ms(sent: Collective, devices: Sequence[Coordinates], chip: Chip) -> float | None:
    """Milliseconds that the links need for a collective, as the module's docstring says; None for unknown groups.

    Args:
      sent: the collective.
      devices: the coordinates in the torus of each device of the program's mesh.
      chip: the pod's kind of chip.
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
    """The number of links on the shortest way, along each axis."""
    straight = np.abs(start - end)
    return np.where(rings, np.minimum(straight, sides - straight), straight)


def _ways(group: np.ndarray, sides: np.ndarray, rings: np.ndarray) -> list[int]:
    """The number of links along each axis over which a chip of a group receives: 0 where the group does not span it."""
    ways = []
    for axis, side, ring in zip(group.T, sides, rings, strict=True):
        places = np.unique(axis)
        # Equal distances, with the one from the last place round to the first: the chips form a ring of their own.
        closed = ring and len(set(np.diff(places, append=places[0] + side))) == 1
        ways.append(0 if len(places) == 1 else 2 if closed else 1)
    return ways


def _share(groups: list[np.ndarray], axis: int, ways: np.ndarray, sides: np.ndarray) -> int:
    """The largest number of groups that send over one link along an axis; 1 where no group does."""
    crossing: dict[tuple[int, ...], np.ndarray] = {}  # line along the axis -> number of groups on each of its links
    for group, way in zip(groups, ways, strict=True):
        if not way:
            continue
        others = np.delete(group, axis, axis=1)
        for line in {tuple(place) for place in others.tolist()}:
            places = group[(others == line).all(axis=1), axis]
            if len(places) == 1:  # chips on a diagonal: what they send goes along both sides of their rectangle
                places = group[:, axis]
            links = crossing.setdefault(line, np.zeros(sides[axis], int))
            links[slice(None) if way == 2 else slice(places.min(), places.max())] += 1
    return max((int(links.max()) for links in crossing.values()), default=1)


def _group_ms(sent: Collective, group: np.ndarray, rate: float, sides: np.ndarray, rings: np.ndarray) -> float:
    """Milliseconds of one group, each of whose chips receives `rate` bytes a millisecond."""
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
