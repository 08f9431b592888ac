"""A delivery API that stands before a real one, passes every call on, and loses some of the answers."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import grpc
from google.protobuf.any_pb2 import Any
from google.rpc.code_pb2 import UNAVAILABLE
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status
from sanjay_api import SERVICE, TIMEOUT, Api


@dataclass
class Call:
    """A `Send` that came: when, in seconds, and for whom."""

    at: float
    users: list[str]


class Lossy(grpc.GenericRpcHandler):
    """What it does to the calls since `forget`:

    - the first `Send` is carried out, and answered with UNAVAILABLE and a RetryInfo;
    - the second is carried out, and the last user's result is replaced by an error;
    - the first `SendStream` ends after some answers without an error, the second with UNAVAILABLE.
    """

    # Seconds that it asks to wait.
    RETRY_INFO = 0.7
    RETRY_AFTER = 0.6
    # Answers of a stream that is cut.
    ANSWERS = 300

    def __init__(self, server: str, key: str):
        self.api = Api(server=f"http://{server}", key=key)
        self.channel = grpc.insecure_channel(server)
        self.server = grpc.server(ThreadPoolExecutor(8), handlers=[self])
        self.url = f"http://127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"
        self.forget()

    def __enter__(self) -> "Lossy":
        self.server.start()
        return self

    def __exit__(self, *_) -> None:
        self.server.stop(None).wait()
        self.channel.close()

    def forget(self) -> None:
        self.calls: list[Call] = []
        self.streams = 0

    def service(self, details):
        if details.method == f"/{SERVICE}/Send":
            return grpc.unary_unary_rpc_method_handler(self.send)
        if details.method == f"/{SERVICE}/SendStream":
            return grpc.stream_stream_rpc_method_handler(self.send_stream)
        return None

    def send(self, request: bytes, context) -> bytes:
        users = list(self.api.message("SendRequest").FromString(request).users)
        self.calls.append(Call(time.monotonic(), users))
        number = len(self.calls)
        answer = self.channel.unary_unary(f"/{SERVICE}/Send")(request, metadata=self.key(context), timeout=TIMEOUT)
        if number == 1:
            context.abort_with_status(rpc_status.to_status(away(self.RETRY_INFO)))
        if number > 2:
            return answer
        response = self.api.message("SendResponse").FromString(answer)
        error = response.results[-1].error
        error.code, error.message, error.retryable = "unavailable", "the answer was lost", True
        error.retry_after_ms = int(self.RETRY_AFTER * 1000)
        return response.SerializeToString()

    def send_stream(self, requests, context):
        self.streams += 1
        number = self.streams
        answers = self.channel.stream_stream(f"/{SERVICE}/SendStream")(requests, metadata=self.key(context))
        for count, answer in enumerate(answers, 1):
            yield answer
            if count == self.ANSWERS and number <= 2:
                answers.cancel()
                if number == 2:
                    context.abort_with_status(rpc_status.to_status(away(self.RETRY_INFO)))
                return

    @staticmethod
    def key(context) -> list[tuple[str, str]]:
        return [item for item in context.invocation_metadata() if item[0] == "authorization"]


def away(seconds: float) -> Status:
    info = RetryInfo()
    info.retry_delay.FromMilliseconds(int(seconds * 1000))
    detail = Any()
    detail.Pack(info)
    return Status(code=UNAVAILABLE, message="the answer was lost", details=[detail])
