"""The delivery API through gRPC reflection, and the client protocol over a WebSocket: no code of Sanjay's own."""

import json
import os

import grpc
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from websockets.sync.client import connect

URL = os.environ["SANJAY_URL"]
SERVER = os.environ["SANJAY_SERVER"].removeprefix("http://")
KEY = os.environ["SANJAY_API_KEY"]
SERVICE = "sanjay.delivery.v1.Delivery"
TIMEOUT = 15


class Api:
    """Calls methods that the server describes."""

    def __init__(self, key=KEY):
        self.channel = grpc.insecure_channel(SERVER)
        database = ProtoReflectionDescriptorDatabase(self.channel)
        assert SERVICE in database.get_services(), database.get_services()
        self.pool = DescriptorPool(database)
        self.service = self.pool.FindServiceByName(SERVICE)
        self.metadata = [("authorization", f"Bearer {key}")]

    def message(self, name, **fields):
        return GetMessageClass(self.pool.FindMessageTypeByName(f"sanjay.delivery.v1.{name}"))(**fields)

    def call(self, method, **fields):
        """One call; answers with the response message."""
        described = self.service.methods_by_name[method]
        call = self.channel.unary_unary(
            f"/{SERVICE}/{method}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=GetMessageClass(described.output_type).FromString,
        )
        request = GetMessageClass(described.input_type)(**fields)
        return call(request, metadata=self.metadata, timeout=TIMEOUT)

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
    """A user's connection."""

    def __init__(self, user, **hello):
        headers = {"Authorization": f"Bearer {os.environ['TOKEN_' + user.upper()]}"}
        self.socket = connect(URL, subprotocols=["sanjay.v1.json"], additional_headers=headers)
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
