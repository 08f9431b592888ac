"""The delivery API through gRPC reflection, and the client protocol over a WebSocket: no code of Sanjay's own."""

import json
import os

import grpc
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from websockets.sync.client import connect

SERVICE = "sanjay.delivery.v1.Delivery"
TIMEOUT = 15


class Api:
    """Calls methods that the server describes: that of the environment unless another is given."""

    def __init__(self, key=None, server=None, certificate=None):
        server = server or os.environ["SANJAY_SERVER"]
        key = key or os.environ["SANJAY_API_KEY"]
        if server.startswith("https://"):
            credentials = grpc.ssl_channel_credentials(certificate)
            self.channel = grpc.secure_channel(server.removeprefix("https://"), credentials)
        else:
            self.channel = grpc.insecure_channel(server.removeprefix("http://"))
        database = ProtoReflectionDescriptorDatabase(self.channel)
        assert SERVICE in database.get_services(), database.get_services()
        self.pool = DescriptorPool(database)
        self.service = self.pool.FindServiceByName(SERVICE)
        self.metadata = [("authorization", f"Bearer {key}")]

    def message(self, name, **fields):
        return GetMessageClass(self.pool.FindMessageTypeByName(f"sanjay.delivery.v1.{name}"))(**fields)

    def call(self, method, traceparent=None, timeout=TIMEOUT, **fields):
        """One call; answers with the response message."""
        described = self.service.methods_by_name[method]
        call = self.channel.unary_unary(
            f"/{SERVICE}/{method}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=GetMessageClass(described.output_type).FromString,
        )
        request = GetMessageClass(described.input_type)(**fields)
        metadata = self.metadata + ([("traceparent", traceparent)] if traceparent else [])
        return call(request, metadata=metadata, timeout=timeout)

    def stream(self, method, requests):
        """A stream of calls; iterates over the response messages."""
        described = self.service.methods_by_name[method]
        call = self.channel.stream_stream(
            f"/{SERVICE}/{method}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=GetMessageClass(described.output_type).FromString,
        )
        make = GetMessageClass(described.input_type)
        return call((make(**fields) for fields in requests), metadata=self.metadata, timeout=TIMEOUT)


class Client:
    """A user's connection, to the edge of the environment unless another is given."""

    def __init__(self, user, url=None, token=None, tls=None, **hello):
        url = url or os.environ["SANJAY_URL"]
        token = token or os.environ["TOKEN_" + user.upper()]
        headers = {"Authorization": f"Bearer {token}"}
        self.socket = connect(url, subprotocols=["sanjay.v1.json"], additional_headers=headers, ssl=tls)
        assert self.socket.subprotocol == "sanjay.v1.json", self.socket.subprotocol
        self.pending = []
        self.id = 0
        self.welcome = self.call(hello=hello)["welcome"]
        assert self.welcome["user"] == user, self.welcome

    def next(self):
        while not self.pending:
            for line in self.socket.recv(timeout=TIMEOUT).split("\n"):
                envelope = json.loads(line)
                if envelope == {}:
                    self.socket.send("{}")
                else:
                    self.pending.append(envelope)
        return self.pending.pop(0)

    def event(self, kind):
        """The next event of this kind."""
        while True:
            envelope = self.next()
            if kind in envelope:
                return envelope[kind]

    def send(self, **command):
        """A command without an answer."""
        self.socket.send(json.dumps(command))

    def call(self, **command):
        """The answer to a command. What comes before it is kept."""
        self.id += 1
        self.socket.send(json.dumps({"id": self.id, **command}))
        before = []
        while (envelope := self.next()).get("id") != self.id:
            before.append(envelope)
        self.pending = before + self.pending
        return envelope

    def is_quiet(self):
        """Whether anything arrived by the time that a ping was answered."""
        self.call()
        return not self.pending

    def close(self):
        self.socket.close()
