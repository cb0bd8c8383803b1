"""Sums of products with packed words, as functions of kernels: one row of x on ordinary lanes, several on tensor cores.

A code becomes a float by taking a place in the mantissa of 2^23 (`magic`, those bits, comes as an argument: a constant would cost an
instruction a code). On lanes the zero is taken off a whole tile at once; for tensor cores q − z is made, which every float type holds
exactly, and the scale multiplies the sum of a group. Knows nothing of how a product is cut.
"""

from train.kernels.runtime import tl, triton

if triton is not None:

    @triton.jit
    def zero_and_scale(qzeros, scales, g, n, inside, columns, zero_words, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
        """Zeros and scales float32 of the groups g at the columns n, in the shape of their sum."""
        PER: tl.constexpr = 32 // BITS
        MASK: tl.constexpr = (1 << BITS) - 1
        stored = tl.load(qzeros + g * zero_words + n // PER, mask=inside, other=0) >> ((n % PER) * BITS)
        scale = tl.load(scales + g * columns + n, mask=inside, other=0.0).to(tl.float32)
        return (((stored & MASK) + 1) & MASK).to(tl.float32), scale

    @triton.jit
    def one_row(  # type: ignore[no-untyped-def]
        x, qweight, qzeros, scales, perm, first, last, n, inside, rows, columns, zero_words, group, magic,
        BITS: tl.constexpr, WORDS: tl.constexpr, TN: tl.constexpr, PERM: tl.constexpr, ONE_GROUP: tl.constexpr,
        STAGES: tl.constexpr,
    ):  # fmt: skip
        """x [K] @ W[:, n] over the tiles first … last: [1, TN] float32, on ordinary lanes."""
        PER: tl.constexpr = 32 // BITS
        MASK: tl.constexpr = (1 << BITS) - 1
        LOW: tl.constexpr = 23 // BITS  # codes of a word that lie within a mantissa where they are
        acc = tl.zeros((WORDS, TN), tl.float32)
        for tile in tl.range(first, last, num_stages=STAGES):
            word = tile * WORDS + tl.arange(0, WORDS)
            there = word * PER < rows
            place = qweight + word[:, None].to(tl.int64) * columns + n[None]
            packed = tl.load(place, mask=there[:, None] & inside[None], other=0)
            part = tl.zeros((WORDS, TN), tl.float32)
            total = tl.zeros((WORDS,), tl.float32)
            for j in tl.static_range(PER):
                k = word * PER + j
                if PERM:
                    k = tl.load(perm + k, mask=there, other=0)
                xj = tl.load(x + k, mask=there, other=0.0).to(tl.float32)
                total += xj
                if j < LOW:
                    code = (packed & (MASK << (BITS * j))) | magic  # 2^23 + q · 2^(BITS·j)
                    xj = xj * (1.0 / (1 << (BITS * j)))
                else:
                    code = ((packed >> (BITS * LOW)) & (MASK << (BITS * (j - LOW)))) | magic
                    xj = xj * (1.0 / (1 << (BITS * (j - LOW))))
                part += xj[:, None] * (code.to(tl.float32, bitcast=True) - 8388608.0)
            if ONE_GROUP:
                zero, scale = zero_and_scale(
                    qzeros, scales, tile * WORDS * PER // group, n, inside, columns, zero_words, BITS
                )
                acc += (part - total[:, None] * zero[None]) * scale[None]
            else:
                g = (word * PER // group)[:, None]
                zero, scale = zero_and_scale(
                    qzeros, scales, g, n[None], there[:, None] & inside[None], columns, zero_words, BITS
                )
                acc += (part - total[:, None] * zero) * scale
        return tl.sum(acc, axis=0)[None]

    @triton.jit
    def less_zero(packed, zero, magic, J: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
        """Code J of each word less its zero, exactly: one step of bits, one of floats."""
        LOW: tl.constexpr = 23 // BITS  # codes of a word that lie within a mantissa where they are
        PLACE: tl.constexpr = BITS * (J % LOW)
        MASK: tl.constexpr = ((1 << BITS) - 1) << PLACE
        word = packed >> (BITS * LOW * (J // LOW))
        code = (word & MASK) | magic  # 2^23 + q · 2^PLACE
        return (code.to(tl.float32, bitcast=True) * (1.0 / (1 << PLACE)) - (zero + (8388608 >> PLACE))).to(DTYPE)

    @triton.jit
    def codes(packed, zero, magic, BITS: tl.constexpr, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
        """packed [N, words] -> q − z [N, words · codes], those of a word side by side in one thread."""
        tl.static_assert(BITS == 4 or BITS == 8)
        N: tl.constexpr = packed.shape[0]
        WORDS: tl.constexpr = packed.shape[1]
        if BITS == 4:
            even = tl.join(
                tl.join(less_zero(packed, zero, magic, 0, 4, DTYPE), less_zero(packed, zero, magic, 4, 4, DTYPE)),
                tl.join(less_zero(packed, zero, magic, 2, 4, DTYPE), less_zero(packed, zero, magic, 6, 4, DTYPE)),
            )
            odd = tl.join(
                tl.join(less_zero(packed, zero, magic, 1, 4, DTYPE), less_zero(packed, zero, magic, 5, 4, DTYPE)),
                tl.join(less_zero(packed, zero, magic, 3, 4, DTYPE), less_zero(packed, zero, magic, 7, 4, DTYPE)),
            )
        else:
            even = tl.join(less_zero(packed, zero, magic, 0, 8, DTYPE), less_zero(packed, zero, magic, 2, 8, DTYPE))
            odd = tl.join(less_zero(packed, zero, magic, 1, 8, DTYPE), less_zero(packed, zero, magic, 3, 8, DTYPE))
        return tl.reshape(tl.join(even, odd), (N, WORDS * (32 // BITS)))

    @triton.jit
    def many_rows(  # type: ignore[no-untyped-def]
        x, qweight, qzeros, scales, perm, first, last, m, many, n, inside, rows, columns, zero_words, group, magic,
        BITS: tl.constexpr, WORDS: tl.constexpr, TM: tl.constexpr, TN: tl.constexpr, PERM: tl.constexpr,
        ONE_GROUP: tl.constexpr, STAGES: tl.constexpr,
    ):  # fmt: skip
        """x[m] @ W[:, n] over the tiles first … last: [TM, TN] float32, on tensor cores."""
        PER: tl.constexpr = 32 // BITS
        DEEP: tl.constexpr = WORDS * PER
        DTYPE: tl.constexpr = x.dtype.element_ty
        acc = tl.zeros((TM, TN), tl.float32)
        for tile in tl.range(first, last, num_stages=STAGES):
            word = tile * WORDS + tl.arange(0, WORDS)
            there = inside[:, None] & (word * PER < rows)[None]
            packed = tl.load(qweight + word[None].to(tl.int64) * columns + n[:, None], mask=there, other=0)
            k = tile * DEEP + tl.arange(0, DEEP)
            inner = k < rows
            at = tl.load(perm + k, mask=inner, other=0) if PERM else k
            xs = tl.load(x + m[:, None] * rows + at[None], mask=(m < many)[:, None] & inner[None], other=0.0)
            if ONE_GROUP:
                zero, scale = zero_and_scale(qzeros, scales, tile * DEEP // group, n, inside, columns, zero_words, BITS)
                whole = codes(packed, zero[:, None], magic, BITS, DTYPE)
                acc += tl.dot(xs, tl.trans(whole), input_precision="ieee") * scale[None]
            else:
                zero, scale = zero_and_scale(
                    qzeros, scales, (word * PER // group)[None], n[:, None], there, columns, zero_words, BITS
                )
                steps = tl.reshape(tl.broadcast_to(scale[:, :, None], (TN, WORDS, PER)), (TN, DEEP))
                weight = (codes(packed, zero, magic, BITS, tl.float32) * steps).to(DTYPE)
                acc += tl.dot(xs, tl.trans(weight), input_precision="ieee")
        return acc
