"""What the documents point to is there, and what they show is what the code says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic.fields import FieldInfo

from service.config import Settings
from service.sweeps.documents import parse_spec, parse_yaml
from service.sweeps.expand import plan
from service.sweeps.spec import FeedbackSpec

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
    for target in re.findall(r"`?make (\w+)`?", README):
        assert re.search(rf"^{target}:", text, re.MULTILINE), target


def test_the_readmes_spec_is_the_example() -> None:
    (block,) = [b for b in re.findall(r"```yaml\n(.*?)```", README, re.DOTALL) if "grids:" in b]
    shown = parse_spec(parse_yaml(block.encode()))
    example = parse_spec(parse_yaml((ROOT / "examples" / "digits-fig4a-sgd.yaml").read_bytes()))
    assert shown == example
    assert f'"packs":{len(plan(shown).packs)}' in README


def rows(heading: str) -> list[str]:
    table = README.split(heading, 1)[1].split("\n\n", 1)[0]
    return re.findall(r"^\| `([^`]+)`", table, re.MULTILINE)


def test_the_options_of_ddpnopt_are_all_told() -> None:
    assert rows("| option of `ddpnopt` |") == list(FeedbackSpec.model_fields)


def test_the_settings_are_all_told() -> None:
    fields: dict[str, FieldInfo] = Settings.model_fields
    assert set(rows("| setting |")) == {f"DDPSWEEP_{name.upper()}" for name in fields}
