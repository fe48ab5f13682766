"""Who may do what at the ports: serving for everyone, management for nobody outside; gRPC with TLS and clients' certificates."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import tritonclient.grpc as triton

from tests.triton.calls import post
from tests.triton.live_server import LiveServer, http_get
from tests.triton.running import PROMPT


def post_json(server: LiveServer, path: str, content: dict[str, Any], headers: dict[str, str] | None = None) -> int:
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", server.http_port, timeout=10)
    try:
        connection.request("POST", path, json.dumps(content), headers or {})
        return connection.getresponse().status
    finally:
        connection.close()


@pytest.mark.parametrize(
    "path",
    [
        "/v2/repository/models/ensemble/unload",
        "/v2/repository/models/mistral_nemo/load",
        "/v2/repository/index",
        "/v2/systemsharedmemory/region/x/register",
        "/v2/cudasharedmemory/region/x/register",
        "/v2/logging",
        "/v2/trace/setting",
    ],
)
def test_management_is_refused_over_http(monitored: LiveServer, path: str) -> None:
    for headers in ({}, {"nemo-admin": "guess"}):
        assert post_json(monitored, path, {"key": "/x", "offset": 0, "byte_size": 8}, headers) == 403
    assert monitored.is_ready()
    assert post(monitored, "ensemble/generate", PROMPT | {"max_tokens": 1})[0] == 200


def test_management_is_refused_over_grpc(monitored: LiveServer) -> None:
    with triton.InferenceServerClient(monitored.grpc_url) as client:
        assert client.is_model_ready("ensemble")
        calls: tuple[Callable[[], Any], ...] = (
            lambda: client.unload_model("ensemble"),
            lambda: client.get_model_repository_index(),
            lambda: client.register_system_shared_memory("x", "/nemo_1_x", 64),
            lambda: client.update_log_settings({"log_verbose_level": 1}),
        )
        for refused in calls:
            with pytest.raises(triton.InferenceServerException, match=r"restricted|expecting header"):
                refused()
        assert client.is_model_ready("ensemble")


def test_what_clients_need_stays_open(monitored: LiveServer) -> None:
    for path in (
        "/v2",
        "/v2/health/live",
        "/v2/models/ensemble",
        "/v2/models/ensemble/config",
        "/v2/models/ensemble/stats",
    ):
        assert http_get(monitored.http_port, path)[0] == 200, path


def openssl(folder: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True, timeout=60)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CA, and a server's and a client's certificate that it signed."""
    folder = tmp_path_factory.mktemp("certificates")
    subject = ("-subj", "/CN=test")
    openssl(folder, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "ca.key", "-out", "ca.crt", *subject)
    (folder / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
    for name in ("server", "client"):
        openssl(
            folder, "req", "-newkey", "rsa:2048", "-nodes", "-keyout", f"{name}.key", "-out", f"{name}.csr", *subject
        )
        signing = ("-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-extfile", "names")
        openssl(folder, "x509", "-req", "-in", f"{name}.csr", "-out", f"{name}.crt", "-days", "2", *signing)
    return folder


@pytest.fixture(scope="module", params=["tls", "mutual tls"])
def tls_server(
    request: pytest.FixtureRequest, checkpoint: Path, certificates: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[LiveServer, str]]:
    server = LiveServer(checkpoint, tmp_path_factory.mktemp("tls") / "server", runner="fake")
    server._command += ["--grpc-tls-cert", str(certificates / "server.crt")]
    server._command += ["--grpc-tls-key", str(certificates / "server.key")]
    if request.param == "mutual tls":
        server._command += ["--grpc-tls-client-ca", str(certificates / "ca.crt")]
    try:
        yield server.start().wait_until_ready(), request.param
        server.stop()
    finally:
        server.kill_everything()


def is_served(url: str, credentials: grpc.ChannelCredentials | None) -> bool:
    try:
        with triton.InferenceServerClient(url, ssl=credentials is not None, creds=credentials) as client:
            return bool(client.is_model_ready("ensemble", client_timeout=5))
    except triton.InferenceServerException:
        return False


def test_grpc_speaks_tls_and_nothing_else(tls_server: tuple[LiveServer, str], certificates: Path) -> None:
    server, kind = tls_server
    ca, key, cert = ((certificates / name).read_bytes() for name in ("ca.crt", "client.key", "client.crt"))
    assert not is_served(server.grpc_url, None)
    assert is_served(server.grpc_url, grpc.ssl_channel_credentials(ca, key, cert))
    assert is_served(server.grpc_url, grpc.ssl_channel_credentials(ca)) == (kind == "tls")
    assert not is_served(server.grpc_url, grpc.ssl_channel_credentials())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--grpc-tls-cert", "/x"], "--grpc-tls-cert and --grpc-tls-key: must be given both, or neither"),
        (["--grpc-tls-cert", "/x", "--grpc-tls-key", "/y"], "gRPC TLS, cert: there is no file /x"),
        (
            ["--grpc-tls-cert", "/x", "--grpc-tls-key", "/y", "--openai-port", "9"],
            "the OpenAI gateway speaks gRPC without TLS",
        ),
    ],
)
def test_tls_by_halves_is_refused(checkpoint: Path, tmp_path: Path, arguments: list[str], words: str) -> None:
    server = LiveServer(checkpoint, tmp_path / "server")
    server._command += arguments
    try:
        server.start().assert_ended(1)
        assert words in server.log()
    finally:
        server.kill_everything()
