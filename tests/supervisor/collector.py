"""Stands for Jaeger in the process stack: takes spans by OTLP over gRPC on port 4317, and answers with them as JSON.

`GET http://ADDRESS:16686/spans?trace=ID` has the spans of a trace, `?message=UUID` those of every trace in which a span
names that message. The newest 200,000 spans are kept.
"""

from __future__ import annotations

import json
import socket
import sys
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlparse

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

KINDS = ["unspecified", "internal", "server", "client", "producer", "consumer"]


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps spans."""

    def __init__(self):
        self.spans = deque(maxlen=200_000)
        self.lock = threading.Lock()

    def Export(self, request, context):
        with self.lock:
            for resource in request.resource_spans:
                about = {pair.key: _value(pair.value) for pair in resource.resource.attributes}
                for scope in resource.scope_spans:
                    self.spans.extend(_span(about.get("service.name", ""), span) for span in scope.spans)
        return trace_service_pb2.ExportTraceServiceResponse()

    def of(self, trace: str | None, message: str | None):
        with self.lock:
            spans = list(self.spans)
        if message:
            traces = {span["trace"] for span in spans if span["attributes"].get("messaging.message.id") == message}
        else:
            traces = {trace}
        return [span for span in spans if span["trace"] in traces]


def _value(value):
    return getattr(value, value.WhichOneof("value") or "string_value")


def _span(service, span):
    return {
        "service": service,
        "trace": span.trace_id.hex(),
        "id": span.span_id.hex(),
        "parent": span.parent_span_id.hex(),
        "name": span.name,
        "kind": KINDS[span.kind],
        "start": span.start_time_unix_nano,
        "end": span.end_time_unix_nano,
        "attributes": {pair.key: _value(pair.value) for pair in span.attributes},
        "links": [{"trace": link.trace_id.hex(), "id": link.span_id.hex()} for link in span.links],
        "error": span.status.code == 2,
    }


def serve(address: str) -> None:
    collector = Collector()
    server = grpc.server(ThreadPoolExecutor(4))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    if not server.add_insecure_port(f"{address}:4317"):
        sys.exit(f"{address}:4317 is taken")
    server.start()

    class Pages(BaseHTTPRequestHandler):
        def do_GET(self):
            query = parse_qs(urlparse(self.path).query)
            spans = collector.of(query.get("trace", [None])[0], query.get("message", [None])[0])
            body = json.dumps(spans).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    ThreadingHTTPServer((address, 16686), Pages).serve_forever()


if __name__ == "__main__":
    if sys.argv[1] == "--check":
        for port in (4317, 16686):
            socket.create_connection((sys.argv[2], port), timeout=2).close()
    else:
        serve(sys.argv[1])
