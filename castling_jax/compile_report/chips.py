"""The chips of a pod, and the links between them.

All figures but the clocks and the memory come from Google: docs.cloud.google.com/tpu/docs/v4, v5e, v5p and v6e, as they
stood in November 2026. They are for a whole chip, which JAX shows as one device even where it has two cores.

- Links: the published bandwidth of all ports in both directions, divided by the ports and the directions: 400 GB/s and
  4 ports on v5e, 1,200 and 6 on v5p, 800 and 4 on v6e. For v4, 50 GB/s a link and 6 links, from table 4 of Jouppi et
  al., arXiv 2304.01433.
- Memory: what the compiler (libtpu 0.0.42) leaves for a program, as its message says when a program is too large.
- Clocks: the ones at which the matrix units reach Google's peak: 8 units of 128 x 128 on v4 and v5p, 4 on v5e, 4 of
  256 x 256 on v6e. Google writes 2 for v6e. The compiler estimates a large product at 70 % of v6e's peak, and at 88 to
  93 % of the others', so a v6e's milliseconds are the least certain.

A side of a v5e or v6e closes to a ring where it has all 16 chips of the pod's side. The sides of a v4 or v5p close
where all three consist of whole cubes of 4 x 4 x 4 chips.
"""

import dataclasses
import re

from castling_jax.errors import InputError, check_known


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of chip.

    Attributes:
      gigahertz: the clock, which turns the compiler's cycles into time.
      hbm_gibibytes: the memory, in 2^30 bytes.
      hbm_gigabytes_per_second: the memory's bandwidth, in 10^9 bytes.
      teraflops: the peak in bfloat16, in 10^12 operations a second.
      link_gigabytes_per_second: the bandwidth of one link to a neighbour, one way, in 10^9 bytes.
      axes: the number of axes of its torus.
      ring: a side is a ring where its number of chips is a multiple of this; with three axes, only where all sides are.
      pods: the sides of the slices that Google rents out, of growing size up to 256 or 512 chips.
    """

    gigahertz: float
    hbm_gibibytes: float
    hbm_gigabytes_per_second: float
    teraflops: float
    link_gigabytes_per_second: float
    axes: int
    ring: int
    pods: tuple[str, ...]

    @property
    def hbm_gigabytes(self) -> float:
        """The memory, in 10^9 bytes."""
        return self.hbm_gibibytes * 2**30 / 1e9


FLAT = ("2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBES = ("2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
CHIPS = {
    "v4": Chip(1.05, 30.75, 1200, 275, 50, axes=3, ring=4, pods=CUBES),
    "v5e": Chip(1.5, 15.75, 819, 197, 50, axes=2, ring=16, pods=FLAT),
    "v5p": Chip(1.75, 95.74, 2765, 459, 100, axes=3, ring=4, pods=CUBES),
    "v6e": Chip(1.75, 31.25, 1640, 918, 100, axes=2, ring=16, pods=FLAT),
}


def chip_of(topology: str) -> Chip:
    """The kind of chip in a topology such as "v5e:2x2".

    Raises:
      InputError: the chip is unknown, or the topology has another number of sides.
    """
    name, _, sides = topology.partition(":")
    check_known("chip", name, CHIPS)
    chip = CHIPS[name]
    if not re.fullmatch(rf"\d+(x\d+){{{chip.axes - 1}}}", sides):
        raise InputError(f"a topology of {name} has {chip.axes} sides, as {name}:{chip.pods[-1]}, not {topology!r}.")
    return chip
