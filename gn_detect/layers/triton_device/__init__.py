"""The device code of ``triton_kernels.py``, which says what it computes and how.

Two kernels for the forward pass and two for the backward pass of groups that many programs share,
and one for each where a program holds whole groups in registers ("resident"). A program of the
shared kind has tiles of P pixels x CB channels, of which it uses ``block``: GB whole groups, or
part of one where GB = 1 (NCHW: one channel). S programs share the pixels of these channels, each
doing ``iters`` tiles, and R programs share a group; R = 1 where the sums of many are added up
between the two kernels.

H * W is passed as ``HWV * VEC``: only a constant factor tells the compiler that rows of, say, 4200
elements may be read 8 at a time (of an argument it knows divisibility by 16 alone).

Of a padded batch, ``extents`` (N, 2) int32 has the rows and columns of each map that belong to its
image. The rest is not counted, not read but where an access of VEC pixels has both, and written as
0. Without extents all is image, W is None, and a kernel is compiled as if there was no padding.

Names: C channels, G groups, D = C / G; x, y (N, C, H, W); weight (gamma) and bias (beta) (C,);
mean, rstd (N, G) float32; residual, dy, dx, dz shaped like x. weight, bias, residual may be None, y
is None where the mask of the ReLU is found from x. Arithmetic is float32, whatever the tensors are.
"""

from .resident_kernels import resident, resident_gradient
from .split_kernels import apply, gradient, gradient_sums, statistics

__all__ = ["apply", "gradient", "gradient_sums", "resident", "resident_gradient", "statistics"]
