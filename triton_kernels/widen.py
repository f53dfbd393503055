"""int8 codes as 16-bit floats, exactly."""

import triton
import triton.language as tl


@triton.jit
def widen(codes, dtype: tl.constexpr):
    """``codes`` int8 as ``dtype``, exactly: both 16-bit formats hold every integer up to 256.

    bfloat16 is the upper half of a float32, and the lower half is 0 for a code. Written as a shift, CDNA needs 1.5
    instructions per code. Written as a conversion, the compiler adds rounding and needs four.
    """
    if dtype == tl.bfloat16:
        bits = codes.to(tl.float32).to(tl.int32, bitcast=True) >> 16
        widened = bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        widened = codes.to(dtype)
    return widened
