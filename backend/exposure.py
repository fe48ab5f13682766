"""What of tritonserver the network may reach: serving for everyone, management for the supervisor alone, TLS for gRPC.

With explicit model control anybody who reaches the HTTP or gRPC port could unload the model, and with shared memory registered by
name read or overwrite what the Python stubs pass each other (CVE-2025-23319 began so). Both belong to the supervisor, which makes
up a secret at each start.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path

from backend.errors import ConfigError

ADMIN_HEADER = "nemo-admin"
RESTRICTED_APIS = ("model-repository", "shared-memory", "trace", "logging")


@dataclass(frozen=True, slots=True)
class GrpcTls:
    """PEM files of the gRPC port: the server's certificate and key, and the CA of clients' certificates (mutual TLS)."""

    cert: Path
    key: Path
    client_ca: Path | None = None

    def __post_init__(self) -> None:
        for name, path in (("cert", self.cert), ("key", self.key), ("client_ca", self.client_ca)):
            if path is not None and not path.is_file():
                raise ConfigError(f"gRPC TLS, {name}: there is no file {path}")

    def options(self) -> list[str]:
        """tritonserver's command line for it."""
        return [
            "--grpc-use-ssl=true",
            f"--grpc-server-cert={self.cert}",
            f"--grpc-server-key={self.key}",
            *(
                ["--grpc-use-ssl-mutual=true", f"--grpc-root-cert={self.client_ca}"]
                if self.client_ca is not None
                else []
            ),
        ]


def new_admin_secret() -> str:
    """A secret that whoever may manage the server sends as the header `nemo-admin`."""
    return secrets.token_hex(16)


def restriction_options(admin_secret: str) -> list[str]:
    """tritonserver's command line that keeps management to those who know the secret."""
    rule = f"{','.join(RESTRICTED_APIS)}:{ADMIN_HEADER}={admin_secret}"
    return [f"--http-restricted-api={rule}", f"--grpc-restricted-protocol={rule}"]
