"""How the Triton kernels divide a tensor into programs."""

import functools
import math
from typing import NamedTuple

import triton

RESIDENT = 8192  # elements of the largest group that is kept in registers
PAIRS = 128  # sums of a group that each program may add up for itself; 32 groups have no more


class Plan(NamedTuple):
    """How one shape is computed.

    Attributes:
        resident: a whole group stays in registers; the fields from ``splits`` on do not matter.
        vec: power of 2 that divides H * W (NCHW only).
        block: channels per program.
        groups: groups per program; 1 also if a program has a part of the channels of a group.
        parts: programs that share the channels of a group.
        lanes: power of 2 >= ``block``; of a resident group, power of 2 >= C / G.
        pixels: power of 2, pixels of a tile.
        warps: warps per program.
        splits, split_iters: programs per channel of the kernels that sum, and their tiles.
        chunks, chunk_iters: the same of the kernels that write y or dx.
    """

    resident: bool
    vec: int
    block: int
    groups: int
    parts: int
    lanes: int
    pixels: int
    warps: int
    splits: int = 1
    split_iters: int = 1
    chunks: int = 1
    chunk_iters: int = 1

    @property
    def pairs(self) -> int:
        """Programs that share a group; each gives a pair of sums."""
        return self.splits * self.parts

    @property
    def reduced(self) -> bool:
        """Whether the pairs of a group are added up once, and not by each program that needs their
        sum: where they are many, and more than 5 % of the (float32) map that it works on."""
        map_part = self.block * self.pixels * self.chunk_iters
        return self.pairs > PAIRS and 20 * 2 * self.pairs * self.groups > map_part

    @property
    def pair_lanes(self) -> int:
        """A power of 2 >= ``pairs``; 32 at least, as each one is another compilation."""
        return max(32, 1 << (self.pairs - 1).bit_length())


@functools.lru_cache(maxsize=4096)
def plan(nhwc: bool, n: int, c: int, g: int, hw: int, processors: int) -> Plan:
    """The plan of a tensor (n, c, H, W) with g groups, H * W = hw, on so many multiprocessors."""
    vec = 1 if nhwc else math.gcd(hw, 16)
    d, pixels = c // g, triton.next_power_of_2(hw)
    dp, gp = triton.next_power_of_2(d), triton.next_power_of_2(g)
    if dp * pixels <= RESIDENT:
        groups = min(gp, max(1, 2048 // (dp * pixels)))
        if nhwc:  # runs of 64 channels are whole cache lines
            groups = min(groups, max(1, 64 // dp))
        warps = _warps(groups * dp * pixels)
        return Plan(True, vec, groups * d, groups, 1, dp, pixels, warps)
    if nhwc:
        # Runs of 64 channels; of 32 where there are few, to have enough programs.
        width = 64 if c > 64 else 32
        if d < width:
            groups = min(gp, 1 << (width // d).bit_length() - 1)
            block = groups * d
        else:
            groups, block = 1, math.gcd(d, width)
        pixels = min(pixels, 4096 // triton.next_power_of_2(block))
        # Each program of the second kernel reads the sums of all splits of its groups.
        most = 512 if groups == 1 else max(128, 2048 // groups)
    else:
        groups, block, most = 1, 1, 512
        pixels = min(pixels, 1024)
    lanes = triton.next_power_of_2(block)
    rows, tiles = n * triton.cdiv(c, block), triton.cdiv(hw, pixels)
    # As many as fit the multiprocessors at a time, or less than twice as many. More are slower on
    # an H200: each has to find its groups, and those of the second kernel read all sums of theirs.
    most = min(tiles, most, max(1, (3 if nhwc else 12) * processors // rows))
    splits = most if nhwc else min(most, triton.cdiv(tiles, 2))
    chunks = most if nhwc else triton.cdiv(tiles, 2)
    split_iters, chunk_iters = triton.cdiv(tiles, splits), triton.cdiv(tiles, chunks)
    return Plan(
        False, vec, block, groups, max(1, d // block), lanes, pixels, _warps(lanes * pixels),
        triton.cdiv(tiles, split_iters), split_iters, triton.cdiv(tiles, chunk_iters), chunk_iters,
    )  # fmt: skip


def _warps(elements: int) -> int:
    """Warps for a tile: 16 elements per thread."""
    return min(16, max(1, elements // 512))
