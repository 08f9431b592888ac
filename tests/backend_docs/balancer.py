"""nginx, with the project's configuration, in front of one server: its addresses and its certificate are replaced."""

import pathlib
import re
import shutil
import socket
import subprocess

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Debian keeps it where a user's PATH may not lead.
NGINX = shutil.which("nginx") or "/usr/sbin/nginx"


class Balancer:
    """Listens with TLS for `localhost` on a free port, and passes calls on to `server` (`HOST:PORT`)."""

    def __init__(self, directory: str, server: str):
        self.home = pathlib.Path(directory, "nginx")
        shutil.copytree(ROOT / "nginx", self.home)
        (self.home / "run").mkdir(exist_ok=True)
        self.certificate, key = self.home / "certificate.pem", self.home / "key.pem"
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
            + ["-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
            + ["-keyout", str(key), "-out", str(self.certificate)],
            check=True,
            capture_output=True,
        )
        port = None
        for path in (self.home / "listen").iterdir():
            free = free_port()
            self.replace(path, r"\*:\d+", f"127.0.0.1:{free}")
            port = free if path.name == "grpc_tls.conf" else port
        # The edge's address does not matter: no client comes this way.
        for path in (self.home / "upstreams").iterdir():
            self.replace(path, r"(?m)^(\s*server )[\w-]+:\d+", rf"\g<1>{server}")
        self.replace(self.home / "conf/tls.conf", "/run/secrets/tls_cert", str(self.certificate))
        self.replace(self.home / "conf/tls.conf", "/run/secrets/tls_key", str(key))
        self.url = f"https://localhost:{port}"

    @staticmethod
    def replace(path: pathlib.Path, pattern: str, text: str) -> None:
        replaced, count = re.subn(pattern, text, path.read_text(encoding="utf-8"))
        if count == 0:
            raise ValueError(f"{path} has nothing like {pattern}")
        path.write_text(replaced, encoding="utf-8")

    def __enter__(self) -> "Balancer":
        command = [NGINX, "-p", f"{self.home}/", "-c", "nginx.conf", "-g", "daemon off;"]
        self.log = open(self.home / "run/log", "wb")
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log)
        return self

    def __exit__(self, *_) -> None:
        self.process.terminate()
        self.process.wait()
        self.log.close()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
