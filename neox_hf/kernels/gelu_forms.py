"""The numbers in GELU, as every kernel of it computes them in half precision."""

ERF_TAIL = (
    0.12028085440397263,
    0.11148140579462051,
    0.15323717892169952,
    -0.03376013785600662,
    0.23074929416179657,
    -0.08198929578065872,
)
"""Phi(-|z|) = exp(-z^2 / 2) t p(t), t = 1 / (1 + 0.3 |z|), by the coefficients of p, the constant one first.

Right to 1.4e-6 of itself for |z| < 4.5 and to 5e-5 in the tail beyond. Form: Abramowitz and Stegun, 7.1.26;
coefficients: fitted.
"""

ERF_STRETCH = 0.3

BELL = -0.7213475204444817
"""exp(-z^2 / 2) = 2^(BELL z^2)"""

BELL_AT_ZERO = 0.3989422804014327
"""The density of the normal distribution at 0."""

TANH_ARGUMENT = (-2.302208198144325, -0.10294324022285356)
"""exp(-2 |u|) = 2^(|z| (a + b z^2)), u the argument of the tanh form."""

TANH_SLOPE = (1.5957691216057308, 0.2140644488365519)
"""d 2u / dz = a + b z^2"""
