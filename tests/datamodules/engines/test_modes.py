"""Evaluation mode for a while leaves no trace."""

from __future__ import annotations

import pytest
from torch import nn

from lightning_onpolicy.datamodules.engines.modes import eval_mode


def test_each_module_gets_its_own_mode_back_also_after_an_exception() -> None:
    """Catches: module.train() at the end, which wakes sub-modules that were in eval mode."""
    module = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout(), nn.Dropout()))
    module[1].eval()
    before = [m.training for m in module.modules()]
    assert before == [True, True, False, False, False]
    with eval_mode(module):
        assert not any(m.training for m in module.modules())
    assert [m.training for m in module.modules()] == before
    with pytest.raises(RuntimeError, match="inside"), eval_mode(module):
        raise RuntimeError("inside")
    assert [m.training for m in module.modules()] == before
