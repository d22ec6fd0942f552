"""8-bit floats from the definition of their formats, in exact integer and float64 arithmetic.

The oracle for everything that rounds to FP8: no library's conversion is used, so that libraries can be judged by it.
Formats: "FP8 Formats for Deep Learning" (Micikevicius et al. 2022) and the OCP 8-bit floating point specification
(OFP8, revision 1.0, 2023).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moec.ir.types import DType


@dataclass(frozen=True)
class Float8:
    """A sign, `exponent` bits and `mantissa` bits, bias 2^(exponent − 1) − 1.

    `infinities`: the largest exponent holds ±∞ and NaN, as in IEEE 754; without, it holds ordinary numbers, but for
    the code of all ones, which is the only NaN.
    """

    name: str
    exponent: int
    mantissa: int
    infinities: bool

    @property
    def bias(self) -> int:
        return 2 ** (self.exponent - 1) - 1

    @property
    def largest_code(self) -> int:
        """Code of the largest finite number; codes of non-negative numbers are in the order of their values."""
        return (((2**self.exponent - 1) << self.mantissa) - 1) if self.infinities else 0x7E

    @property
    def nan_code(self) -> int:
        return 0x7F

    @property
    def infinity_code(self) -> int | None:
        return self.largest_code + 1 if self.infinities else None

    @property
    def largest(self) -> float:
        return float(self.decode(torch.tensor(self.largest_code, dtype=torch.uint8)))

    @property
    def smallest(self) -> float:
        """The smallest positive number, a subnormal, and the step between subnormals."""
        return 2.0 ** (1 - self.bias - self.mantissa)

    @property
    def overflow(self) -> float:
        """The midpoint between the largest number and the one that would follow: from here on numbers overflow or
        saturate."""
        step = 2.0 ** ((self.largest_code >> self.mantissa) - self.bias - self.mantissa)
        return self.largest + step / 2

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """The numbers of codes uint8[...], as float64."""
        magnitude = codes.to(torch.int64) & 0x7F
        exponent, fraction = magnitude >> self.mantissa, magnitude & (2**self.mantissa - 1)
        significand = torch.where(exponent == 0, fraction, fraction + 2**self.mantissa)
        power = exponent.clamp(min=1) - self.bias - self.mantissa
        value = torch.ldexp(significand.to(torch.float64), power)
        value = torch.where(magnitude > self.largest_code, torch.nan, value)
        if self.infinity_code is not None:
            value = torch.where(magnitude == self.infinity_code, torch.inf, value)
        return torch.where(codes.to(torch.int64) >= 0x80, -value, value)

    def encode(self, x: torch.Tensor, *, saturate: bool) -> torch.Tensor:
        """The codes uint8[...] nearest to floats x, ties to the even code.

        What rounds beyond the largest number, infinities included, becomes that number with `saturate`, otherwise an
        infinity, or NaN where the format has none. NaN stays NaN and zeros keep their sign.
        """
        wide = x.to(torch.float64)  # every float dtype is exact in float64
        size = wide.abs().nan_to_num(0.0, 0.0, 0.0)
        least = 1 - self.bias
        power = (torch.frexp(size).exponent.to(torch.int64) - 1).clamp(min=least)
        steps = torch.ldexp(size, self.mantissa - power)  # exact: a power of two
        steps = torch.where(size == 0, 0.0, steps).round().to(torch.int64)  # round() takes halves to even
        codes = ((power - least) << self.mantissa) + steps  # 2^(mantissa + 1) steps carry into the next exponent
        codes = torch.where(size == 0, 0, codes)
        beyond = (codes > self.largest_code) | wide.isinf()
        past = self.infinity_code if self.infinity_code is not None else self.nan_code
        codes = torch.where(beyond, self.largest_code if saturate else past, codes)
        codes = torch.where(wide.isnan(), self.nan_code, codes)
        return (codes | torch.where(wide.signbit(), 0x80, 0)).to(torch.uint8)


E4M3FN = Float8("E4M3FN", exponent=4, mantissa=3, infinities=False)
E5M2 = Float8("E5M2", exponent=5, mantissa=2, infinities=True)

FORMATS = {DType.F8E4M3: E4M3FN, DType.F8E5M2: E5M2}


def codes_of(x: torch.Tensor) -> torch.Tensor:
    """The codes uint8[...] of an FP8 tensor."""
    return x.contiguous().view(torch.uint8)


def quantize_exactly(x: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """What `quant.quantize` has to give, block by block: x [..., R, C] → E4M3 codes uint8[..., R, C], scales
    f32[..., ⌈R/rows⌉, ⌈C/columns⌉].

    scale = amax / 448 rounded to float32 (1 where that is zero, NaN where the block holds one); code = the quotient
    x / scale rounded to float32, then to E4M3, saturating.
    """
    (rows, columns), (*lead, r, c) = block, x.shape
    wide = x.to(torch.float64).reshape(-1, r, c)
    codes = torch.zeros(wide.shape, dtype=torch.uint8)
    scales = torch.ones(len(wide), -(-r // rows), -(-c // columns), dtype=torch.float32)
    for m in range(len(wide)):
        for i in range(scales.shape[1]):
            for j in range(scales.shape[2]):
                at = m, slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
                part = wide[at]
                # float64 holds both quotients to more than twice float32's digits: rounding twice changes nothing
                ratio = (part.abs().max() / E4M3FN.largest).to(torch.float32)
                scale = torch.nan if bool(part.isnan().any()) else float(ratio) or 1.0
                codes[at] = E4M3FN.encode((part / scale).to(torch.float32), saturate=True)
                scales[m, i, j] = scale
    return codes.reshape(x.shape), scales.reshape(*lead, *scales.shape[1:])
