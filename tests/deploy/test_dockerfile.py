"""The Dockerfile and the script that builds from it, as far as they can be judged without building."""

import re
import subprocess
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = Path(sysconfig.get_path("scripts"))
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def instructions():
    """Every instruction as (stage, keyword, rest), continued lines joined, comments gone."""
    lines = re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE).replace("\\\n", " ").splitlines()
    stage = ""
    for line in filter(None, map(str.strip, lines)):
        keyword, _, rest = line.partition(" ")
        if keyword == "FROM":
            stage = rest.split(" AS ")[1]
        yield stage, keyword, rest


INSTRUCTIONS = list(instructions())
PARENT = {stage: rest.split()[0] for stage, keyword, rest in INSTRUCTIONS if keyword == "FROM"}


def image(stage):
    """The instructions that make up an image: its stage's own after those of the stages it grew from."""
    own = [(keyword, rest) for name, keyword, rest in INSTRUCTIONS if name == stage]
    return (image(PARENT[stage]) if PARENT[stage] in PARENT else []) + own


def run(image_instructions):
    return [rest for keyword, rest in image_instructions if keyword == "RUN"]


@pytest.mark.parametrize("command", [["hadolint", "Dockerfile"], ["shellcheck", "deploy/image"]])
def test_linter_has_no_complaint(command):
    name, *arguments = command
    result = subprocess.run([SCRIPTS / name, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_base_image_is_named_with_a_version():
    default = next(rest for stage, keyword, rest in INSTRUCTIONS if (stage, keyword) == ("", "ARG"))
    assert re.fullmatch(r"BASE_IMAGE=\S+:\d+\.\d+\S*", default)
    assert {parent for parent in PARENT.values() if parent not in PARENT} == {"${BASE_IMAGE}"}


def test_the_api_has_neither_torch_nor_ray():
    text = "\n".join(rest for _, rest in image("api"))
    assert "requirements/service.txt" in text
    assert "requirements/postgres.txt" in text
    for wrong in ("numerics", "cluster", "torch==", "ray==", "COPY requirements "):
        assert wrong not in text
    names = "\n".join((ROOT / "requirements" / name).read_text() for name in ("service.txt", "postgres.txt"))
    assert not re.search(r"^(torch|ray|scikit-learn)\b", names, flags=re.MULTILINE)


def test_the_worker_has_everything():
    text = "\n".join(run(image("worker")))
    for name in ("service", "postgres", "numerics", "cluster"):
        assert f"/opt/requirements/{name}.txt" in text


@pytest.mark.parametrize("stage", ["api", "worker"])
def test_versions_are_pinned_and_the_package_brings_none_of_its_own(stage):
    installs = [part for line in run(image(stage)) for part in line.split("&&") if "pip install" in part]
    assert len(installs) >= 2
    for install in installs:
        assert "-c /opt/requirements/constraints.txt" in install or "--no-index --no-deps" in install


@pytest.mark.parametrize("stage", ["api", "worker"])
def test_runs_as_an_ordinary_user(stage):
    users = [rest for keyword, rest in image(stage) if keyword == "USER"]
    assert users[-1] == "10001:10001"  # a number: Kubernetes' runAsNonRoot cannot judge a name
    assert "--uid 10001" in "\n".join(run(image(stage)))


def test_the_api_tells_whether_it_is_ready():
    checks = [rest for keyword, rest in image("api") if keyword == "HEALTHCHECK"]
    assert len(checks) == 1
    assert "/readyz" in checks[0]


def test_settings_of_one_machine_stay_out():
    environment = [rest for _, keyword, rest in INSTRUCTIONS if keyword in {"ENV", "ARG"}]
    assert not re.search(r"PIP_(INDEX|EXTRA|FIND|CERT|TRUSTED|PROXY)", "\n".join(environment))
    online = [
        rest
        for _, keyword, rest in INSTRUCTIONS
        if keyword == "RUN" and re.search(r"pip (install|wheel)", rest)
    ]
    for line in online:
        assert "--mount=type=secret,id=pip-conf" in line or "--no-index" in line


def test_no_setting_weakens_the_refusal_to_listen_without_authentication():
    for _, keyword, rest in INSTRUCTIONS:
        assert keyword not in {"ENV", "ARG"} or "ALLOW_UNAUTHENTICATED" not in rest


def test_the_build_context_holds_what_is_copied_and_no_more():
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert ignored[0] == "*"
    allowed = {line[1:] for line in ignored if line.startswith("!")}
    copied = {
        source.split("/")[0].removeprefix("./")
        for _, keyword, rest in INSTRUCTIONS
        if keyword == "COPY" and not rest.startswith("--from")
        for source in rest.split()[:-1]
    }
    assert copied == allowed
