"""How strong a penalty is: `ewc_lambda` as configurations and penalties take it."""

import reprlib


ALLOWED = "positive numbers, 'auto' and multiples of it such as '10xauto'"


def parse_ewc_lambda(ewc_lambda: float | str) -> tuple[float, bool]:
    """
    Returns the factor in `ewc_lambda`, and whether it multiplies the measured curvature (`auto`) in place of the Fisher.

    Args:
        ewc_lambda (`float` or `str`): a positive number, `"auto"` or a multiple of it.

    Raises:
        ValueError: for anything else, saying what is allowed.

    ```python
    >>> parse_ewc_lambda(15_000.0), parse_ewc_lambda("auto"), parse_ewc_lambda("0.1xauto")
    ((15000.0, False), (1.0, True), (0.1, True))
    ```
    """
    # Python takes true for 1.
    factor, automatic = None if isinstance(ewc_lambda, bool) else ewc_lambda, isinstance(ewc_lambda, str)
    if automatic:
        before, cross, after = ewc_lambda.rpartition("x")
        factor = None if after != "auto" else before if cross else 1.0
    try:
        factor = float(factor)
    except (TypeError, ValueError, OverflowError):
        factor = float("nan")
    if not 0 < factor < float("inf"):
        raise ValueError(f"ewc_lambda is {reprlib.repr(ewc_lambda)}; allowed: {ALLOWED}")
    return factor, automatic
