"""The shape of a matrix product's tiles, as the table of measured choices names it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """Rows, columns and depth of a tile; warps; pipeline stages; into how many column parts the
    result is stored; rows of tiles walked together for the cache's sake; persistent programs per
    multiprocessor; programs of a cluster, side by side, that share what they read of the rows."""

    m: int = 128
    n: int = 256
    k: int = 128
    warps: int = 8
    stages: int = 3
    parts: int = 1
    group: int = 8
    per_sm: int = 1
    cluster: int = 1
