"""The user connects, gets each message once and in order, acknowledges, and does not get it again."""

from sanjay_api import Api, Client

api = Api()
bob = Client("bob", credit=64)
assert bob.welcome["inbox"]["head"] == 200, bob.welcome
ids = []
for seq in range(1, 201):
    message = bob.event("inbox")
    assert message["seq"] == seq, message
    assert message["payload"] == {"text": "see you" if seq == 1 else str(seq)}, message
    ids.append(message["message_id"])
    if seq % 10 == 0:
        answer = bob.call(ack={"ranges": [[seq - 9, seq]]})
        assert answer["ok"] == {}, answer
assert bob.is_quiet()
bob.close()

bob = Client("bob")
assert bob.welcome["inbox"]["mark"] == 200, bob.welcome
assert bob.is_quiet(), bob.pending
for message_id in (ids[0], ids[-1]):
    delivery = api.call("GetDelivery", user="bob", message_id=message_id)
    assert delivery.state == 2 and delivery.settled_us >= delivery.accepted_us, delivery
steps = {(step.service, step.stage) for step in api.call("GetTrace", message_id=ids[-1]).milestones}
assert {("edge", "written"), ("delivery", "acked")} <= steps, steps
bob.close()
print("done")
