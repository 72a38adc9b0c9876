"""The chips of a pod, and the links between them.

All figures but the clocks are Google's, of a chip with both of its cores where it has two, which JAX shows as one
device: docs.cloud.google.com/tpu/docs/v4, v5e, v5p and v6e, as they stood in November 2026. The links' are the
published bandwidth of all ports in both directions, divided by the ports and the directions: 400 GB/s and 4 ports on
v5e, 1,200 and 6 on v5p, 800 and 4 on v6e; of v4, 50 GB/s a link and 6 links, from table 4 of Jouppi et al., arXiv
2304.01433.

A side of a v5e or v6e is closed to a ring where all 16 chips of the pod's side are in it; one of a v4 or v5p where it
is made of whole cubes of 4 x 4 x 4 chips.
"""

import dataclasses

from castling_jax.ops.errors import check_known


@dataclasses.dataclass(frozen=True)
class Chip:
    """A chip.

    Attributes:
      gigahertz: its clock, by which the compiler's cycles are time.
      hbm_gigabytes: its memory.
      hbm_gigabytes_per_second: the memory's bandwidth.
      teraflops: operations in bfloat16 at most, a second.
      link_gigabytes_per_second: of one link to a neighbour, one way.
      ring: sides of a multiple of so many chips are rings.
      pods: topologies of growing size, as many as Google rents out as one slice up to 256 or 512 chips.
    """

    gigahertz: float
    hbm_gigabytes: float
    hbm_gigabytes_per_second: float
    teraflops: float
    link_gigabytes_per_second: float
    ring: int
    pods: tuple[str, ...]


FLAT = ("2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBES = ("2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
CHIPS = {
    "v4": Chip(1.05, 32, 1228, 275, 50, ring=4, pods=CUBES),
    "v5e": Chip(1.5, 16, 819, 197, 50, ring=16, pods=FLAT),
    "v5p": Chip(1.75, 95, 2765, 459, 100, ring=4, pods=CUBES),
    "v6e": Chip(1.75, 32, 1640, 918, 100, ring=16, pods=FLAT),
}


def chip_of(topology: str) -> Chip:
    """The chip that a topology such as "v5e:2x2" is made of.

    Raises:
      InputError: it is unknown.
    """
    name = topology.split(":")[0]
    check_known("chip", name, CHIPS)
    return CHIPS[name]
