"""Every refusal has its own problem, and none of them starts anything."""

from __future__ import annotations

import httpx
import pytest

from tests.up.clients import connect, read_answer


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("/nothing/x", 404, "no-such-route"),
        ("/probe/secret", 404, "path-not-allowed"),
        ("/probe/apix", 404, "path-not-allowed"),
        ("/probe/api/../secret", 400, "bad-path"),
        ("/probe/api/%2e%2e/secret", 400, "bad-path"),
        ("/probe/api/%2E./secret", 400, "bad-path"),
        ("/probe/api/.%2e", 400, "bad-path"),
        ("/probe/api/./x", 400, "bad-path"),
        ("/probe/api%2fx", 400, "bad-path"),
        ("/probe/api/a%5Cb", 400, "bad-path"),
        ("/probe/api/a%00b", 400, "bad-path"),
        ("/probe/api/a%0d%0ab", 400, "bad-path"),
    ],
)
def test_paths_that_are_refused(limited, path, status, code):
    request = f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode()
    client = connect(limited.port, request)
    head, _, body = read_answer(client).partition(b"\r\n\r\n")
    client.close()
    assert head.startswith(b"HTTP/1.1 %d " % status)
    assert b"Content-Type: application/problem+json" in head
    problem = httpx.Response(status, content=body).json()
    assert problem["type"].endswith(code)
    assert problem["status"] == status
    assert problem["title"]
    assert problem["detail"]
    assert limited.info()["state"] == "cold"


@pytest.mark.parametrize(
    "path",
    [
        "/admin/reload",
        "/admin/services/probe/start",
        "/admin/services/probe/stop",
        "/admin/management/disable",
        "/admin/management/kill",
        "/demand_probe",
        "/disable_service_management",
        "/kill_disable_service_management",
    ],
)
@pytest.mark.parametrize("token", [None, "Bearer wrong", "Bearer", "Basic abc"])
def test_admin_calls_without_the_token_change_nothing(limited, path, token):
    headers = {} if token is None else {"Authorization": token}
    answer = httpx.post(limited.url + path, headers=headers, timeout=60)
    assert answer.status_code == 401
    assert answer.json()["type"].endswith("unauthorized")
    assert limited.info()["state"] == "cold"
    assert limited.info()["management_enabled"] is True


def test_get_never_changes_anything(limited):
    headers = {"Authorization": f"Bearer {limited.token}"}
    for path in ("/demand_probe", "/admin/management/disable", "/enable_service_management"):
        answer = httpx.get(limited.url + path, headers=headers)
        assert answer.status_code == 405
        assert answer.headers["Allow"] == "POST"
    assert limited.info()["state"] == "cold"


def test_openai_paths_are_refused_in_the_shape_their_clients_know(limited):
    answer = httpx.post(f"{limited.url}/v1/chat/completions", json={"model": "x"})
    assert answer.status_code == 404
    assert set(answer.json()["error"]) == {"message", "type", "code", "param"}


def test_management_off_starts_nothing_and_leaves_what_runs(product):
    product.probe(timeout=3600)
    product.probe("other")
    product.up()
    assert product.post("/admin/management/disable").status_code == 200
    answer = product.get("/probe/")
    assert answer.status_code == 503
    assert answer.json()["type"].endswith("disabled")
    assert answer.headers["Retry-After"] == "60"
    product.run("enable")
    assert product.get("/probe/").status_code == 200
    product.run("disable")
    assert product.get("/probe/").status_code == 200
    product.probe(timeout=1)
    product.write_config()
    product.until_state("disabled")
    refused = product.post("/admin/services/other/start")
    assert refused.status_code == 503
    assert refused.json()["type"].endswith("disabled")
    product.run("enable")
    assert product.info("other")["state"] == "cold"
    product.get("/other/")
    product.run("disable", "--kill")
    product.until_state("disabled", "other")
    assert product.replicas() == []


def test_management_stays_off_over_a_restart(product):
    product.probe()
    product.up()
    product.run("disable")
    assert product.down() == 0
    product.up()
    assert product.get("/probe/").status_code == 503


def test_what_the_backend_refuses_is_named_as_the_gate_names_it(product):
    product.probe()
    product.up()
    for path in ("/info/nothing", "/check_nothing"):
        unknown = product.get(path)
        assert (unknown.status_code, unknown.json()["type"].rpartition("/")[2]) == (
            404,
            "no-such-route",
        )
    product.run("disable")
    refused = product.post("/demand_probe")
    assert (refused.status_code, refused.json()["type"].rpartition("/")[2]) == (503, "disabled")
    assert 1 <= int(refused.headers["Retry-After"]) <= 60


def test_demand_starts_a_service_without_a_request_to_it(product):
    product.probe()
    product.up()
    assert product.post("/demand_probe").status_code == 200
    product.until_state("ready")
    assert product.info()["requests"] == 0


def test_clients_elsewhere_see_no_logs_nodes_or_versions(product):
    product.top["gate"] = {"private": []}
    product.service("bad", product.script("bad.sh", "echo the secret path; exit 3"))
    product.probe()
    product.up()
    product.get("/probe/")
    answer = product.get("/bad/")
    assert answer.status_code == 503
    assert "secret" not in answer.text
    assert "code 3" not in answer.text
    info = product.get("/info")
    assert info.json()["version"] is None
    replicas = [r for service in info.json()["services"] for r in service["replicas"]]
    assert [(r["node"], r["job_id"]) for r in replicas] == [(None, None)]
    assert product.get("/metrics").status_code == 403
