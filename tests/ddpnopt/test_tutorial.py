"""The tutorial's code blocks run as they stand, and say what the text says they do."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from ddpnopt import DDPNOpt
from ddpnopt.layers import modules

TUTORIAL = Path(__file__).parents[2] / "docs" / "tutorial.md"


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", TUTORIAL.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_mnist_in_fifteen_lines(real_data, capsys):
    real_data("mnist")
    code = blocks()[0]
    body = [line for line in code.splitlines() if line and not line.startswith(("import", "from"))]
    assert len(body) <= 15
    exec(compile(code, str(TUTORIAL), "exec"), {})
    accuracy = float(re.search(r"test accuracy ([\d.]+) %", capsys.readouterr().out)[1])
    assert accuracy > 91


@pytest.mark.parametrize(("block", "module"), [(1, nn.Softplus()), (2, nn.LayerNorm(4))])
def test_registering_a_layer(block, module, monkeypatch):
    monkeypatch.setattr(modules, "MAPS", dict(modules.MAPS))
    monkeypatch.setattr(modules, "GENERIC", set(modules.GENERIC))
    model = nn.Sequential(nn.Linear(3, 4), module, nn.Linear(4, 2))
    options: dict[str, Any] = {"lr": 0.1, "terminal_hessian": "gauss_newton"}
    with pytest.raises(ValueError, match=type(module).__name__):
        DDPNOpt(model, **options)
    exec(compile(blocks()[block], str(TUTORIAL), "exec"), {})
    assert DDPNOpt(model, **options).status is None
