"""What the documents point to is there, and what they show is what the code says."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import get_args

import pytest
from pydantic.fields import FieldInfo

from ddpnopt import config
from service.config import Settings
from service.paper.presets import PRESETS
from service.sweeps.documents import parse_spec, parse_yaml
from service.sweeps.expand import plan
from service.sweeps.spec import FeedbackSpec, ModelSpec, SweepSpec, TrainingSpec

ROOT = Path(__file__).parent.parent
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("deploy/*.md")]
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_make_targets_run_what_is_there() -> None:
    text = (ROOT / "Makefile").read_text()
    for module in re.findall(r"-m ((?:benchmarks|service)[\w.]*)", text):
        assert (ROOT / (module.replace(".", "/") + ".py")).exists(), module
    for script in re.findall(r"python (examples/\S+\.py)", text):
        assert (ROOT / script).exists()
    for target in re.findall(r"`?make ([\w-]+)`?", README):
        assert re.search(rf"^{target}:", text, re.MULTILINE), target


def test_the_readmes_spec_is_the_example() -> None:
    (block,) = [b for b in re.findall(r"```yaml\n(.*?)```", README, re.DOTALL) if "grids:" in b]
    shown = parse_spec(parse_yaml(block.encode()))
    example = parse_spec(parse_yaml((ROOT / "examples" / "digits-fig4a-sgd.yaml").read_bytes()))
    assert shown == example
    answer = f'"packs":{len(plan(shown).packs)}'
    assert f'{answer},"run_steps":300000,"estimated_seconds":{plan(shown).seconds:.1f}' in README


def table(heading: str) -> dict[str, list[str]]:
    """Return a table's rows by what stands in backticks first: the other columns."""
    text = README.split(heading, 1)[1].split("\n\n", 1)[0]
    # A bar that belongs to the words is escaped.
    lines = [re.split(r"(?<!\\)\|", line.strip("|")) for line in text.splitlines()[2:]]
    return {cells[0].strip(" `"): [cell.strip() for cell in cells[1:]] for cells in lines}


def rows(heading: str) -> list[str]:
    return list(table(heading))


def written(default: object) -> str:
    return f"`{default}`"


def test_the_keys_of_the_model_are_all_told() -> None:
    told = table("| key of `model` |")
    assert list(told) == list(ModelSpec.model_fields)
    for name, field in ModelSpec.model_fields.items():
        assert told[name][0] == ("" if field.is_required() else written(field.get_default()))
    for activation in get_args(config.Activation):
        assert f"`{activation}`" in told["activation"][1]
    for kind in get_args(config.ModelKind):
        assert f"`{kind}`" in told["kind"][1]


def test_the_keys_of_the_training_are_all_told() -> None:
    assert rows("| key of `training` |") == list(TrainingSpec.model_fields)


def test_the_losses_are_all_told() -> None:
    (words,) = re.findall(r"^The loss is .*?\n\n", README, re.MULTILINE | re.DOTALL)
    assert tuple(re.findall(r"`(\w+)`", words)) == get_args(config.Loss)


def test_the_options_of_the_baselines_are_all_told() -> None:
    """Names, defaults and whose they are, in the order in which the numerics declare them."""
    told = table("| option of the baseline |")
    baselines = get_args(config.Baseline)
    options = {name for baseline in baselines for name in config.OPTIONS_OF[baseline]}
    assert list(told) == [f.name for f in fields(config.BaselineOptions) if f.name in options]
    for f in fields(config.BaselineOptions):
        if f.name in options:
            default, owners, _ = told[f.name]
            assert default == written(list(f.default) if isinstance(f.default, tuple) else f.default)
            having = [name for name in baselines if f.name in config.OPTIONS_OF[name]]
            assert owners == ("all" if len(having) == len(baselines) else ", ".join(having))


def test_every_baseline_is_named() -> None:
    text = README.split("### The spec", 1)[1].split("### ", 1)[0]
    (paired,) = re.findall(r"- baseline: sgd +# (.*)", text)
    assert tuple(paired.split(", ")) == get_args(config.PairedBaseline)
    (words,) = re.findall(r"^A grid may also do without a partner.*?\n\n", text, re.MULTILINE | re.DOTALL)
    named = [word for word in re.findall(r"`(\w+)`", words) if word in get_args(config.Baseline)]
    assert tuple(named) == get_args(config.LoneBaseline)


def test_the_readmes_grid_without_a_partner_is_good() -> None:
    (line,) = re.findall(r"```yaml\n  - ({baseline: .*})\n```", README)
    (block,) = [b for b in re.findall(r"```yaml\n(.*?)```", README, re.DOTALL) if "grids:" in b]
    document = parse_yaml(block.encode())
    spec = parse_spec(document | {"grids": [parse_yaml(line.encode())]})
    assert plan(spec).runs_total == 20


def test_the_options_of_ddpnopt_are_all_told() -> None:
    assert rows("| option of `ddpnopt` |") == list(FeedbackSpec.model_fields)


def test_the_settings_are_all_told() -> None:
    known: dict[str, FieldInfo] = Settings.model_fields
    assert set(rows("| setting |")) == {f"DDPSWEEP_{name.upper()}" for name in known}


def test_the_optional_keys_of_a_spec_are_told() -> None:
    assert set(rows("| optional key of the spec |")) == {"probes", "priority", "reuse", "device"}
    optional = {name for name, field in SweepSpec.model_fields.items() if not field.is_required()}
    assert optional == {"probes", "priority", "reuse", "device", "loss", "dtype"}


def test_the_presets_are_all_told() -> None:
    told = re.search(r"Presets: (.*?)\.\n", README, re.DOTALL)
    assert told is not None
    assert set(re.findall(r"`([^`]+)`", told.group(1))) == set(PRESETS)
