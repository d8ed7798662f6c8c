"""docker-compose.yml: valid by the Compose specification's schema, and as safe as it claims."""

import subprocess
import sysconfig
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
FILE = ROOT / "docker-compose.yml"
COMPOSE = yaml.safe_load(FILE.read_text())
SERVICES = COMPOSE["services"]
LASTING = sorted(set(SERVICES) - {"migrate"})
RAY = ["ray-head", "ray-worker"]


def check_schema(file):
    """Validate against the schema that check-jsonschema carries with it, so nothing is fetched."""
    command = [
        Path(sysconfig.get_path("scripts")) / "check-jsonschema",
        "--builtin-schema",
        "vendor.compose-spec",
    ]
    return subprocess.run([*command, file], capture_output=True, text=True)


def test_follows_the_compose_specification():
    result = check_schema(FILE)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("healthcheck:", "healtcheck:"),
        ("condition: service_healthy", "condition: healthy"),
        ("init: true", "init: [1]"),
    ],
)
def test_the_schema_would_notice(tmp_path, right, wrong):
    broken = tmp_path / "docker-compose.yml"
    broken.write_text(FILE.read_text().replace(right, wrong))
    assert check_schema(broken).returncode == 1


def test_has_the_services_it_should():
    assert set(SERVICES) == {"postgres", "migrate", "api", "dispatcher", "ray-head", "ray-worker"}
    assert "version" not in COMPOSE  # obsolete


def test_only_the_api_can_be_reached_from_outside_and_only_from_this_host():
    assert [name for name, service in SERVICES.items() if "ports" in service] == ["api"]
    assert all(port.startswith("127.0.0.1:") for port in SERVICES["api"]["ports"])
    assert not any("network_mode" in service for service in SERVICES.values())
    for name, service in SERVICES.items():
        outward = [
            network for network in service["networks"] if not COMPOSE["networks"][network].get("internal")
        ]
        assert outward == (["edge"] if name == "api" else []), name


@pytest.mark.parametrize("name", RAY)
def test_ray_nodes_know_nothing_of_the_database(name):
    assert not set(SERVICES[name]["networks"]) & set(SERVICES["postgres"]["networks"])
    text = yaml.safe_dump(SERVICES[name])
    assert "DATABASE" not in text
    assert "POSTGRES" not in text


def test_the_dispatcher_keeps_the_database_out_of_the_ray_node_beside_it():
    script = SERVICES["dispatcher"]["command"][-1]
    assert script.count("ray start") == script.count("env -u DDPSWEEP_DATABASE_URL ray start") == 1
    assert "--num-cpus=0" in script  # no pack is placed there


def test_only_who_needs_the_database_gets_its_password():
    knows = {name for name, service in SERVICES.items() if "POSTGRES_PASSWORD" in yaml.safe_dump(service)}
    assert knows == {"postgres", "migrate", "api", "dispatcher"}


def test_no_secret_has_a_default():
    text = FILE.read_text()
    for name in ("POSTGRES_PASSWORD", "RAY_AUTH_TOKEN"):
        assert text.count(f"${{{name}") == text.count(f"${{{name}:?") > 0


@pytest.mark.parametrize("name", [*RAY, "dispatcher"])
def test_ray_asks_for_its_token(name):
    environment = SERVICES[name]["environment"]
    assert environment["RAY_AUTH_MODE"] == "token"
    assert environment["RAY_AUTH_TOKEN"].startswith("${RAY_AUTH_TOKEN:?")


def test_the_api_and_the_migration_have_no_ray_token():
    for name in ("api", "migrate", "postgres"):
        assert "RAY_AUTH_TOKEN" not in yaml.safe_dump(SERVICES[name])


@pytest.mark.parametrize("name", LASTING)
def test_lasting_services_are_watched_and_come_back(name):
    assert SERVICES[name]["healthcheck"]["test"][0] == "CMD"
    assert SERVICES[name]["restart"] == "unless-stopped"


def test_everything_waits_for_what_it_needs():
    for name in ("api", "dispatcher"):
        needs = SERVICES[name]["depends_on"]
        assert needs["migrate"]["condition"] == "service_completed_successfully"
        assert needs["postgres"]["condition"] == "service_healthy"
    for name in ("dispatcher", "ray-worker"):
        assert SERVICES[name]["depends_on"]["ray-head"]["condition"] == "service_healthy"
    assert SERVICES["migrate"]["restart"] == "no"


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_containers_are_confined(name):
    service = SERVICES[name]
    assert service["cap_drop"] == ["ALL"]
    assert "cap_add" not in service
    assert "privileged" not in service
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["read_only"] is True
    assert "docker.sock" not in yaml.safe_dump(service)


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_nothing_runs_as_root(name):
    service = SERVICES[name]
    if "build" in service:  # the image's own user: see test_dockerfile
        assert service["build"]["target"] in {"api", "worker"}
        assert "user" not in service
    else:
        assert service["user"] not in {"root", "0"}


@pytest.mark.parametrize("name", [*RAY, "dispatcher"])
def test_the_object_store_fits_into_shared_memory(name):
    command = " ".join(SERVICES[name]["command"])
    assert command.count("ray start") == 1
    store = int(command.split("--object-store-memory=")[1].split()[0])
    assert store < int(SERVICES[name]["shm_size"].removesuffix("m")) * 2**20


def test_the_ray_head_says_its_address():
    # On a network without a route out, Ray would take loopback for it, and no node could join.
    assert "--node-ip-address=" in SERVICES["ray-head"]["command"][-1]


def test_images_are_pinned_to_a_major_version():
    for service in SERVICES.values():
        if "build" not in service:
            tag = service["image"].rpartition(":")[2]
            assert tag.split("-")[0].split(".")[0].isdigit()
