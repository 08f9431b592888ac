"""A client and a back end through the load balancer's TLS, which they check: its names, its cookie, its refusals."""

import os
import ssl
from pathlib import Path

import grpc
from sanjay_api import SERVICE, TIMEOUT, Api, Client

certificate = Path(os.environ["CERTIFICATE"]).read_bytes()

api = Api(certificate=certificate)
context = ssl.create_default_context(cadata=certificate.decode())
ann = Client("ann", tls=context)
headers = ann.socket.response.headers
cookie = headers["Set-Cookie"]
assert cookie.startswith("sanjay_lb=") and cookie.endswith("; HttpOnly; SameSite=Lax; Secure"), cookie
assert headers["Strict-Transport-Security"] == "max-age=31536000", headers

sent = api.call("Send", users=["ann"], payload={"text": "over TLS"})
assert sent.results[0].accepted.seq == 1, sent
message = ann.event("inbox")
assert message["payload"] == {"text": "over TLS"}, message
assert "ok" in ann.call(ack={"ranges": [[1, 1]]})

# What nginx itself refuses is a gRPC status to a client that is not ours.
for method, expected in {
    "/sanjay.edge.v1.Inbox/ReadInbox": grpc.StatusCode.UNIMPLEMENTED,
    "/metrics": grpc.StatusCode.UNIMPLEMENTED,
    f"/{SERVICE}/Nothing": grpc.StatusCode.UNIMPLEMENTED,
}.items():
    call = api.channel.unary_unary(method, request_serializer=bytes, response_deserializer=bytes)
    try:
        call(b"", metadata=api.metadata, timeout=TIMEOUT)
    except grpc.RpcError as error:
        assert error.code() == expected, (method, error)
    else:
        raise AssertionError(f"{method} was answered")
ann.close()
print("done")
