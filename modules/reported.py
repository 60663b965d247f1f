"""What has been reported so far, so that a step without a value does not show an earlier one."""

from __future__ import annotations

import math
from collections.abc import Mapping


class Reported:
    """Fills in NaN for metrics of earlier steps that this one has no value for.

    Nothing was scored, or no row was sampled by the policy: the mean does not exist. Lightning (2.6) would go on giving
    the last value to loggers, to the progress bar and in ``callback_metrics``.
    """

    def __init__(self) -> None:
        self._names: dict[str, None] = {}  # in the order of their first report, which all ranks share

    def filled(self, values: Mapping[str, float]) -> dict[str, float]:
        """The values, and NaN for every name of earlier calls that is not among them."""
        self._names.update(dict.fromkeys(values))
        return {name: values.get(name, math.nan) for name in self._names}
