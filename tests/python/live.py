"""Live messages: from a back end and from a client, one by one and in a stream, to two subscribers."""

import grpc
from sanjay_api import Api, Client

api = Api()
ann, bob = Client("ann", credit=0), Client("bob", credit=0, device="laptop", client="python/1")
for client in (ann, bob):
    subscribed = client.call(subscribe={"channel": "py"})["subscribed"]
    assert subscribed["offset"] == 0, subscribed

published = api.call("Publish", channel="py", payload={"text": "hi"})
assert published.offset == 1 and published.epoch == subscribed["epoch"], published
for client in (ann, bob):
    message = client.event("message")
    assert message["payload"] == {"text": "hi"}, message
    assert message["message_id"] == published.message_id, message

kinds = [{"text": "größe"}, {"json": '{"a": [1, 2]}'}, {"bytes": b"\x00\x01"}]
requests = ({"channel": "py", "payload": kinds[n % 3]} for n in range(300))
offsets = [answer.published.offset for answer in api.stream("PublishStream", requests)]
assert offsets == list(range(2, 302)), offsets
wanted = [{"text": "größe"}, {"json": {"a": [1, 2]}}, {"bytes": "AAE="}]
for client in (ann, bob):
    for n in range(300):
        message = client.event("message")
        assert (message["offset"], message["payload"]) == (n + 2, wanted[n % 3]), message

answer = ann.call(publish={"channel": "py", "payload": {"json": {"from": "ann"}}})
assert answer["published"]["offset"] == 302, answer
message = bob.event("message")
assert (message["publisher"], message["payload"]) == ("ann", {"json": {"from": "ann"}}), message
assert bob.is_quiet()

answer = ann.call(subscribe={"channel": ""})
assert answer["error"]["code"] == "bad_request", answer
try:
    Api(key="wrong").call("Publish", channel="py", payload={"text": "x"})
    raise AssertionError("a wrong key was taken")
except grpc.RpcError as error:
    assert error.code() == grpc.StatusCode.UNAUTHENTICATED, error
ann.close()
bob.close()
print("done")
