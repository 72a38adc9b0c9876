import itertools

import numpy as np
import pytest

from castling_jax.compile_report.chips import CHIPS
from castling_jax.compile_report.dump import Collective
from castling_jax.compile_report.links import link_ms, read_groups

V4, V5E, V5P = CHIPS["v4"], CHIPS["v5e"], CHIPS["v5p"]
MEGABYTE = [("f32", "250000")]


def torus(*sides):
    return [[*place, *(0,) * (3 - len(sides))] for place in itertools.product(*map(range, sides))]


def sent(kind, groups):
    return Collective(kind, MEGABYTE, "", f"%x = f32[250000] {kind}(%y), {groups}, to_apply=%sum")


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}, dimensions={0}", [[0, 1], [2, 3]]),
        ("replica_groups={}, to_apply=%sum", [[0, 1, 2, 3]]),
        ("replica_groups=[2,2]<=[4], use_global", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0), use_global", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}, use_global", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}, use_global", [[0, 1, 2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}, use_global", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(1)2}, use_global", None),
        ("channel_id=1", None),
        ("source_target_pairs={{0,1},{3,2}}, channel_id=1", [[0, 1], [3, 2]]),
    ],
)
def test_groups_are_read_as_the_compiler_writes_them(text, groups):
    assert read_groups(f"%x = f32[8] all-reduce(%y), {text}", 4) == groups


def test_groups_of_three_axes_are_numpys():
    found = read_groups("replica_groups=[4,4]<=[4,2,2]T(2,1,0), use_global_device_ids=true", 16)
    assert found == np.arange(16).reshape(4, 2, 2).transpose(2, 1, 0).reshape(4, 4).tolist()


@pytest.mark.parametrize(
    ("kind", "sides", "chip", "milliseconds"),
    [
        # A megabyte, of which a chip lacks (n - 1) / n, over 50 or 100 GB/s a link.
        ("all-gather", (1, 2), V5E, 1 / 2 / 50),
        ("all-reduce", (1, 2), V5E, 2 * 1 / 2 / 50),
        ("reduce-scatter", (1, 2), V5E, 2 * 1 / 2 / 50),  # its result is half of what it adds up
        ("all-reduce", (4, 4), V5E, 2 * 15 / 16 / 100),  # two lines
        ("all-reduce", (16, 16), V5E, 2 * 255 / 256 / 200),  # two rings
        ("all-reduce", (8, 16), V5E, 2 * 127 / 128 / 150),  # a line and a ring
        ("all-reduce", (4, 4, 4), V5P, 2 * 63 / 64 / 600),  # three rings
        ("all-reduce", (2, 2, 2), V5P, 2 * 7 / 8 / 300),
        ("all-reduce", (2, 2, 4), V5P, 2 * 15 / 16 / 300),  # no whole cube, no ring
        ("all-reduce", (4, 4, 8), V4, 2 * 127 / 128 / 300),
        # Chips along a line of 4 are 1, 2 or 3 links away: 10 / 6 in the mean of all pairs.
        ("all-to-all", (1, 4), V5E, 3 / 4 / 50 * 10 / 6),
    ],
)
def test_links_take_what_a_chip_lacks_over_the_links_it_has(kind, sides, chip, milliseconds):
    assert link_ms(sent(kind, "replica_groups={}"), torus(*sides), chip) == pytest.approx(milliseconds)


def test_only_the_axes_that_a_group_spans_count():
    rows = sent("all-reduce", "replica_groups=[4,4]<=[16]")
    assert link_ms(rows, torus(4, 4), V5E) == pytest.approx(2 * 3 / 4 / 50)
    alone = sent("all-reduce", "replica_groups=[16,1]<=[16]")
    assert link_ms(alone, torus(4, 4), V5E) == 0


@pytest.mark.parametrize(
    ("groups", "links"),
    [
        # A diagonal of a square has two ways of two links; halves of a message take both, so a chip receives over two.
        ("{{0,3}}", 2),
        # Both diagonals: each directed link of the square carries a half of two messages.
        ("{{0,3},{1,2}}", 1),
    ],
)
def test_chips_on_a_diagonal_send_over_the_links_between(groups, links):
    diagonal = sent("all-reduce", f"replica_groups={groups}")
    assert link_ms(diagonal, torus(2, 2), V5E) == pytest.approx(2 * 1 / 2 / (50 * links))


def counted_by_link(groups, side, ring):
    """What the fullest link brings of an all-gather of a megabyte: every shard is walked to all chips of its group.

    On a ring half of it goes either way; what passes a chip is not sent to it again.
    """
    brought = np.zeros((2, side))
    for group in groups:
        for start in group:
            after, before = [chip - start for chip in group], [start - chip for chip in group]
            reach = [max(np.mod(after, side)), max(np.mod(before, side))] if ring else [max(after), max(before)]
            for way, links in enumerate(reach):
                for step in range(links):
                    link = start - step - 1 if way else start + step
                    brought[way, link % side] += 1 / len(group) / (2 if ring else 1)
    return brought.max()


@pytest.mark.parametrize(
    ("groups", "ring"),
    [
        ([[n + 4 * m for m in range(4)] for n in range(4)], True),  # each spread over the whole ring
        ([list(range(n, n + 4)) for n in range(0, 16, 4)], False),  # each a line of neighbours
        ([[n, n + 2, n + 4, n + 6] for n in (0, 1, 8, 9)], False),  # lines, two beside each other
    ],
)
def test_groups_share_the_links_that_they_all_send_over(groups, ring):
    listed = ",".join("{" + ",".join(map(str, group)) + "}" for group in groups)
    gathered = sent("all-gather", "replica_groups={" + listed + "}")
    assert link_ms(gathered, torus(1, 16), V5E) == pytest.approx(counted_by_link(groups, 16, ring) / 50)


@pytest.mark.parametrize("chip", ["v4", "v5e", "v5p"])
def test_a_step_of_deit_b_scales_over_the_pods(chip):
    """From 8 to 256 chips its gradients' time differs by less than 5 % of the least that the products can take."""
    gradients = Collective("all-reduce", [("bf16", "86567656")], "", "%x = all-reduce(%y), replica_groups={}")
    least = 6 * 17.6e9 * 128 / CHIPS[chip].teraflops / 1e9  # forward and backward, of 17.6 G products an image
    pods = [pod for pod in CHIPS[chip].pods if 8 <= np.prod([int(n) for n in pod.split("x")]) <= 256]
    times = [link_ms(gradients, torus(*map(int, pod.split("x"))), CHIPS[chip]) for pod in pods]
    assert len(times) == 6
    assert max(times) - min(times) < 0.05 * least


def test_a_permutation_takes_its_longest_way():
    ring = sent("collective-permute", "source_target_pairs={{0,1},{1,15},{15,0}}")
    assert link_ms(ring, torus(1, 16), V5E) == pytest.approx(2 / 50)
    line = sent("collective-permute", "source_target_pairs={{0,1},{1,7},{7,0}}")
    assert link_ms(line, torus(1, 8), V5E) == pytest.approx(7 / 50)


def test_unknown_groups_have_no_time():
    assert link_ms(sent("all-reduce", "channel_id=1"), torus(4, 4), V5E) is None
