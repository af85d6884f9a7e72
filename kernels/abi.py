"""What Python and the sources of csrc/ both know by heart: numbers, and sizes of the structs that are packed here.

Every library exports its own; `native.load` refuses one that differs, which is a library of another version.
"""

from .reference import LANES

PIXELS, STRIP, SLACK, ROWS = 128, 64, 64, 8  # of a frozen net: kPixels, kStrip, kSlackElements, kRows

# Words of 8 bytes.
FROZEN_ARGS, FROZEN_LAYER = 2, 3
NET_ARGS, NET_STAGE, NET_FIELD = 18, 25, 11
ROWS_ARGS, ROWS_LAYER = 3, 7
TRAIN_ARGS, TRAIN_LAYER = 13, 7

# Words of 4 bytes.
PLAN_HEADER, TAPS = 18, 10

ALIKE = 4  # rows with the same columns that are multiplied together: kAlike

# The arguments of `ABI` in each source.
TABLE = {
    "chain": (LANES, FROZEN_ARGS, FROZEN_LAYER),
    "net": (PIXELS, STRIP, SLACK, ROWS, NET_ARGS, NET_STAGE, NET_FIELD),
    "plan": (PLAN_HEADER, TAPS, ALIKE),
    "rows": (ROWS_ARGS, ROWS_LAYER),
    "train": (LANES, TRAIN_ARGS, TRAIN_LAYER),
}
