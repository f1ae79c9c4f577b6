"""The programs of :mod:`~anomalib_sgfr.core.gpu`, in Triton: what each computes is said there."""

import triton
from triton import language as tl


@triton.jit
def _offset(points_ptr, centre_ptr, point, inside, value, value_stride, width):
    """Some values of each point, from the bank's centre."""
    x = tl.load(
        points_ptr + point[:, None] + value[None, :] * value_stride,
        mask=inside[:, None] & (value < width)[None, :],
        other=0.0,
    ).to(tl.float32)
    return x - tl.load(centre_ptr + value, mask=value < width, other=0.0)[None, :]


# One compilation for all banks and images, or two: nothing is made for one number of values, atoms
# or patches.
@triton.jit(
    do_not_specialize=[
        "number",
        "of_image",
        "bank_size",
        "members",
        "width",
        "image_stride",
        "value_stride",
    ]
)
def affine_lengths(
    points_ptr,
    columns_ptr,
    rows_ptr,
    centre_ptr,
    residual_scale_ptr,
    found_ptr,
    number,
    of_image,
    bank_size,
    members,
    width,
    image_stride,
    value_stride,
    place_stride,
    regularisation,
    K: tl.constexpr,
    POINTS: tl.constexpr,
    GROUPS: tl.constexpr,
    CANDIDATES: tl.constexpr,
    SUPPORT: tl.constexpr,
    STEP: tl.constexpr,
    SHORT: tl.constexpr,
):
    row = tl.program_id(0) * POINTS + tl.arange(0, POINTS)
    inside = row < number
    point = (row // of_image).to(tl.int64) * image_stride + (row % of_image).to(
        tl.int64
    ) * place_stride

    # The least squared distance of each group, less the point's own length, which orders nothing.
    group = tl.arange(0, GROUPS)
    step = tl.arange(0, STEP)
    least = tl.full((POINTS, GROUPS), float("inf"), tl.float32)
    for member in range(members):
        atom = member * GROUPS + group
        product = tl.zeros((POINTS, GROUPS), tl.float32)
        for start in range(0, width, STEP):
            value = start + step
            x = _offset(points_ptr, centre_ptr, point, inside, value, value_stride, width)
            x = tl.where(tl.abs(x) < float("inf"), x, 0.0)  # nothing is nearest to NaN
            b = tl.load(
                columns_ptr + value[:, None] * (members * GROUPS) + atom[None, :],
                mask=(value < width)[:, None],
                other=0.0,
            )
            product = tl.dot(x, b, product, input_precision="tf32x3")
        length = tl.load(columns_ptr + width * (members * GROUPS) + atom)
        length = tl.where(atom < bank_size, length, float("inf"))
        least = tl.minimum(least, length[None, :] - 2.0 * product)

    # All members of the best groups, of which the nearest are among them.
    slot = tl.arange(0, CANDIDATES)
    candidate = tl.zeros((POINTS, CANDIDATES), tl.int32)
    for place in tl.static_range(K + 1):
        best = tl.argmin(least, 1)
        least = tl.where(group[None, :] == best[:, None], float("inf"), least)
        member = slot - place * members
        belongs = (member >= 0) & (member < members)
        candidate = tl.where(belongs[None, :], best[:, None] + member[None, :] * GROUPS, candidate)
    real = (slot < (K + 1) * members)[None, :] & (candidate < bank_size)
    candidate = tl.where(real, candidate, 0)
    distance = tl.zeros((POINTS, CANDIDATES), tl.float32)
    short = tl.arange(0, SHORT)
    for start in range(0, width, SHORT):
        value = start + short
        x = _offset(points_ptr, centre_ptr, point, inside, value, value_stride, width)
        x = tl.where(tl.abs(x) < float("inf"), x, 0.0)
        b = tl.load(
            rows_ptr + candidate[:, :, None] * (width + 1) + value[None, None, :],
            mask=(value < width)[None, None, :],
            other=0.0,
        )
        apart = b - x[:, None, :]
        distance += tl.sum(apart * apart, 2)
    distance = tl.where(real, distance, float("inf"))

    # The support and the next atom, the nearest first.
    order = tl.arange(0, SUPPORT)
    support = tl.zeros((POINTS, SUPPORT), tl.int32)
    for place in tl.static_range(K + 1):
        best = tl.argmin(distance, 1)
        chosen = slot[None, :] == best[:, None]
        atom = tl.sum(tl.where(chosen, candidate, 0), 1)
        distance = tl.where(chosen, float("inf"), distance)
        support = tl.where((order == place)[None, :], atom[:, None], support)

    # Products of the offsets to them.
    gram = tl.zeros((POINTS, SUPPORT, SUPPORT), tl.float32)
    few = tl.arange(0, 8)
    for start in range(0, width, 8):
        value = start + few
        x = _offset(points_ptr, centre_ptr, point, inside, value, value_stride, width)
        b = tl.load(
            rows_ptr + support[:, :, None] * (width + 1) + value[None, None, :],
            mask=(value < width)[None, None, :],
            other=0.0,
        )
        offset = b - x[:, None, :]
        gram += tl.sum(offset[:, :, None, :] * offset[:, None, :, :], 3)

    # The code and the length, as length_of_products has them.
    across = order[None, :, None] == order[None, None, :]
    squared = tl.sum(tl.where(across, gram, 0.0), 2)  # (POINTS, SUPPORT)
    within = (order < K)[None, :]
    tiny = 1.1754943508222875e-38
    scale = tl.maximum(tl.sum(tl.where(within, squared, 0.0), 1) / K, tiny)
    following = tl.sum(tl.where((order == K)[None, :], squared, 0.0), 1)
    first = tl.sum(tl.where((order == 0)[None, :], squared, 0.0), 1)
    least_gap = 1e-6 * following + tiny
    gap = tl.maximum(following[:, None] - squared, least_gap[:, None])
    first_gap = tl.maximum(following - first, least_gap)
    penalty = regularisation * tl.maximum(first_gap[:, None] / gap, 0.5)
    both = (order < K)[None, :, None] & (order < K)[None, None, :]
    gram = tl.where(both, gram / scale[:, None, None], 0.0)
    work = gram + tl.where(across, tl.where(within, penalty, 1.0)[:, :, None], 0.0)
    code = tl.where(within, 1.0, 0.0) + tl.zeros((POINTS, SUPPORT), tl.float32)
    for place in tl.static_range(K):  # Gauss-Jordan; no pivot is smaller than the penalty
        here = order == place
        line = tl.sum(tl.where(here[None, :, None], work, 0.0), 1)  # (POINTS, SUPPORT)
        pivot = tl.sum(tl.where(here[None, :], line, 0.0), 1)
        share = tl.sum(tl.where(here[None, :], code, 0.0), 1) / pivot
        line = line / pivot[:, None]
        column = tl.sum(tl.where(here[None, None, :], work, 0.0), 2) - tl.where(
            here[None, :], 1.0, 0.0
        )
        work -= column[:, :, None] * line[:, None, :]
        code -= column * share[:, None]
    code = code / tl.sum(code, 1)[:, None]
    length = tl.sum(code * tl.sum(gram * code[:, None, :], 2), 1)
    length = tl.sqrt(tl.maximum(length, 0.0) * scale)
    # of a point that is not finite, neither is the first offset
    length = tl.where(first < float("inf"), length, float("nan"))
    tl.store(found_ptr + row, length / tl.load(residual_scale_ptr), mask=inside)


@triton.jit(do_not_specialize=["number", "most"])
def farthest_points(
    left_ptr,
    mutual_ptr,
    same_ptr,
    outside_ptr,
    taken_ptr,
    number,
    most,
    tolerated,
    SIZE: tl.constexpr,
):
    place = tl.arange(0, SIZE)
    inside = place < number
    left = tl.load(left_ptr + place, mask=inside, other=float("-inf"))
    same = tl.load(same_ptr + place, mask=inside, other=0.0)
    outside = tl.load(outside_ptr)
    taken = 0
    going = 1
    while going > 0:
        farthest, pick = tl.max(left, 0, return_indices=True)
        go_on = (taken == 0) | ((farthest >= outside) & (farthest > tolerated))
        going = tl.where(go_on & (taken < most), 1, 0)
        if going > 0:
            tl.store(taken_ptr + taken, pick.to(tl.int64))
            left = tl.minimum(
                left, tl.load(mutual_ptr + pick * number + place, mask=inside, other=float("-inf"))
            )
            left = tl.where((place == pick) | (left <= same), float("-inf"), left)
            taken += 1


@triton.jit(do_not_specialize=["number", "size", "first", "width"])
def staged_nearest(
    points_ptr,
    columns_ptr,
    atoms_ptr,
    centre_ptr,
    index_ptr,
    least_ptr,
    number,
    size,
    columns,
    first,
    limit,
    width,
    ROWS: tl.constexpr,
    ATOMS: tl.constexpr,
    STEP: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < number
    point = row.to(tl.int64) * width
    place = tl.arange(0, ATOMS)
    step = tl.arange(0, STEP)
    nearest = tl.zeros((ROWS,), tl.int32)
    least = tl.full((ROWS,), float("inf"), tl.float32)
    looking = inside.to(tl.int32)
    start = 0
    end = tl.minimum(first, size)
    while (start < size) & (tl.max(looking, 0) > 0):
        # of the atoms of each place in a block: which block's is the nearest, by products
        shortest = tl.full((ROWS, ATOMS), float("inf"), tl.float32)
        where = tl.zeros((ROWS, ATOMS), tl.int32) + start
        for block in range(start, end, ATOMS):
            atom = block + place
            product = tl.zeros((ROWS, ATOMS), tl.float32)
            for begin in range(0, width, STEP):
                value = begin + step
                x = _offset(points_ptr, centre_ptr, point, inside, value, 1, width)
                b = tl.load(
                    columns_ptr + value[:, None] * columns + atom[None, :],
                    mask=(value < width)[:, None] & (atom < end)[None, :],
                    other=0.0,
                )
                product = tl.dot(x, b, product, input_precision="tf32x3")
            length = tl.load(
                columns_ptr + width * columns + atom, mask=atom < end, other=float("inf")
            )
            squared = length[None, :] - 2.0 * product
            where = tl.where(squared < shortest, block, where)
            shortest = tl.minimum(squared, shortest)
        slot = tl.argmin(shortest, 1)
        here = tl.sum(tl.where(place[None, :] == slot[:, None], where, 0), 1) + slot
        # how far it is, without the rounding of products
        apart = tl.zeros((ROWS,), tl.float32)
        for begin in range(0, width, STEP):
            value = begin + step
            x = tl.load(
                points_ptr + point[:, None] + value[None, :],
                mask=inside[:, None] & (value < width)[None, :],
                other=0.0,
            )
            b = tl.load(
                atoms_ptr + here[:, None].to(tl.int64) * width + value[None, :],
                mask=(value < width)[None, :],
                other=0.0,
            )
            apart += tl.sum((x - b) * (x - b), 1)
        nearest = tl.where(looking > 0, here, nearest)
        least = tl.where(looking > 0, tl.minimum(least, apart), least)
        looking = tl.where(apart <= limit, 0, looking)
        start = end
        end = tl.minimum(2 * end, size)
    tl.store(index_ptr + row, nearest.to(tl.int64), mask=inside)
    tl.store(least_ptr + row, least, mask=inside)


@triton.jit(do_not_specialize=["number"])
def separated_points(mutual_ptr, kept_ptr, number, nearest, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    inside = place < number
    alive = inside.to(tl.int32)
    for row in range(number):
        if tl.sum(tl.where(place == row, alive, 0), 0) > 0:
            close = (
                tl.load(mutual_ptr + row * number + place, mask=inside, other=float("inf"))
                <= nearest
            )
            alive = tl.where(close & (place > row), 0, alive)
    tl.store(kept_ptr + place, alive.to(tl.int8), mask=inside)


@triton.jit
def _weighted_row(row_ptr, inside, column, width, column_stride):
    """1, 4, 6, 4, 1 of five neighbours; beyond the border there are zeros."""
    total = tl.load(row_ptr + column * column_stride, mask=inside, other=0.0).to(tl.float32) * 6.0
    for apart in tl.static_range(1, 3):
        left = tl.load(
            row_ptr + (column - apart) * column_stride, mask=inside & (column >= apart), other=0.0
        )
        right = tl.load(
            row_ptr + (column + apart) * column_stride,
            mask=inside & (column + apart < width),
            other=0.0,
        )
        total += (left.to(tl.float32) + right.to(tl.float32)) * (4.0 if apart == 1 else 1.0)
    return total


@triton.jit(
    do_not_specialize=[
        "blocks",
        "channels",
        "height",
        "width",
        "image_stride",
        "channel_stride",
        "row_stride",
    ]
)
def binomial(
    feature_ptr,
    found_ptr,
    blocks,
    channels,
    height,
    width,
    image_stride,
    channel_stride,
    row_stride,
    column_stride,
    PLACES: tl.constexpr,
):
    plane = tl.program_id(0) // blocks
    place = (tl.program_id(0) % blocks) * PLACES + tl.arange(0, PLACES)
    row = place // width
    column = place % width
    inside = row < height
    image = (plane // channels).to(tl.int64) * image_stride
    row_ptr = (
        feature_ptr + image + (plane % channels).to(tl.int64) * channel_stride + row * row_stride
    )
    total = _weighted_row(row_ptr, inside, column, width, column_stride) * 6.0
    for apart in tl.static_range(1, 3):
        above = _weighted_row(
            row_ptr - apart * row_stride, inside & (row >= apart), column, width, column_stride
        )
        beneath = _weighted_row(
            row_ptr + apart * row_stride,
            inside & (row + apart < height),
            column,
            width,
            column_stride,
        )
        total += (above + beneath) * (4.0 if apart == 1 else 1.0)
    found = found_ptr + plane.to(tl.int64) * height * width + place
    tl.store(found, total / 256.0, mask=inside)
